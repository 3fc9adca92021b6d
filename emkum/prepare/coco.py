"""COCO captions (Lin et al., 2014; Chen et al., 2015) with COCO's own splits or Karpathy's."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from emkum.errors import UserError
from emkum.prepare.common import add_common_arguments, add_set_parser, run_set
from emkum.prepare.photos import (
    Photo,
    PhotoSet,
    add_images_argument,
    field_of,
    read_json,
    read_karpathy,
    read_names,
)
from emkum.prepare.sources import SPLIT_NAMES, SPLIT_ORDER, assert_disjoint, assert_none, parse_splits


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `coco`."""
    parser = add_set_parser(
        subparsers,
        "coco",
        help="COCO: photos with five captions each, of 2014 or 2017, with COCO's or Karpathy's splits",
        description="COCO captions from COCO's own JSON or from Karpathy's. The photos' files may have the names of\n"
        "2014 (COCO_val2014_000000000042.jpg) or of 2017 (000000000042.jpg), whichever the JSON has. Images that\n"
        "the JSON lists without captions are left out and counted.",
        example="  emkum prepare coco --images train2017.zip val2017.zip --captions train=captions_train2017.json \\\n"
        "      --captions valid=captions_val2017.json --out data/coco\n"
        "  emkum prepare coco --images train2014 val2014 --karpathy dataset_coco.json --out data/coco\n"
        "  emkum prepare coco --images val2014.zip --captions captions_val2014.json \\\n"
        "      --split valid=karpathy_val_images.txt --split test=karpathy_test_images.txt --out data/coco_5k",
    )
    add_images_argument(parser)
    forms = parser.add_mutually_exclusive_group(required=True)
    forms.add_argument(
        "--captions",
        action="append",
        metavar="[NAME=]FILE",
        help="COCO's captions_*.json, as often as there are files. With NAME (train, valid, val, dev or test) all its "
        "images are of that split, save those that a --split names; without, it gives what --split names alone",
    )
    forms.add_argument(
        "--karpathy", type=Path, metavar="FILE", help="Karpathy's dataset_coco.json, which holds captions and splits"
    )
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="with --captions: names of a split's images, one a line, such as karpathy_val_images.txt",
    )
    parser.add_argument(
        "--no-restval",
        action="store_true",
        help="with --karpathy: leave out the 30,504 images of his split restval, which else are part of train",
    )
    add_common_arguments(parser, vocab_size=0)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the folder that the arguments of the sub-command describe."""
    if args.karpathy is None:
        if args.no_restval:
            raise UserError("--no-restval belongs to --karpathy: COCO's own files know no split restval")
        captions, lists = parse_captions(args.captions), parse_splits(args.split)
        options = {"captions": [name for name, _ in captions]}
        sources = {f"captions {number}": path for number, (_, path) in enumerate(captions, start=1)}
        sources |= {f"split {name}": path for name, path in lists.items()}
        splits = choose_splits(captions, lists)
    else:
        if args.split:
            raise UserError("--split belongs to --captions: Karpathy's file holds its own splits")
        options, sources = {"restval": not args.no_restval}, {"karpathy": args.karpathy}
        splits = read_karpathy(args.karpathy, "coco", "cocoid", not args.no_restval)
    run_set(Coco(args.images, splits, sources, options), args)


class Coco(PhotoSet):
    """The raw set: `PhotoSet` whose photos may have the file names of another year than the JSON has."""

    name = "coco"

    def file_names(self, photo: Photo) -> tuple[str, ...]:
        return photo.file_name, *file_names(photo.image_id)


def file_names(image_id: int) -> tuple[str, ...]:
    """Base names that COCO has given to a photo: of 2017, then of 2014 and 2015."""
    name = f"{image_id:012d}.jpg"
    return name, *(f"COCO_{part}_{name}" for part in ("train2014", "val2014", "test2014", "test2015"))


def parse_captions(arguments: Sequence[str]) -> list[tuple[str | None, Path]]:
    """[NAME=]FILE arguments to pairs of split, None without NAME, and file.

    Raises:
        UserError: NAME is none of the splits.
    """
    captions: list[tuple[str | None, Path]] = []
    for argument in arguments:
        name, equals, file = argument.partition("=")
        if equals and file and name in SPLIT_NAMES:
            captions.append((SPLIT_NAMES[name], Path(file)))
        elif not equals or Path(argument).is_file():
            captions.append((None, Path(argument)))
        else:
            raise UserError(f"--captions {argument}: want FILE or NAME=FILE with NAME one of {', '.join(SPLIT_NAMES)}")
    return captions


def choose_splits(captions: Sequence[tuple[str | None, Path]], lists: Mapping[str, Path]) -> dict[str, list[Photo]]:
    """Photos of each split: those of its list in the list's order, or else those of its files that no list names.

    Args:
        captions: pairs of split, or None, and COCO's JSON.
        lists: split -> list of image names.

    Raises:
        UserError: a file is missing or malformed, of no use or of two uses, an image is in two files or lists, or a
            list names an image that no file has.
    """
    named = {name for name, _ in captions if name is not None}
    for name in lists:
        if name in named:
            raise UserError(f"both --captions {name}=... and --split {name}=... are given: give --captions FILE alone")
    for name, path in captions:
        if name is None and not lists:
            raise UserError(f"--captions {path}: want --captions NAME={path}, or --split NAME=FILE beside it")
    photos = [read_captions(path) for _, path in captions]
    paths = [path for _, path in captions]
    ids = {str(number): [photo.image_id for photo in chosen] for number, chosen in enumerate(photos)}
    assert_disjoint(ids, {str(number): path for number, path in enumerate(paths)})
    by_id = {photo.image_id: photo for chosen in photos for photo in chosen}
    listed = {name: read_ids(path) for name, path in lists.items()}
    assert_disjoint(listed, lists)
    for name, wanted in listed.items():
        missing = [str(image_id) for image_id in wanted if image_id not in by_id]
        assert_none(missing, f"{lists[name]}: not in {', '.join(map(str, paths))}")
    taken = {image_id for wanted in listed.values() for image_id in wanted}
    splits: dict[str, list[Photo]] = {name: [by_id[i] for i in wanted] for name, wanted in listed.items()}
    for (name, _), chosen in zip(captions, photos, strict=True):
        if name is not None:
            splits.setdefault(name, []).extend(photo for photo in chosen if photo.image_id not in taken)
    return {name: splits[name] for name in SPLIT_ORDER if name in splits}


def read_captions(path: Path) -> list[Photo]:
    """Photos of COCO's captions JSON in its order, each with its captions in the order of their annotations' ids.

    Raises:
        UserError: the file is missing or malformed, or an annotation is of an image that it does not list.
    """
    content = read_json(path)
    names: dict[int, str] = {}
    for number, entry in enumerate(field_of(content, "images", list, path)):
        where = f"{path}, images[{number}]"
        image_id = field_of(entry, "id", int, where)
        if image_id in names:
            raise UserError(f"{where}: image {image_id} is listed twice")
        names[image_id] = PurePosixPath(field_of(entry, "file_name", str, where)).name
    captions: dict[int, list[tuple[int, str]]] = {image_id: [] for image_id in names}
    for number, entry in enumerate(field_of(content, "annotations", list, path)):
        where = f"{path}, annotations[{number}]"
        image_id = field_of(entry, "image_id", int, where)
        if image_id not in captions:
            raise UserError(f"{where}: image {image_id} is not among the file's images")
        captions[image_id].append((field_of(entry, "id", int, where), field_of(entry, "caption", str, where)))
    return [Photo(name, i, tuple(caption for _, caption in sorted(captions[i]))) for i, name in names.items()]


def read_ids(path: Path) -> list[int]:
    """COCO's numbers of the images of a list of names.

    Raises:
        UserError: the file cannot be read or is empty, or a name does not end in a number.
    """
    ids = []
    for name in read_names(path):
        digits = re.search(r"\d+$", PurePosixPath(name).stem)
        if digits is None:
            raise UserError(f"{path}: want names that end in COCO's number, as 000000000042.jpg does, not {name}")
        ids.append(int(digits[0]))
    return ids
