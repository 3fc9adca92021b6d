"""What the sets share whose photos are named by files of annotations, and Karpathy's splits of COCO and Flickr30k
(Karpathy and Fei-Fei, "Deep Visual-Semantic Alignments for Generating Image Descriptions", 2015)."""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from emkum.errors import UserError
from emkum.prepare.raw_set import ImageSet, RawSample, Settings, Skipped
from emkum.prepare.sources import SPLIT_ORDER, ImageFiles, assert_disjoint, read_error, read_lines

# His names of the splits. "restval" is what is left of COCO's val2014; most train on it too.
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "valid", "test": "test"}

_KINDS = {str: "a text", int: "a whole number", list: "a list"}
_T = TypeVar("_T", str, int, list)


def add_images_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--images` of a set whose photos may lie in several places."""
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="folders, zips or tars of the photos, at any depth",
    )


class PhotoFiles:
    """The files of one or more folders and archives by their base names; picklable, as `ImageFiles` is.

    Args:
        paths: folders, zips or tars.
        wanted: base names; what else is there does not matter.

    Raises:
        UserError: a path is none of these, or two of the wanted files share their base name.
    """

    def __init__(self, paths: Sequence[Path], wanted: Iterable[str]) -> None:
        self._files = [ImageFiles(path) for path in paths]
        # Base name -> number of its folder or archive, and its name there.
        self._places: dict[str, tuple[int, str]] = {}
        wanted = set(wanted)
        for number, files in enumerate(self._files):
            for base, name in files.by_base_name(wanted).items():
                if base in self._places:
                    first = self._files[self._places[base][0]].path
                    raise UserError(f"--images: {base} is both in {first} and in {files.path}")
                self._places[base] = number, name

    @property
    def sources(self) -> dict[str, Path]:
        """Role -> path, as a set's `sources` have them."""
        if len(self._files) == 1:
            return {"images": self._files[0].path}
        return {f"images {number}": files.path for number, files in enumerate(self._files, start=1)}

    def read(self, key: str, *names: str) -> bytes | Skipped:
        """Content of a sample's photo: of the first of the base names that there is a file of."""
        for name in names:
            if name in self._places:
                number, place = self._places[name]
                try:
                    return self._files[number].read(place)
                except Exception as error:  # zipfile and zlib raise many kinds for broken files
                    return Skipped(key, read_error(error))
        return Skipped(key, "there is no such file among --images")


class Photo(NamedTuple):
    """A photo: the base name of its file, the set's own number of it, and its captions."""

    file_name: str
    image_id: int
    captions: tuple[str, ...]


class CaptionedSet(ImageSet):
    """Photos of which some may have no captions, which is no mistake: they are left out, and counted.

    Attributes:
        without_captions: split -> how many were left out, whatever `--limit` says.
    """

    without_captions: Mapping[str, int]

    def join(self, root: Path, settings: Settings) -> dict[str, dict[str, int]]:
        counts = super().join(root, settings)
        return {name: {**n, "images_without_captions": self.without_captions[name]} for name, n in counts.items()}


class PhotoSet(CaptionedSet):
    """Photos and captions that fit into memory.

    Args:
        images: folders, zips or tars.
        splits: split -> its photos, in order.
        sources: role -> file that the splits were read from.
        options: that the splits depend on beside the sources.

    Raises:
        UserError: a split has no captions, or two wanted files share their base name.
    """

    def __init__(
        self,
        images: Sequence[Path],
        splits: Mapping[str, Sequence[Photo]],
        sources: Mapping[str, Path],
        options: Mapping[str, Any],
    ) -> None:
        self._photos = {split: [photo for photo in photos if photo.captions] for split, photos in splits.items()}
        self.counts = {split: len(photos) for split, photos in self._photos.items()}
        self.without_captions = {split: len(photos) - self.counts[split] for split, photos in splits.items()}
        for split, count in self.counts.items():
            if count == 0:
                raise UserError(f"split {split} has no image with captions in {', '.join(map(str, sources.values()))}")
        photos = (photo for chosen in self._photos.values() for photo in chosen)
        self._files = PhotoFiles(images, (name for photo in photos for name in self.file_names(photo)))
        self.sources = {**self._files.sources, **sources}
        self.options = options

    def file_names(self, photo: Photo) -> tuple[str, ...]:
        """Base names that the photo's file may have; the first that is there is taken."""
        return (photo.file_name,)

    def samples(self, split: str, start: int, stop: int) -> Iterator[RawSample | Skipped]:
        """In the order of the split's photos."""
        for photo in self._photos[split][start:stop]:
            key = PurePosixPath(photo.file_name).stem
            image = self._files.read(key, *self.file_names(photo))
            if isinstance(image, Skipped):
                yield image
            else:
                yield RawSample(key, image, photo.captions, photo.image_id, {"file_name": photo.file_name})


def read_karpathy(path: Path, dataset: str, id_name: str, restval: bool = True) -> dict[str, list[Photo]]:
    """Photos of each split of Karpathy's JSON, in its order.

    Args:
        path: such as dataset_coco.json.
        dataset: what the file must say that it is of, unless it says nothing.
        id_name: which number is the image id, such as cocoid.
        restval: whether his split restval belongs to train; else it is left out.

    Raises:
        UserError: the file is missing or malformed, of another data set, or names an image twice.
    """
    content = read_json(path)
    splits: dict[str, list[Photo]] = {name: [] for name in SPLIT_ORDER}
    entries = field_of(content, "images", list, path)
    found = content.get("dataset", dataset)
    if found != dataset:
        raise UserError(f"{path} is of {found}, not of {dataset}")
    for number, entry in enumerate(entries):
        where = f"{path}, images[{number}]"
        split = field_of(entry, "split", str, where)
        if split not in KARPATHY_SPLITS:
            raise UserError(f"{where}: split {split!r} is none of {', '.join(KARPATHY_SPLITS)}")
        captions = tuple(field_of(s, "raw", str, where) for s in field_of(entry, "sentences", list, where))
        name = PurePosixPath(field_of(entry, "filename", str, where)).name
        photo = Photo(name, field_of(entry, id_name, int, where), captions)
        if restval or split != "restval":
            splits[KARPATHY_SPLITS[split]].append(photo)
    splits = {name: photos for name, photos in splits.items() if photos}
    if not splits:
        raise UserError(f"{path} names no images")
    names = {name: [photo.file_name for photo in photos] for name, photos in splits.items()}
    assert_disjoint(names, dict.fromkeys(splits, path))
    return splits


def read_json(path: Path, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Content of a JSON file; bytes that are not UTF-8 become escapes that `clean_captions` recognizes.

    Args:
        path: the file.
        object_hook: of `json.loads`; it can make large files smaller while they are parsed.

    Raises:
        UserError: the file cannot be read or is no JSON.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    try:
        return json.loads(data.decode("utf-8-sig", errors="surrogateescape"), object_hook=object_hook)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from None


def field_of(entry: object, name: str, kind: type[_T], where: object) -> _T:
    """A field of a JSON object.

    Raises:
        UserError: `entry` is no object, or lacks the field, or that is of another kind; `where` it is, is named.
    """
    value = entry.get(name) if isinstance(entry, dict) else None
    if type(value) is not kind:
        raise UserError(f"{where}: want {_KINDS[kind]} named {name}")
    return value


def read_names(path: Path) -> list[str]:
    """Base names of the images of a list: the first word of each line that is not empty.

    Raises:
        UserError: the file cannot be read or is empty.
    """
    names = [PurePosixPath(line.split()[0]).name for line in read_lines(path) if line]
    if not names:
        raise UserError(f"split list {path} is empty")
    return names
