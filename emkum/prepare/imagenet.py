"""ImageNet-1K (ILSVRC2012) from class folders or from its tars, which are read where they are."""

import argparse
import csv
import re
import tarfile
import zipfile
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from emkum.errors import UserError
from emkum.prepare.common import add_common_arguments, add_set_parser, run_set
from emkum.prepare.image_folder import ClassImages, is_image
from emkum.prepare.sources import ImageFiles, assert_none, read_error, read_lines

_WNID = re.compile(r"n\d{8}")
_META_NAME = "meta.mat"
_LABEL_FORMS = (
    "the devkit's ILSVRC2012_validation_ground_truth.txt, Kaggle's LOC_val_solution.csv, a synset a line, or lines "
    "NAME.JPEG LABEL with labels from 0"
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `imagenet`."""
    parser = add_set_parser(
        subparsers,
        "imagenet",
        help="ImageNet-1K: photos of 1,000 classes",
        description="ImageNet (ILSVRC2012) from folders, zips or tars of its images, or from the official tars, which\n"
        "are not extracted. The class of an image is the synset that names its folder (n01440764/1.JPEG) or begins\n"
        "its file's name (n01440764_1.JPEG); its label is the place of that synset in --synsets. Samples have label,\n"
        "class_name and wnid, and classes.json lists these by label.",
        example="  emkum prepare imagenet --train ILSVRC2012_img_train.tar --valid ILSVRC2012_img_val.tar \\\n"
        "      --valid-labels ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt \\\n"
        "      --synsets synset_words.txt --image-size 256 --out data/imagenet\n"
        "  emkum prepare imagenet --train imagenet/train --valid imagenet/val --synsets synset_words.txt \\\n"
        "      --out data/imagenet",
    )
    parser.add_argument(
        "--train", type=Path, metavar="PATH", help="folder, zip or tar of images, or folder or tar of a tar a class"
    )
    parser.add_argument("--valid", type=Path, metavar="PATH", help="the same; or a flat one, with --valid-labels")
    parser.add_argument(
        "--valid-labels",
        "--val-labels",
        type=Path,
        metavar="FILE",
        help=f"classes of the images ILSVRC2012_val_*: {_LABEL_FORMS}",
    )
    parser.add_argument(
        "--synsets",
        type=Path,
        required=True,
        metavar="FILE",
        help="synset_words.txt or LOC_synset_mapping.txt: a synset and its words a line, in the order of labels",
    )
    add_common_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the folder that the arguments of the sub-command describe."""
    images = {"train": args.train, "valid": args.valid}
    images = {split: path for split, path in images.items() if path is not None}
    if not images:
        raise UserError("give --train PATH, --valid PATH or both")
    if args.valid_labels is not None and args.valid is None:
        raise UserError("--valid-labels are those of --valid PATH: give that too")
    run_set(ImageNet(images, args.synsets, args.valid_labels), args)


class ImageNet(ClassImages):
    """The raw set.

    Args:
        images: split -> folder, zip or tar of its images, or of a tar for each class.
        synsets: file of synsets and words.
        valid_labels: classes of validation images that are in no class folders.

    Raises:
        UserError: a file is missing or malformed, or a class unknown.
    """

    name = "imagenet"

    def __init__(self, images: dict[str, Path], synsets: Path, valid_labels: Path | None = None) -> None:
        words = read_synsets(synsets)
        label_of = {wnid: label for label, wnid in enumerate(words)}
        self.options: dict[str, object] = {}
        self.sources = {**images, "synsets": synsets}
        files = {split: open_images(path, f"--{split}") for split, path in images.items()}
        names = {split: sorted(name for name in found.names if is_image(name)) for split, found in files.items()}
        labels = {}
        for split, there in names.items():
            if not there:
                raise UserError(f"--{split}: {images[split]} holds no images")
            label, where = _by_synset(label_of, synsets, images[split]), "its folder or name"
            if split == "valid" and valid_labels is not None:
                label, where = _by_list(read_valid_labels(valid_labels, label_of, synsets)), valid_labels
                self.sources["valid labels"] = valid_labels
                meta = valid_labels.with_name(_META_NAME)
                self.sources |= {"synset numbers": meta} if meta.is_file() else {}
            labels[split] = _labels(there, label, f"--{split}: {images[split]}: no class in {where}")
        super().__init__(files, names, labels, {"class_name": list(words.values()), "wnid": list(words)})


def read_synsets(path: Path) -> dict[str, str]:
    """Synset -> its words, in the order of labels.

    Raises:
        UserError: the file is missing or malformed.
    """
    words: dict[str, str] = {}
    for number, line in enumerate(read_lines(path), start=1):
        if not line:
            continue
        wnid, _, text = line.replace("\t", " ").partition(" ")
        if not _WNID.fullmatch(wnid) or not text.strip() or wnid in words:
            raise UserError(f"{path}, line {number}: want a synset not listed before and its words: n01440764 tench")
        words[wnid] = text.strip()
    if not words:
        raise UserError(f"{path} holds no synsets")
    return words


def _labels(names: Sequence[str], label: Callable[[str], int | None], problem: str) -> np.ndarray:
    """(images,) their labels; UserError with the problem where one has none."""
    labels = [label(name) for name in names]
    assert_none([name for name, found in zip(names, labels, strict=True) if found is None], problem)
    return np.array(labels, dtype=np.int32)


def _by_synset(label_of: dict[str, int], synsets: Path, images: Path) -> Callable[[str], int | None]:
    """Label of an image by its folder, or else by the beginning of its name; None = neither is a synset."""

    def label(name: str) -> int | None:
        path = PurePosixPath(name)
        for part in (*reversed(path.parts[:-1]), path.name.partition("_")[0]):
            if _WNID.fullmatch(part):
                if part not in label_of:
                    raise UserError(f"{images}: the class {part} of {name} is not in {synsets}")
                return label_of[part]
        return None

    return label


def _by_list(labels: dict[str, int]) -> Callable[[str], int | None]:
    return lambda name: labels.get(PurePosixPath(name).stem)


def read_valid_labels(path: Path, label_of: dict[str, int], synsets: Path) -> dict[str, int]:
    """Name of a validation image without its suffix -> label.

    Args:
        path: the file, in one of the four forms that people have it.
        label_of: synset -> label.
        synsets: where these are from, for messages.

    Raises:
        UserError: the file is missing, malformed or of another form, or names an unknown class.
    """
    lines = read_lines(path)
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{path} holds no labels; want {_LABEL_FORMS}")
    headers = int(lines[0].replace(" ", "").lower() == "imageid,predictionstring")
    parse = _kaggle_line if headers else _line_parser(path, lines[0], list(label_of))
    labels: dict[str, int] = {}
    for number, line in enumerate(lines[headers:], start=1):
        name, wnid = parse(line)
        name = name or f"ILSVRC2012_val_{number:08d}"
        if wnid not in label_of or name in labels:
            raise UserError(f"{path}, line {number + headers}: {line!r} is no class of {synsets}; want {_LABEL_FORMS}")
        labels[name] = label_of[wnid]
    return labels


def _line_parser(path: Path, first: str, wnids: Sequence[str]) -> Callable[[str], tuple[str, str | None]]:
    """From a line to the image's name, empty where its number is the line's, and the synset; None = there is none."""
    if first.isdecimal():
        numbers = _synset_numbers(path.with_name(_META_NAME), path)
        return lambda line: ("", numbers.get(line))
    if " " not in first:
        return lambda line: ("", line)

    def parse(line: str) -> tuple[str, str | None]:
        name, _, label = line.rpartition(" ")
        known = label.isdecimal() and int(label) < len(wnids)
        return PurePosixPath(name.strip()).stem, wnids[int(label)] if known else None

    return parse


def _kaggle_line(line: str) -> tuple[str, str]:
    """An image's name and the synset of the first of its boxes, which all have the same."""
    name, boxes, *_ = [*next(csv.reader([line]), []), "", ""]
    return name, boxes.partition(" ")[0]


def _synset_numbers(meta: Path, labels: Path) -> dict[str, str]:
    """ILSVRC2012_ID, as text -> synset.

    The devkit numbers the classes in an order of its own, which is not that of the usual synset lists: taking its
    numbers for places in one of these would give every image a wrong class.
    """
    if not meta.is_file():
        raise UserError(f"{labels} has the devkit's own numbers of classes: want its {meta.name} beside it, as there")
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{meta} is read by scipy: pip install scipy") from None
    try:
        synsets = loadmat(meta, squeeze_me=True, variable_names=["synsets"])["synsets"]
        return {str(int(one["ILSVRC2012_ID"])): str(one["WNID"]) for one in np.atleast_1d(synsets)}
    except Exception as error:  # scipy raises all sorts for files of another kind
        raise UserError(f"{meta} is not the devkit's: {read_error(error)}") from None


def open_images(path: Path, option: str) -> Any:
    """The images of a folder, a zip or a tar, or those of its tars where it holds a tar for each class.

    Raises:
        UserError: it is neither, or a tar is damaged.
    """
    files = ImageFiles(path, option)
    if files.names and all(name.endswith(".tar") for name in files.names) and not zipfile.is_zipfile(path):
        return ClassTars(path, files.names, option)
    return files


class ClassTars:
    """The images in tars of classes, which are in one tar or in one folder; named CLASS/FILE, CLASS without `.tar`.

    All headers are read once, which is a pass over all tars; nothing is extracted. Picklable.

    Args:
        path: the tar or folder.
        tars: names of the tars in it.
        option: the option that named it, for messages.

    Attributes:
        names: of the images, sorted.

    Raises:
        UserError: a tar is cut off or damaged.
    """

    def __init__(self, path: Path, tars: Sequence[str], option: str) -> None:
        self.path = path
        self._tars = [path / name for name in tars] if path.is_dir() else [path]
        names: list[str] = []
        # Arrays, not objects: more than a million images go to every worker process.
        places = array("q")
        try:
            for tar, folder, start, stop in _class_tars(path, tars):
                for info in _members(self._tars[tar], start, stop):
                    names.append(f"{folder}/{info.name}")
                    places.extend((tar, info.offset_data, info.size))
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{option}: {path} cannot be read: {error}") from None
        order = sorted(range(len(names)), key=names.__getitem__)
        self.names = [names[position] for position in order]
        # (images, 3): which tar, offset and length in it.
        self._places = np.array(places).reshape(-1, 3)[order]

    def read(self, name: str) -> bytes:
        """Content of an image.

        Raises:
            Exception: whatever the operating system raises for a file that cannot be read.
        """
        tar, offset, length = self._places[bisect_left(self.names, name)].tolist()
        with open(self._tars[tar], "rb") as file:
            file.seek(offset)
            return file.read(length)


def _class_tars(path: Path, tars: Sequence[str]) -> Iterator[tuple[int, str, int, int]]:
    """Number of the file that each tar of a class is in, the class, and where in the file it begins and ends."""
    if path.is_dir():
        for number, name in enumerate(tars):
            yield number, PurePosixPath(name).stem, 0, (path / name).stat().st_size
        return
    with tarfile.open(path, "r:") as outer:
        for info in outer:
            if info.isfile() and info.name in tars:
                yield 0, PurePosixPath(info.name).stem, info.offset_data, info.offset_data + info.size


def _members(path: Path, start: int, stop: int) -> Iterator[tarfile.TarInfo]:
    """Files of the tar that lies between two offsets of a file; theirs count from the file's beginning."""
    with open(path, "rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                if info.offset_data + info.size > stop:
                    raise tarfile.ReadError(f"cut off within {info.name}")
                if info.isfile():
                    yield info
