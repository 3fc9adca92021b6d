"""A user's own images: in class folders, or with a table of captions."""

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from emkum.data.shards import CLASSES_NAME
from emkum.errors import UserError
from emkum.prepare.caption_tables import SUFFIXES, CaptionTable
from emkum.prepare.common import add_common_arguments, add_set_parser, run_set
from emkum.prepare.raw_set import ImageSet, RawSample, Settings, Skipped
from emkum.prepare.sources import (
    SPLIT_NAMES,
    SPLIT_ORDER,
    ImageFiles,
    assert_disjoint,
    assert_none,
    parse_splits,
    read_error,
    read_lines,
)
from emkum.provenance import write_json

# Beside the splits of a set with classes: for each value that samples have of their class, the list of it by label.
DEFAULT_VALID_FRACTION = 0.05

# Files that are meant as images, those that cannot be read included: they are listed as skipped, not passed over.
_IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .png .webp .gif .bmp .tif .tiff .ppm .pgm .jp2 .heic .heif .avif .jxl".split()
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `image-folder`."""
    parser = add_set_parser(
        subparsers,
        "image-folder",
        help="your own images, in class folders or with a table of captions",
        description="Images in class folders (CLASS/FILE), or images with a table of captions.\n\n"
        "Splits are, in this order of preference: the lists that --split names; the folders train, valid (or val,\n"
        "dev) and test, where all images are in such; else train and, drawn by a hash of the image's name, valid.",
        example="  emkum prepare image-folder --images photos --captions captions.csv --out data/photos\n"
        "  emkum prepare image-folder --images birds.zip --valid-fraction 0.1 --out data/birds\n"
        "  emkum prepare image-folder --images photos --captions table.csv --sounds clips --out data/heard",
    )
    parser.add_argument("--images", type=Path, required=True, metavar="PATH", help="folder, zip or tar of the images")
    parser.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help=f"table ({', '.join('*' + suffix for suffix in SUFFIXES)}) with a column of image names and one of "
        "captions; several rows an image give it several captions; without a table, folders are classes and no "
        "tokenizer is trained",
    )
    parser.add_argument(
        "--sounds",
        type=Path,
        metavar="PATH",
        help="folder, zip or tar of a sound for each image, WAV (with soundfile also FLAC, OGG, MP3), that a column of "
        "the table names; stored at 16 kHz in one channel",
    )
    for what in ("image", "caption", "sound"):
        parser.add_argument(
            f"--{what}-column", metavar="NAME", help=f"of the table (default: {what}, or another usual name)"
        )
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="names of a split's images, one a line; NAME is train, valid (or val, dev) or test; give it once a split",
    )
    parser.add_argument(
        "--valid-fraction",
        type=float,
        metavar="F",
        help="the part of the train images that become the split valid, where there is none; 0 = none (default: "
        f"{DEFAULT_VALID_FRACTION} where there are neither lists nor folders of splits, else 0)",
    )
    add_common_arguments(parser, vocab_size=4000)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the folder that the arguments of the sub-command describe."""
    lists = parse_splits(args.split)
    if args.captions is not None:
        if args.sound_column and args.sounds is None:
            raise UserError("--sound-column names files of --sounds PATH: give it")
        columns = (args.image_column, args.caption_column, args.sound_column)
        raw = CaptionedImages(args.images, args.captions, columns, lists, args.valid_fraction, args.sounds)
        if raw.unused:
            print(f"{args.images}: {raw.unused:,} images are not in {args.captions} and are left out")
        run_set(raw, args)
        return
    if args.image_column or args.caption_column or args.sound_column:
        raise UserError("--image-column and --caption-column name columns of the table --captions: give one")
    if args.sounds is not None:
        raise UserError("--sounds needs a table that says which image each is of: give --captions")
    args.vocab_size = 0
    run_set(ClassFolders(args.images, lists, args.valid_fraction), args)


