"""Writing tar shards, indexing those that are there, and joining the parts to one split.

Many processes may each make one part, a shard and its records; `join_parts` then makes the index of a whole data set.
"""

import hashlib
import json
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from emkum.data.foreign_tars import IMAGE_SUFFIXES
from emkum.data.shards import (
    INDEX_DTYPE,
    INDEX_NAME,
    MANIFEST_NAME,
    OWN_JSON,
    SOUND_INDEX_DTYPE,
    ShardManifest,
)
from emkum.errors import UserError
from emkum.files import replaced_file, staged_directory
from emkum.provenance import write_json

# A part's records also tell equal names and equal images apart.
PART_DTYPE = np.dtype([*SOUND_INDEX_DTYPE.descr, ("key_hash", "<u8"), ("content_hash", "<u8")])
# Image id of a sample whose set has none: its number in the whole set takes its place.
NO_ID = -1

_RESERVED_META = ("key", "captions")
_LARGEST_ID = np.iinfo(np.int32).max


def content_hash(data: bytes) -> int:
    """64 bits of BLAKE2b: among ten million files two different ones agree with a chance of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class TarPart:
    """Write one shard; a context manager. The file appears whole when the block ends, and not at all when it raises.

    Equal samples give equal bytes.

    Args:
        path: the tar file.
        shard: its number in the split.
    """

    def __init__(self, path: Path, shard: int) -> None:
        self.path = path
        self.shard = shard
        self._stack = ExitStack()
        self._keys: set[str] = set()
        self._records: list[tuple[int, ...]] = []

    def __enter__(self) -> "TarPart":
        temporary = self._stack.enter_context(replaced_file(self.path))
        self._file: IO[bytes] = self._stack.enter_context(open(temporary, "wb"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._file.write(bytes(2 * tarfile.BLOCKSIZE))
            self._file.write(bytes(-self._file.tell() % tarfile.RECORDSIZE))
        self._stack.__exit__(kind, value, trace)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def records(self) -> np.ndarray:
        """(samples,) PART_DTYPE."""
        return np.array(self._records, dtype=PART_DTYPE)

    def add(
        self,
        key: str,
        image: bytes,
        suffix: str,
        captions: Sequence[str],
        meta: Mapping[str, Any] | None = None,
        image_id: int | None = None,
        fingerprint: int | None = None,
        sound: bytes = b"",
    ) -> None:
        """Append one sample.

        Args:
            key: name without dots and slashes, since WebDataset splits names at the first dot; unique in the shard.
            image: the encoded file, stored unchanged; empty = none.
            suffix: of the image file without its dot, such as `jpg`.
            captions: none or more.
            meta: further JSON values for the sample.
            image_id: None = the number of the sample.
            fingerprint: `content_hash` of what makes two images equal; None = of `image`.
            sound: WAV file of `emkum.data.sounds`; empty = none.

        Raises:
            UserError: the key is malformed or was added before; the id is negative or above 2**31 - 1.
            ValueError: the suffix or a name in `meta` is one that the format itself uses.
        """
        if not key or any(character in key for character in "./\\\0"):
            raise UserError(f"sample name {key!r} must be neither empty nor hold dots or slashes")
        if key in self._keys:
            raise UserError(f"two samples of shard {self.path.name} are named {key}")
        if suffix not in IMAGE_SUFFIXES:
            raise ValueError(f"image suffix {suffix!r}: choose from {', '.join(IMAGE_SUFFIXES)}")
        meta = meta or {}
        if any(name in meta for name in _RESERVED_META):
            raise ValueError(f"meta must not hold {', '.join(_RESERVED_META)}")
        if image_id is not None and not 0 <= image_id <= _LARGEST_ID:
            raise UserError(f"sample {key}: image id {image_id} is not in 0 ... {_LARGEST_ID}")
        described = {"key": key, "captions": list(captions), **meta}
        text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
        image_offset = self._append(f"{key}.{suffix}", image)
        if captions:
            self._append(f"{key}.txt", captions[0].encode())
        text_offset = self._append(f"{key}.json", text)
        sound_offset = self._append(f"{key}.wav", sound) if sound else 0
        self._keys.add(key)
        self._records.append(
            make_record(
                (image_offset, image),
                (text_offset, text, OWN_JSON),
                captions,
                NO_ID if image_id is None else image_id,
                self.shard,
                content_hash(key.encode()),
                content_hash(image) if fingerprint is None else fingerprint,
                (sound_offset, sound),
            )
        )

    def _append(self, name: str, content: bytes) -> int:
        """Append a member without owner and time; return the offset of its content."""
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._file.write(info.tobuf(tarfile.PAX_FORMAT))
        offset = self._file.tell()
        self._file.write(content)
        self._file.write(bytes(-len(content) % tarfile.BLOCKSIZE))
        return offset


def make_record(
    image: tuple[int, bytes],
    text: tuple[int, bytes, int],
    captions: Sequence[str],
    image_id: int,
    shard: int,
    key_hash: int,
    fingerprint: int,
    sound: tuple[int, bytes] = (0, b""),
) -> tuple[int, ...]:
    """One record of PART_DTYPE.

    Args:
        image: offset and content.
        text: offset, content and kind of the member that holds the captions.
        captions: what it holds.
        image_id: or NO_ID.
        shard: number.
        key_hash, fingerprint: what tells names and images apart.
        sound: offset and content; empty where there is none.
    """
    mean_length = round(sum(map(len, captions)) / len(captions)) if captions else 0
    return (
        image[0] // tarfile.BLOCKSIZE,
        len(image[1]),
        text[0] // tarfile.BLOCKSIZE,
        len(text[1]),
        image_id,
        shard,
        zlib.crc32(text[1], zlib.crc32(image[1])),
        text[2],
        min(len(captions), 65_535),
        min(mean_length, 65_535),
        sound[0] // tarfile.BLOCKSIZE,
        len(sound[1]),
        zlib.crc32(sound[1]),
        key_hash,
        fingerprint,
    )


@dataclass(frozen=True)
class SplitParts:
    """The parts of one split.

    Attributes:
        folder: where its shards are, relative to the split or absolute.
        shards: their file names, by number.
        parts: files that `np.save` wrote of each shard's records (PART_DTYPE), in order.
    """

    folder: str
    shards: Sequence[str]
    parts: Sequence[Path]


@dataclass(frozen=True)
class JoinedSplit:
    """How many samples and captions a split has, how many images equal an earlier one of the whole set, and how many
    samples were left out since an earlier one of the split has the same name."""

    images: int
    captions: int
    duplicate_images: int
    duplicate_names: int


def join_parts(root: Path, splits: Mapping[str, SplitParts], limit: int = 0) -> dict[str, JoinedSplit]:
    """Write index and manifest of every split into `root`/SPLIT.

    Equal images get the id of the first of them, over all splits. Of samples of one name in a split the first stays,
    and of all samples the first `limit` (0 = all). Memory: 24 bytes a sample, beside mapped files.

    Raises:
        UserError: a split has no sample.
    """
    hashes = {name: [_column(part, "content_hash") for part in split.parts] for name, split in splits.items()}
    first = _first_of_equals(np.concatenate([np.concatenate(columns) for columns in hashes.values()]))
    del hashes
    ids = np.concatenate([_column(part, "image_id") for split in splits.values() for part in split.parts])
    numbers = np.arange(len(ids), dtype=np.int32)
    ids = np.where(ids == NO_ID, numbers, ids)[first]
    repeated = first != numbers
    joined, start = {}, 0
    for name, split in splits.items():
        keys = np.concatenate([_column(part, "key_hash") for part in split.parts])
        kept = _first_of_equals(keys) == np.arange(len(keys), dtype=np.int32)
        stop = start + len(keys)
        if not kept.any():
            raise UserError(f"no samples to write into {root / name}")
        equal_names = int((~kept).sum())
        if limit > 0:
            kept &= np.cumsum(kept) <= limit
        joined[name] = _write_split(root / name, split, ids[start:stop], kept, repeated[start:stop], equal_names)
        start = stop
    return joined


def _column(part: Path, name: str) -> np.ndarray:
    return np.load(part, mmap_mode="r", allow_pickle=False)[name].copy()


def _first_of_equals(values: np.ndarray) -> np.ndarray:
    """(n,) int32, for each value the first position that holds the same."""
    order = np.argsort(values, kind="stable").astype(np.int32)
    begins = np.empty(len(values), dtype=bool)
    begins[:1] = True
    begins[1:] = values[order[1:]] != values[order[:-1]]
    # The stable order puts the first of equal values in front of the others.
    leader = order[np.maximum.accumulate(np.where(begins, np.arange(len(values), dtype=np.int32), 0))]
    first = np.empty_like(order)
    first[order] = leader
    return first


def _write_split(
    directory: Path, split: SplitParts, ids: np.ndarray, kept: np.ndarray, repeated: np.ndarray, equal_names: int
) -> JoinedSplit:
    directory.mkdir(exist_ok=True)
    digest = hashlib.sha256()
    captions = without = row = position = 0
    heard = any(_column(part, "sound_length").any() for part in split.parts)
    dtype = SOUND_INDEX_DTYPE if heard else INDEX_DTYPE
    header = np.lib.format.header_data_from_array_1_0(np.empty(0, dtype)) | {"shape": (int(kept.sum()),)}
    # Written piece by piece: of a mapped file, a full disk would be told by a signal that ends the process.
    with replaced_file(directory / INDEX_NAME) as temporary, open(temporary, "wb") as index:
        np.lib.format.write_array_header_1_0(index, header)
        for path in split.parts:
            part = np.load(path, allow_pickle=False)
            chosen = kept[position : position + len(part)]
            records = np.empty(int(chosen.sum()), dtype=dtype)
            for name in dtype.names:
                records[name] = part[name][chosen]
            records["image_id"] = ids[position : position + len(part)][chosen]
            index.write(content := records.tobytes())
            digest.update(content)
            captions += int(records["num_captions"].sum())
            without += int((records["num_captions"] == 0).sum())
            row, position = row + len(records), position + len(part)
    sizes = tuple((directory / split.folder / name).stat().st_size for name in split.shards)
    manifest = ShardManifest(split.folder, tuple(split.shards), sizes, row, captions, without, digest.hexdigest())
    write_json(directory / MANIFEST_NAME, asdict(manifest))
    return JoinedSplit(row, captions, int(repeated[kept].sum()), equal_names)


class ShardWriter:
    """Write one split in this process; a context manager.

    The folder appears whole when the block ends, and not at all when it raises.

    Args:
        directory: the split's folder, absent or empty before.
        samples_per_shard: samples in one tar file.

    Raises:
        UserError: on leaving the block, without any sample; on entering, where the folder is taken.
    """

    def __init__(self, directory: str | Path, samples_per_shard: int = 1000) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, not {samples_per_shard}")
        self.directory = Path(directory)
        self.samples_per_shard = samples_per_shard
        self.num_samples = 0
        self._shards: list[str] = []
        self._parts: list[Path] = []
        self._part: TarPart | None = None
        self._keys: set[str] = set()
        self._stack = ExitStack()

    def __enter__(self) -> "ShardWriter":
        self._stage = self._stack.enter_context(staged_directory(self.directory))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._part is not None:
                self._part.__exit__(kind, value, trace)
            self._stack.__exit__(kind, value, trace)
            return
        with self._stack:
            self._finish()

    def add(
        self,
        key: str,
        image: bytes,
        suffix: str,
        captions: Sequence[str],
        meta: Mapping[str, Any] | None = None,
        image_id: int | None = None,
        sound: bytes = b"",
    ) -> None:
        """Append one sample; see `TarPart.add`. The key must be unique in the split."""
        if key in self._keys:
            raise UserError(f"two samples for {self.directory} are named {key}")
        if self._part is None:
            number = len(self._shards)
            self._shards.append(f"{number:06d}.tar")
            self._part = TarPart(self._stage / self._shards[-1], number).__enter__()
        self._part.add(key, image, suffix, captions, meta, image_id, sound=sound)
        self._keys.add(key)
        self.num_samples += 1
        if len(self._part) == self.samples_per_shard:
            self._close_part()

    def _close_part(self) -> None:
        if self._part is not None:
            self._part.__exit__(None, None, None)
            self._parts.append(self._stage / f"{len(self._parts):06d}.part.npy")
            np.save(self._parts[-1], self._part.records, allow_pickle=False)
            self._part = None

    def _finish(self) -> None:
        self._close_part()
        if self.num_samples == 0:
            raise UserError(f"no samples to write into {self.directory}")
        join_parts(self._stage.parent, {self._stage.name: SplitParts(".", self._shards, self._parts)})
        for part in self._parts:
            part.unlink()
