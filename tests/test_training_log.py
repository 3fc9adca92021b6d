"""fairseq's log read back, and what a person sees of it."""

import json

import pytest

from emkum.errors import UserError
from emkum.training_log import Progress, parse_line, read_training_log


def log_line(tag, **stats):
    return f"2026-11-24 02:00:00 | INFO | {tag} | {json.dumps(stats)}\n"


def test_read_training_log(tmp_path):
    log = tmp_path / "train.log"
    log.write_text(
        "2026-11-24 02:00:00 | INFO | fairseq_cli.train | {'not': 'json'}\n"
        + log_line("train_inner", epoch=1, loss="3.5", num_updates="100", ppl=None, best="n/a")
        + log_line("train_inner", epoch=1, loss="3.25", num_updates="200")
        + log_line("train", epoch=1, train_loss="3.4", train_num_updates="200")
        + log_line("valid", epoch=1, valid_loss="3.3", valid_mean_recall="12.5", valid_num_updates="200")
        + "some library prints {this}\n"
        + log_line("train_inner", epoch=2, loss="3.0", num_updates="300")[:-10]
    )
    assert read_training_log(log) == {
        "train_inner": [{"step": 100, "epoch": 1, "loss": 3.5}, {"step": 200, "epoch": 1, "loss": 3.25}],
        "train": [{"step": 200, "epoch": 1, "loss": 3.4}],
        "valid": [{"step": 200, "epoch": 1, "loss": 3.3, "mean_recall": 12.5}],
    }


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    log = tmp_path / "train.log"
    steps = [("100", "5"), ("200", "4"), ("300", "3"), ("200", "4.5"), ("300", "3.5")]
    log.write_text("".join(log_line("train_inner", loss=loss, num_updates=step) for step, loss in steps))
    history = read_training_log(log)["train_inner"]
    assert [(record["step"], record["loss"]) for record in history] == [(100, 5), (200, 4.5), (300, 3.5)]


def test_log_errors(tmp_path):
    with pytest.raises(UserError, match="cannot read training log"):
        read_training_log(tmp_path / "absent.log")
    (tmp_path / "simple.log").write_text("epoch 001: loss=3\n")
    with pytest.raises(UserError, match="--log-format json"):
        read_training_log(tmp_path / "simple.log")


def test_progress_tells_updates_losses_speed_and_time_left() -> None:
    progress = Progress(max_update=200)
    line = log_line(
        "train_inner", epoch=1, update=0.5, loss="5.25", itc_loss="2.5", kd_mse_text_loss="1", gnorm="1", bsz="128",
        ups="0.5", num_updates="50",
    )  # fmt: skip
    assert progress.show(line) == "update 50/200 | loss 5.25 | itc_loss 2.5 | 64 images/s | 5:00 left"
    recalls = {f"valid_{way}_r{k}": k for way in ("i2t", "t2i") for k in (1, 5, 10)}
    shown = progress.show(
        log_line("valid", valid_loss="3", valid_mean_recall="12.5", valid_num_updates="50", **recalls)
    )
    assert shown == "valid at update 50: loss 3 | mean recall 12.5 % (i2t, t2i R@1/5/10: 1.0 5.0 10.0 1.0 5.0 10.0)"


def test_progress_hides_the_model_but_no_error() -> None:
    log = [
        "2026-11-24 02:00:00 | INFO | fairseq_cli.train | Model(\n",
        "  (layer): Linear(\n",
        "  )\n",
        ")\n",
        "2026-11-24 02:00:01 | INFO | fairseq_cli.train | task: T\n",
        "2026-11-24 02:00:02 | WARNING | fairseq | careful\n",
        "emkum: error: no such file\n",
        "Traceback (most recent call last):\n",
        '  File "a.py", line 1\n',
    ]
    progress = Progress()
    shown = [line for line in map(progress.show, log) if line is not None]
    assert shown == [line.rstrip() for line in log[5:]]


def test_lines_without_statistics_are_none() -> None:
    assert parse_line("2026 | INFO | valid | {broken\n") is None
    assert parse_line(log_line("valid", valid_loss="3")) is None
