"""Sentences and pairs: how they are joined, read and batched."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emkum.data.glue import GlueDataset, join_sentences, read_classes
from emkum.data.tables import TABLE_NAME, join_rows
from emkum.data.tokenizers import BertTokenizer, SpecialTokens, load_tokenizer
from emkum.errors import UserError
from tests.glue_cases import write_vocabulary

SPECIAL = SpecialTokens(bos=0, pad=1, eos=2, unk=3, mask=99)
ROWS: list[dict[str, Any]] = [
    {"sentence1": "the cat", "sentence2": "yes", "label": 1, "index": 4},
    {"sentence1": "the", "sentence2": "no the dog sat", "label": 0, "index": 5},
    {"sentence1": "dog", "sentence2": "maybe", "label": 2, "index": 9},
]


class Numbers:
    """A tokenizer that is not BERT's; a word's id is the word."""

    special = SPECIAL

    def pieces(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


def write_table(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    part = folder / "part"
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    join_rows([part], folder / TABLE_NAME)
    part.unlink()
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> BertTokenizer:
    return load_tokenizer(write_vocabulary(tmp_path / "tokenizer"))


def longest_first(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """Take pieces one by one from the end of the longer sentence, and from the second of equals."""
    first, second = list(first), list(second)
    while len(first) + len(second) > room:
        (first if len(first) > len(second) else second).pop()
    return first, second


def test_one_sentence() -> None:
    assert join_sentences([[10, 11]], SPECIAL, 2, 8) == [0, 10, 11, 2]
    assert join_sentences([list(range(10, 30))], SPECIAL, 2, 8) == [0, *range(10, 16), 2]


@pytest.mark.parametrize("separators", [1, 2])
def test_pairs_are_cut_from_the_longer_sentence(separators: int) -> None:
    for lengths in [(1, 1), (3, 9), (9, 3), (20, 20), (20, 4), (4, 20), (5, 6), (6, 5), (0, 20), (20, 0), (50, 49)]:
        for most in range(6, 40):
            first, second = (list(range(start, start + n)) for start, n in zip((100, 200), lengths, strict=True))
            one, two = longest_first(first, second, most - 2 - separators)
            expected = [0, *one, *[2] * separators, *two, 2]
            assert join_sentences([first, second], SPECIAL, separators, most) == expected, (lengths, most)
            assert len(expected) <= most


def test_bert_has_one_separator_and_others_two(tokenizer: BertTokenizer, tmp_path: Path) -> None:
    folder = write_table(tmp_path / "train", ROWS)
    special = tokenizer.special
    ids = GlueDataset(folder, tokenizer, 3, 32)[0].ids.tolist()
    assert ids == [
        special.bos, *tokenizer.pieces("the cat"), special.eos, *tokenizer.pieces("yes"), special.eos,
    ]  # fmt: skip
    rows = [{"sentence1": "10 11", "sentence2": "12", "label": 1, "index": 0}]
    other = GlueDataset(write_table(tmp_path / "other", rows), Numbers(), 2, 32)
    assert other[0].ids.tolist() == [0, 10, 11, 2, 2, 12, 2]
    rows = [{"sentence1": "10 11", "label": 1, "index": 0}]
    assert GlueDataset(write_table(tmp_path / "one", rows), Numbers(), 2, 32)[0].ids.tolist() == [0, 10, 11, 2]


def test_items_and_batches(tokenizer: BertTokenizer, tmp_path: Path) -> None:
    data = GlueDataset(write_table(tmp_path / "train", ROWS), tokenizer, 3, 32)
    assert len(data) == 3 and data.lengths.tolist() == [6, 8, 5]
    assert data.labels.tolist() == [1, 0, 2] and data.index.tolist() == [4, 5, 9]
    batch = data.collate([data[0], data[1]])
    assert batch["id"].tolist() == [0, 1] and batch["nsentences"] == 2 and batch["ntokens"] == 14
    inputs = batch["net_input"]
    assert inputs["text"].shape == (2, 8) and inputs["text"][0, 6:].tolist() == [tokenizer.special.pad] * 2
    assert inputs["padding_mask"].tolist() == [[False] * 6 + [True] * 2, [False] * 8]
    assert inputs["labels"].dtype == torch.int64 and inputs["labels"].tolist() == [1, 0]
    assert data.collate([data[1]])["net_input"]["padding_mask"] is None
    assert data.collate([]) == {}
    assert [rows.tolist() for rows in data.batches(2)] == [[2, 0], [1]]


def test_scores_and_rows_without_a_label(tmp_path: Path) -> None:
    rows = [{"sentence1": "10", "sentence2": "11", "label": score, "index": n} for n, score in enumerate([0, 3.8, 5.0])]
    data = GlueDataset(write_table(tmp_path / "train", rows), Numbers(), 0, 32)
    labels = data.collate([data[n] for n in range(3)])["net_input"]["labels"]
    assert labels.dtype == torch.float32 and labels.tolist() == pytest.approx([0, 3.8, 5])
    folder = write_table(tmp_path / "test", [row | {"label": None} for row in rows])
    data = GlueDataset(folder, Numbers(), 2, 32, labeled=False)
    assert np.isnan(data.labels).all() and math.isnan(data[0].label)
    assert data.collate([data[0]])["net_input"]["labels"].tolist() == [-1]
    with pytest.raises(UserError, match="test, row 0 has no label: the split can be predicted, not scored"):
        GlueDataset(folder, Numbers(), 2, 32)


@pytest.mark.parametrize(
    ("change", "classes", "message"),
    [
        ({"label": 3}, 3, r"row 1: label 3 is not in 0 ... 2"),
        ({"label": -1}, 3, r"row 1: label -1 is not in 0 ... 2"),
        ({"label": 0.5}, 3, r"row 1: label 0.5 is not in 0 ... 2"),
        ({"label": "1"}, 3, r"row 1: label '1' is not in 0 ... 2"),
        ({"label": True}, 3, r"row 1: label True is not in 0 ... 2"),
        ({"label": 5.5}, 0, r"row 1: score 5.5 is not in 0 ... 5"),
        ({"label": "high"}, 0, r"row 1: score 'high' is not in 0 ... 5"),
        ({"label": None}, 3, r"row 1 has no label"),
    ],
)
def test_labels_that_mean_nothing(tmp_path: Path, change: dict, classes: int, message: str) -> None:
    row = {"sentence1": "10", "sentence2": "11", "label": 1, "index": 0}
    folder = write_table(tmp_path / "train", [row, row | change])
    with pytest.raises(UserError, match=message) as caught:
        GlueDataset(folder, Numbers(), classes, 32)
    assert "\n" not in str(caught.value)


def test_tables_of_something_else(tmp_path: Path) -> None:
    for missing in ("sentence1", "label", "index"):
        row = {"sentence1": "10", "label": 1, "index": 0}
        del row[missing]
        folder = write_table(tmp_path / missing, [row])
        with pytest.raises(UserError, match=f"row 0 lacks '{missing}': want a table of `emkum prepare glue`"):
            GlueDataset(folder, Numbers(), 2, 32)
    with pytest.raises(UserError, match="holds no table"):
        GlueDataset(tmp_path / "none", Numbers(), 2, 32)
    with pytest.raises(UserError, match="--glue-max-tokens 5"):
        GlueDataset(tmp_path / "label", Numbers(), 2, 5)


def test_names_of_classes(tmp_path: Path) -> None:
    assert read_classes(tmp_path) == ()
    path = tmp_path / "classes.json"
    path.write_text('{"class_name": ["no", "yes"]}')
    assert read_classes(tmp_path) == ("no", "yes")
    for wrong in ("{", '{"class_name": "no"}', '{"class_name": ["no"]}', '{"class_name": [1, 2]}', "[]"):
        path.write_text(wrong)
        with pytest.raises(UserError, match="classes.json (cannot be read|lists no two classes)"):
            read_classes(tmp_path)


def test_hash_follows_the_content(tokenizer: BertTokenizer, tmp_path: Path) -> None:
    folders = [write_table(tmp_path / name, rows) for name, rows in (("a", ROWS), ("b", ROWS), ("c", ROWS[:2]))]
    one, same, other = (GlueDataset(folder, tokenizer, 3, 32).content_hash() for folder in folders)
    assert one == same != other


def test_real_tasks_fit(shared_data: Path, tmp_path: Path, run_prepare) -> None:
    run_prepare("glue", "--input", shared_data / "glue", "--out", tmp_path / "glue", "--limit", 300)
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "bert-base-uncased-vocab.txt")
    for task, classes in {"CoLA": 2, "MRPC": 2, "STS-B": 0, "RTE": 2}.items():
        assert len(read_classes(tmp_path / "glue" / task)) == classes
        data = GlueDataset(tmp_path / "glue" / task / "valid", tokenizer, classes, 128)
        assert len(data) in (277, 300) and data.lengths.max() <= 128
        assert np.isfinite(data.labels).all()
        separators = [int((data[n].ids == tokenizer.special.eos).sum()) for n in range(len(data))]
        assert set(separators) == {1 if task == "CoLA" else 2}
