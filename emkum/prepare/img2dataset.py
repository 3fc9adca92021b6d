"""Folders of tars as img2dataset writes them (CC3M, CC12M, SBU and others), or any in the WebDataset convention."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from emkum.errors import UserError
from emkum.prepare.common import add_common_arguments, add_set_parser, run_set
from emkum.prepare.raw_set import TarSet
from emkum.prepare.sources import parse_splits


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `img2dataset`."""
    parser = add_set_parser(
        subparsers,
        "img2dataset",
        help="tars that img2dataset wrote: CC3M, CC12M, SBU or any others",
        description="Index tars in the WebDataset convention (KEY.jpg, KEY.txt, KEY.json) where they are. They are\n"
        "neither changed nor copied, and must stay: the folder that is made names theirs. Captions come from KEY.txt,\n"
        'or else from "caption" in KEY.json; what img2dataset leaves beside the tars is not needed.',
        example="  emkum prepare img2dataset --input cc3m --valid-shards 2 --out data/cc3m\n"
        "  emkum prepare img2dataset --split train=cc3m/train --split valid=cc3m/valid --out data/cc3m",
    )
    parser.add_argument("--input", type=Path, metavar="DIR", help="folder of the tars, which all go to train")
    parser.add_argument(
        "--valid-shards",
        type=int,
        default=0,
        metavar="N",
        help="with --input: its last N tars, by name, are the split valid instead; 0 = none (default)",
    )
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="folder of a split's tars, instead of --input; NAME is train, valid (or val, dev) or test; give it once "
        "a split",
    )
    add_common_arguments(parser, vocab_size=0, shrink=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the folder that the arguments of the sub-command describe."""
    if (args.input is None) == (not args.split):
        raise UserError("give either --input DIR or --split NAME=DIR once a split")
    if args.split and args.valid_shards != 0:
        raise UserError("--valid-shards goes with --input; --split names the folder of each split itself")
    raw = Img2Dataset({"train": args.input} if args.input else parse_splits(args.split), args.valid_shards)
    out = args.out.resolve()
    for folder in raw.folders.values():
        if out.is_relative_to(folder.resolve()):
            raise UserError(f"--out {args.out} lies in {folder}, in which nothing is written: choose another")
    run_set(raw, args)


class Img2Dataset(TarSet):
    """The raw set.

    Args:
        folders: split -> the folder of its tars, `*.tar`, taken in the order of their names.
        valid_shards: how many of the last tars of `train` are the split `valid` instead.

    Raises:
        UserError: a folder is missing or holds no tar, or train would keep none.
    """

    name = "img2dataset"

    def __init__(self, folders: Mapping[str, Path], valid_shards: int = 0) -> None:
        self.options = {"valid_shards": valid_shards}
        self.folders: dict[str, Path] = dict(folders)
        self.tars: dict[str, Sequence[str]] = {split: _tar_names(folder) for split, folder in folders.items()}
        self.sources = {f"tars of {split}": folder for split, folder in folders.items()}
        if valid_shards == 0:
            return
        names = self.tars["train"]
        if not 0 < valid_shards < len(names):
            raise UserError(
                f"--valid-shards {valid_shards}: want 0 to {len(names) - 1}, for {folders['train']} holds "
                f"{len(names)} tars"
            )
        self.folders["valid"] = folders["train"]
        self.tars = {"train": names[:-valid_shards], "valid": names[-valid_shards:]}


def _tar_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    names = sorted(path.name for path in folder.glob("*.tar") if path.is_file() and not path.name.startswith("."))
    if not names:
        raise UserError(f"folder {folder} holds no *.tar")
    return names
