"""The options of zero-shot classification at validations, and what is logged."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fairseq.logging import metrics

from emkum.data.prompts import open_prompted_set
from emkum.data.tokenizers import load_tokenizer
from emkum.errors import UserError
from tests.integration.conftest import STUDENT
from tests.integration.in_process import make_run
from tests.small_classes import write_class_folders
from user_dir.zero_shot import ZeroShotConfig, ZeroShotScores, spaced_positions


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory, run_prepare: Callable[..., None]) -> Path:
    root = tmp_path_factory.mktemp("classes")
    raw = write_class_folders(root / "raw", {"train": 1, "test": 3}, 4)
    run_prepare("image-folder", "--images", raw, "--out", root / "data")
    return root / "data"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory, run_prepare: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    run_prepare("scenes", "--out", folder, "--num-images", 20, "--seed", 1, "--image-size", 32, "--vocab-size", 120)
    return folder


def test_positions_are_spaced_over_the_split() -> None:
    assert spaced_positions(10, 0).tolist() == list(range(10)) == spaced_positions(10, 99).tolist()
    assert spaced_positions(10, 4).tolist() == [0, 2, 5, 7]
    assert spaced_positions(12, 4).tolist() == [0, 3, 6, 9]


def test_scores_of_a_limited_set(classes: Path, scenes: Path, tmp_path: Path) -> None:
    run = make_run(scenes, tmp_path, STUDENT, zero_shot_data=classes, zero_shot_limit=8)
    scores = run.task.zero_shot
    assert str(scores).startswith("8 images of ") and str(scores).endswith("test, 4 classes")
    with metrics.aggregate(new_root=True) as before:
        scores.log(metrics)
    assert before.get_smoothed_values() == {}
    student = run.model.eval().student
    scores.score(student, 32, 3, 0)
    assert set(scores.figures) == {"zero_shot_top1", "zero_shot_top5"}
    with metrics.aggregate(new_root=True) as after:
        scores.log(metrics)
        scores.log(metrics)
    assert after.get_smoothed_values() == scores.figures
    # The only kind that fairseq leaves out of checkpoints.
    restored = metrics.MetersDict()
    restored.load_state_dict(after.state_dict())
    assert len(restored) == 0
    # What the student makes goes on to have gradients afterwards.
    student.train().encode_image(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).features.sum().backward()


def test_a_right_answer_counts(classes: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"templates": ["{}"]}))
    found = open_prompted_set(classes, "test", path)
    scores = ZeroShotScores(found, load_tokenizer(scenes), 16, limit=8)
    labels = found.labels[scores.positions]
    # A model that sees the first three images right and takes all others for the class behind theirs.
    seen = iter([*labels[:3], *(labels[3:] + 1) % 4])

    class Known:
        device = torch.device("cpu")

        def __init__(self, *arguments: object) -> None:
            pass

        def encode_tokens(self, tokens: list) -> torch.Tensor:
            return torch.eye(4)[: len(tokens)]

        def encode_crops(self, crops: torch.Tensor) -> torch.Tensor:
            return torch.eye(4)[[next(seen) for _ in crops]]

    monkeypatch.setattr("user_dir.zero_shot.ImageTextModel", Known)
    scores.score(torch.nn.Linear(1, 1), 32, 3, 0)
    assert len(set(labels.tolist())) > 2 and next(seen, None) is None
    assert scores.figures == {"zero_shot_top1": 37.5, "zero_shot_top5": 100.0}


def test_nothing_is_scored_without_a_set(scenes: Path) -> None:
    assert ZeroShotScores.build(ZeroShotConfig(), load_tokenizer(scenes), 16) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": "p.json"}, "--zero-shot-prompts p.json needs a set: give --zero-shot-data"),
        ({"limit": -1}, "--zero-shot-limit -1: want 0"),
        ({"data": "scenes"}, r"has no classes\.json"),
        ({"data": "classes", "split": "valid"}, "has no split 'valid'"),
        ({"data": "classes", "prompts": "none.json"}, "no such file of prompts"),
    ],
)
def test_a_bad_option_is_one_line(classes: Path, scenes: Path, changes: dict, words: str) -> None:
    folders = {"scenes": scenes, "classes": classes}
    changes = changes | ({"data": str(folders[changes["data"]])} if "data" in changes else {})
    with pytest.raises(UserError, match=words) as error:
        ZeroShotScores.build(ZeroShotConfig(**changes), load_tokenizer(scenes), 16)
    assert "\n" not in error.value.message


def test_a_run_says_so_before_it_trains(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no classes\.json"):
        make_run(scenes, tmp_path, STUDENT, zero_shot_data=scenes)
