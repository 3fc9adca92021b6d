"""DINO on images alone, through the real command."""

from pathlib import Path
from typing import Any

import pytest
import torch

# These register.
import user_dir.models.dino_image
import user_dir.tasks.image_views  # noqa: F401
from emkum.errors import UserError
from emkum.layers.ema import cosine_decay
from emkum.models.encoder_sources import load_image_encoder
from emkum.models.teacher_builders import build_teacher
from emkum.teachers.base import TeacherConfig
from tests.integration.in_process import Run, make_run
from tests.user_dir.distillation_runs import assert_resumes, content, logged, train

SIDE, UPDATES = 32, 24
OPTIONS = {
    "task": "image_views", "arch": "dino_image", "student_width": 32, "student_heads": 2, "image_layers": 2,
    "image_size": SIDE, "image_patch_size": 8, "dino_prototypes": 24, "dino_hidden": 32, "dino_bottleneck": 16,
    "dino_warmup_updates": 10, "multi_crop_number": 2, "average_decay": 0.8,
    "lr": 0.003, "batch_size": 12, "max_update": UPDATES, "update_freq": 2,
}  # fmt: skip


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
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    save_dir = tmp_path_factory.mktemp("run") / "checkpoints"
    return save_dir, train(scenes, save_dir, OPTIONS, "--dino-crops")


def in_process(scenes: Path, tmp_path: Path, **changes: Any) -> Run:
    shared = {"criterion": "model", "optimizer": "grouped_adamw", "dino_crops": True}
    return make_run(scenes, tmp_path / "save", shared | OPTIONS, **changes)


def test_the_log_tells_of_a_collapse(run: tuple) -> None:
    records = logged(run[1])
    assert int(records[-1]["num_updates"]) == UPDATES
    # In nats: neither one of the 24 prototypes for all views, nor all of them for each.
    assert 0.01 < float(records[-1]["teacher_entropy"]) < 3.178
    # At first all crops look alike, until the center tells them apart.
    assert float(records[0]["loss"]) < float(records[-1]["loss"]) < 4
    assert {"valid_loss", "valid_accuracy"} <= logged(run[1], "valid")[-1].keys()


def test_resuming_equals_an_uninterrupted_run(run: tuple, scenes: Path, tmp_path: Path) -> None:
    assert_resumes(scenes, run[0], tmp_path / "resumed", OPTIONS, "--dino-crops")


def test_the_average_is_the_encoder_of_the_run(run: tuple) -> None:
    model, loaded = content(run[0])["model"], load_image_encoder(str(run[0] / "checkpoint_last.pt"))
    for name, value in loaded.encoder.state_dict().items():
        assert torch.equal(value, model[f"average.module.encoder.{name}"])
    assert any(not torch.equal(value, model[f"encoder.{name}"]) for name, value in loaded.encoder.state_dict().items())
    teacher = build_teacher(f"checkpoint:{run[0]}", TeacherConfig(pooling="cls"))
    assert teacher.width == 32 and teacher.grid == (4, 4)


def test_the_loss_is_that_of_pairs_of_views(scenes: Path, tmp_path: Path) -> None:
    run = in_process(scenes, tmp_path)
    batch, model = run.batch(0, 4), run.model
    views = batch["net_input"]["views"]
    assert [tuple(view.shape) for view in views] == [(4, 3, SIDE, SIDE)] * 4
    dino = model.objective
    with torch.no_grad():
        for parameter in model.average.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        dino.center.normal_()
        student = [dino.head(model.norm(model.encoder(model.normalize(view)).tokens[:, 0])).double() for view in views]
        average = model.average.module
        teacher = [
            dino.average_head.module(average["norm"](average["encoder"](model.normalize(view)).tokens[:, 0])).double()
            for view in views[:2]
        ]
        losses = []
        for first, theirs in enumerate(teacher):
            target = ((theirs - dino.center) / 0.04).softmax(1)
            for second, own in enumerate(student):
                if first != second:
                    losses += [-(target * (own / 0.1).log_softmax(1)).sum(1)]
    log = run.backward(batch, 0)
    assert float(log["loss"]) == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
    assert all(gradient.abs().max() > 0 for name, gradient in run.gradients().items() if "k_bias" not in name)
    assert not any(name.startswith("average") for name in run.gradients())


def test_the_average_moves_once_an_update(scenes: Path, tmp_path: Path) -> None:
    model = in_process(scenes, tmp_path).model
    before = model.average.module["norm"].weight.clone()
    with torch.no_grad():
        model.norm.weight.add_(1.0)
    model.set_num_updates(0)
    assert torch.equal(model.average.module["norm"].weight, before)
    model.set_num_updates(1)
    model.set_num_updates(1)
    expected = before + (1 - cosine_decay(0.8, 1.0, 1 / UPDATES))
    torch.testing.assert_close(model.average.module["norm"].weight, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multi_crop_number": 0}, "--dino-crops and --multi-crop-number belong together"),
        ({"dino_crops": False}, "--dino-crops and --multi-crop-number belong together"),
        ({"average_decay": 1.5}, "--average-decay 1.5: want a number from 0 (no average) to below 1"),
        ({"image_encoder": "vit"}, "--image-encoder 'vit' is unknown"),
    ],
)
def test_mistakes(scenes: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        in_process(scenes, tmp_path, **changes)
    assert message in str(caught.value)
