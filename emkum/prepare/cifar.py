"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) from the official archives, or from folders of images.

The official archives for Python hold pickles. No pickled code is run: what they build out of numpy is replaced by two
classes that merely keep what they are given.
"""

import argparse
import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from emkum.data.shards import CLASSES_NAME
from emkum.errors import UserError
from emkum.prepare.common import add_common_arguments, add_set_parser, run_set
from emkum.prepare.image_folder import ClassFolders, class_meta
from emkum.prepare.raw_set import ImageSet, RawSample, Settings, Skipped
from emkum.prepare.sources import read_error
from emkum.provenance import write_json

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
# Superclass -> its classes, as the data set's page has them; labels are places in the alphabetical order.
CIFAR100_CLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}


@dataclass(frozen=True)
class Version:
    """One of the two sets.

    Attributes:
        name: of the sub-command.
        title: of the set.
        batches: split -> the archive's files, without the suffix `.bin` of the binary version.
        classes: what samples have of their class -> the list of it by label.
        label_key: what the pickles call the labels.
        label_bytes: in front of each image in the binary version; the last is the label.
    """

    name: str
    title: str
    batches: Mapping[str, Sequence[str]]
    classes: Mapping[str, Sequence[Any]]
    label_key: bytes
    label_bytes: int


def _cifar100_classes() -> dict[str, list[Any]]:
    coarse_of = {name: coarse for coarse, names in CIFAR100_CLASSES.items() for name in names.split()}
    names, coarse = sorted(coarse_of), sorted(CIFAR100_CLASSES)
    return {
        "class_name": names,
        "coarse_label": [coarse.index(coarse_of[name]) for name in names],
        "coarse_name": [coarse_of[name] for name in names],
    }


VERSIONS = (
    Version(
        "cifar10",
        "CIFAR-10",
        {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]},
        {"class_name": CIFAR10_CLASSES},
        label_key=b"labels",
        label_bytes=1,
    ),
    Version(
        "cifar100",
        "CIFAR-100",
        {"train": ["train"], "test": ["test"]},
        _cifar100_classes(),
        label_key=b"fine_labels",
        label_bytes=2,
    ),
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-commands `cifar10` and `cifar100`."""
    for version in VERSIONS:
        archive = f"{version.title.lower()}-python.tar.gz"
        parser = add_set_parser(
            subparsers,
            version.name,
            help=f"{version.title}: 60,000 images of 32 x 32 pixels in {len(version.classes['class_name'])} classes",
            description=f"{version.title} from an official archive, for Python or binary, packed or unpacked, without\n"
            "running any pickled code; images are stored as PNG. Or from a folder, zip or tar of image files,\n"
            "SPLIT/CLASS/FILE, which are stored unchanged.\n"
            f"Samples have label, {', '.join(version.classes)}, and {CLASSES_NAME} lists these by label.",
            example=f"  emkum prepare {version.name} --input {archive} --out data/{version.name}",
        )
        parser.add_argument(
            "--input",
            type=Path,
            required=True,
            metavar="PATH",
            help=f"{archive}, {version.title.lower()}-binary.tar.gz, what either unpacks to, or a folder, zip or tar "
            "of image files",
        )
        add_common_arguments(parser, shrink=False)
        parser.set_defaults(run=partial(run, version))


def run(version: Version, args: argparse.Namespace) -> None:
    """Make the folder that the arguments of the sub-command describe."""
    path = args.input
    archive = CifarArchive(version, path)
    if path.is_file() and path.suffix not in (".zip", ".tar") and not archive.counts:
        names = ", ".join(name for names in version.batches.values() for name in names)
        raise UserError(f"--input: {path} is no archive of {version.title}: want a tar with the files {names}")
    run_set(archive if archive.counts else CifarFolders(version, path), args)


class CifarFolders(ClassFolders):
    """Image files in class folders, SPLIT/CLASS/FILE.

    Args:
        version: of the set.
        path: folder, zip or tar.

    Raises:
        UserError: it is neither, or an image is in the folder of no class.
    """

    def __init__(self, version: Version, path: Path) -> None:
        super().__init__(path, valid_fraction=0.0, classes=version.classes, option="--input")
        self.name = version.name
        self.options = {}
        self.sources = {"input": path}


@dataclass(frozen=True)
class Rows:
    """The images of a split.

    Attributes:
        pixels: (n, 3072) uint8: red, green and blue, each row by row.
        labels: (n,) integers.
    """

    pixels: np.ndarray
    labels: np.ndarray


class CifarArchive(ImageSet):
    """An official archive, packed or unpacked. Images are stored as PNG, named by their places in the split.

    Args:
        version: of the set.
        path: tar of any compression, or folder.

    Attributes:
        counts: empty where the archive has none of the set's files.

    Raises:
        UserError: a file of the set is missing or damaged, or a label out of range.
    """

    def __init__(self, version: Version, path: Path) -> None:
        self.name = version.name
        self.options: dict[str, object] = {}
        self.sources = {"input": path}
        self._version = version
        self._rows: dict[str, Rows] = read_archive(version, path)
        self.counts = {split: len(rows.labels) for split, rows in self._rows.items()}

    def __getstate__(self) -> dict[str, Any]:
        # Every process reads the archive itself, which is faster than to hand on 180 MB.
        return self.__dict__ | {"_rows": {}}

    def samples(self, split: str, start: int, stop: int) -> Iterator[RawSample | Skipped]:
        """In the order of the archive."""
        self._rows = self._rows or read_archive(self._version, self.sources["input"])
        rows = self._rows[split]
        for number in range(start, stop):
            image = encode_png(rows.pixels[number])
            yield RawSample(f"{number:05d}", image, meta=class_meta(self._version.classes, int(rows.labels[number])))

    def join(self, root: Path, settings: Settings) -> dict[str, dict[str, int]]:
        write_json(root / CLASSES_NAME, self._version.classes)
        return super().join(root, settings)


