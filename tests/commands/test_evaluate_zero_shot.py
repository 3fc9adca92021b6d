"""`emkum evaluate zero-shot` with a model that knows colors, and what a user may get wrong."""

import csv
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emkum.cli import main
from emkum.data.shard_writing import ShardWriter
from emkum.data.shards import open_split
from emkum.errors import UserError
from tests.small_classes import CLASSES, write_class_folders


class Colors:
    """Stands for a student: images by their mean color, "color N" by that of class N."""

    image_size = 8

    def __init__(self, broken: bool = False) -> None:
        # As the folders are drawn.
        self.table = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (CLASSES, 3))).float() - 128
        self.broken = broken

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return F.normalize(self.table[[int(text.split()[-1]) for text in texts]], dim=-1)

    def encode_crops(self, crops: Tensor) -> Tensor:
        features = crops.float().mean(dim=(2, 3)) - 128
        return features / 0 if self.broken else F.normalize(features, dim=-1)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    # The command silences other libraries for the whole process.
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, run_prepare: Callable[..., None]) -> Path:
    root = tmp_path_factory.mktemp("classes")
    run_prepare("image-folder", "--images", write_class_folders(root / "raw"), "--out", root / "data")
    # The same images without labels.
    with ShardWriter(root / "data" / "unlabeled") as writer:
        for sample in open_split(root / "data", "test", require_captions=False):
            writer.add(sample.key, sample.image, "png", [])
    return root / "data"


def write_prompts(folder: Path, swapped: bool = False) -> Path:
    names = {f"class{label}": f"color {label}" for label in range(CLASSES)}
    if swapped:
        names["class1"], names["class2"] = names["class2"], names["class1"]
    path = folder / "prompts.json"
    path.write_text(json.dumps({"classes": names, "templates": ["{}", "the {}"]}))
    return path


def evaluate(data: Path, *words: object) -> None:
    main([*map(str, ["evaluate", "zero-shot", "--checkpoint", "run", "--data", data, "--workers", 0, *words])])


def test_figures_table_and_classes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("emkum.checkpoint.load", lambda checkpoint, device: Colors())
    prompts = write_prompts(tmp_path, swapped=True)
    json_path, csv_path = tmp_path / "out" / "figures.json", tmp_path / "tables" / "classes.csv"
    evaluate(data, "--prompts", prompts, "--batch-size", 4, "--json", json_path, "--per-class", csv_path)
    figures = json.loads(json_path.read_text())
    # All are right but those of the two classes whose names are exchanged.
    assert figures["top_1"] == pytest.approx(100 * 5 / 7) == figures["mean_per_class"]
    assert (figures["num_images"], figures["num_classes"], figures["num_templates"]) == (14, CLASSES, 2)
    assert (figures["split"], figures["chance_top_5"]) == ("test", pytest.approx(500 / 7))
    out = capsys.readouterr().out
    assert "14 images of 7 classes; 2 templates" in out and "71.43" in out and "14.29" in out and "tie" not in out
    rows = list(csv.DictReader(csv_path.read_text().splitlines()))
    assert [row["top_1"] for row in rows] == ["100.0", "0.0", "0.0", *["100.0"] * 4]
    assert [row["taken_for"] for row in rows[:4]] == ["", "class2", "class1", ""]
    assert rows[1]["prompt_names"] == "color 2" and rows[1]["taken_for_images"] == "2" and rows[0]["images"] == "2"


def test_classes_with_the_same_texts_are_told_of(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("emkum.checkpoint.load", lambda checkpoint, device: Colors())
    path = tmp_path / "prompts.json"
    names = [f"color {max(label, 1)}" for label in range(CLASSES)]
    path.write_text(json.dumps({"classes": names, "templates": ["{}"]}))
    evaluate(data, "--prompts", path, "--json", tmp_path / "figures.json")
    assert "2 classes have the texts of another one: they tie" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text())["top_1"] == pytest.approx(100 * 5 / 7)


def test_a_broken_model_and_a_place_that_cannot_be_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_prompts(tmp_path)
    monkeypatch.setattr("emkum.checkpoint.load", lambda checkpoint, device: Colors(broken=True))
    with pytest.raises(UserError, match="NaN or infinite"):
        evaluate(data, "--prompts", prompts)
    monkeypatch.setattr("emkum.checkpoint.load", lambda checkpoint, device: Colors())
    for option in ("--json", "--per-class", "--confusion"):
        with pytest.raises(UserError, match=f"cannot write {prompts}/below"):
            evaluate(data, "--prompts", prompts, option, prompts / "below")


@pytest.mark.parametrize(
    ("content", "words", "expected"),
    [
        ({"classes": ["a", "b"]}, [], "lists 2 classes, .* has 7"),
        ({"templates": ["a photo"]}, [], "template 'a photo' has no place for the class's name"),
        ({"classes": {"class0": "a"}}, [], "names no class 'class1' and 5 more"),
        ({"templates": ["{}"]}, ["--split", "valid2"], "has no split 'valid2'; splits of .*: train, valid, test"),
        ({"templates": ["{}"]}, ["--split", "unlabeled"], "has no label; choose a split with labels"),
        ({"templates": ["{}"]}, ["--batch-size", 0], "--batch-size 0: want 1 or more"),
        ({"templates": ["{}"]}, [], "no such checkpoint: run"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(
    data: Path, tmp_path: Path, content: dict, words: list, expected: str
) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=expected) as error:
        evaluate(data, "--prompts", path, *words)
    assert "\n" not in error.value.message


def test_a_set_without_classes(scenes: Path) -> None:
    with pytest.raises(UserError, match=r"has no classes\.json, so its images have no classes"):
        evaluate(scenes)