class CaptionedImages(ImageSet):
    """Images that a table gives captions of.

    Args:
        images: folder, zip or tar.
        captions: the table.
        columns: of images, captions and sounds; None = a usual name.
        lists: split -> file with image names.
        valid_fraction: of train, for a split valid; None = the default.
        sounds: folder, zip or tar of sounds, one for each image; None = there are none.

    Attributes:
        unused: images that the table does not name.

    Raises:
        UserError: a file is missing or malformed, none of the images is there, or the splits are contradictory.
    """

    name = "image-folder"

    def __init__(
        self,
        images: Path,
        captions: Path,
        columns: tuple[str | None, str | None, str | None] = (None, None, None),
        lists: Mapping[str, Path] | None = None,
        valid_fraction: float | None = None,
        sounds: Path | None = None,
    ) -> None:
        lists = lists or {}
        self._files = ImageFiles(images)
        self._table = CaptionTable(captions, *columns, with_sounds=sounds is not None)
        self._file_of = match_names(self._table.names, self._files.names, images)
        if not self._file_of:
            first = self._table.names[0]
            raise UserError(f"none of the {len(self._table):,} images of {captions} is in {images}, the first {first}")
        pictures = sum(is_image(name) for name in self._files.names)
        self.unused = max(0, pictures - len(set(self._file_of.values())))
        if lists:
            splits = _listed(lists, self._table.names, captions)
            for split, names in splits.items():
                absent = [name for name, there in names.items() if there is None]
                assert_none(absent, f"{lists[split]}: no captions in {captions}")
            splits = {split: list(names.values()) for split, names in splits.items()}
        else:
            splits = self._split_by_folder(images)
        splits, fraction = with_valid(splits, valid_fraction)
        numbers = {name: number for number, name in enumerate(self._table.names)}
        self._numbers = {split: np.array([numbers[name] for name in names]) for split, names in splits.items()}
        self.counts = {split: len(names) for split, names in splits.items()}
        self.options = {"image_column": columns[0], "caption_column": columns[1], "valid_fraction": fraction}
        self.sources = {"images": images, "captions": captions} | {f"split {name}": lists[name] for name in lists}
        self._sounds = None if sounds is None else ImageFiles(sounds, "--sounds")
        if self._sounds is not None:
            self._sound_of = match_names(list(self._table.sounds.values()), self._sounds.names, sounds)
            self.options["sound_column"] = columns[2]
            self.sources["sounds"] = sounds

    def _split_by_folder(self, images: Path) -> dict[str, list[str]]:
        """Images whose files are missing go to the first split, where they are counted."""
        layout = Layout(list(self._file_of.values()), images)
        splits: dict[str, list[str]] = {split: [] for split in layout.splits}
        for name in self._table.names:
            file = self._file_of.get(name)
            splits[layout.splits[0] if file is None else layout.split(file)].append(name)
        return splits

    def samples(self, split: str, start: int, stop: int) -> Iterator[RawSample | Skipped]:
        """In the order of the table, or of the split's list."""
        for number in self._numbers[split][start:stop]:
            name = self._table.names[number]
            file = self._file_of.get(name)
            if file is None:
                yield Skipped(name, f"there is no such file in {self._files.path.name}")
                continue
            captions, meta = self._table.captions(int(number)), {"file_name": name}
            sample = read_sample(self._files, file, str(PurePosixPath(name).with_suffix("")), captions, meta)
            yield sample if isinstance(sample, Skipped) else self._with_sound(sample, int(number))

    def _with_sound(self, sample: RawSample, number: int) -> RawSample | Skipped:
        if self._sounds is None:
            return sample
        name = self._table.sounds.get(number)
        file = self._sound_of.get(name)
        if file is None:
            reason = "it has none in the table" if name is None else f"there is no {name} in {self._sounds.path.name}"
            return Skipped(sample.key, f"sound: {reason}")
        try:
            return replace(sample, sound=self._sounds.read(file))
        except Exception as error:  # zipfile and zlib raise many kinds for broken files
            return Skipped(sample.key, f"sound: {read_error(error)}")


class ClassImages(ImageSet):
    """Images of classes. Their order goes round the classes, so that the first N items of a split are as balanced as
    they can be, and neighbors are of different classes.

    Args:
        files: split -> where its images are.
        names: split -> their names there.
        labels: split -> (images,) label of each; -1 = there is no such file.
        classes: what samples are to have of their class -> the list of it by label; `class_name` must be among them.
    """

    def __init__(
        self,
        files: Mapping[str, Any],
        names: Mapping[str, Sequence[str]],
        labels: Mapping[str, np.ndarray],
        classes: Mapping[str, Sequence[Any]],
    ) -> None:
        self._files, self._names, self._labels = files, names, labels
        self._order = {split: round_the_classes(labels[split]) for split in names}
        self.classes = classes
        self.counts = {split: len(names[split]) for split in names}

    def key(self, split: str, name: str) -> str:
        """Name of a sample; by default the file's without its suffix."""
        return PurePosixPath(name).stem

    def samples(self, split: str, start: int, stop: int) -> Iterator[RawSample | Skipped]:
        for position in self._order[split][start:stop]:
            name, label = self._names[split][position], int(self._labels[split][position])
            if label < 0:
                yield Skipped(name, f"there is no such file in {self._files[split].path.name}")
                continue
            yield read_sample(self._files[split], name, self.key(split, name), (), class_meta(self.classes, label))

    def join(self, root: Path, settings: Settings) -> dict[str, dict[str, int]]:
        write_json(root / CLASSES_NAME, self.classes)
        return super().join(root, settings)


