"""What the runs of real commands share: a few scenes, a small random teacher, and a way to run a command."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
TEACHER = "test_vit"

# A tiny student on 32-pixel crops: real code, seconds of work.
STUDENT = {
    "task": "image_text",
    "arch": "image_text_student",
    "criterion": "multi_objective",
    "optimizer": "grouped_adamw",
    "lr_scheduler": "cosine",
    "student_size": "tiny",
    "image_size": "32",
    "image_patch_size": "8",
    "batch_size": "8",
    "lr": "0.001",
    "max_update": "6",
    "warmup_updates": "2",
    "num_workers": "1",
    "log_format": "json",
    "log_interval": "1",
    "best_checkpoint_metric": "mean_recall",
    "caption_per_image": "2",
}
SWITCHES = ["--cpu", "--maximize-best-checkpoint-metric", "--no-epoch-checkpoints", "--crop-flip"]


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess]:
    """A function that runs a console command of the environment in the checkout and returns the finished process."""

    def run(*words: object, expect: int | None = 0) -> subprocess.CompletedProcess:
        program, *rest = map(str, words)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        path = Path(sys.executable).parent / program
        done = subprocess.run([path, *rest], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
        if expect is not None:
            assert done.returncode == expect, f"{done.args}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    return run


@pytest.fixture(scope="session")
def train_by_hand(command: Callable[..., subprocess.CompletedProcess]) -> Callable[..., subprocess.CompletedProcess]:
    """A function that runs `fairseq-train DATA ...` as a user types it, for a tiny student with changed options."""

    def run(data: Path, *switches: str, expect: int | None = 0, **options: object) -> subprocess.CompletedProcess:
        merged = STUDENT | {key: str(value) for key, value in options.items()}
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in merged.items()]
        return command("fairseq-train", data, "--user-dir=user_dir", *flags, *SWITCHES, *switches, expect=expect)

    return run


@pytest.fixture(scope="session")
def examples() -> Path:
    """The folder of recipes."""
    return ROOT / "examples"


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory, run_prepare: Callable[..., None]) -> Path:
    """40 scenes: 32 to train on, 4 valid, 4 test."""
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    run_prepare("scenes", "--out", folder, "--num-images", 40, "--seed", 1, "--image-size", 32, "--vocab-size", 120)
    return folder


@pytest.fixture(scope="session")
def teacher_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that timm's own small test model wrote, with random weights."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("teacher") / "model.safetensors"
    save_file(timm.create_model(TEACHER).state_dict(), path)
    return path
