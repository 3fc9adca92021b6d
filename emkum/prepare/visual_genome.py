"""Visual Genome (Krishna et al., 2017): photos with phrases for their regions."""

import argparse
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from emkum.data.shard_writing import content_hash
from emkum.errors import UserError
from emkum.prepare.common import add_common_arguments, add_set_parser, run_set
from emkum.prepare.photos import CaptionedSet, PhotoFiles, add_images_argument, field_of, read_json, read_names
from emkum.prepare.raw_set import RawSample, Skipped, clean_captions
from emkum.prepare.sources import SPLIT_ORDER, assert_disjoint, assert_none, parse_splits

_CHUNK_BYTES = 1 << 20
# An image's regions take some 10 kB; what is longer than this without coming to an end is damaged.
_LONGEST_ELEMENT = 1 << 24


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `visual-genome`."""
    parser = add_set_parser(
        subparsers,
        "visual-genome",
        help="Visual Genome: photos with some fifty region phrases each",
        description="Visual Genome's photos with the phrases of their regions as captions, equal ones once. The JSON\n"
        "of each sample holds the regions, {phrase, box: [left, top, width, height]}, in pixels of the original\n"
        "image, whose width and height it holds too: scale the boxes where images are stored smaller\n"
        "(--image-size). There are no official splits: everything is train unless you ask for others.",
        example="  emkum prepare visual-genome --images VG_100K VG_100K_2 --regions region_descriptions.json \\\n"
        "      --image-data image_data.json --valid-fraction 0.02 --out data/visual_genome",
    )
    add_images_argument(parser)
    parser.add_argument("--regions", type=Path, required=True, metavar="FILE", help="region_descriptions.json")
    parser.add_argument(
        "--image-data",
        type=Path,
        metavar="FILE",
        help="image_data.json: size of the original images, and the COCO ids of those that COCO has too, by which to "
        "keep them out of COCO's test images; without it, the size is that of the image files",
    )
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="image ids of a split, one a line; NAME is train, valid (or val, dev) or test. What no list names is "
        "train, unless that has a list",
    )
    parser.add_argument(
        "--valid-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="part of the images without a list that becomes valid, chosen by their ids; 0 = none (default)",
    )
    add_common_arguments(parser, vocab_size=0)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the folder that the arguments of the sub-command describe."""
    lists = parse_splits(args.split)
    run_set(VisualGenome(args.images, args.regions, args.image_data, lists, args.valid_fraction), args)


class VisualGenome(CaptionedSet):
    """The raw set. It holds where each image's regions are in the file, not the regions.

    Args:
        images: folders, zips or tars.
        regions: region_descriptions.json.
        image_data: image_data.json; None = take the images' sizes from their files.
        lists: split -> file of image ids.
        valid_fraction: part of the images without a list that is valid.

    Raises:
        UserError: a file is missing or malformed, the fraction is out of range, or a split has no image.
    """

    name = "visual-genome"

    def __init__(
        self,
        images: Sequence[Path],
        regions: Path,
        image_data: Path | None = None,
        lists: Mapping[str, Path] | None = None,
        valid_fraction: float = 0.0,
    ) -> None:
        lists = lists or {}
        if not 0 <= valid_fraction < 1:
            raise UserError(f"--valid-fraction {valid_fraction:g}: want 0 to less than 1")
        for name in ("valid", "train"):
            if valid_fraction > 0 and name in lists:
                raise UserError(f"--valid-fraction and --split {name}=... exclude each other: give one of them")
        self.options = {"valid_fraction": valid_fraction}
        self.sources = {"regions": regions} | {f"split {name}": path for name, path in lists.items()}
        self._regions = regions
        places = find_regions(regions)
        self._image_data = None
        if image_data is not None:
            self.sources["image data"] = image_data
            self._image_data = read_image_data(image_data)
            missing = [str(image_id) for image_id in places if image_id not in self._image_data]
            assert_none(missing, f"{image_data}: no entry, unlike in {regions},")
        splits = choose_splits(list(places), lists, valid_fraction, regions)
        # Of each split, (images, 3) int64: image id, and where the image's element is in the file, in bytes.
        self._places = {}
        for split, ids in splits.items():
            rows = [(image_id, *places[image_id][:2]) for image_id in ids if places[image_id][2] > 0]
            if not rows:
                raise UserError(f"split {split} has no image with regions in {regions}")
            self._places[split] = np.array(rows, dtype=np.int64)
        self.counts = {split: len(rows) for split, rows in self._places.items()}
        self.without_captions = {split: len(ids) - self.counts[split] for split, ids in splits.items()}
        self._files = PhotoFiles(images, (f"{i}.jpg" for rows in self._places.values() for i in rows[:, 0]))
        self.sources |= self._files.sources

    def samples(self, split: str, start: int, stop: int) -> Iterator[RawSample | Skipped]:
        """In the order of the split's list, or else of the file."""
        with open(self._regions, "rb") as file:
            for image_id, offset, length in self._places[split][start:stop].tolist():
                key = str(image_id)
                image = self._files.read(key, f"{key}.jpg")
                if isinstance(image, Skipped):
                    yield image
                    continue
                file.seek(offset)
                element = json.loads(file.read(length).decode("utf-8", errors="surrogateescape"))
                regions = regions_of(element, self._regions)
                captions = tuple(dict.fromkeys(region["phrase"] for region in regions))
                usable = set(clean_captions(key, captions)[0])
                meta = self._size(image_id, image)
                meta["regions"] = [region for region in regions if region["phrase"] in usable]
                yield RawSample(key, image, captions, image_id, meta)

    def _size(self, image_id: int, image: bytes) -> dict[str, Any]:
        """Width and height of the original image, and its COCO id if it has one."""
        if self._image_data is None:
            return _file_size(image)
        width, height, coco_id = self._image_data[image_id]
        return {"width": width, "height": height} | ({} if coco_id is None else {"coco_id": coco_id})


