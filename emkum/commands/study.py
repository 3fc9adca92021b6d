"""`emkum study`: the commands behind a table of results, one after the other, and the page that shows them."""

import argparse
import json
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

from emkum.commands.kept_run import KeptRun, run_emkum
from emkum.commands.train import USER_DIR
from emkum.errors import UserError
from emkum.files import replaced_file
from emkum.provenance import machine_in_words
from emkum.recipe import read_mapping

# Whose versions pages of results tell.
PACKAGES = ("torch", "timm", "fairseq-fixed")
_KEYS = {"title", "about", "places", "steps", "tables"}
_TABLE_KEYS = {"title", "rows", "columns", "notes"}
# Words of every study: the folder of all that it makes, and that of the recipes.
_OUT, _RECIPES = "out", "recipes"
_WIDTH = 120
_PLACES = (
    "In the commands below, {out} is RUNS, {recipes} is examples, and the other words in braces are the folders given."
)


@dataclass(frozen=True)
class Table:
    """A table of a study.

    Attributes:
        title: above it. notes: below it.
        rows: heading of a row -> word that stands for {row} in the cells.
        columns: heading of a column -> FILE#KEY/KEY of its value, or two of them, a value and its spread.
    """

    title: str
    rows: Mapping[str, str]
    columns: Mapping[str, str | list[str]]
    notes: str = ""


@dataclass(frozen=True)
class Study:
    """What a file of a study says.

    Attributes:
        title, about: of the page.
        places: folders that a user may have elsewhere, by the word that stands for them in commands.
        steps: words of an `emkum` command by the step's name, in their order.
    """

    title: str
    steps: Mapping[str, str]
    tables: list[Table]
    about: str = ""
    places: Mapping[str, str] = field(default_factory=dict)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "study",
        help="run the commands behind a table of results and write its page",
        description="Run each step of a study, an emkum command, one after the other, and write its tables with the "
        "commands, times and machine as one Markdown page. A step that is finished is not run again; one that was "
        "stopped goes on. Steps that need nothing of one another can be run side by side by --only.",
        epilog="example: emkum study examples/studies/text_encoders.yaml glue=data/glue_raw --out runs/text_encoders "
        "--page docs/results/text_encoders.md",
    )
    parser.add_argument("file", type=Path, help="YAML file with title, steps and tables; see examples/studies/")
    parser.add_argument("overrides", nargs="*", metavar="name=DIR", help="folders that replace the file's places")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for all that the steps make")
    parser.add_argument("--page", type=Path, metavar="FILE", help="Markdown file to write (default: DIR/results.md)")
    parser.add_argument("--only", default="", metavar="STEP,STEP", help="these steps alone, and no page before all ran")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    parser.set_defaults(run=run)


def read_study(path: Path) -> Study:
    """
    Raises:
        UserError: it cannot be read, or is no study.
    """
    content = read_mapping(path, "study")
    if not {"title", "steps", "tables"} <= content.keys() <= _KEYS:
        raise UserError(f"{path}: want a mapping with title, steps, tables and, if need be, about and places")
    for part in ("steps", "places"):
        if not is_mapping_of_words(content.setdefault(part, {})):
            raise UserError(f"{path}: {part} is no mapping of names to words")
    for table in content["tables"]:
        if not isinstance(table, dict) or not {"title", "rows", "columns"} <= table.keys() <= _TABLE_KEYS:
            raise UserError(f"{path}: a table wants title, rows, columns and, if need be, notes")
    check_words(path, "step", content["steps"], {_OUT, _RECIPES, *content["places"]})
    wrong = [name for name in content["steps"] if re.search(r"[^\w.-]", name)]
    if wrong:
        raise UserError(f"{path}: step {wrong[0]!r} has a name that is no word: it is that of a file")
    return Study(**content | {"tables": [Table(**table) for table in content["tables"]]})


def check_words(path: Path, part: str, lines: Mapping[str, str], known: set[str]) -> None:
    """
    Args:
        path: of the file. part: what a line is called in messages.
        lines: words by name. known: what may stand in braces.

    Raises:
        UserError: something else stands in braces.
    """
    for name, words in lines.items():
        unknown = {word for _, word, _, _ in Formatter().parse(words) if word is not None} - known
        if unknown:
            names = ", ".join(f"{{{key}}}" for key in sorted(known))
            raise UserError(f"{path}: {part} {name!r} has {{{sorted(unknown)[0]}}}; it may name {names}")


def is_mapping_of_words(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(word, str) for pair in value.items() for word in pair)


def run(args: argparse.Namespace) -> None:
    study = read_study(args.file)
    words = _words(study, args)
    chosen = [name.strip() for name in args.only.split(",") if name.strip()] or list(words)
    unknown = [name for name in chosen if name not in words]
    if unknown:
        raise UserError(f"--only {unknown[0]!r}: {args.file} has the steps {', '.join(words)}")
    if args.list:
        print("\n".join(shlex.join(["emkum", *words[name]]) for name in chosen))
        return
    for number, name in enumerate(chosen, start=1):
        run_step(name, words[name], args.out, f"step {number} of {len(chosen)}")
    records = {name: _kept(name, words[name], args.out).record() for name in words}
    missing = [name for name, record in records.items() if not record.get("finished")]
    if missing:
        print(f"not yet run: {', '.join(missing)}; the page is written once all have")
        return
    page = args.page or args.out / "results.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(page) as temporary:
        temporary.write_text(_page(study, args, records), encoding="utf-8")
    print(f"written to {page}")


