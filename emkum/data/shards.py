"""Images with captions in tar shards of the WebDataset convention, each sample randomly readable.

A split is a folder with `index.npy` and `shards.json`, and with its tars (`000000.tar`, ...) where they were written
for it; tars that were there before, such as img2dataset's, stay where they are and `shards.json` names their folder. A
sample KEY has members that follow one another: `KEY.jpg` (or another image suffix), `KEY.txt` (its caption),
`KEY.json`, and `KEY.wav` where it has a sound. In the JSON that `ShardWriter` writes, {"key", "captions", further
meta}, all captions are; foreign ones give one caption, from KEY.txt or else the JSON's "caption".

The index has one record a sample (`INDEX_DTYPE`; `SOUND_INDEX_DTYPE` where samples have sounds) and is memory-mapped,
so that opening a split costs the same for a thousand as for ten million samples.
"""

import io
import json
import os
import tarfile
import zlib
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emkum.errors import UserError

# Beside the splits of a set with classes: their names by label, as `class_name`.
CLASSES_NAME = "classes.json"
INDEX_NAME = "index.npy"
MANIFEST_NAME = "shards.json"
MANIFEST_VERSION = 1
SPLIT_ORDER = ("train", "valid", "test")

# Where a sample's captions are: nowhere, in JSON of this project, in a text member, in foreign JSON as "caption".
NO_TEXT, OWN_JSON, PLAIN_TEXT, FOREIGN_JSON = range(4)

# A block is tar's unit of 512 bytes, at whose multiples all members begin; lengths are in bytes. `text` is the member
# that `text_kind` tells of; `checksum` is the CRC-32 of image and text; `caption_length` is the mean number of
# characters of the captions, rounded, at most 65,535. 36 bytes without gaps.
INDEX_DTYPE = np.dtype(
    [
        ("image_block", "<i4"),
        ("image_length", "<i4"),
        ("text_block", "<i4"),
        ("text_length", "<i4"),
        ("image_id", "<i4"),
        ("shard", "<i4"),
        ("checksum", "<u4"),
        ("text_kind", "<i4"),
        ("num_captions", "<u2"),
        ("caption_length", "<u2"),
    ]
)

# Of a split with sounds; a sample without one has length 0. The checksum is the sound's own.
SOUND_INDEX_DTYPE = np.dtype(
    [*INDEX_DTYPE.descr, ("sound_block", "<i4"), ("sound_length", "<i4"), ("sound_checksum", "<u4")]
)

# More shards than this are closed, least recently used first: below the usual limit of 1,024 open files.
_MAX_OPEN_SHARDS = 256


class ShardSample(NamedTuple):
    """One image with its captions, and its sound where it has one.

    Attributes:
        key: name in its shard.
        image: the encoded file; empty bytes where a sample has none.
        captions: in their order; may be empty.
        image_id: equal for equal images.
        meta: what else the JSON member holds.
        sound: a WAV file, see `emkum.data.sounds`; empty bytes where a sample has none.
    """

    key: str
    image: bytes
    captions: tuple[str, ...]
    image_id: int
    meta: dict[str, Any]
    sound: bytes = b""


@dataclass(frozen=True)
class ShardManifest:
    """What `shards.json` says of a split.

    Attributes:
        folder: where the shards are, relative to the split or absolute.
        names, sizes: of the shards, in the order of the index's numbers; sizes in bytes.
        num_samples, num_captions: how many.
        num_without_caption: samples that have none.
        index_sha256: of the index's records.
    """

    folder: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    num_samples: int
    num_captions: int
    num_without_caption: int
    index_sha256: str
    version: int = field(default=MANIFEST_VERSION)


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
        directory: the split's folder.

    Raises:
        UserError: the folder, its index or a shard is missing, damaged or not the one that was indexed.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).absolute()
        self.manifest = _load_manifest(self.directory)
        self._index = _load_index(self.directory, self.manifest)
        self._folder = self.directory / self.manifest.folder
        _assert_shards(self._folder, self.manifest)
        self._open = lru_cache(maxsize=_MAX_OPEN_SHARDS)(partial(_open_shard, self._folder, self.manifest.names))

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
            UserError: the shard's bytes are not those that were indexed.
        """
        position = int(index) + len(self) if index < 0 else int(index)
        if not 0 <= position < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        # One conversion of the whole record is faster than reading its fields one by one.
        record = self._index[position].item()
        image_block, image_length, text_block, text_length, image_id, shard, checksum, kind, _, _, *heard = record
        file = self._open(shard)
        offset = image_block * tarfile.BLOCKSIZE
        image = file.read(offset, image_length)
        text = file.read(text_block * tarfile.BLOCKSIZE, text_length)
        if zlib.crc32(text, zlib.crc32(image)) != checksum:
            raise self._damaged(shard, position)
        if kind == OWN_JSON:
            meta = json.loads(text)
            sound = self._sound(shard, position, *heard) if heard else b""
            return ShardSample(meta.pop("key"), image, tuple(meta.pop("captions")), image_id, meta, sound)
        captions, meta = foreign_captions(kind, text)
        return ShardSample(_foreign_key(file, offset), image, captions, image_id, meta)

    def _sound(self, shard: int, position: int, block: int, length: int, checksum: int) -> bytes:
        sound = self._open(shard).read(block * tarfile.BLOCKSIZE, length)
        if zlib.crc32(sound) != checksum:
            raise self._damaged(shard, position)
        return sound

    def _damaged(self, shard: int, position: int) -> UserError:
        path = self._folder / self.manifest.names[shard]
        return UserError(f"{path} is damaged at sample {position}: prepare the data again")

    @property
    def image_ids(self) -> np.ndarray:
        """(len,) int32, equal for equal images; a read-only view of the index."""
        return self._index["image_id"]

    @property
    def image_lengths(self) -> np.ndarray:
        """(len,) int32, bytes of each encoded image; a read-only view of the index."""
        return self._index["image_length"]

    @property
    def num_captions(self) -> np.ndarray:
        """(len,) uint16; a read-only view of the index."""
        return self._index["num_captions"]

    @property
    def caption_lengths(self) -> np.ndarray:
        """(len,) uint16, mean characters of each sample's captions; a read-only view of the index."""
        return self._index["caption_length"]

    @property
    def has_sound(self) -> np.ndarray:
        """(len,) bool, whether each sample has a sound."""
        if self._index.dtype == INDEX_DTYPE:
            return np.zeros(len(self), dtype=bool)
        return self._index["sound_length"] > 0

    def content_hash(self) -> str:
        """SHA-256 (hex) of the index, which holds a checksum of each sample's bytes."""
        return self.manifest.index_sha256


