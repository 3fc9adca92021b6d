"""Images with captions in tar shards of the WebDataset convention, each sample randomly readable.

A split is a folder of `000000.tar`, `000001.tar`, ... and `index.npy`. A sample KEY has up to three members that follow
one another: `KEY.jpg` (or another image suffix), `KEY.txt` (its first caption, absent without captions) and `KEY.json`
({"key", "captions", "image_id", further meta}). The index has one record a sample (`INDEX_DTYPE`) and is memory-mapped,
so that opening a split costs the same for a thousand as for ten million samples.
"""

import hashlib
import json
import os
import shutil
import tarfile
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from emkum.errors import UserError

INDEX_NAME = "index.npy"
SPLIT_ORDER = ("train", "valid", "test")

# Offsets and lengths in bytes of the member's content in its shard; `checksum` is the CRC-32 of image and JSON.
# 48 bytes without gaps, and every field's stride is a multiple of its size, as `torch.from_numpy` demands.
INDEX_DTYPE = np.dtype(
    [
        ("image_offset", "<i8"),
        ("json_offset", "<i8"),
        ("image_id", "<i8"),
        ("checksum", "<i8"),
        ("image_length", "<i4"),
        ("json_length", "<i4"),
        ("shard", "<i4"),
        ("num_captions", "<i4"),
    ]
)

_RESERVED_META = ("key", "captions", "image_id")
# More shards than this are closed, least recently used first: below the usual limit of 1,024 open files.
_MAX_OPEN_SHARDS = 256


