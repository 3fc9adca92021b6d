"""Training of the image quantizer through the real command."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from emkum.commands.teacher_options import build_from
from emkum.errors import UserError
from emkum.objectives.target_codes import read_quantizer
from emkum.teachers.base import TeacherConfig
from user_dir.models.image_quantizer import ImageQuantizerConfig, ImageQuantizerModel
from user_dir.tasks.image_quantization import ImageQuantizationConfig, ImageQuantizationTask

ROOT = Path(__file__).resolve().parents[2]
MODEL, SIDE, CODES, UPDATES, EARLY = "test_vit", 32, 8, 24, 7


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def scenes(run_prepare: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    run_prepare("scenes", "--num-images", 60, "--seed", 1, "--image-size", SIDE, "--vocab-size", 0, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    model = timm.create_model(MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    path = tmp_path_factory.mktemp("teacher") / "model.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def train(scenes: Path, weights: Path) -> Callable[..., subprocess.CompletedProcess]:
    """A function that trains in a folder, with changed options."""

    def run(save_dir: Path, **changes: object) -> subprocess.CompletedProcess:
        options = {
            "user_dir": ROOT / "user_dir", "task": "image_quantization", "arch": "image_quantizer",
            "criterion": "model", "optimizer": "grouped_adamw", "lr": 0.003, "batch_size": 12, "num_workers": 0,
            "teacher": f"timm:{MODEL}", "teacher_weights": weights, "teacher_image_size": SIDE,
            "quantizer_codes": CODES, "quantizer_code_width": 4, "quantizer_decay": 0.9,
            "quantizer_window": 15, "quantizer_revive_below": 0.5,
            "max_update": UPDATES, "update_freq": 2, "log_format": "json", "log_interval": 4, "seed": 3,
            "save_interval_updates": EARLY,
            "save_dir": save_dir,
        } | changes  # fmt: skip
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        command = [sys.executable, "-m", "fairseq_cli.train", str(scenes), "--cpu", "--no-epoch-checkpoints", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, cwd=save_dir.parent, capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def run(train: Callable[..., subprocess.CompletedProcess], tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A finished run's folder and its log."""
    save_dir = tmp_path_factory.mktemp("run") / "checkpoints"
    result = train(save_dir)
    log = result.stdout + result.stderr
    assert result.returncode == 0, log
    return save_dir, log


def logged(log: str, kind: str) -> list[dict[str, str]]:
    return [json.loads(line.split(" | ")[-1]) for line in log.splitlines() if f"| {kind} | {{" in line]


def test_training_lowers_the_loss_and_uses_the_codes(run: tuple) -> None:
    records = logged(run[1], "train_inner")
    losses = [float(record["loss"]) for record in records]
    assert int(records[-1]["num_updates"]) == UPDATES and losses[-1] < 0.8 * losses[0], losses
    assert float(records[-1]["codes_used"]) == 100 and 4 < float(records[-1]["perplexity"]) <= CODES
    valid = logged(run[1], "valid")
    assert {"valid_loss", "valid_loss_rebuild", "valid_loss_commitment", "valid_rebuilt"} <= valid[-1].keys()
    assert "Warning" not in run[1], run[1]


def test_checkpoint_gives_codes_and_says_whose(run: tuple, weights: Path) -> None:
    found = read_quantizer(run[0] / "checkpoint_last.pt")
    assert found.tensors["codes"].shape == (CODES, 4) and found.count == CODES
    options = vars(TeacherConfig(weights=str(weights), image_size=SIDE))
    teacher = build_from(Namespace(teacher=f"timm:{MODEL}", **options))
    assert found.teacher == teacher.identity and found.width == teacher.width
    assert json.loads((run[0] / "run.json").read_text())["teacher"] == teacher.identity
    names = torch.load(run[0] / "checkpoint_last.pt", weights_only=True)["model"]
    assert all(name.startswith("quantizer.") for name in names), "the teacher is not saved"


def test_resuming_equals_an_uninterrupted_run(run: tuple, train: Callable, tmp_path: Path) -> None:
    """From the checkpoint that the whole run left amid an epoch."""
    (early,) = run[0].glob(f"checkpoint_*_{EARLY}.pt")
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(early, resumed / "checkpoint_last.pt")
    result = train(resumed)
    assert result.returncode == 0, result.stderr
    whole, again = (
        torch.load(folder / "checkpoint_last.pt", weights_only=True)["model"] for folder in (run[0], resumed)
    )
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_task_names_mistakes(scenes: Path, weights: Path) -> None:
    def task_with(**options: object) -> ImageQuantizationTask:
        given: dict[str, Any] = {"data": str(scenes), "seed": 1, "save_dir": "."} | options
        return ImageQuantizationTask(OmegaConf.merge(OmegaConf.structured(ImageQuantizationConfig), given))

    with pytest.raises(UserError, match="image_quantization needs --teacher: timm:NAME"):
        task_with()
    live = {"teacher": f"timm:{MODEL}", "teacher_weights": str(weights), "teacher_image_size": SIDE}
    with pytest.raises(UserError, match="--teacher-target own needs a teacher that reads images and text"):
        task_with(**live, teacher_target="own")
    task = task_with(**live)
    config = OmegaConf.merge(OmegaConf.structured(ImageQuantizerConfig), {"quantizer_codes": 16})
    model = ImageQuantizerModel.build_model(config, task)
    assert len(model.quantizer.codebook) == 16
    scales = {name: p.optim_overrides["optimizer"]["weight_decay_scale"] for name, p in model.named_parameters()}
    assert scales["quantizer.mask_token"] == scales["quantizer.project.bias"] == 0
    assert scales["quantizer.project.weight"] == 1
