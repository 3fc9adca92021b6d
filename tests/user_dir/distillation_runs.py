"""What the tests of distillation share: the real command, and what it logged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
EARLY = 7
SHARED = {
    "criterion": "model", "optimizer": "grouped_adamw", "num_workers": 0, "log_format": "json", "log_interval": 4,
    "seed": 3, "save_interval_updates": EARLY,
}  # fmt: skip


def train(data: Path, save_dir: Path, options: dict[str, Any], *switches: str) -> str:
    """Run `fairseq-train` with options beside SHARED; what it printed."""
    merged = SHARED | {"user_dir": ROOT / "user_dir", "save_dir": save_dir} | options
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in merged.items()]
    command = [
        sys.executable,
        "-m",
        "fairseq_cli.train",
        str(data),
        "--cpu",
        "--no-epoch-checkpoints",
        *flags,
        *switches,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=save_dir.parent, capture_output=True, text=True, timeout=200)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    assert "Warning" not in log, log[-4000:]
    return log


def logged(log: str, kind: str = "train_inner") -> list[dict[str, str]]:
    return [json.loads(line.split(" | ")[-1]) for line in log.splitlines() if f"| {kind} | {{" in line]


def content(save_dir: Path) -> dict[str, Any]:
    return torch.load(save_dir / "checkpoint_last.pt", weights_only=True)


def assert_resumes(data: Path, whole: Path, folder: Path, options: dict[str, Any], *switches: str) -> None:
    """From the checkpoint that a whole run left amid an epoch, training ends where that run ended, bit for bit."""
    (early,) = whole.glob(f"checkpoint_*_{EARLY}.pt")
    folder.mkdir()
    shutil.copy(early, folder / "checkpoint_last.pt")
    train(data, folder, options, *switches)
    once, again = content(whole)["model"], content(folder)["model"]
    start = torch.load(early, weights_only=True)["model"]
    assert once.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in once.items())
    assert any(not torch.equal(value, start[name]) for name, value in once.items())
