"""Distillation of an image teacher's layers, through the real command."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

# These register.
import user_dir.models.unimodal_student
import user_dir.tasks.image_distillation  # noqa: F401
from emkum.errors import UserError
from emkum.layers.layer_targets import mean_of_layers
from emkum.models.beit3 import BEiT3
from emkum.models.data2vec2 import Data2Vec2ImageEncoder
from emkum.models.encoder_sources import load_image_encoder
from emkum.models.teacher_builders import build_teacher
from emkum.teachers.base import TeacherInput
from tests.integration.in_process import Run, make_run
from tests.user_dir.distillation_runs import assert_resumes, content, logged, train

MODEL, SIDE, UPDATES = "test_vit", 32, 24


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def scenes(run_prepare: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    run_prepare("scenes", "--num-images", 60, "--seed", 1, "--image-size", SIDE, "--vocab-size", 0, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run with a teacher whose layers differ from one another."""
    torch.manual_seed(5)
    model = timm.create_model(MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    weights = tmp_path_factory.mktemp("teacher") / "model.safetensors"
    save_file(model.state_dict(), weights)
    return {
        "task": "image_distillation", "arch": "image_student", "teacher": f"timm:{MODEL}",
        "teacher_weights": weights, "teacher_image_size": SIDE, "image_layers": 3, "crop_min_scale": 0.5,
        "lr": 0.001, "batch_size": 12, "max_update": UPDATES, "update_freq": 2,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(scenes: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run's folder and its log."""
    save_dir = tmp_path_factory.mktemp("run") / "checkpoints"
    return save_dir, train(scenes, save_dir, options)


def in_process(scenes: Path, options: dict[str, Any], tmp_path: Path, **changes: Any) -> Run:
    shared = {"criterion": "model", "optimizer": "grouped_adamw"}
    return make_run(scenes, tmp_path / "save", shared | options, **changes)


def layers_of(run: Run) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Of a batch: the student's layers in eval mode, and the teacher's."""
    image = run.batch(0, 4)["net_input"]["image"]
    ids = torch.arange(4)
    with torch.no_grad():
        student = run.model.eval().encoder.hidden_states(run.model.normalize(image))
    return student, run.task.teacher(TeacherInput(image, ids, torch.full_like(ids, -1), "train")).layers


def test_at_first_the_student_is_the_teachers_first_layers(scenes: Path, options: dict, tmp_path: Path) -> None:
    run = in_process(scenes, options, tmp_path)
    student, teacher = layers_of(run)
    assert len(student) == 3 and len(teacher) == 6
    for own, theirs in zip(student, teacher, strict=False):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)
    assert (teacher[2] - teacher[3]).abs().max() > 0.1
    # The options say what the student is made of, for whoever reads its checkpoint.
    cfg = run.task.cfg._get_root().model
    assert (cfg.image_encoder, cfg.image_size, cfg.image_layers) == (f"timm:{MODEL}", SIDE, 3)


def test_every_second_layer(scenes: Path, options: dict, tmp_path: Path) -> None:
    run = in_process(scenes, options, tmp_path, image_layer_choice="every_second")
    theirs = load_image_encoder(f"timm:{MODEL}", str(options["teacher_weights"]), SIDE).encoder.all_blocks()
    for own, index in zip(run.model.encoder.all_blocks(), (0, 2, 4), strict=True):
        state = theirs[index].state_dict()
        assert all(torch.equal(value, state[name]) for name, value in own.state_dict().items())


def test_the_loss_is_that_of_the_definition(scenes: Path, options: dict, tmp_path: Path) -> None:
    run = in_process(scenes, options, tmp_path)
    student, teacher = layers_of(run)

    def tokens(layers: Any) -> Tensor:
        """Mean over layers of tokens normed by channel, then LayerNorm, in float64."""
        normed = []
        for layer in layers:
            centered = layer.double() - layer.double().mean(1, keepdim=True)
            normed.append(centered / (centered.square().mean(1, keepdim=True) + 1e-8).sqrt())
        mean = sum(normed) / len(normed)
        mean = mean - mean.mean(-1, keepdim=True)
        return mean / (mean.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    expected = (tokens(student) - tokens(teacher)).square().mean()
    run.model.train()
    log = run.backward(run.batch(0, 4), 0)
    assert float(log["loss"]) == pytest.approx(float(expected), rel=1e-4) and float(expected) > 0.01
    assert all(gradient.abs().max() > 0 for gradient in run.gradients().values())
    whole = in_process(scenes, options, tmp_path, image_layers=6)
    assert float(whole.backward(whole.batch(0, 4), 0)["loss"]) < 1e-6


def test_training_lowers_the_loss(run: tuple) -> None:
    losses = [float(record["loss"]) for record in logged(run[1])]
    assert losses[-1] < 0.8 * losses[0], losses
    assert logged(run[1], "valid")[-1]["valid_loss"]


def test_checkpoint_stands_alone(run: tuple, options: dict) -> None:
    state = content(run[0])
    assert all(name.startswith("encoder.") for name in state["model"]), "the teacher is not saved"
    loaded = load_image_encoder(str(run[0] / "checkpoint_last.pt"))
    assert loaded.encoder.num_layers == 3 and loaded.encoder.image_size == SIDE
    weights = loaded.encoder.state_dict()
    assert all(torch.equal(value, weights[name.removeprefix("encoder.")]) for name, value in state["model"].items())
    # As the next one's teacher.
    assert build_teacher(f"checkpoint:{run[0]}", layers=True).patch_width == loaded.encoder.width


def test_resuming_equals_an_uninterrupted_run(run: tuple, scenes: Path, options: dict, tmp_path: Path) -> None:
    assert_resumes(scenes, run[0], tmp_path / "resumed", options)


def test_a_student_of_a_run_and_one_from_scratch(run: tuple, scenes: Path, options: dict, tmp_path: Path) -> None:
    half = in_process(scenes, options, tmp_path, init_from=run[0] / "checkpoint_last.pt", image_layers=2)
    weights = content(run[0])["model"]
    assert all(
        torch.equal(value, weights[f"encoder.{name}"]) for name, value in half.model.encoder.state_dict().items()
    )
    scratch = in_process(scenes, options, tmp_path, init_from="none", image_encoder=f"timm:{MODEL}", image_size=SIDE)
    student, teacher = layers_of(scratch)
    assert (student[0] - teacher[0]).abs().max() > 0.1
    chained = options | {"teacher": f"checkpoint:{run[0]}"}
    student, teacher = layers_of(in_process(scenes, chained, tmp_path, image_layers=2))
    assert len(teacher) == 3
    for own, theirs in zip(student, teacher, strict=False):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)


def assert_starts_as_its_teacher(run: Run) -> tuple[list, list]:
    """Layers of a student of two blocks and of its teacher of four, whose first two it has."""
    student, teacher = layers_of(run)
    assert len(teacher) == 4 and len(student) == 2
    for own, theirs in zip(student, teacher, strict=False):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)
    return student, teacher


def test_data2vec2(scenes: Path, options: dict, tmp_path: Path) -> None:
    sizes = {"embed_dim": 24, "num_heads": 4, "input_size": SIDE, "patch_size": 8}
    encoder = Data2Vec2ImageEncoder(depth=3, prenet_depth=1, **sizes)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 * parameter.requires_grad)
    torch.save({"cfg": {"model": {"num_heads": 4}}, "model": encoder.state_dict()}, tmp_path / "d2v.pt")
    changes = {"teacher": f"data2vec2:{tmp_path / 'd2v.pt'}", "image_layers": 2}
    run = in_process(scenes, options, tmp_path, **changes)
    student, teacher = assert_starts_as_its_teacher(run)
    run.model.train()
    loss = float(run.backward(run.batch(0, 4), 0)["loss"])
    expected = (mean_of_layers(student) - mean_of_layers(teacher)).square().mean()
    assert loss == pytest.approx(float(expected), rel=1e-4)
    # Distributed training wants a gradient of each parameter that learns.
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert run.gradients().keys() == trained and "encoder.blocks.0.norm2.weight" not in trained


def test_beit3(scenes: Path, options: dict, tmp_path: Path) -> None:
    model = BEiT3(20, width=64, layers=4, heads=1, ffn_width=256, image_size=SIDE, patch_size=8, max_positions=9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    torch.save({"model": model.state_dict()}, tmp_path / "beit3.pth")
    changes = {"teacher": f"beit3:{tmp_path / 'beit3.pth'}", "image_layers": 2}
    run = in_process(scenes, options, tmp_path, **changes)
    assert_starts_as_its_teacher(run)
    run.model.train()
    run.backward(run.batch(0, 4), 0)
    assert run.gradients().keys() == {name for name, _ in run.model.named_parameters()}
    cfg = run.task.cfg._get_root().model
    assert (cfg.image_encoder, cfg.image_patch_size, cfg.student_width, cfg.image_weights) == ("beit3", 8, 64, None)
    with pytest.raises(UserError, match="has 4 layers; 5 cannot be kept"):
        in_process(scenes, options, tmp_path, **changes | {"image_layers": 5})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": False}, "distillation needs --teacher: timm:NAME"),
        ({"teacher_target": "own"}, "--teacher-target own needs a teacher that reads images and text"),
        ({"image_layers": 7}, f"timm's {MODEL} has 6 layers; 7 cannot be kept"),
        ({"image_layers": 4, "image_layer_choice": "every_second"}, "3 by taking every second one; 4 cannot be kept"),
        ({"image_layer_choice": "last"}, "--image-layer-choice 'last' is unknown"),
        ({"image_size": 64}, "--image-size 64: --init-from teacher has 32; leave --image-size out"),
        ({"image_weights": "x"}, "--image-weights beside --init-from teacher: give one"),
        ({"init_from": "timm:test_vit"}, "--init-from timm:test_vit: give --init-from none, --image-encoder"),
        ({"init_from": "nowhere"}, "no such checkpoint: nowhere"),
        ({"init_from": "none"}, "have 64 channels, the student's 768"),
        ({"init_from": "none", "image_encoder": f"timm:{MODEL}"}, "--image-size 224: --teacher timm:test_vit sees 32"),
        (
            {"init_from": "none", "image_encoder": "timm:test_resnet", "image_layers": 0, "image_size": 32},
            "distillation of layers needs a Transformer as student",
        ),
        (
            {"init_from": "none", "student_width": 64, "student_heads": 2, "image_size": 32, "image_patch_size": 8},
            "has 4 patches, the student 16",
        ),
    ],
)
def test_mistakes(scenes: Path, options: dict, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        in_process(scenes, options, tmp_path, **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_architecture_must_be_an_image_student(scenes: Path, options: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task image_distillation trains --arch image_student alone"):
        in_process(scenes, options | {"image_layers": False}, tmp_path, arch="text_student")
