"""Flickr8k (Hodosh, Young and Hockenmaier, 2013) from the files that people have."""

import argparse
import csv
import hashlib
import io
import zipfile
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path, PurePosixPath

from PIL import Image

from emkum.errors import UserError
from emkum.prepare.common import RawSample, SkippedSample, add_common_arguments, prepare

_SPLIT_NAMES = {"train": "train", "valid": "valid", "val": "valid", "dev": "valid", "test": "test"}
_FORMAT_SUFFIX = {"JPEG": "jpg", "PNG": "png"}

_EXAMPLE = """\
example:
  emkum prepare flickr8k --images Images.zip --captions captions.txt \\
      --split train=Flickr_8k.trainImages.txt --split valid=Flickr_8k.devImages.txt \\
      --split test=Flickr_8k.testImages.txt --out data/flickr8k
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `flickr8k`."""
    parser = subparsers.add_parser(
        "flickr8k",
        help="Flickr8k: photos with five captions each",
        description="Flickr8k from its raw files. Image files are stored unchanged; those that cannot be decoded are\n"
        "left out and listed in skipped.jsonl.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--images", type=Path, required=True, metavar="PATH", help="zip or folder of the photos, at any depth"
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
    prepare(Flickr8k(args.images, args.captions, parse_splits(args.split)), args.out, args.vocab_size)


class Flickr8k:
    """The raw set.

    Args:
        images: zip or folder.
        captions: captions file in either format.
        splits: split name -> file with image names.

    Raises:
        UserError: a file is missing or malformed, an image is listed twice, or lacks its file or captions.
    """

    name = "flickr8k"

    def __init__(self, images: Path, captions: Path, splits: dict[str, Path]) -> None:
        self.options: dict[str, object] = {}
        self.sources = {"images": images, "captions": captions} | {f"split {name}": splits[name] for name in splits}
        self._captions = read_captions(captions)
        # Ids do not depend on the splits that are asked for.
        self._image_ids = {name: position for position, name in enumerate(sorted(self._captions))}
        self._names = {name: _read_names(path) for name, path in splits.items()}
        self._id_of_content: dict[bytes, int] = {}
        self._readers = image_readers(images, {name for names in self._names.values() for name in names})
        self.counts = {name: len(names) for name, names in self._names.items()}
        self._check(images, captions, splits)

    def samples(self, split: str) -> Iterator[RawSample | SkippedSample]:
        """In the order of the split's list."""
        for name in self._names[split]:
            try:
                data = self._readers[name]()
                suffix = image_suffix(data)
            # Pillow and zipfile raise many kinds for broken files: OSError, SyntaxError, ValueError, zlib.error, ...
            except Exception as error:
                reason = str(error).splitlines()
                yield SkippedSample(name, f"{type(error).__name__}: {reason[0] if reason else 'cannot be decoded'}")
                continue
            # The set holds files of equal content under two names.
            content = hashlib.blake2b(data, digest_size=16).digest()
            yield RawSample(
                key=PurePosixPath(name).stem.replace(".", "_"),
                image=data,
                suffix=suffix,
                captions=self._captions[name],
                image_id=self._id_of_content.setdefault(content, self._image_ids[name]),
                meta={"file_name": name},
            )

    def _check(self, images: Path, captions: Path, splits: dict[str, Path]) -> None:
        seen: dict[str, str] = {}
        for split, names in self._names.items():
            _assert_none([n for n in names if n not in self._captions], f"{splits[split]}: no captions in {captions}")
            _assert_none([n for n in names if n not in self._readers], f"{splits[split]}: no file in {images}")
            for name in names:
                if name in seen:
                    raise UserError(f"image {name} is listed twice: in {seen[name]} and in {splits[split]}")
                seen[name] = str(splits[split])


def _assert_none(names: list[str], what: str) -> None:
    if names:
        raise UserError(f"{what} for {len(names)} of its images, the first {names[0]}")


def parse_splits(arguments: Sequence[str]) -> dict[str, Path]:
    """NAME=FILE arguments to split -> file, in the order train, valid, test.

    Raises:
        UserError: one is malformed, given twice, or its file is missing.
    """
    splits: dict[str, Path] = {}
    for argument in arguments:
        name, equals, file = argument.partition("=")
        if not equals or not file or name not in _SPLIT_NAMES:
            raise UserError(f"--split {argument}: want NAME=FILE with NAME one of {', '.join(_SPLIT_NAMES)}")
        split = _SPLIT_NAMES[name]
        if split in splits:
            raise UserError(f"--split {argument}: {split} is given twice")
        if not Path(file).is_file():
            raise UserError(f"--split {argument}: there is no file {file}")
        splits[split] = Path(file)
    return {name: splits[name] for name in ("train", "valid", "test") if name in splits}


def read_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """Captions of each image, by its file name, from Kaggle's CSV or the original token file.

    Raises:
        UserError: the file is missing or a line is malformed.
    """
    lines = _read_lines(path)
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
            caption = caption if tag else ""
        if not name or not caption.strip():
            want = "image,caption" if is_csv else "the header image,caption or lines like NAME.jpg#0<TAB>caption"
            raise UserError(f"{path}, line {number}: want {want}")
        captions.setdefault(name.strip(), []).append(caption.strip())
    if not captions:
        raise UserError(f"{path} holds no captions")
    return {name: tuple(texts) for name, texts in captions.items()}


def _read_names(path: Path) -> list[str]:
    names = [line for line in _read_lines(path) if line]
    if not names:
        raise UserError(f"split list {path} is empty")
    return names


def _read_lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None


def image_readers(path: Path, wanted: Set[str]) -> dict[str, Callable[[], bytes]]:
    """For each wanted file of a zip or folder, by its name without folders, a function that reads it.

    Raises:
        UserError: `path` is neither, or two wanted files share a name.
    """
    readers: dict[str, Callable[[], bytes]] = {}
    if path.is_dir():
        files = [(entry.name, entry.read_bytes) for entry in sorted(path.rglob("*")) if entry.is_file()]
    elif path.is_file():
        files = _zip_readers(path)
    else:
        raise UserError(f"--images: there is no zip or folder {path}")
    for name, reader in files:
        if name not in wanted:
            continue
        if name in readers:
            raise UserError(f"{path} holds two files named {name}")
        readers[name] = reader
    return readers


def _zip_readers(path: Path) -> list[tuple[str, Callable[[], bytes]]]:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError):
        raise UserError(f"--images: {path} is neither a folder nor a zip file") from None

    def reader(info: zipfile.ZipInfo) -> Callable[[], bytes]:
        return lambda: archive.read(info)

    members = [(PurePosixPath(info.filename), info) for info in archive.infolist() if not info.is_dir()]
    # macOS packs a shadow tree of resource forks.
    return [(name.name, reader(info)) for name, info in members if "__MACOSX" not in name.parts]


def image_suffix(data: bytes) -> str:
    """Decode an image wholly; give its file suffix, jpg or png.

    Raises:
        Exception: whatever Pillow raises for a broken file; ValueError for another format.
    """
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        if image.format not in _FORMAT_SUFFIX:
            raise ValueError(f"format {image.format} is neither JPEG nor PNG")
        return _FORMAT_SUFFIX[image.format]
