"""A training process that is killed amid an update goes on from its checkpoint as one that was not."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.tasks import FairseqTask
from fairseq_cli.train import cli_main

from tests.integration.conftest import ROOT, STUDENT, TEACHER

# All that register something: fairseq's loader leaves out a `user_dir` of which another test has imported a part.
from user_dir.models import image_quantizer, image_text_student  # noqa: F401
from user_dir.tasks import image_quantization, image_text  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

# Four updates make an epoch.
UPDATES, SAVED_AT = 6, 2
COMMON = {"max_update": UPDATES, "update_freq": 2, "save_interval_updates": SAVED_AT, "num_workers": 0, "batch_size": 4}
# Everything that objectives keep: banks of all kinds, queues, the average, its head, the center, draws, scales.
WITH_STATES = STUDENT | {
    "objectives": "itc,bank_itc,proximal_itc,momentum_itc,kd_contrastive,itm,dino",
    "teacher": f"timm:{TEACHER}",
    "average_decay": 0.7,
    "average_end_decay": 0.9,
    "bank_itc_size": 10,
    "bank_itc_half_life": 3.0,
    "proximal_itc_negatives": 10,
    "momentum_itc_size": 10,
    "kd_contrastive_bank_size": 10,
    "itm_negatives": "hard",
    "dino_prototypes": 16,
    "dino_hidden": 16,
    "dino_bottleneck": 8,
    "dino_warmup_updates": 4,
}
QUANTIZER = {
    "task": "image_quantization",
    "arch": "image_quantizer",
    "criterion": "model",
    "optimizer": "grouped_adamw",
    "lr": 0.003,
    "quantizer_codes": 2,
    "quantizer_code_width": 3,
    "quantizer_decay": 0.8,
    "quantizer_revive_below": 0.5,
    "teacher": f"timm:{TEACHER}",
}


def train(words: list[str], killed: bool) -> None:
    """`fairseq-train`, which dies in the second batch of the update behind a checkpoint's next one."""
    torch.set_num_threads(1)
    original, batches = FairseqTask.train_step, [0] * (UPDATES + 1)

    def train_step(self: FairseqTask, *arguments: Any, update_num: int, **options: Any) -> tuple:
        batches[update_num] += 1
        if killed and update_num > SAVED_AT and batches[update_num] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments, update_num=update_num, **options)

    FairseqTask.train_step = train_step
    sys.argv = ["fairseq-train", *words]
    cli_main()


def run(data: Path, folder: Path, options: dict[str, Any], killed: bool = False) -> None:
    merged = options | COMMON | {"user_dir": ROOT / "user_dir", "save_dir": folder}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in merged.items()]
    words = [str(data), "--cpu", "--disable-validation", *flags]
    child = multiprocessing.get_context("fork").Process(target=train, args=(words, killed))
    child.start()
    child.join(timeout=120)
    assert child.exitcode == (-signal.SIGKILL if killed else 0)


@pytest.mark.parametrize("options", [WITH_STATES, QUANTIZER], ids=["objectives", "quantizer"])
def test_killed_and_resumed_equals_uninterrupted(
    options: dict[str, Any], scenes: Path, teacher_weights: Path, tmp_path: Path
) -> None:
    options = options | {"teacher_weights": teacher_weights, "teacher_image_size": 32}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(scenes, whole, options)
    run(scenes, parts, options, killed=True)
    left = torch.load(parts / "checkpoint_last.pt", weights_only=True)
    assert left["optimizer_history"][-1]["num_updates"] == SAVED_AT
    run(scenes, parts, options)
    expected, resumed = (torch.load(folder / "checkpoint_last.pt", weights_only=True) for folder in (whole, parts))
    assert resumed["optimizer_history"][-1]["num_updates"] == UPDATES
    assert expected["model"].keys() == resumed["model"].keys() == left["model"].keys()
    different = [name for name, value in expected["model"].items() if not torch.equal(value, resumed["model"][name])]
    assert different == []
    moments = [state["last_optimizer_state"]["state"] for state in (expected, resumed)]
    for key, state in moments[0].items():
        assert all(torch.equal(value, moments[1][key][name]) for name, value in state.items() if torch.is_tensor(value))
