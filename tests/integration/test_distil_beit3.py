"""DistilBEiT-3 by its recipe: a tiny random BEiT-3 as source of the student's layers and as its teacher."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

import emkum
from emkum.cli import main
from emkum.commands.feature_models import open_model
from emkum.data.tokenizers import load_tokenizer
from emkum.errors import UserError
from emkum.models.beit3 import BEiT3
from emkum.models.encoder_sources import load_image_encoder, load_text_encoder
from emkum.recipe import read_recipe
from emkum.training_log import parse_line
from tests.integration.in_process import Run, make_run

UPDATES = 30


@pytest.fixture(scope="module")
def beit3(scenes: Path, run_prepare: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights with its vocabulary beside it, as released."""
    folder = tmp_path_factory.mktemp("beit3")
    run_prepare("tokenizer", "--data", scenes, "--vocab-size", 120, "--layout", "sentencepiece", "--out", folder)
    (folder / "tokenizer.model").rename(folder / "beit3.spm")
    words = load_tokenizer(folder / "beit3.spm").vocab_size
    torch.manual_seed(0)
    # A few more rows than ids, as released; and another image size than the student's.
    sizes = {"width": 128, "layers": 4, "heads": 2, "ffn_width": 512, "max_positions": 64}
    model = BEiT3(words + 8, **sizes, image_size=48, patch_size=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    torch.save({"model": {f"beit3.{name}": value for name, value in model.state_dict().items()}}, folder / "beit3.pth")
    return folder / "beit3.pth"


@pytest.fixture(scope="module")
def options(beit3: Path) -> dict[str, Any]:
    """What is added to the recipe, in small."""
    return {
        "caption_tokenizer": beit3.parent, "teacher": f"beit3:{beit3}", "image_encoder": f"beit3:{beit3}",
        "text_encoder": f"beit3:{beit3}", "student_size": "tiny", "image_layers": 2, "text_layers": 2,
        "image_size": 32, "image_patch_size": 8, "text_max_positions": 64, "batch_size": 8, "max_update": UPDATES,
        "warmup_updates": 4, "lr": "[0.001]", "caption_per_image": 2, "kd_contrastive_bank_size": 16,
        "num_workers": 0, "log_interval": 1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(
    command: Callable[..., subprocess.CompletedProcess],
    examples: Path,
    scenes: Path,
    options: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished run's folder."""
    folder = tmp_path_factory.mktemp("run")
    words = [f"{name}={value}" for name, value in options.items()]
    further = [f"data={scenes}", f"save_dir={folder}", "autocast=", "cpu=true"]
    command("emkum", "train", examples / "rows" / "36_distil_beit3.yaml", *words, *further)
    return folder


@pytest.fixture
def start(examples: Path, scenes: Path, options: dict[str, Any], tmp_path: Path) -> Callable[..., Run]:
    """A function that makes a run in this process, with changed options."""

    def run(**changes: Any) -> Run:
        recipe = read_recipe(examples / "rows" / "36_distil_beit3.yaml")
        base = {name: value for name, value in recipe.items() if value is not False}
        return make_run(scenes, tmp_path / "save", base | options, **({"autocast": False} | changes))

    return run


def records(folder: Path, tag: str) -> list[dict[str, float]]:
    found = [parse_line(line) for line in (folder / "train.log").read_text().splitlines()]
    return [item[1] for item in found if item is not None and item[0] == tag]


def test_the_student_learns_from_the_whole_of_its_own_layers(finished: Path) -> None:
    updates = records(finished, "train_inner")
    assert [record["step"] for record in updates] == list(range(1, UPDATES + 1))
    # From the third update on the bank is full: what is compared is alike from then on.
    for name in ("kd_contrastive_image_loss", "kd_contrastive_text_loss", "itc_loss"):
        losses = [record[name] for record in updates[2:]]
        assert mean(losses[-6:]) < 0.95 * mean(losses[:6]), (name, losses)
    valid = records(finished, "valid")[-1]
    assert {"loss", "mean_recall", "kd_contrastive_text_loss"} <= valid.keys()
    assert "Warning" not in (finished / "train.log").read_text()


def test_the_checkpoint_stands_alone(finished: Path, beit3: Path, tmp_path: Path) -> None:
    hidden = beit3.rename(tmp_path / "elsewhere.pth")
    try:
        student = emkum.load(finished).student
        images, texts = load_image_encoder(str(finished)), load_text_encoder(str(finished))
        features = open_model(str(finished))
    finally:
        hidden.rename(beit3)
    assert (images.encoder.num_layers, images.encoder.image_size, texts.encoder.num_layers) == (2, 32, 2)
    assert texts.tokenizer.vocab_size == texts.encoder.vocab_size
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = student.image_encoder(student.normalize(pixels)).cls
    torch.testing.assert_close(features.extract(pixels), expected, rtol=1e-5, atol=1e-5)
    assert load_image_encoder(str(finished), image_size=64).encoder(torch.zeros(1, 3, 64, 64)).tokens.shape[1] == 65


def test_the_parts_are_told(examples: Path, finished: Path, capsys: pytest.CaptureFixture) -> None:
    main(["model", "info", str(finished)])
    assert "BEiT3TextEncoder" in capsys.readouterr().out
    main(["model", "info", str(examples / "rows" / "36_distil_beit3.yaml"), "--vocab-size", "64002"])
    told = capsys.readouterr().out
    # As counted in tests/models/test_builders.py.
    assert "43,317,504" in told and "92,121,600" in told


def test_a_further_run_starts_from_the_student(start: Callable[..., Run], finished: Path) -> None:
    run = start(init_from=finished, objectives="itc", teacher=False, teacher_target=False)
    saved = torch.load(finished / "checkpoint_best.pt", weights_only=True)["model"]
    for name, value in run.model.student.state_dict().items():
        assert torch.equal(value, saved[f"student.{name}"]), name
    assert torch.isfinite(run.backward(run.batch(0, 8), 0)["loss"])


def test_with_the_next_layer_as_shared_block(start: Callable[..., Run], beit3: Path) -> None:
    shared = {"shared_kind": "blocks", "shared_init": "image"}
    run = start(**shared, shared_sub_norms=True)
    theirs = torch.load(beit3, weights_only=True)["model"]["beit3.encoder.layers.2.self_attn.inner_attn_ln.A.weight"]
    assert torch.equal(run.model.student.shared_encoder.blocks[0].attn.norm.weight, theirs)
    assert torch.isfinite(run.backward(run.batch(0, 8), 0)["loss"])
    with pytest.raises(UserError, match="--shared-sub-norms is for layers of beit3, which need it"):
        start(**shared)


def test_mistakes(start: Callable[..., Run], teacher_weights: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "model.safetensors is no checkpoint of BEiT-3: it lacks text_embed.weight": {
            "image_encoder": f"beit3:{teacher_weights}"
        },
        "beit3.pth has 4 layers; 5 cannot be kept": {"text_layers": 5},
        "--image-size 36 is no multiple of --image-patch-size 8": {"image_size": 36},
    }
    for said, changes in cases.items():
        with pytest.raises(UserError) as caught:
            start(**changes)
        assert said in str(caught.value) and "\n" not in str(caught.value)
