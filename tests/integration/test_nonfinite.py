"""Updates whose gradients are not finite are skipped, counted and written down; too many in a row end the run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.optim.fp16_optimizer import FP16Optimizer
from omegaconf import OmegaConf

from emkum.errors import UserError
from tests.integration.conftest import STUDENT
from tests.integration.in_process import Run, make_run
from user_dir.optimizers import GroupedAdamWConfig

# What fairseq's optimizer for half precision asks its options for.
FP16 = {
    "fp16_init_scale": 4,
    "fp16_scale_window": None,
    "fp16_scale_tolerance": 0.0,
    "min_loss_scale": 1e-4,
    "threshold_loss_scale": None,
    "fp16_no_flatten_grads": True,
    "model_parallel_size": 1,
}


def update(run: Run, number: int, poisoned: bool) -> None:
    """One update of two batches as fairseq's trainer does it; the second batch's loss may be no number."""
    run.optimizer.zero_grad()
    run.backward(run.batch(0, 8), number)
    batch = run.batch(8, 16)
    if poisoned:
        scale = run.model.objectives["itc"].scales["features"].log_scale
        kept = scale.detach().clone()
        with torch.no_grad():
            scale.fill_(float("nan"))
    run.backward(batch, number)
    if poisoned:
        with torch.no_grad():
            scale.copy_(kept)
    norm = run.optimizer.clip_grad_norm(1.0)
    assert torch.isfinite(norm)
    run.task.optimizer_step(run.optimizer, run.model, number)


@pytest.fixture
def run(scenes: Path, tmp_path: Path) -> Run:
    return make_run(
        scenes, tmp_path, STUDENT, objectives="itc,bank_itc", bank_itc_size=16, max_nonfinite=3, update_freq=2
    )


def state_of(run: Run) -> dict[str, Any]:
    return {name: value.clone() for name, value in run.model.named_parameters()}


def test_a_bad_update_changes_nothing_and_is_written_down(run: Run, tmp_path: Path) -> None:
    update(run, 0, poisoned=False)
    before = state_of(run)
    moments = [value.clone() for state in run.optimizer.optimizer.state.values() for value in state.values()]
    update(run, 1, poisoned=True)
    assert all(torch.equal(value, before[name]) for name, value in run.model.named_parameters())
    after = [value for state in run.optimizer.optimizer.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    assert all(torch.isfinite(value).all() for value in run.model.objectives["bank_itc"].buffers())
    (line,) = (tmp_path / "nonfinite.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "update": 1,
        "batches": [{"split": "train", "ids": list(range(8))}, {"split": "train", "ids": list(range(8, 16))}],
    }
    update(run, 2, poisoned=False)
    assert any(not torch.equal(value, before[name]) for name, value in run.model.named_parameters())


def test_too_many_in_a_row_end_the_run(run: Run, tmp_path: Path) -> None:
    pattern = [True, True, False, True, True]
    for number, poisoned in enumerate(pattern):
        update(run, number, poisoned)
    with pytest.raises(UserError, match="not finite in 3 updates in a row .*nonfinite.jsonl") as caught:
        update(run, len(pattern), poisoned=True)
    assert "\n" not in caught.value.message
    assert len((tmp_path / "nonfinite.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_half_precision_leaves_or_hands_on_what_is_not_finite(half: str, run: Run) -> None:
    """fairseq's optimizer for half precision stands around ours: its scaler must see an overflow, and where it has no
    scaler the task must see that the update was skipped."""
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float16 if half == "fp16" else torch.bfloat16))
    common = {"fp16": half == "fp16", "bf16": half == "bf16"}
    cfg = OmegaConf.create(
        {
            "common": {**FP16, **common},
            "optimization": {"lr": [0.1], "update_freq": [1]},
            "optimizer": vars(GroupedAdamWConfig()) | {"_name": "grouped_adamw", "lr": [0.1], "fp16": common["fp16"]},
            "distributed_training": {"distributed_world_size": 1, "pipeline_model_parallel": False, "ddp_backend": ""},
        }
    )
    optimizer = FP16Optimizer.build_optimizer(cfg, [parameter])
    optimizer.backward(parameter.sum() * float("inf"))
    before = parameter.detach().clone()
    if half == "fp16":
        with pytest.raises(OverflowError):
            optimizer.clip_grad_norm(1.0)
        return
    assert torch.isfinite(optimizer.clip_grad_norm(1.0)).all()
    run.task._batches.append(("train", torch.arange(2)))
    run.task.optimizer_step(optimizer, run.model, 0)
    assert torch.equal(parameter, before)
    assert run.task._skipped == 1
