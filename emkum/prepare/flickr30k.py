"""Flickr30k (Young et al., 2014) from the files that people have."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from emkum.errors import UserError
from emkum.prepare.common import add_common_arguments, add_set_parser, run_set
from emkum.prepare.photos import Photo, PhotoSet, add_images_argument, read_karpathy, read_names
from emkum.prepare.sources import assert_disjoint, assert_none, parse_splits, read_lines

# NAME.jpg#0<TAB>caption, or NAME.jpg| 0| caption. One line of Kaggle's file lacks its second bar.
_LINE = re.compile(r"(?P<name>[^|#]*[^|#\s])\s*[|#]\s*(?P<number>\d+)(?:\s*\||\s|$)\s*(?P<caption>.*)")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `flickr30k`."""
    parser = add_set_parser(
        subparsers,
        "flickr30k",
        help="Flickr30k: photos with five captions each, with Karpathy's splits or lists",
        description="Flickr30k from Karpathy's JSON, or from the original captions and lists of the splits' images.",
        example="  emkum prepare flickr30k --images flickr30k-images --karpathy dataset_flickr30k.json \\\n"
        "      --out data/flickr30k\n"
        "  emkum prepare flickr30k --images flickr30k-images.tar --captions results_20130124.token \\\n"
        "      --split train=train.txt --split valid=val.txt --split test=test.txt --out data/flickr30k",
    )
    add_images_argument(parser)
    forms = parser.add_mutually_exclusive_group(required=True)
    forms.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help="results_20130124.token (NAME.jpg#0, a tab, the caption) or results.csv (NAME.jpg| 0| the caption)",
    )
    forms.add_argument(
        "--karpathy", type=Path, metavar="FILE", help="Karpathy's dataset_flickr30k.json, with captions and splits"
    )
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="with --captions: names of a split's images, one a line, with or without .jpg; NAME is train, valid (or "
        "val, dev) or test; give it once a split",
    )
    add_common_arguments(parser, vocab_size=0)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the folder that the arguments of the sub-command describe."""
    if (args.karpathy is None) == (not args.split):
        raise UserError("--split NAME=FILE goes with --captions, once a split; --karpathy holds its own splits")
    if args.karpathy is not None:
        sources = {"karpathy": args.karpathy}
        splits = read_karpathy(args.karpathy, "flickr30k", "imgid")
    else:
        lists = parse_splits(args.split)
        sources = {"captions": args.captions} | {f"split {name}": path for name, path in lists.items()}
        splits = choose_splits(args.captions, lists)
    run_set(Flickr30k(args.images, splits, sources, {}), args)


class Flickr30k(PhotoSet):
    """The raw set."""

    name = "flickr30k"


def choose_splits(captions: Path, lists: Mapping[str, Path]) -> dict[str, list[Photo]]:
    """Photos of each split in the order of its list.

    Raises:
        UserError: a file is missing or malformed, or a list names an image that has no captions or is listed before.
    """
    photos = read_captions(captions)
    names = {split: [_with_suffix(name) for name in read_names(path)] for split, path in lists.items()}
    for split, chosen in names.items():
        assert_none([name for name in chosen if name not in photos], f"{lists[split]}: no captions in {captions}")
    assert_disjoint(names, lists)
    return {split: [photos[name] for name in chosen] for split, chosen in names.items()}


def read_captions(path: Path) -> dict[str, Photo]:
    """Photos by their file names, each with its captions in the order of their numbers; image ids count the names.

    Raises:
        UserError: the file cannot be read, or a line is malformed.
    """
    captions: dict[str, list[tuple[int, str]]] = {}
    for number, line in enumerate(read_lines(path), start=1):
        if not line or (number == 1 and line.replace(" ", "") == "image_name|comment_number|comment"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(f"{path}, line {number}: want NAME.jpg#0<TAB>caption or NAME.jpg| 0| caption")
        captions.setdefault(match["name"], []).append((int(match["number"]), match["caption"]))
    if not captions:
        raise UserError(f"{path} holds no captions")
    return {
        name: Photo(name, place, tuple(caption for _, caption in sorted(captions[name])))
        for place, name in enumerate(sorted(captions))
    }


def _with_suffix(name: str) -> str:
    return name if PurePosixPath(name).suffix else f"{name}.jpg"