def encode_png(pixels: np.ndarray) -> bytes:
    """(3072,) uint8 as `Rows` has it to a PNG file. The same pixels give the same bytes."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.reshape(3, _SIDE, _SIDE).transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def read_archive(version: Version, path: Path) -> dict[str, Rows]:
    """Split -> its images; empty where the archive has none of the set's files.

    Raises:
        UserError: a file of the set is missing or damaged, or a label out of range.
    """
    names = [name for batch in version.batches.values() for name in batch]
    found = _read_files(path, {name + suffix for name in names for suffix in ("", ".bin")})
    if not found:
        return {}
    suffix = "" if any(name in found for name in names) else ".bin"
    missing = [name + suffix for name in names if name + suffix not in found]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)} of {version.title}")
    read = _read_binary if suffix else _read_pickle
    splits = {}
    for split, batches in version.batches.items():
        rows = []
        for name in batches:
            try:
                rows.append(read(version, found.pop(name + suffix)))
            except ValueError as error:
                raise UserError(f"{path}: {name}{suffix} is damaged: {error}") from None
        splits[split] = Rows(np.concatenate([r.pixels for r in rows]), np.concatenate([r.labels for r in rows]))
    return splits


def _read_files(path: Path, wanted: set[str]) -> dict[str, bytes]:
    """Base name -> content of the wanted files in a folder or a tar."""
    try:
        if path.is_dir():
            return {file.name: file.read_bytes() for file in path.rglob("*") if file.name in wanted and file.is_file()}
        if not path.is_file() or not tarfile.is_tarfile(path):
            return {}
        found = {}
        # Read in one go: to seek in a compressed tar is to unpack it again.
        with tarfile.open(path, "r|*") as archive:
            for info in archive:
                base = PurePosixPath(info.name).name
                if info.isfile() and base in wanted:
                    found[base] = archive.extractfile(info).read()
        return found
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"--input: {path} cannot be read: {error}") from None


def _read_binary(version: Version, data: bytes) -> Rows:
    width = version.label_bytes + _PIXELS
    if not data or len(data) % width:
        raise ValueError(f"{len(data):,} bytes are no whole rows of {width:,}")
    rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, width)
    labels = rows[:, version.label_bytes - 1].astype(np.int64)
    _check_labels(version, labels, rows[:, 0] if version.label_bytes > 1 else None)
    return Rows(rows[:, version.label_bytes :], labels)


def _check_labels(version: Version, labels: np.ndarray, coarse: np.ndarray | None) -> None:
    number = len(version.classes["class_name"])
    for row in np.flatnonzero((labels < 0) | (labels >= number))[:1]:
        raise ValueError(f"label {labels[row]} of row {row} is not in 0 ... {number - 1}")
    if coarse is not None:
        for row in np.flatnonzero(np.array(version.classes["coarse_label"])[labels] != coarse)[:1]:
            raise ValueError(f"row {row} has superclass {coarse[row]}, which is not that of its label {labels[row]}")


class _PickledArray:
    """Keeps what a pickled array is built of."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _PickledDtype:
    """Keeps the name of a pickled element type."""

    def __init__(self, *arguments: Any) -> None:
        self.name = arguments[0] if arguments else None

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which bytes do not have."""


class _Unpickler(pickle.Unpickler):
    """Builds numbers, strings, lists and dictionaries; whatever else a pickle names is refused or kept unbuilt."""

    _KNOWN = {
        ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy", "dtype"): _PickledDtype,
        # An argument, never called.
        ("numpy", "ndarray"): None,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not run") from None


def _read_pickle(version: Version, data: bytes) -> Rows:
    try:
        # Python 2 wrote them: its strings are bytes.
        batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # Damaged pickles raise whatever their parts stumble over.
        raise ValueError(read_error(error)) from None
    if not isinstance(batch, dict):
        raise ValueError("want a dictionary")
    pixels = _pixels(batch.get(b"data"))
    labels = _label_list(batch, version.label_key, len(pixels))
    coarse = _label_list(batch, b"coarse_labels", len(pixels)) if "coarse_label" in version.classes else None
    _check_labels(version, labels, coarse)
    return Rows(pixels, labels)


def _pixels(array: Any) -> np.ndarray:
    """(n, 3072) uint8 of the pickled array, whose state is (version, shape, type, whether by columns, content)."""
    state = getattr(array, "state", None)
    if not isinstance(array, _PickledArray) or not isinstance(state, tuple) or len(state) != 5:
        raise ValueError("want an array as b'data'")
    _, shape, dtype, by_columns, content = state
    if not isinstance(dtype, _PickledDtype) or dtype.name not in (b"u1", "u1") or not isinstance(content, bytes):
        raise ValueError("want bytes as b'data'")
    if len(content) == 0 or shape != (len(content) // _PIXELS, _PIXELS) or len(content) % _PIXELS:
        raise ValueError(f"want rows of {_PIXELS:,} bytes as b'data', not {shape}")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if by_columns else "C")


def _label_list(batch: Mapping[Any, Any], key: bytes, number: int) -> np.ndarray:
    labels = batch.get(key)
    if not isinstance(labels, list) or len(labels) != number or not all(type(label) is int for label in labels):
        raise ValueError(f"want a list of {number:,} whole numbers as {key!r}")
    return np.array(labels, dtype=np.int64)