class ClassFolders(ClassImages):
    """Images in a folder a class, CLASS/FILE or SPLIT/CLASS/FILE, at any depth.

    Args:
        images: folder, zip or tar.
        lists: split -> file with image names.
        valid_fraction: of train, for a split valid; None = the default.
        classes: see `ClassImages`; None = the names of the folders, in alphabetical order.
        option: that names the images, for messages.

    Raises:
        UserError: a file is missing, there are no class folders, or the splits are contradictory.
    """

    name = "image-folder"

    def __init__(
        self,
        images: Path,
        lists: Mapping[str, Path] | None = None,
        valid_fraction: float | None = None,
        classes: Mapping[str, Sequence[Any]] | None = None,
        option: str = "--images",
    ) -> None:
        lists = lists or {}
        files = ImageFiles(images, option)
        pictures = sorted(name for name in files.names if is_image(name))
        self._layout = Layout(pictures, images)
        class_of = {name: self._layout.folder(name) for name in pictures}
        if classes is None:
            classes = {"class_name": _class_names(class_of, images)}
        label_of = {folder: label for label, folder in enumerate(classes["class_name"])}
        for name, folder in class_of.items():
            if folder not in label_of:
                raise UserError(f"{images}: {name} is in no class folder; want one of {', '.join(label_of)}")
        if lists:
            listed = _listed(lists, pictures, images)
            splits = {split: [file or name for name, file in names.items()] for split, names in listed.items()}
        else:
            splits = {split: [] for split in self._layout.splits}
            for name in pictures:
                splits[self._layout.split(name)].append(name)
        splits, fraction = with_valid(splits, valid_fraction, self._layout.inner)
        labels = {
            split: np.array([label_of[class_of[name]] if name in class_of else -1 for name in names])
            for split, names in splits.items()
        }
        super().__init__(dict.fromkeys(splits, files), splits, labels, classes)
        self.options = {"valid_fraction": fraction}
        self.sources = {"images": images} | {f"split {name}": lists[name] for name in lists}

    def key(self, split: str, name: str) -> str:
        return str(PurePosixPath(self._layout.inner(name)).with_suffix(""))


def _class_names(class_of: Mapping[str, str], images: Path) -> list[str]:
    names = sorted(set(class_of.values()))
    if len(names) < 2 or not names[0]:
        stray = next((name for name, folder in class_of.items() if not folder), "no image")
        raise UserError(
            f"{images}: want two or more class folders, CLASS/FILE or SPLIT/CLASS/FILE, or --captions FILE; "
            f"{stray} is in none"
        )
    return names


class Layout:
    """What folders say of images: their split, and the folder below it.

    Args:
        names: of the images, with their folders.
        source: where they are, for messages.

    Attributes:
        splits: that there are; `train` alone where folders name none.

    Raises:
        UserError: some images are in folders of splits and others not, or two folders are of one split.
    """

    def __init__(self, names: Sequence[str], source: Path) -> None:
        folders = sorted({PurePosixPath(name).parts[:-1] for name in names})
        self._depth = _common_depth(folders)
        first = {parts[self._depth] if len(parts) > self._depth else "" for parts in folders}
        named = sorted(folder for folder in first if folder.lower() in SPLIT_NAMES)
        if named and len(named) < len(first):
            stray = min(first - set(named)) or "images that are in no folder"
            raise UserError(f"{source}: beside {', '.join(named)} is {stray}: name the splits with --split NAME=FILE")
        self._split_of = {folder: SPLIT_NAMES[folder.lower()] for folder in named}
        if len(set(self._split_of.values())) < len(named):
            raise UserError(f"{source}: two of the folders {', '.join(named)} are the same split")
        self.splits = [split for split in SPLIT_ORDER if split in self._split_of.values()] or ["train"]

    def split(self, name: str) -> str:
        """Split of an image."""
        return self._split_of[PurePosixPath(name).parts[self._depth]] if self._split_of else "train"

    def inner(self, name: str) -> str:
        """Name of an image without the folders that all have, and without its split's."""
        return "/".join(PurePosixPath(name).parts[self._depth + bool(self._split_of) :])

    def folder(self, name: str) -> str:
        """The outermost folder of `inner`; empty where it has none."""
        return self.inner(name).rpartition("/")[0].partition("/")[0]


def _common_depth(folders: Sequence[tuple[str, ...]]) -> int:
    """How many folders all images are in, those of splits and what is in them left out."""
    if not folders:
        return 0
    # Of sorted names, what the first and the last share, all share.
    for depth, (one, other) in enumerate(zip(folders[0], folders[-1], strict=False)):
        if one != other or one.lower() in SPLIT_NAMES:
            return depth
    return min(len(folders[0]), len(folders[-1]))


