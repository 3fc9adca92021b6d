"""Suites: what `emkum evaluate all` scores, as lines of words that the other commands of `emkum evaluate` know."""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from emkum.commands import evaluate_images, evaluate_zero_shot
from emkum.commands.study import check_words, given_places, is_mapping_of_words
from emkum.errors import UserError
from emkum.recipe import read_mapping

RETRIEVAL, ZERO_SHOT, KNN, LINEAR = "retrieval", "zero-shot", "knn", "linear"
# Results of other commands, read from their folders.
FINETUNE, GLUE = "finetune", "glue"
# Stands in a line for the student with its shared encoder, in place of its image encoder alone.
WHOLE = "whole"
_ENCODER = "encoder"

_KEYS = {"title", "about", "places", "lines"}
# Options that are the suite's or the command's own, and pairs of senses, by their names in a line's arguments.
_NOT_A_LINES = (
    "pair",
    "json",
    "per_class",
    "confusion",
    "cache",
    "weights",
    "image_size",
    "layers",
    "batch_size",
    "workers",
)


@dataclass(frozen=True)
class Line:
    """One thing to score.

    Attributes:
        name: of the line. kind: one of those above.
        words: as the suite has them. args: what they say, as the command of this kind reads them.
    """

    name: str
    kind: str
    words: str
    args: argparse.Namespace


@dataclass(frozen=True)
class Suite:
    """What a file of a suite says.

    Attributes:
        title, about: of the page. lines: words by the line's name.
        places: folders and files that a user may have elsewhere, by the word that stands for them.
    """

    title: str
    lines: Mapping[str, str]
    about: str = ""
    places: Mapping[str, str] = field(default_factory=dict)


def read_suite(path: Path) -> Suite:
    """
    Raises:
        UserError: it cannot be read, or is no suite.
    """
    content = read_mapping(path, "suite")
    if not {"title", "lines"} <= content.keys() <= _KEYS:
        raise UserError(f"{path}: want a suite, a mapping with title, lines and, if need be, about and places")
    for part in ("lines", "places"):
        if not is_mapping_of_words(content.setdefault(part, {})):
            raise UserError(f"{path}: {part} is no mapping of names to words")
    if not content["lines"]:
        raise UserError(f"{path}: the suite has no lines")
    check_words(path, "line", content["lines"], {WHOLE, *content["places"]})
    return Suite(**content)


def read_lines(suite: Suite, path: Path, checkpoint: str, overrides: Sequence[str]) -> list[Line]:
    """Lines with places filled in, each read by its command.

    Args:
        suite: of the file. path: of it, for messages.
        checkpoint: what is scored. overrides: name=DIR, places that are elsewhere.

    Raises:
        UserError: a place is not the suite's, or a line says what its command does not know.
    """
    places = given_places(suite.places, overrides) | {WHOLE: WHOLE}
    parser = _parser()
    lines = []
    for name, text in suite.lines.items():
        try:
            # Split first, so that a folder may have spaces in its name.
            kind, *words = [word.format(**places) for word in shlex.split(text)] or [""]
            args = parser.parse_args([kind, *_completed(kind, words, checkpoint)])
            _assert_a_lines(args, parser.parse_args([kind, *_shortest(kind)]))
        except UserError as error:
            raise UserError(f"{path}: line {name!r}: {error.message}") from None
        except ValueError as error:  # a quotation that does not end
            raise UserError(f"{path}: line {name!r}: {error}") from None
        lines.append(Line(name, kind, text, args))
    return lines


class _Parser(argparse.ArgumentParser):
    """What it refuses is told in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    from emkum.commands.evaluate import add_retrieval_parser

    parser = _Parser(prog="line", add_help=False)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    add_retrieval_parser(kinds)
    evaluate_zero_shot.add_parser(kinds)
    evaluate_images.add_parser(kinds)
    for kind in (FINETUNE, GLUE):
        kinds.add_parser(kind).add_argument("folder", metavar="DIR", help=f"--out of a finished `emkum {kind}`")
    return parser


def _completed(kind: str, words: list[str], checkpoint: str) -> list[str]:
    """A line's words with the model that all lines are of."""
    if kind in (RETRIEVAL, ZERO_SHOT):
        return [*words, "--checkpoint", checkpoint]
    if kind in (KNN, LINEAR) and words[:1] != [WHOLE]:
        return [_ENCODER, *words]
    return words


def _shortest(kind: str) -> list[str]:
    """Words that leave all options at their defaults."""
    return ["DIR"] if kind in (FINETUNE, GLUE) else _completed(kind, ["--data", "DIR"], "")


def _assert_a_lines(args: argparse.Namespace, defaults: argparse.Namespace) -> None:
    for name in _NOT_A_LINES:
        if getattr(args, name, None) != getattr(defaults, name, None):
            raise UserError(f"--{name.replace('_', '-')} is not a line's to say: leave it out")
