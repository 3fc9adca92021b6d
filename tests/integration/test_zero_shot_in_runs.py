"""Zero-shot classification at validations, and the command on the checkpoint that is left."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import emkum
from emkum.data.crops import centered_crops
from emkum.data.decoding import decode
from emkum.data.shards import open_split
from emkum.training_log import parse_line
from tests.small_classes import write_class_folders

# 21 images of 7 classes do not fall evenly on two processes.
NAMES = {
    "class0": "red circle",
    "class1": "blue square",
    "class2": ["green star", "green triangle"],
    "class3": "yellow circle",
    "class4": "black square",
    "class5": "small purple star",
    "class6": "large white triangle",
}
FIGURES = ("zero_shot_top1", "zero_shot_top5")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory, run_prepare: Callable[..., None]) -> Path:
    root = tmp_path_factory.mktemp("classes")
    raw = write_class_folders(root / "raw", {"train": 1, "test": 3})
    run_prepare("image-folder", "--images", raw, "--out", root / "data")
    return root / "data"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps({"classes": NAMES, "templates": ["a {}", "a {} next to a {}."]}))
    return path


def records(log: str, wanted: str) -> list[dict[str, Any]]:
    found = [parse_line(line) for line in log.splitlines()]
    return [item[1] for item in found if item is not None and item[0] == wanted]


def test_two_processes_score_what_the_command_scores(command, examples, scenes, classes, prompts, tmp_path) -> None:
    run = tmp_path / "run"
    command(
        "emkum", "train", "--processes", 2, examples / "scenes_itc.yaml", f"data={scenes}", f"save_dir={run}",
        "image_size=32", "image_patch_size=8", "student_size=tiny", "batch_size=4", "max_update=2",
        "warmup_updates=1", "save_interval_updates=1", f"zero_shot_data={classes}",
        f"zero_shot_prompts={prompts}", "best_checkpoint_metric=zero_shot_top1",
        "lr=[0.003]", "autocast=",
    )  # fmt: skip
    log = (run / "train.log").read_text()
    assert "training on 2 devices" in log and "zero-shot classification: 21 images" in log
    validations = records(log, "valid")
    assert len(validations) >= 2 and all(set(FIGURES) <= set(record) for record in validations)
    assert validations[-1]["best_zero_shot_top1"] == max(record["zero_shot_top1"] for record in validations)
    command(
        "emkum", "evaluate", "zero-shot", "--checkpoint", run / "checkpoint_last.pt", "--data", classes, "--prompts",
        prompts, "--json", tmp_path / "figures.json", "--per-class", tmp_path / "new" / "classes.csv", "--confusion",
        tmp_path / "confusion.png", "--batch-size", 5,
    )  # fmt: skip
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["num_images"], figures["num_classes"], figures["num_templates"]) == (21, 7, 2)
    assert figures["chance_top_1"] == pytest.approx(100 / 7)
    assert 0 < figures["top_5"] < 100
    for key in (1, 5):
        assert figures[f"top_{key}"] == pytest.approx(validations[-1][f"zero_shot_top{key}"], abs=1e-3)
    with open(tmp_path / "new" / "classes.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["class"] for row in table] == list(NAMES) and table[2]["prompt_names"] == "green star; green triangle"
    assert sum(float(row["top_1"]) for row in table) / 7 == pytest.approx(figures["top_1"], abs=1e-2)
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.width > 500
    assert (tmp_path / "confusion.svg").is_file()
    # Crops that workers decode are those that the model makes of images.
    model, samples = emkum.load(run), open_split(classes, "test", require_captions=False)
    features = torch.cat([model.encode_crops(crops) for crops in centered_crops(samples, model.image_size, 8)])
    torch.testing.assert_close(model.encode_image([decode(sample.image) for sample in samples]), features)


def test_training_is_the_same_with_it_and_validation_repeats_it(
    command, train_by_hand, scenes, classes, prompts, tmp_path
) -> None:
    options = {
        "max_update": 2,
        "warmup_updates": 1,
        "validate_interval_updates": 1,
        "valid_subset": "valid,test",
        "num_workers": 0,
    }
    zero_shot = {"zero_shot_data": classes, "zero_shot_prompts": prompts, "zero_shot_limit": 10}
    train_by_hand(scenes, save_dir=tmp_path / "without", **options)
    done = train_by_hand(scenes, save_dir=tmp_path / "with", **options, **zero_shot)
    log = done.stdout + done.stderr
    states = [
        torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=True)["model"] for name in ("without", "with")
    ]
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    last = records(log, "valid")[-1]
    # Each of several validation sets has the figures, besides its own.
    assert {key: records(log, "test")[-1][key] for key in FIGURES} == {key: last[key] for key in FIGURES}
    assert all("mean_recall" in record for record in records(log, "test"))
    done = command(
        "fairseq-validate", scenes, "--user-dir=user_dir", "--task=image_text", "--batch-size=3", "--cpu",
        f"--path={tmp_path / 'with' / 'checkpoint_last.pt'}", "--log-format=json",
    )  # fmt: skip
    again = next(json.loads(line.split(" | ")[-1]) for line in done.stdout.splitlines() if "zero_shot_top1" in line)
    assert {key: float(again[f"valid_{key}"]) for key in FIGURES} == {key: last[key] for key in FIGURES}
