"""Flickr8k (Hodosh, Young and Hockenmaier, 2013) from the files that people have."""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from emkum.errors import UserError
from emkum.prepare.common import add_common_arguments, add_set_parser, run_set
from emkum.prepare.raw_set import ImageSet, RawSample, Skipped
from emkum.prepare.sources import ImageFiles, assert_disjoint, parse_splits, read_error, read_lines


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `flickr8k`."""
    parser = add_set_parser(
        subparsers,
        "flickr8k",
        help="Flickr8k: photos with five captions each",
        description="Flickr8k from its raw files. Image files that cannot be decoded are left out and listed in\n"
        "skipped.jsonl.",
        example="  emkum prepare flickr8k --images Images.zip --captions captions.txt \\\n"
        "      --split train=Flickr_8k.trainImages.txt --split valid=Flickr_8k.devImages.txt \\\n"
        "      --split test=Flickr_8k.testImages.txt --out data/flickr8k",
    )
    parser.add_argument(
        "--images", type=Path, required=True, metavar="PATH", help="folder, zip or tar of the photos, at any depth"
    )
    parser.add_argument(
        "--captions",
        type=Path,
        required=True,
        metavar="FILE",
        help="captions.txt (CSV with the header image,caption) or Flickr8k.token.txt (NAME.jpg#0, a tab, the caption)",
    )
    parser.add_argument(
        "--split",
        action="append",
        required=True,
        metavar="NAME=FILE",
        help="names of a split's images, one a line; NAME is train, valid (or val, dev) or test; give it once a split",
    )
    add_common_arguments(parser, vocab_size=4000)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the folder that the arguments of the sub-command describe."""
    run_set(Flickr8k(args.images, args.captions, parse_splits(args.split)), args)


class Flickr8k(ImageSet):
    """The raw set.

    Args:
        images: folder, zip or tar.
        captions: captions file in either format.
        splits: split name -> file with image names.

    Raises:
        UserError: a file is missing or malformed, an image is listed twice, or no image of a split is there.
    """

    name = "flickr8k"

    def __init__(self, images: Path, captions: Path, splits: dict[str, Path]) -> None:
        self.options: dict[str, object] = {}
        self.sources = {"images": images, "captions": captions} | {f"split {name}": splits[name] for name in splits}
        self._captions = read_captions(captions)
        # Ids do not depend on the splits that are asked for.
        self._image_ids = {name: position for position, name in enumerate(sorted(self._captions))}
        self._names = {name: _read_names(path) for name, path in splits.items()}
        self._files = ImageFiles(images)
        self._file_of = self._files.by_base_name(name for names in self._names.values() for name in names)
        self.counts = {name: len(names) for name, names in self._names.items()}
        for split, names in self._names.items():
            for what, there, where in (("captions", self._captions, captions), ("file", self._file_of, images)):
                if not any(name in there for name in names):
                    raise UserError(f"{splits[split]}: no {what} in {where} for any of its images, such as {names[0]}")
        assert_disjoint(self._names, splits)

    def samples(self, split: str, start: int, stop: int) -> Iterator[RawSample | Skipped]:
        """In the order of the split's list."""
        for name in self._names[split][start:stop]:
            if name not in self._captions or name not in self._file_of:
                yield Skipped(name, f"no {'file' if name in self._captions else 'captions'} of this name")
                continue
            try:
                image = self._files.read(self._file_of[name])
            except Exception as error:  # zipfile and zlib raise many kinds for broken files
                yield Skipped(name, read_error(error))
                continue
            key, meta = PurePosixPath(name).stem, {"file_name": name}
            yield RawSample(key, image, self._captions[name], self._image_ids[name], meta)


def read_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """Captions of each image, by its file name, from Kaggle's CSV or the original token file.

    Raises:
        UserError: the file is missing or a line is malformed.
    """
    lines = read_lines(path)
    is_csv = bool(lines) and lines[0].replace(" ", "").lower() == "image,caption"
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(lines[1:] if is_csv else lines, start=2 if is_csv else 1):
        if not line:
            continue
        if is_csv:
            # Line by line: a stray quotation mark must not swallow the lines after it.
            name, *rest = next(csv.reader([line]))
            caption = ",".join(rest)
        else:
            tagged, _, caption = line.partition("\t")
            name, tag, _ = tagged.partition("#")
        if not name.strip() or not (rest if is_csv else tag):
            want = "image,caption" if is_csv else "the header image,caption or lines like NAME.jpg#0<TAB>caption"
            raise UserError(f"{path}, line {number}: want {want}")
        captions.setdefault(name.strip(), []).append(caption.strip())
    if not captions:
        raise UserError(f"{path} holds no captions")
    return {name: tuple(texts) for name, texts in captions.items()}


def _read_names(path: Path) -> list[str]:
    names = [line for line in read_lines(path) if line]
    if not names:
        raise UserError(f"split list {path} is empty")
    return names