def _open_shard(folder: Path, names: tuple[str, ...], number: int) -> _ShardFile:
    try:
        return _ShardFile(folder / names[number])
    except OSError as error:
        raise UserError(f"cannot read shard {folder / names[number]}: {error.strerror}") from None


def foreign_captions(kind: int, text: bytes) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Captions and meta of a sample that another program wrote.

    Args:
        kind: one of NO_TEXT, PLAIN_TEXT, FOREIGN_JSON.
        text: content of the member that holds them.

    Raises:
        ValueError: the member is not UTF-8, or no JSON object.
    """
    if kind == NO_TEXT:
        return (), {}
    if kind == PLAIN_TEXT:
        captions, meta = [text.decode()], {}
    else:
        meta = json.loads(text)
        if not isinstance(meta, dict):
            raise ValueError("its JSON is no object")
        captions = [meta.pop("caption", None) or ""]
    stripped = (str(caption).strip() for caption in captions)
    return tuple(caption for caption in stripped if caption), meta


def _foreign_key(file: _ShardFile, offset: int) -> str:
    """Name of the member whose content begins at `offset`, without its suffixes; "?" where there is no header."""
    blocks = file.read(max(0, offset - 3 * tarfile.BLOCKSIZE), min(offset, 3 * tarfile.BLOCKSIZE))
    try:
        # A name too long for its header is in an extended one (GNU's type L, POSIX's x), two blocks before.
        if blocks[156:157] in (b"L", b"x") and blocks[257:262] == b"ustar":
            info = tarfile.TarFile(fileobj=io.BytesIO(blocks + bytes(tarfile.BLOCKSIZE))).next()
        else:
            info = tarfile.TarInfo.frombuf(blocks[-tarfile.BLOCKSIZE :], "utf-8", "surrogateescape")
    except tarfile.TarError:
        return "?"
    return member_key(info.name)


def member_key(name: str) -> str:
    """What precedes the first dot of a member's base name, folder included, as WebDataset has it."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _load_manifest(directory: Path) -> ShardManifest:
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise UserError(f"split folder {directory} does not exist; {_what_there_is(directory.parent)}")
    if not path.is_file():
        raise UserError(f"split folder {directory} has no {MANIFEST_NAME}; {_what_there_is(directory.parent)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        manifest = ShardManifest(**content | {name: tuple(content[name]) for name in ("names", "sizes")})
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{path} is no list of tar shards: prepare the data again") from None
    if manifest.version != MANIFEST_VERSION:
        raise UserError(f"{path} is of format {manifest.version}, not {MANIFEST_VERSION}: prepare the data again")
    return manifest


def _load_index(directory: Path, manifest: ShardManifest) -> np.ndarray:
    path = directory / INDEX_NAME
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise UserError(f"{path} is missing or not an index of tar shards: prepare the data again") from None
    if index.dtype not in (INDEX_DTYPE, SOUND_INDEX_DTYPE) or index.shape != (manifest.num_samples,) or len(index) == 0:
        raise UserError(f"{path} is empty, of another version or not that of {MANIFEST_NAME}: prepare the data again")
    # A plain array over the mapped memory: fields of it are arrays too, without memmap's cost on each access.
    return index.view(np.ndarray)


def _assert_shards(folder: Path, manifest: ShardManifest) -> None:
    for name, size in zip(manifest.names, manifest.sizes, strict=True):
        try:
            found = os.stat(folder / name).st_size
        except OSError:
            raise UserError(f"shard {folder / name} is missing: prepare the data again") from None
        if found != size:
            raise UserError(
                f"shard {folder / name} has {found:,} bytes, but had {size:,} when it was indexed: prepare it again"
            )


def _what_there_is(data_dir: Path) -> str:
    splits = available_splits(data_dir)
    if splits:
        return f"splits of {data_dir}: {', '.join(splits)}"
    return "make one with `emkum prepare scenes --out DIR` or another set of `emkum prepare --help`"


def available_splits(data_dir: str | Path, marker: str = INDEX_NAME) -> list[str]:
    """Names of the splits in a folder of prepared data: train, valid, test, then others; empty without the folder.

    Args:
        data_dir: what `emkum prepare` wrote.
        marker: the file that makes a folder a split of the wanted kind.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        return []
    names = [entry.name for entry in data_dir.iterdir() if (entry / marker).is_file() and entry.name[0] != "."]
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
    if require_captions and samples.manifest.num_without_caption > 0:
        missing = np.flatnonzero(samples.num_captions == 0)
        raise UserError(
            f"split {split} of {data_dir} has {len(missing)} of {len(samples)} images without a caption, "
            f"the first {samples[int(missing[0])].key}"
        )
    return samples