def given_places(places: Mapping[str, str], overrides: Sequence[str]) -> dict[str, str]:
    """Places with those in their stead that a user has elsewhere.

    Args:
        places: by the word that stands for them. overrides: name=DIR.

    Raises:
        UserError: there is no place of that name.
    """
    given = dict(places)
    for word in overrides:
        name, equals, folder = word.partition("=")
        if not equals or name not in given:
            raise UserError(f"{word!r}: want name=DIR with one of {', '.join(given) or 'no name, for there is none'}")
        given[name] = folder
    return given


# ----------------------------------------------------------------------------------------------------------------------
# Steps
# ----------------------------------------------------------------------------------------------------------------------


def _words(study: Study, args: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each step, with folders in their places.

    Raises:
        UserError: a place is not the study's, or is no folder.
    """
    places = given_places(study.places, args.overrides)
    for name, folder in places.items():
        if not Path(folder).is_dir():
            raise UserError(f"there is no folder {folder}: give {name}=DIR")
    # Split first, so that a folder may have spaces in its name.
    folders = places | {_OUT: str(args.out), _RECIPES: str(USER_DIR.parent / "examples")}
    return {name: [word.format(**folders) for word in shlex.split(text)] for name, text in study.steps.items()}


def _kept(name: str, words: list[str], out: Path) -> KeptRun:
    return KeptRun(out / "steps" / f"{name}.json", {"words": words})


def run_step(name: str, words: list[str], out: Path, place: str) -> None:
    """Run a step, unless it is finished.

    Args:
        name: of the step. words: of its command.
        out: folder of all that steps make.
        place: of the step among all, in words.

    Raises:
        UserError: it ended with an error, or other words were finished under its name.
    """
    kept = _kept(name, words, out)
    if kept.is_finished():
        if kept.differing():
            raise UserError(f"{out} holds a step {name} of other words: give another --out")
        return
    print(f"emkum: {place}, {name}: {shlex.join(['emkum', *words])}", flush=True)
    record = kept.carry_out(lambda: run_emkum(words))
    if not record["finished"]:
        raise UserError(f"step {name} ended with status {record['status']}; what it needs to go on is kept in {out}")


# ----------------------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------------------


def _page(study: Study, args: argparse.Namespace, records: Mapping[str, dict[str, Any]]) -> str:
    from emkum.evaluation.report import format_table

    # A page does not tell where things lie on the machine.
    root, file = USER_DIR.parent, args.file.resolve()
    file = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
    command = " ".join(["emkum study", file, *(f"{name}=DIR" for name in study.places)])
    machines = dict.fromkeys(machine_in_words(record["machine"], PACKAGES) for record in records.values())
    parts = [f"# {study.title}", _filled(study.about)]
    parts += [_filled(f"Made by `{command} --out RUNS --page FILE` on {' and on '.join(machines)}. {_PLACES}")]
    for table in study.tables:
        rows = [
            {"": row} | {heading: _cell(args.out, cell, word) for heading, cell in table.columns.items()}
            for row, word in table.rows.items()
        ]
        columns = ["", *table.columns]
        parts += [f"## {table.title}", format_table(rows, columns, markdown=True), _filled(table.notes)]
    lines = []
    for name, text in study.steps.items():
        seconds = records[name].get("seconds")
        took = "stopped once and gone on with" if seconds is None else f"{seconds} s"
        lines += [f"# {name}: {took}", _wrapped(f"emkum {text}")]
    parts += ["## Commands", "\n".join(["```bash", *lines, "```"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _filled(text: str) -> str:
    """Paragraphs in lines of a page's width."""
    return "\n\n".join(textwrap.fill(part, _WIDTH) for part in text.split("\n") if part.strip())


def _wrapped(command: str) -> str:
    """A command in lines that a shell takes for one."""
    lines = textwrap.wrap(command, _WIDTH - 6, break_long_words=False, break_on_hyphens=False)
    return " \\\n    ".join(lines)


def _cell(out: Path, cell: str | list[str], word: str) -> Any:
    """A value; or, of two, the value and its spread as text."""
    if isinstance(cell, str):
        return _value(out, cell, word)
    value, spread = (_value(out, each, word) for each in cell)
    return None if value is None else f"{value:.1f} ({'-' if spread is None else f'{spread:.1f}'})"


def _value(out: Path, place: str, word: str) -> Any:
    """What FILE#KEY/KEY holds, see `find_value`. None where there is no such file: of an encoder that cannot be scored
    so.

    Raises:
        UserError: the file has no such key.
    """
    file, _, keys = place.replace("{row}", word).partition("#")
    path = out / file
    if not path.is_file():
        return None
    return find_value(path, keys)


def find_value(path: Path, keys: str) -> float:
    """What a JSON file holds under KEY/KEY, where a KEY that is NAME=VALUE finds the element of a list whose NAME is
    that.

    Raises:
        UserError: it cannot be read, or has no such number.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is no JSON'}") from None
    for key in keys.split("/"):
        name, equals, wanted = key.partition("=")
        if equals and isinstance(value, list):
            value = next((each for each in value if str(each.get(name)) == wanted), None)
        else:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            raise UserError(f"{path} has no {keys}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{path}: {keys} is no number") from None
