"""GLUE (Wang et al., 2019) from the folders that its download script makes."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from emkum.data.shards import CLASSES_NAME
from emkum.errors import UserError
from emkum.prepare.common import add_common_arguments, add_set_parser, run_set
from emkum.prepare.raw_set import Settings, Skipped, TableSet
from emkum.provenance import write_json

_FILES = {"train": ("train.tsv",), "valid": ("dev.tsv",), "test": ("test.tsv",)}
_TOP_SCORE = 5.0


@dataclass(frozen=True)
class Task:
    """One of the nine tasks.

    Attributes:
        name: of its folder.
        sentences: columns of the one or two sentences.
        label: column of the label, which test files lack.
        classes: names by label; empty = the label is a score.
        spelled: whether files have the names of the classes, not their numbers.
        header: columns of files without a header.
        files: split -> its file; the first that is there counts.
    """

    name: str
    sentences: tuple[str, ...]
    label: str = "label"
    classes: tuple[str, ...] = ()
    spelled: bool = False
    header: tuple[str, ...] = ()
    files: Mapping[str, Sequence[str]] = field(default_factory=lambda: _FILES)


_PAIR = ("sentence1", "sentence2")
TASKS = (
    Task("CoLA", ("sentence",), classes=("unacceptable", "acceptable"), header=("source", "label", "mark", "sentence")),
    Task("SST-2", ("sentence",), classes=("negative", "positive")),
    Task(
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        ("not_equivalent", "equivalent"),
        files={
            # The corpus as Microsoft publishes it is one train and one test file.
            "train": ("train.tsv", "msr_paraphrase_train.txt"),
            "valid": ("dev.tsv",),
            "test": ("test.tsv", "msr_paraphrase_test.txt"),
        },
    ),
    Task("STS-B", _PAIR, "score"),
    Task("QQP", ("question1", "question2"), "is_duplicate", ("not_duplicate", "duplicate")),
    Task(
        "MNLI",
        _PAIR,
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        spelled=True,
        files={
            "train": ("train.tsv",),
            "valid": ("dev_matched.tsv",),
            "valid_mismatched": ("dev_mismatched.tsv",),
            "test": ("test_matched.tsv",),
            "test_mismatched": ("test_mismatched.tsv",),
        },
    ),
    Task("QNLI", ("question", "sentence"), classes=("entailment", "not_entailment"), spelled=True),
    Task("RTE", _PAIR, classes=("entailment", "not_entailment"), spelled=True),
    Task("WNLI", _PAIR, classes=("not_entailment", "entailment")),
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `glue`."""
    parser = add_set_parser(
        subparsers,
        "glue",
        help="GLUE: nine tasks of one or two sentences and a label",
        description="GLUE from its official layout, one folder a task; tasks that are not there are left out. Makes\n"
        "DIR/TASK/SPLIT, such as DIR/CoLA/train; rows have sentence1, sentence2 (if there are two), label (a number,\n"
        "null where the file has none) and index. MNLI's splits are train, valid and test (matched), and\n"
        f"valid_mismatched and test_mismatched. DIR/TASK/{CLASSES_NAME} lists class_name by label.\n"
        f"Tasks: {', '.join(task.name for task in TASKS)}.",
        example="  emkum prepare glue --input glue_data --out data/glue",
    )
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help="folder of the tasks' folders")
    add_common_arguments(parser, shrink=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the folder that the arguments of the sub-command describe."""
    run_set(Glue(args.input), args)


class Glue(TableSet):
    """The raw set.

    Args:
        folder: of the tasks' folders.

    Raises:
        UserError: there is no task, or one lacks a file or a column.
    """

    name = "glue"

    def __init__(self, folder: Path) -> None:
        self.options: dict[str, object] = {}
        self._tasks = [task for task in TASKS if (folder / task.name).is_dir()]
        if not self._tasks:
            raise UserError(f"--input: {folder} holds none of the folders {', '.join(task.name for task in TASKS)}")
        self._files = {
            f"{task.name}/{split}": TaskFile(path, task, split.startswith("test"))
            for task in self._tasks
            for split, path in _find_files(folder / task.name, task).items()
        }
        self.sources = {split: file.path for split, file in self._files.items()}
        self.counts = {split: len(file) for split, file in self._files.items()}

    def rows(self, split: str, start: int, stop: int) -> Iterator[dict[str, Any] | Skipped]:
        return self._files[split].rows(start, stop)

    def join(self, root: Path, settings: Settings) -> dict[str, dict[str, int]]:
        for task in self._tasks:
            if task.classes:
                write_json(root / task.name / CLASSES_NAME, {"class_name": task.classes})
        return super().join(root, settings)


def _find_files(folder: Path, task: Task) -> dict[str, Path]:
    """Split -> its file. Train and valid must be there, but for a corpus that has no valid."""
    found = {}
    for split, names in task.files.items():
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is not None:
            found[split] = path
        elif split == "train" or (split == "valid" and found["train"].name == task.files["train"][0]):
            raise UserError(f"--input: {folder} lacks {' or '.join(names)}")
    return found


class TaskFile:
    """One file of a task: fields between tabs, never quoted. Picklable.

    Args:
        path: the file.
        task: whose it is.
        unlabeled: whether it may lack the label.

    Raises:
        UserError: it has no rows, or lacks a column.
    """

    def __init__(self, path: Path, task: Task, unlabeled: bool) -> None:
        self.path = path
        self._task = task
        begins, end = [], 0
        try:
            with open(path, "rb") as file:
                for line in file:
                    if line.strip():
                        begins.append(end)
                    end += len(line)
                file.seek(0)
                first = file.readline().decode("utf-8-sig", errors="replace")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        header = tuple(name.strip() for name in first.split("\t"))
        # CoLA's train and dev files begin with a row, its test file with a header.
        has_header = not task.header or "index" in header
        self._header = header if has_header else task.header
        # (rows,) int64: where each row begins.
        self._begins = np.array(begins[has_header:], dtype=np.int64)
        if len(self._begins) == 0:
            raise UserError(f"{path} has no rows")
        if len(header) != len(self._header):
            raise UserError(f"{path}, line 1: want the {len(self._header)} columns {', '.join(self._header)}")
        wanted = task.sentences if unlabeled else (*task.sentences, task.label)
        missing = [column for column in wanted if column not in self._header]
        if missing:
            raise UserError(f"{path} lacks the column {', '.join(missing)}; it has {', '.join(self._header)}")

    def __len__(self) -> int:
        return len(self._begins)

    def rows(self, start: int, stop: int) -> Iterator[dict[str, Any] | Skipped]:
        """The rows `start` to `stop`."""
        with open(self.path, "rb") as file:
            for number in range(start, stop):
                file.seek(self._begins[number])
                try:
                    yield self._parse(file.readline(), number)
                except ValueError as error:
                    yield Skipped(f"{self.path.parent.name}/{self.path.name} row {number}", str(error))

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        """One row. Its index is the file's own, which the benchmark's server wants, or else its number."""
        try:
            fields = line.decode("utf-8-sig").rstrip("\r\n").split("\t")
        except UnicodeDecodeError:
            raise ValueError("not UTF-8") from None
        if len(fields) != len(self._header):
            raise ValueError(f"{len(fields)} fields, but there are {len(self._header)} columns")
        values = dict(zip(self._header, fields, strict=True))
        row: dict[str, Any] = {
            f"sentence{place}": values[column].strip() for place, column in enumerate(self._task.sentences, start=1)
        }
        row["label"] = self._label(values[self._task.label].strip()) if self._task.label in values else None
        index = values.get("index", values.get("id", str(number)))
        if not index.isdecimal():
            raise ValueError(f"index {index!r} is no number")
        return row | {"index": int(index)}

    def _label(self, text: str) -> int | float:
        classes = self._task.classes
        if not classes:
            score = float(text)
            if not 0 <= score <= _TOP_SCORE:
                raise ValueError(f"score {text} is not in 0 ... {_TOP_SCORE:g}")
            return score
        spellings = classes if self._task.spelled else [str(label) for label in range(len(classes))]
        if text not in spellings:
            raise ValueError(f"label {text!r} is none of {', '.join(spellings)}")
        return spellings.index(text)