def _listed(lists: Mapping[str, Path], there: Sequence[str], source: Path) -> dict[str, dict[str, str | None]]:
    """Split -> each listed name -> the name that it has among `there`; None = it is not among them."""
    listed = {split: [line for line in read_lines(path) if line] for split, path in lists.items()}
    for split, names in listed.items():
        if not names:
            raise UserError(f"split list {lists[split]} is empty")
    found = match_names([name for names in listed.values() for name in names], there, source)
    assert_disjoint({split: [found.get(name, name) for name in names] for split, names in listed.items()}, lists)
    return {split: {name: found.get(name) for name in names} for split, names in listed.items()}


def match_names(wanted: Sequence[str], there: Sequence[str], source: Path) -> dict[str, str]:
    """Find files by the names that a list or table calls them.

    A name may leave out the folders that all files are in; one without a folder is found in any. Where no name with a
    folder is found, as if the table was made elsewhere, base names count for these as well, if they are unique.

    Args:
        wanted: names.
        there: of the files, with their folders.
        source: where they are, for messages.

    Returns:
        wanted name -> name of its file, for those that are there.

    Raises:
        UserError: a base name is that of several files.
    """
    files = set(there)
    depth = _common_depth(sorted({PurePosixPath(name).parts[:-1] for name in there}))
    root = "".join(f"{folder}/" for folder in PurePosixPath(there[0]).parts[:depth]) if there else ""
    found = {name: place for name in wanted for place in (root + name, name) if place in files}
    elsewhere = not any("/" in name for name in found)
    loose = [name for name in dict.fromkeys(wanted) if name not in found and (elsewhere or "/" not in name)]
    times = Counter(PurePosixPath(name).name for name in loose)
    by_base = {base: name for name in loose if times[base := PurePosixPath(name).name] == 1}
    for place in there:
        name = by_base.get(PurePosixPath(place).name)
        if name is not None and found.setdefault(name, place) != place:
            raise UserError(f"{source} holds two files named {PurePosixPath(place).name}: name them with their folders")
    return found


def with_valid(
    splits: Mapping[str, list[str]], fraction: float | None, name_of: Any = str
) -> tuple[dict[str, list[str]], float]:
    """Make a split valid out of train where there is none.

    It takes the images whose names have the lowest hashes, which no other choice of options changes.

    Args:
        splits: split -> names.
        fraction: of train; None = DEFAULT_VALID_FRACTION where train is the only split, else 0.
        name_of: from a name to what is hashed of it.

    Returns:
        The splits, in the order train, valid, test, and the fraction that was used.

    Raises:
        UserError: the fraction is not in [0, 1), or there is a split valid or no train.
    """
    if fraction is None:
        fraction = DEFAULT_VALID_FRACTION if list(splits) == ["train"] else 0.0
    elif not 0 <= fraction < 1:
        raise UserError(f"--valid-fraction {fraction}: want 0 or more and less than 1")
    elif fraction > 0 and ("valid" in splits or "train" not in splits):
        raise UserError(f"--valid-fraction {fraction}: there are the splits {', '.join(splits)} already; leave it out")
    if fraction == 0:
        return dict(splits), fraction
    train = splits["train"]
    number = min(max(1, round(fraction * len(train))), len(train) - 1)
    chosen = set(sorted(train, key=lambda name: _name_hash(name_of(name)))[:number])
    cut = {"train": [name for name in train if name not in chosen], "valid": [n for n in train if n in chosen]}
    cut |= {split: names for split, names in splits.items() if split != "train"}
    return {split: names for split, names in cut.items() if names}, fraction


def _name_hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def is_image(name: str) -> bool:
    """Whether a file's name says that it is meant as an image."""
    return PurePosixPath(name).suffix.lower() in _IMAGE_SUFFIXES


def round_the_classes(labels: np.ndarray) -> np.ndarray:
    """(n,) the order that takes the first item of each class, then the second of each, and so on.

    Args:
        labels: (n,) integers.
    """
    by_class = np.argsort(labels, kind="stable")
    ordered = labels[by_class]
    turn = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    return by_class[np.lexsort((ordered, turn))]


def class_meta(classes: Mapping[str, Sequence[Any]], label: int) -> dict[str, Any]:
    """What a sample has of its class."""
    return {"label": label} | {name: values[label] for name, values in classes.items()}


def read_sample(files: Any, file: str, key: str, captions: Iterable[str], meta: dict[str, Any]) -> RawSample | Skipped:
    """A sample of an image file, or why it cannot be read.

    Args:
        files: ImageFiles, or what reads a file by its name as that does.
        file: its name there.
        key, captions, meta: of the sample.
    """
    try:
        key.encode()
        return RawSample(key, files.read(file), tuple(captions), meta=meta)
    except UnicodeEncodeError:
        return Skipped(key, "its name is not UTF-8")
    except Exception as error:  # zipfile and zlib raise many kinds for broken files
        return Skipped(key, read_error(error))