@contextmanager
def staged_directory(target: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside `target` that takes its place on success and is removed on any exception.

    Raises:
        UserError: `target` exists and is not an empty folder, or its parent cannot be written.
    """
    target = Path(target).absolute()
    _assert_free(target)
    stage = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        stage.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write beside {target}: {error.strerror}") from None
    try:
        yield stage
        _assert_free(target)
        os.replace(stage, target)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _assert_free(target: Path) -> None:
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} exists already and is not empty")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} exists already and is not a folder")


@dataclass(frozen=True)
class ShardSample:
    """One image and its captions.

    Attributes:
        key: name, unique in its split.
        image: the encoded file.
        captions: in their order; may be empty.
        image_id: equal for equal images.
        meta: what else the JSON member holds.
    """

    key: str
    image: bytes
    captions: tuple[str, ...]
    image_id: int
    meta: dict[str, Any]


class ShardWriter:
    """Write one split; a context manager.

    The folder appears whole when the block ends, and not at all when it raises. Equal samples give equal bytes. The set
    of keys is held in memory until then.

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
        self._stack = ExitStack()
        self._stage: Path | None = None
        self._file: IO[bytes] | None = None
        self._keys: set[str] = set()
        self._records: list[tuple[int, ...]] = []
        self._finished: list[np.ndarray] = []

    def __enter__(self) -> "ShardWriter":
        self._stage = self._stack.enter_context(staged_directory(self.directory))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._close_file()
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
        meta: dict[str, Any] | None = None,
        image_id: int | None = None,
    ) -> None:
        """Append one sample.

        Args:
            key: unique name without dots and slashes, since WebDataset splits names at the first dot.
            image: the encoded file, stored unchanged.
            suffix: of the image file without its dot, such as `jpg`.
            captions: none or more.
            meta: further JSON values for the sample.
            image_id: None = the running number of the sample.

        Raises:
            UserError: the key is malformed or was added before.
            ValueError: the suffix or a name in `meta` is one that the format itself uses.
        """
        if not key or any(character in key for character in "./\\\0"):
            raise UserError(f"sample name {key!r} must be neither empty nor hold dots or slashes")
        if key in self._keys:
            raise UserError(f"two samples for {self.directory} are named {key}")
        if not suffix.isalnum() or suffix in ("txt", "json"):
            raise ValueError(f"image suffix {suffix!r}: want one such as jpg or png")
        meta = meta or {}
        if any(name in meta for name in _RESERVED_META):
            raise ValueError(f"meta must not hold {', '.join(_RESERVED_META)}")
        image_id = self.num_samples if image_id is None else int(image_id)
        described = {"key": key, "captions": list(captions), "image_id": image_id, **meta}
        text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()

        file = self._open_file()
        image_offset = _append_member(file, f"{key}.{suffix}", image)
        if captions:
            _append_member(file, f"{key}.txt", captions[0].encode())
        json_offset = _append_member(file, f"{key}.json", text)
        shard = self.num_samples // self.samples_per_shard
        checksum = zlib.crc32(text, zlib.crc32(image))
        lengths = (len(image), len(text))
        self._records.append((image_offset, json_offset, image_id, checksum, *lengths, shard, len(captions)))
        self._keys.add(key)
        self.num_samples += 1
        if self.num_samples % self.samples_per_shard == 0:
            self._close_file()

    def _open_file(self) -> IO[bytes]:
        if self._stage is None:
            raise RuntimeError("ShardWriter is a context manager: add samples inside a with block")
        if self._file is None:
            self._file = open(_shard_path(self._stage, self.num_samples // self.samples_per_shard), "wb")
        return self._file

    def _close_file(self) -> None:
        """End the present shard and move its records out of Python objects."""
        if self._file is not None:
            self._file.write(bytes(2 * tarfile.BLOCKSIZE))
            self._file.write(bytes(-self._file.tell() % tarfile.RECORDSIZE))
            self._file.close()
            self._file = None
        if self._records:
            self._finished.append(np.array(self._records, dtype=INDEX_DTYPE))
            self._records = []

    def _finish(self) -> None:
        self._close_file()
        if self.num_samples == 0:
            raise UserError(f"no samples to write into {self.directory}")
        np.save(self._stage / INDEX_NAME, np.concatenate(self._finished), allow_pickle=False)


def _shard_path(directory: Path, shard: int) -> Path:
    return directory / f"{shard:06d}.tar"


def _append_member(file: IO[bytes], name: str, content: bytes) -> int:
    """Append a member without owner and time; return the offset of its content."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    file.write(info.tobuf(tarfile.PAX_FORMAT))
    offset = file.tell()
    file.write(content)
    file.write(bytes(-len(content) % tarfile.BLOCKSIZE))
    return offset


class _ShardFile:
    """A file descriptor that lives as long as someone uses it, so that closing one cannot disturb another thread."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, offset: int, length: int) -> bytes:
        # `pread` leaves the file's position alone: descriptors that a fork shares do not disturb one another.
        return os.pread(self.descriptor, length, offset)


class ShardedSamples:
    """One split, a read-only sequence of `ShardSample`.

    It holds the memory-mapped index and a bounded number of open shards; it may be forked into data loader workers
    and pickled, which carries the folder's name alone.

    Args:
        directory: what `ShardWriter` wrote.

    Raises:
        UserError: the folder, its index or a shard is missing or damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).absolute()
        self._index = _load_index(self.directory)
        self._shard_sizes = _shard_sizes(self.directory, self._index)
        self._open = lru_cache(maxsize=_MAX_OPEN_SHARDS)(_ShardFile)

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["directory"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.directory)!r})"

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> ShardSample:
        """Read one sample.

        Raises:
            IndexError: there is no such sample.
            UserError: the shard's bytes are not those that were written.
        """
        position = int(index) + len(self) if index < 0 else int(index)
        if not 0 <= position < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        record = self._index[position]
        path = _shard_path(self.directory, int(record["shard"]))
        file = self._open(path)
        image = file.read(int(record["image_offset"]), int(record["image_length"]))
        text = file.read(int(record["json_offset"]), int(record["json_length"]))
        if zlib.crc32(text, zlib.crc32(image)) != int(record["checksum"]):
            raise UserError(f"{path} is damaged at sample {position}: prepare the data again")
        meta = json.loads(text)
        key, captions, image_id = (meta.pop(name) for name in _RESERVED_META)
        return ShardSample(key=key, image=image, captions=tuple(captions), image_id=image_id, meta=meta)

    @property
    def image_ids(self) -> np.ndarray:
        """(len,) int64, equal for equal images; a read-only view of the index."""
        return self._index["image_id"]

    @property
    def num_captions(self) -> np.ndarray:
        """(len,) int32; a read-only view of the index."""
        return self._index["num_captions"]

    def content_hash(self) -> str:
        """SHA-256 (hex) of the index, which holds each sample's checksum, and of the shards' sizes."""
        digest = hashlib.sha256(self._index.tobytes())
        digest.update(np.array(self._shard_sizes, dtype="<i8").tobytes())
        return digest.hexdigest()


def _load_index(directory: Path) -> np.ndarray:
    path = directory / INDEX_NAME
    if not path.is_file():
        what = "has no index.npy" if directory.is_dir() else "does not exist"
        raise UserError(f"split folder {directory} {what}; {_what_there_is(directory.parent)}")
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise UserError(f"{path} is not an index of tar shards: prepare the data again") from None
    if index.dtype != INDEX_DTYPE or index.ndim != 1 or len(index) == 0:
        raise UserError(f"{path} is empty or of another version: prepare the data again")
    # A plain array over the mapped memory: fields of it are arrays too, without memmap's cost on each access.
    return index.view(np.ndarray)


def _shard_sizes(directory: Path, index: np.ndarray) -> list[int]:
    sizes = []
    for shard in range(int(index["shard"].max()) + 1):
        path = _shard_path(directory, shard)
        if not path.is_file():
            raise UserError(f"shard {path} is missing: prepare the data again")
        sizes.append(path.stat().st_size)
    ends = index["json_offset"] + index["json_length"]
    cut = np.flatnonzero(ends > np.array(sizes)[index["shard"]])
    if len(cut) > 0:
        raise UserError(f"shard {_shard_path(directory, int(index['shard'][cut[0]]))} is cut off: prepare it again")
    return sizes


def _what_there_is(data_dir: Path) -> str:
    splits = available_splits(data_dir)
    if splits:
        return f"splits of {data_dir}: {', '.join(splits)}"
    return "make one with `emkum prepare scenes --out DIR` or another set of `emkum prepare --help`"


def available_splits(data_dir: str | Path) -> list[str]:
    """Names of the splits in a folder of prepared data: train, valid, test, then others; empty without the folder."""
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        return []
    names = [entry.name for entry in data_dir.iterdir() if (entry / INDEX_NAME).is_file() and entry.name[0] != "."]
    return sorted(names, key=lambda name: (SPLIT_ORDER.index(name) if name in SPLIT_ORDER else len(SPLIT_ORDER), name))


def open_split(data_dir: str | Path, split: str, require_captions: bool = True) -> ShardedSamples:
    """Open a split of a folder of prepared data.

    Args:
        data_dir: what `emkum prepare` wrote.
        split: train, valid, test or another that is there.
        require_captions: whether each image must have a caption.

    Raises:
        UserError: there is no such folder or split, or an image without captions where they are required.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise UserError(f"data folder {data_dir} does not exist; {_what_there_is(data_dir)}")
    splits = available_splits(data_dir)
    if split not in splits:
        raise UserError(f"data folder {data_dir} has no split {split!r}; {_what_there_is(data_dir)}")
    samples = ShardedSamples(data_dir / split)
    missing = np.flatnonzero(samples.num_captions == 0)
    if require_captions and len(missing) > 0:
        raise UserError(
            f"split {split} of {data_dir} has {len(missing)} of {len(samples)} images without a caption, "
            f"the first {samples[int(missing[0])].key}"
        )
    return samples