def _file_size(image: bytes) -> dict[str, int]:
    """Width and height in the header of an image file; nothing of one that is damaged, which is then left out."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(image)) as header:
            return {"width": header.width, "height": header.height}
    except Exception:  # Pillow's parsers raise whatever a damaged file makes them stumble over.
        return {}


def choose_splits(
    ids: Sequence[int], lists: Mapping[str, Path], valid_fraction: float, regions: Path
) -> dict[str, list[int]]:
    """Image ids of each split.

    Args:
        ids: all of them.
        lists: split -> file of ids.
        valid_fraction: part of the others, by a hash of their ids, that is valid rather than train.
        regions: the file of the ids, for messages.

    Raises:
        UserError: a list is malformed, names an id that is not there, or one that was listed before.
    """
    known = set(ids)
    splits = {name: read_ids(path) for name, path in lists.items()}
    for name, listed in splits.items():
        assert_none([str(i) for i in listed if i not in known], f"{lists[name]}: not in {regions}")
    assert_disjoint(splits, lists)
    if "train" not in lists:
        taken = {image_id for listed in splits.values() for image_id in listed}
        rest = [image_id for image_id in ids if image_id not in taken]
        in_valid = [content_hash(str(image_id).encode()) < valid_fraction * 2**64 for image_id in rest]
        splits["train"] = [image_id for image_id, chosen in zip(rest, in_valid, strict=True) if not chosen]
        if valid_fraction > 0:
            splits["valid"] = [image_id for image_id, chosen in zip(rest, in_valid, strict=True) if chosen]
    return {name: splits[name] for name in SPLIT_ORDER if name in splits}


def find_regions(path: Path) -> dict[int, tuple[int, int, int]]:
    """Where each image's element is in the file: image id -> offset and length in bytes, number of regions.

    Raises:
        UserError: the file is missing or malformed, or an image is in it twice.
    """
    places: dict[int, tuple[int, int, int]] = {}
    for offset, length, element in list_elements(path):
        where = f"{path}, element {len(places)}"
        image_id = field_of(element, "image_id" if "image_id" in element else "id", int, where)
        if image_id in places:
            raise UserError(f"{where}: image {image_id} is listed twice")
        places[image_id] = offset, length, len(regions_of(element, where))
    if not places:
        raise UserError(f"{path} names no images")
    return places


def regions_of(element: Mapping[str, Any], where: object) -> list[dict[str, Any]]:
    """Regions of an image: {phrase, box: [left, top, width, height]}.

    Raises:
        UserError: one lacks a part of this; `where`, is named.
    """
    try:
        return [
            {"phrase": region["phrase"].strip(), "box": [region[side] for side in ("x", "y", "width", "height")]}
            for region in element["regions"]
        ]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{where}: want a list named regions of phrase, x, y, width, height") from None


def list_elements(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Elements of a file that is one JSON list of objects, of which only a part is in memory at a time.

    Yields:
        offset and length in bytes, and the object. Its texts are those of the file's bytes read as Latin-1, which has
        one character a byte, so that places in the text are places in the file.

    Raises:
        UserError: the file cannot be read, or is no such list.
    """
    decode = json.JSONDecoder().raw_decode
    try:
        file = open(path, encoding="latin-1", newline="")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    with file:
        text = file.read(_CHUNK_BYTES)
        begin, offset = len(text) - len(text.removeprefix("\xef\xbb\xbf").lstrip()), 0
        if not text.startswith("[", begin):
            raise UserError(f"{path} is no JSON list")
        begin += 1
        while True:
            while text[begin : begin + 1] in (" ", "\t", "\r", "\n", ","):
                begin += 1
            if text.startswith("]", begin):
                return
            try:
                element, end = decode(text, begin)
            except (ValueError, RecursionError):
                more = file.read(_CHUNK_BYTES)
                if not more or len(text) - begin > _LONGEST_ELEMENT:
                    raise UserError(f"{path} is no JSON list of objects at byte {offset + begin:,}") from None
                offset, text, begin = offset + begin, text[begin:] + more, 0
                continue
            if not isinstance(element, dict):
                raise UserError(f"{path} is no JSON list of objects at byte {offset + begin:,}")
            yield offset + begin, end - begin, element
            begin = end


def read_image_data(path: Path) -> dict[int, tuple[int, int, int | None]]:
    """Width, height in pixels and COCO id, None where there is none, of each image by its id.

    Raises:
        UserError: the file is missing or malformed.
    """
    entries = read_json(path)
    if not isinstance(entries, list):
        raise UserError(f"{path} is no JSON list")
    images = {}
    for number, entry in enumerate(entries):
        where = f"{path}, element {number}"
        name = "image_id" if isinstance(entry, dict) and "image_id" in entry else "id"
        size = field_of(entry, "width", int, where), field_of(entry, "height", int, where)
        images[field_of(entry, name, int, where)] = *size, entry.get("coco_id")
    return images


def read_ids(path: Path) -> list[int]:
    """Image ids of a list: numbers or file names.

    Raises:
        UserError: the file cannot be read or is empty, or a line is neither.
    """
    names = [PurePosixPath(name).stem for name in read_names(path)]
    for name in names:
        if not name.isdecimal():
            raise UserError(f"{path}: want image ids, one a line, not {name}")
    return [int(name) for name in names]
