"""Teacher targets computed once, then read from memory-mapped files: training needs no teacher in memory.

A cache is a folder with the manifest `cache.json`, which is there from the start, and files SPLIT/PART-VIEW-SHARD.npy
that `numpy.load` reads. A part is one of PARTS. A shard is a fixed number of consecutive samples, the last one what is
left of them. Each file appears whole or not at all, so that an interrupted job leaves nothing but whole ones.

All parts are float16. Logits are stored as distances below the largest one, which is float32: where a class has any
probability its distance is small, and float16 is fine there. So the softmax is right to 3e-4 however large logits are.
"""

import io
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from emkum.errors import UserError
from emkum.files import replaced_file
from emkum.outputs import TeacherOutput
from emkum.teachers.base import IMAGE, TeacherInput

MANIFEST_NAME = "cache.json"
MANIFEST_VERSION = 1
FEATURES, LOGITS, PATCHES = PARTS = ("features", "logits", "patches")

# More files than this are unmapped, least recently used first: below the usual limit of 1,024 open files.
_MAX_OPEN_FILES = 256
_AGAIN = "run the same `emkum teacher cache` command again"


class Shard(NamedTuple):
    """Consecutive samples of a split in one view: `start` to `stop`, the latter not included."""

    split: str
    view: int
    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class CacheManifest:
    """What `cache.json` says: whatever the targets depend on, and how they are stored.

    Attributes:
        teacher: identity of the teacher.
        precision: what its matrix products are computed in, such as float32.
        parts: what is stored. "features": {"width"}; "logits": {"classes", "top"}, where top is the number of largest
            logits that are stored, 0 = all; "patches": {"grid": [rows, columns], "width"}.
        shard_size: samples of a shard.
        splits: name to {"data_hash", "samples", "crops"}; `crops` is what the crops depend on beside the images, with
            the key "views": how many repeating random crops, 0 = the centered one.
    """

    teacher: dict[str, Any]
    precision: str
    parts: dict[str, dict[str, Any]]
    shard_size: int
    splits: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, directory: Path) -> "CacheManifest":
        """Read `cache.json`.

        Raises:
            ValueError: it is missing, damaged or of another version.
        """
        try:
            content = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
            if content["version"] != MANIFEST_VERSION:
                raise ValueError(f"version {content['version']} instead of {MANIFEST_VERSION}")
            manifest = cls(**{field.name: content[field.name] for field in fields(cls)})
            manifest._validate()
        except (OSError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(str(error)) from None
        return manifest

    def _validate(self) -> None:
        """Raise one of the exceptions of wrong types and missing keys unless everything can be told from it."""
        if FEATURES not in self.dtypes or not isinstance(self.teacher, dict):
            raise ValueError("no features or no teacher")
        for split in self.splits.values():
            _ = split["data_hash"]
        for _ in self.shards():
            pass

    def as_json(self) -> dict[str, Any]:
        """As plain data that survives a round trip through JSON."""
        return json.loads(json.dumps({"version": MANIFEST_VERSION, **asdict(self)}))

    @cached_property
    def dtypes(self) -> dict[str, np.dtype]:
        """Of one sample's record, for each part that is stored."""
        return {part: record_dtype(part, self.parts[part]) for part in PARTS if part in self.parts}

    def views(self, split: str) -> int:
        """How many targets each sample of a split has."""
        return max(1, self.splits[split]["crops"]["views"])

    def shard(self, split: str, view: int, number: int) -> Shard:
        """One shard by its number."""
        start = number * self.shard_size
        return Shard(split, view, number, start, min(start + self.shard_size, self.splits[split]["samples"]))

    def shards(self) -> Iterator[Shard]:
        """All shards, view after view."""
        for split, content in self.splits.items():
            count = len(range(0, content["samples"], self.shard_size))
            for view in range(self.views(split)):
                yield from (self.shard(split, view, number) for number in range(count))


def record_dtype(part: str, description: Mapping[str, Any]) -> np.dtype:
    """What is stored of one sample.

    Args:
        part: one of PARTS.
        description: that of CacheManifest.parts.

    Returns:
        For features float16 (D_t,), for patches float16 (N, D_p). For logits a record of `largest`, float32, and
        `below`, float16 (C,), what each is below it; or, of the k largest alone, `below` (k,), their classes `number`
        (k,) int16 or int32, and `rest`, float32, the logarithm of the summed exponentials of all others.
    """
    if part == FEATURES:
        return np.dtype(("<f2", (description["width"],)))
    if part == PATCHES:
        return np.dtype(("<f2", (math.prod(description["grid"]), description["width"])))
    classes, top = description["classes"], description["top"]
    if top == 0:
        return np.dtype([("largest", "<f4"), ("below", "<f2", (classes,))])
    number = "<i2" if classes <= 2**15 else "<i4"
    return np.dtype([("largest", "<f4"), ("rest", "<f4"), ("below", "<f2", (top,)), ("number", number, (top,))])


def pack(part: str, dtype: np.dtype, output: TeacherOutput, batch: TeacherInput) -> np.ndarray:
    """Records of a batch, (B,) of `dtype`.

    Args:
        part: one of PARTS.
        dtype: what `record_dtype` gave.
        output: the teacher's.
        batch: what it was made of, for messages.

    Raises:
        UserError: a value is infinite, not a number, or too large for float16.
        ValueError: the teacher's output is not of the shape that it declared.
    """
    values = getattr(output, part).float()
    if part == LOGITS:
        return _pack_logits(values, dtype, batch)
    if tuple(values.shape[1:]) != dtype.shape:
        raise ValueError(f"the teacher declared {part} {dtype.shape} a sample and gives {tuple(values.shape[1:])}")
    return _half(values, part, values, batch).cpu().numpy()


def _pack_logits(logits: Tensor, dtype: np.dtype, batch: TeacherInput) -> np.ndarray:
    largest = logits.amax(dim=1, keepdim=True)
    columns = {"largest": largest[:, 0]}
    if "number" in dtype.names:
        top, numbers = logits.topk(dtype["below"].shape[0], dim=1)
        rest = logits.scatter(1, numbers, -math.inf).logsumexp(dim=1)
        # The rest is stored in float32, but it has to be finite too.
        below = _half(largest - torch.cat([top, rest[:, None]], dim=1), LOGITS, logits, batch)[:, :-1]
        columns |= {"number": numbers, "rest": rest, "below": below}
    else:
        columns["below"] = _half(largest - logits, LOGITS, logits, batch)
    records = np.empty(len(logits), dtype)
    for name, column in columns.items():
        records[name] = column.cpu().numpy()
    return records


def _half(values: Tensor, part: str, original: Tensor, batch: TeacherInput) -> Tensor:
    """(B, ...) in float16; an error that tells of the original values where one does not fit."""
    halves = values.to(torch.float16)
    fits = torch.isfinite(halves).flatten(1).all(dim=1)
    if not fits.all():
        row = int((~fits).nonzero()[0])
        least, most = original[row].min().item(), original[row].max().item()
        raise UserError(
            f"{part} of sample {int(batch.ids[row])} of split {batch.split!r} (view {int(batch.views[row])}) do not "
            f"fit float16: they reach from {least:g} to {most:g}; leave them out of --store, or look at the teacher "
            "with `emkum teacher check`"
        )
    return halves


def unpack(part: str, records: np.ndarray, description: Mapping[str, Any], device: torch.device) -> Tensor:
    """Float32 values of a batch on a device.

    Args:
        part: one of PARTS.
        records: (B,) what `pack` made.
        description: that of CacheManifest.parts.
        device: where to.

    Returns:
        (B, D_t), (B, C) or (B, N, D_p). Where only the largest logits are stored, the others share their probability
        evenly.
    """
    if part != LOGITS:
        return torch.from_numpy(records).to(device).float()
    columns = {name: torch.from_numpy(records[name].copy()).to(device) for name in records.dtype.names}
    stored = columns["largest"][:, None] - columns["below"].float()
    classes, top = description["classes"], description["top"]
    if top == 0:
        return stored
    each = columns["rest"] - math.log(classes - top)
    return each[:, None].repeat(1, classes).scatter_(1, columns["number"].long(), stored)


def shard_path(directory: Path, part: str, shard: Shard) -> Path:
    """The file of one part of a shard."""
    return directory / shard.split / f"{part}-{shard.view:02d}-{shard.number:06d}.npy"


def missing_shards(directory: Path, manifest: CacheManifest) -> list[Shard]:
    """Those that lack a file, or whose file is not of its full length."""
    return [shard for shard in manifest.shards() if not _is_whole(directory, manifest, shard)]


def _is_whole(directory: Path, manifest: CacheManifest, shard: Shard) -> bool:
    for part, dtype in manifest.dtypes.items():
        count = shard.stop - shard.start
        try:
            size = os.stat(shard_path(directory, part, shard)).st_size
        except OSError:
            return False
        if size != len(_header(dtype, count)) + count * dtype.itemsize:
            return False
    return True


def _header(dtype: np.dtype, count: int) -> bytes:
    """The header of a .npy file of so many records, format 1.0. NumPy's own pads differently from version to version,
    and here the length of a file tells whether it is whole."""
    description = {
        "descr": np.lib.format.dtype_to_descr(dtype.base),
        "fortran_order": False,
        "shape": (count, *dtype.shape),
    }
    text = repr(description).encode("ascii")
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@contextmanager
def written_shard(
    directory: Path, manifest: CacheManifest, shard: Shard
) -> Iterator[Callable[[TeacherOutput, TeacherInput], None]]:
    """Give a function that appends the targets of the shard's next batch to its files, which appear when the block
    ends, and not at all when it raises.

    Raises:
        UserError: a file cannot be written.
    """
    try:
        with ExitStack() as stack:
            files: dict[str, io.BufferedWriter] = {}
            for part, dtype in manifest.dtypes.items():
                temporary = stack.enter_context(replaced_file(shard_path(directory, part, shard)))
                files[part] = stack.enter_context(open(temporary, "wb"))
                files[part].write(_header(dtype, shard.stop - shard.start))

            def write(output: TeacherOutput, batch: TeacherInput) -> None:
                for part, file in files.items():
                    records = pack(part, manifest.dtypes[part], output, batch)
                    file.write(records.reshape(-1).view(np.uint8).data)

            yield write
    except OSError as error:
        raise UserError(
            f"cannot write into {directory / shard.split}: {error.strerror or error}; mend that and {_AGAIN}: it goes "
            "on from there"
        ) from None


def _map_file(directory: Path, manifest: CacheManifest, part: str, split: str, view: int, number: int) -> np.ndarray:
    """Records of one file, mapped into memory."""
    shard = manifest.shard(split, view, number)
    path = shard_path(directory, part, shard)
    dtype, count = manifest.dtypes[part], shard.stop - shard.start
    header = _header(dtype, count)
    try:
        with open(path, "rb") as file:
            if file.read(len(header)) != header:
                raise ValueError("another header")
            mapped = np.memmap(file, dtype.base, "r", len(header), (count, *dtype.shape))
    except (OSError, ValueError):
        raise UserError(f"{path} is damaged: delete it and {_AGAIN}") from None
    # A plain array over the mapped memory, without memmap's cost on each access.
    return mapped.view(np.ndarray)


class CachedTeacher:
    """What `emkum teacher cache` stored of a teacher, in its place.

    A split holds either the centered crop of each image, whatever crop the student sees, or the first K repeating
    random crops, which the student must then replay: same seed, scale and flip. Attributes: see Teacher; those of parts
    that are not stored say that there are none.

    Args:
        directory: the cache.

    Raises:
        UserError: there is no cache, or not all of it.
    """

    image_size = 0
    modalities: tuple[str, ...] = (IMAGE,)
    tokenizer: Path | None = None
    max_tokens = 0

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        try:
            self.manifest = CacheManifest.read(self.directory)
        except ValueError:
            raise UserError(
                f"no teacher cache at {self.directory} ({MANIFEST_NAME} is missing, damaged or of another version); "
                "make one with `emkum teacher cache`"
            ) from None
        self._assert_complete()
        parts = self.manifest.parts
        self.identity: dict[str, Any] = self.manifest.teacher
        self.splits = self.manifest.splits
        self.width: int = parts[FEATURES]["width"]
        self.num_classes: int = parts[LOGITS]["classes"] if LOGITS in parts else 0
        self.patch_width: int = parts[PATCHES]["width"] if PATCHES in parts else 0
        self.grid: tuple[int, int] | None = tuple(parts[PATCHES]["grid"]) if PATCHES in parts else None
        self._open = lru_cache(maxsize=_MAX_OPEN_FILES)(partial(_map_file, self.directory, self.manifest))

    def _assert_complete(self) -> None:
        missing = missing_shards(self.directory, self.manifest)
        if missing:
            split, view, number, *_ = missing[0]
            raise UserError(
                f"teacher cache {self.directory} is incomplete: {len(missing):,} of "
                f"{sum(1 for _ in self.manifest.shards()):,} shards are missing or damaged, the first of them number "
                f"{number} of split {split!r}, view {view}; {_AGAIN}"
            )

    def open_split(self, split: str, data_hash: str, crops: dict[str, Any]) -> None:
        if split not in self.splits:
            raise UserError(f"teacher cache {self.directory} has no split {split!r}, only {', '.join(self.splits)}")
        cached = self.splits[split]
        if cached["data_hash"] != data_hash:
            raise UserError(f"teacher cache {self.directory} was made of other data than the split {split!r} in use")
        for name, value in cached["crops"].items():
            if cached["crops"]["views"] > 0 and crops.get(name) != value:
                raise UserError(
                    f"teacher cache {self.directory} holds {split!r} crops with {name} = {value}, "
                    f"training uses {crops.get(name)}"
                )

    def __call__(self, batch: TeacherInput) -> TeacherOutput:
        manifest, split = self.manifest, batch.split
        shards, rows = np.divmod(batch.ids.cpu().numpy(), manifest.shard_size)
        # Where the centered crop is stored, whichever crop the student sees.
        views = np.maximum(batch.views.cpu().numpy(), 0) % manifest.views(split)
        files = views * self.splits[split]["samples"] + shards
        order = np.argsort(files, kind="stable")
        of_one_file = np.split(order, np.flatnonzero(np.diff(files[order])) + 1)
        values = {}
        for part, dtype in manifest.dtypes.items():
            records = np.empty((len(rows), *dtype.shape), dtype.base)
            for group in of_one_file:
                stored = self._open(part, split, int(views[group[0]]), int(shards[group[0]]))
                records[group] = stored[rows[group]]
            values[part] = unpack(part, records, manifest.parts[part], batch.images.device)
        return TeacherOutput(**values)
