"""Fine-tuning through the real commands: accuracy over two devices, and retrieval from another run's weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from emkum.errors import UserError
from emkum.training_log import parse_line
from tests.integration.conftest import STUDENT
from tests.integration.in_process import make_run
from tests.small_classes import write_class_folders


def records(text: str, tag: str) -> list[dict[str, float]]:
    found = [parse_line(line) for line in text.splitlines()]
    return [item[1] for item in found if item is not None and item[0] == tag]


def test_accuracy_counts_each_image_once_on_two_devices(
    command: Callable, examples: Path, run_prepare: Callable[..., None], tmp_path: Path
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    run_prepare("image-folder", "--images", write_class_folders(tmp_path / "raw"), "--out", data)
    # 14 images to score make batches of 5, 5 and 4: the second device repeats one to no effect.
    command(
        "emkum", "train", "--processes", 2, examples / "image_classification.yaml", f"data={data}", f"save_dir={run}",
        "student_size=tiny", "image_size=16", "image_patch_size=8", "image_layers=1", "batch_size=8", "update_freq=1",
        "batch_size_valid=5", "max_update=3", "warmup_updates=1", "log_interval=1", "num_workers=0", "autocast=",
    )  # fmt: skip
    log = (run / "train.log").read_text()
    assert "training on 2 devices" in log
    # The number of images is no figure of the log, but accuracies are multiples of its inverse.
    (trained,) = records(log, "valid")[-1:]
    done = command(
        "fairseq-validate", data, "--user-dir=user_dir", "--task=image_classification",
        f"--path={run / 'checkpoint_last.pt'}", "--batch-size=14", "--cpu", "--log-format=json",
    )  # fmt: skip
    alone = next(json.loads(line.split(" | ")[-1]) for line in done.stdout.splitlines() if '"valid_top1"' in line)
    for key in ("top1", "top5", "loss"):
        assert float(alone[f"valid_{key}"]) == pytest.approx(trained[key], abs=2e-3), key


def test_retrieval_finetuning_starts_from_a_distilled_run(
    command: Callable,
    train_by_hand: Callable,
    examples: Path,
    scenes: Path,
    teacher_weights: Path,
    run_prepare: Callable[..., None],
    tmp_path: Path,
) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    train_by_hand(
        scenes, objectives="itc,kd_contrastive", kd_contrastive_bank_size=20, teacher="timm:test_vit",
        teacher_weights=teacher_weights, teacher_image_size=32, text_dropout=0.0, save_dir=source,
    )  # fmt: skip
    words = [
        "emkum", "train", examples / "retrieval_finetuning.yaml", f"data={scenes}", f"init_from={source}",
        f"caption_tokenizer={source / 'tokenizer'}", "batch_size=8", "contrastive_chunk=0", "warmup_updates=0",
        "log_interval=1", "num_workers=0", "autocast=",
    ]  # fmt: skip
    # With a rate of nothing, what is left of the source is what the run started with.
    command(*words, f"save_dir={run}", "lr=0.0", "max_update=1")
    before = torch.load(source / "checkpoint_best.pt", weights_only=True)["model"]
    after = torch.load(run / "checkpoint_last.pt", weights_only=True)
    assert after["model"].keys() < before.keys()
    left_out = before.keys() - after["model"].keys()
    assert all(name.startswith(("student.heads.prediction.", "objectives.kd_contrastive.")) for name in left_out)
    assert [name for name, value in after["model"].items() if not torch.equal(value, before[name])] == []
    assert any(name.startswith("objectives.itc.") for name in after["model"])
    # Updates are counted anew, and the checkpoint tells its own architecture.
    assert after["optimizer_history"][-1]["num_updates"] == 1
    assert after["cfg"]["model"]["student_size"] == "tiny" and after["cfg"]["model"]["image_size"] == 32
    # The same command goes on from the run's own checkpoint.
    command(*words, f"save_dir={run}", "lr=0.0001", "max_update=3")
    log = (run / "train.log").read_text()
    assert [record["step"] for record in records(log, "train_inner")] == [1, 2, 3]
    figures = tmp_path / "figures.json"
    command("emkum", "evaluate", "retrieval", "--checkpoint", run / "checkpoint_last.pt", "--data", scenes,
            "--split", "valid", "--json", figures)  # fmt: skip
    expected = records(log, "valid")[-1]["mean_recall"]
    assert json.loads(figures.read_text())["mean_recall"] == pytest.approx(expected, abs=1e-3)
    # Captions by another tokenizer would mean other pieces.
    other = tmp_path / "other"
    run_prepare("scenes", "--out", other, "--num-images", 20, "--image-size", 32, "--vocab-size", 90)
    with pytest.raises(
        UserError, match=f"another tokenizer than this run; give --caption-tokenizer {source}/tokenizer"
    ):
        make_run(other, tmp_path / "not", STUDENT, init_from=source)
