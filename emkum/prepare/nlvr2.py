"""NLVR2 (Suhr et al., 2019): statements about pairs of photos."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from emkum.errors import UserError
from emkum.prepare.common import add_common_arguments, add_set_parser, run_set
from emkum.prepare.photos import PhotoFiles, add_images_argument, field_of
from emkum.prepare.raw_set import ImageSet, RawSample, Settings, Skipped
from emkum.prepare.sources import assert_disjoint, parse_splits, read_lines

# What the names of a pair's images end in -> their side.
SIDES = {"img0": "left", "img1": "right"}
_LABELS = {"True": True, "False": False}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `nlvr2`."""
    parser = add_set_parser(
        subparsers,
        "nlvr2",
        help="NLVR2: pairs of photos with true and false statements",
        description="NLVR2: two samples a pair, PAIR_img0 and PAIR_img1, which follow one another and have no\n"
        "captions. The JSON of both holds the pair's name and their side, left or right; that of the left one the\n"
        "statements, {identifier, sentence, label}. A pair of which one image cannot be used is left out; --limit\n"
        "counts pairs.",
        example="  emkum prepare nlvr2 --images images/train dev test1 --split train=train.json \\\n"
        "      --split valid=dev.json --split test=test1.json --out data/nlvr2",
    )
    add_images_argument(parser)
    parser.add_argument(
        "--split",
        action="append",
        required=True,
        metavar="NAME=FILE",
        help="official JSON lines (train.json, dev.json, test1.json); NAME is train, valid (or val, dev) or test; give "
        "it once a split",
    )
    add_common_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the folder that the arguments of the sub-command describe."""
    run_set(Nlvr2(args.images, parse_splits(args.split)), args)


class Nlvr2(ImageSet):
    """The raw set, whose items are pairs.

    Args:
        images: folders, zips or tars.
        splits: split -> file of statements.

    Raises:
        UserError: a file is missing or malformed, or a pair is in two splits.
    """

    name = "nlvr2"

    def __init__(self, images: Sequence[Path], splits: Mapping[str, Path]) -> None:
        self.options: dict[str, object] = {}
        self._statements = {split: read_statements(path) for split, path in splits.items()}
        assert_disjoint(self._statements, splits)
        self.counts = {split: len(pairs) for split, pairs in self._statements.items()}
        pairs = (pair for statements in self._statements.values() for pair in statements)
        self._files = PhotoFiles(images, (f"{pair}-{image}.png" for pair in pairs for image in SIDES))
        self.sources = {f"split {split}": path for split, path in splits.items()} | self._files.sources

    def part_sizes(self, split: str, settings: Settings) -> list[int]:
        # In samples, since bad samples are held against it.
        return [len(SIDES) * pairs for pairs in super().part_sizes(split, settings)]

    def range_of(self, split: str, part: int, settings: Settings) -> tuple[int, int]:
        start, stop = super().range_of(split, part, settings)
        return start, start + (stop - start) // len(SIDES)

    def samples(self, split: str, start: int, stop: int) -> Iterator[RawSample | Skipped]:
        """Both images of each pair, pairs in the order of the file."""
        for pair, statements in islice(self._statements[split].items(), start, stop):
            images = {name: self._files.read(f"{pair}_{name}", f"{pair}-{name}.png") for name in SIDES}
            bad = next((image for image in images.values() if isinstance(image, Skipped)), None)
            for name, image in images.items():
                key, meta = f"{pair}_{name}", {"pair": pair, "side": SIDES[name]}
                if isinstance(image, Skipped):
                    yield image
                elif bad is not None:
                    yield Skipped(key, f"belongs to {bad.key}")
                else:
                    own = {"statements": statements} if meta["side"] == "left" else {}
                    yield RawSample(key, image, meta=meta | own, group=pair)


def read_statements(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Statements about each pair, {identifier, sentence, label}, in the order of the file.

    Raises:
        UserError: the file cannot be read, a line is malformed, or a statement is listed twice.
    """
    pairs: dict[str, list[dict[str, Any]]] = {}
    seen: set[str] = set()
    for number, line in enumerate(read_lines(path), start=1):
        if not line:
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is no JSON: {error}") from None
        identifier = field_of(entry, "identifier", str, where)
        # SPLIT-SET-PAIR-STATEMENT
        pair, _, statement = identifier.rpartition("-")
        if pair.count("-") != 2 or not statement.isdecimal():
            raise UserError(f"{where}: want an identifier such as train-10171-0-0, not {identifier}")
        if identifier in seen:
            raise UserError(f"{where}: {identifier} is listed twice")
        seen.add(identifier)
        label = field_of(entry, "label", str, where)
        if label not in _LABELS:
            raise UserError(f"{where}: label {label} is none of {', '.join(_LABELS)}")
        # What was not UTF-8 becomes a question mark: such texts cannot be stored.
        sentence = field_of(entry, "sentence", str, where).encode("utf-8", errors="replace").decode()
        pairs.setdefault(pair, []).append({"identifier": identifier, "sentence": sentence, "label": _LABELS[label]})
    if not pairs:
        raise UserError(f"{path} holds no statements")
    return pairs
