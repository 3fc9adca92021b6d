"""`emkum figures`: the pictures of a study, each as PNG and SVG, with the numbers behind it as JSON."""

import argparse
import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emkum.commands import figures_features, figures_retrieval, figures_tokens
from emkum.commands.figures_inputs import report_files
from emkum.commands.study import find_value
from emkum.commands.train import LOG_NAME
from emkum.errors import UserError
from emkum.recipe import read_mapping

if TYPE_CHECKING:
    from emkum.evaluation.landscape_figure import Model

# What the log calls the records of training and validation, in words.
_TAGS = {"train_inner": "training", "train": "training, by epoch", "valid": "validation"}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "figures",
        help="draw the pictures of a study",
        description="Each picture is written as PNG and as SVG, at the size of a paper's column, and what it shows as "
        "JSON beside them. docs/evaluation.md says how to read each.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    figures_retrieval.add_parser(kinds)
    figures_tokens.add_parsers(kinds)
    figures_features.add_parsers(kinds)
    _add_curves(kinds)
    _add_landscape(kinds)


def _add_curves(kinds: Any) -> None:
    parser = kinds.add_parser(
        "curves",
        help="losses of the image side and of the caption side, side by side",
        description="The losses that runs logged, those of the two sides of an objective side by side with one scale.",
        epilog='example: emkum figures curves "ITC + KD=runs/flickr8k" --out figures/curves',
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="a run's name and folder; or its folder")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="picture to write, NAME or NAME.png")
    parser.add_argument(
        "--tags",
        default="train_inner,valid",
        metavar="TAG,TAG",
        help="records of the log: train_inner (within epochs), train, valid or another subset (default: %(default)s)",
    )
    parser.add_argument(
        "--keys",
        default="",
        metavar="KEY,KEY",
        help="show these values instead, two a line, such as loss,mean_recall",
    )
    parser.set_defaults(run=run_curves)


def _add_landscape(kinds: Any) -> None:
    parser = kinds.add_parser(
        "landscape",
        help="models by a score, their parameters and their training pairs",
        description="A score against parameters and against training pairs, from tables that name the models.",
        epilog="example: emkum figures landscape examples/figures/landscape.yaml --score coco --out figures/landscape",
    )
    parser.add_argument(
        "tables",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="YAML (models, scores) or CSV with columns name, parameters, pairs (both in millions), group and scores; "
        "in YAML a score may be FILE.json#KEY/KEY, of a file that `emkum evaluate` wrote",
    )
    parser.add_argument("--score", required=True, metavar="KEY", help="score to show")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="picture to write, NAME or NAME.png")
    parser.set_defaults(run=run_landscape)


# ----------------------------------------------------------------------------------------------------------------------
# Curves
# ----------------------------------------------------------------------------------------------------------------------


def named_runs(words: Sequence[str]) -> dict[str, Path]:
    """Folders of runs by name, from words NAME=RUN or RUN.

    Raises:
        UserError: a folder does not exist, or two have one name.
    """
    folders: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        path = Path(folder if equals else name)
        if not path.is_dir():
            raise UserError(f"{word}: there is no folder {path}")
        name = name if equals else path.name
        if name in folders:
            raise UserError(f"{word}: another run is called {name}; give NAME=RUN")
        folders[name] = path
    return folders


def read_histories(folders: Mapping[str, Path], tags: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """Records of the runs that kept a log, by the name of the run; of several tags by that and what the tag means."""
    from emkum.training_log import read_training_log

    histories = {}
    for name, folder in folders.items():
        log = folder / LOG_NAME
        records = read_training_log(log) if log.is_file() else {}
        for tag in tags:
            if records.get(tag):
                histories[name if len(tags) == 1 else f"{name}, {_TAGS.get(tag, tag)}"] = records[tag]
    return histories


def run_curves(args: argparse.Namespace) -> None:
    from emkum.evaluation.curves_figure import logged_keys, loss_curves, part_pairs

    folders = named_runs(args.runs)
    tags = [tag.strip() for tag in args.tags.split(",") if tag.strip()]
    histories = read_histories(folders, tags)
    if not histories:
        raise UserError(
            f"--tags {args.tags}: no such records in {', '.join(str(f / LOG_NAME) for f in folders.values())}"
        )
    present = logged_keys(histories)
    keys: list[Any] = [key.strip() for key in args.keys.split(",") if key.strip()]
    if unknown := [key for key in keys if key not in present]:
        raise UserError(f"--keys {unknown[0]}: the runs logged {', '.join(present)}")
    keys = keys or part_pairs(present)
    if not keys:
        raise UserError(
            "these runs logged no losses of both sides (NAME_image_loss and NAME_text_loss, or NAME_i2t_loss and "
            f"NAME_t2i_loss); choose --keys from {', '.join(present)}"
        )
    report_files(loss_curves(args.out, histories, keys), {"keys": keys, "histories": histories})


# ----------------------------------------------------------------------------------------------------------------------
# Landscape
# ----------------------------------------------------------------------------------------------------------------------


def run_landscape(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from emkum.evaluation.landscape_figure import landscape_figure

    models, label = [], args.score
    for path in args.tables:
        rows, labels = read_table(path)
        label = labels.get(args.score, label)
        models += [model for number, row in enumerate(rows, start=1) for model in _model(path, number, row, args.score)]
    if not any(model.parameters or model.pairs for model in models):
        given = ", ".join(sorted({key for path in args.tables for row in read_table(path)[0] for key in row}))
        raise UserError(f"--score {args.score}: no model has it and parameters or pairs; the tables have {given}")
    facts = {"score": label, "models": [asdict(model) for model in models]}
    report_files(landscape_figure(args.out, models, label), facts)


def read_table(path: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Models of a YAML or CSV file, and the scores' names in words.

    Raises:
        UserError: it cannot be read, or holds no models.
    """
    if path.suffix.lower() == ".csv":
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows, labels = list(csv.DictReader(file)), {}
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    else:
        content = read_mapping(path, "table of models")
        rows, labels = content.get("models"), content.get("scores") or {}
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and row.get("name") for row in rows):
        raise UserError(f"{path}: want rows of models, each with a name; see examples/figures/landscape.yaml")
    return rows, labels


def _model(path: Path, number: int, row: Mapping[str, Any], score: str) -> "list[Model]":
    """The model of a row; none where it has no such score."""
    from emkum.evaluation.landscape_figure import Model

    given = row.get(score)
    if isinstance(given, str) and ".json#" in given:
        file, _, keys = given.partition("#")
        given = find_value(path.parent / file, keys)
    values = {
        key: _number(path, number, key, value)
        for key, value in {"score": given, "parameters": row.get("parameters"), "pairs": row.get("pairs")}.items()
    }
    for key in ("parameters", "pairs"):
        if values[key] is not None and values[key] <= 0:
            raise UserError(f"{path}, model {number}: {key} {values[key]:g}: want a number above 0, in millions")
    if values["score"] is None:
        return []
    return [Model(str(row["name"]), group=str(row.get("group") or ""), **values)]


def _number(path: Path, number: int, key: str, value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        found = float(value)
        if not math.isfinite(found):
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(f"{path}, model {number}: {key} {value!r} is no number") from None
    return found
