"""Text as blocks of token ids in memory-mapped files.

A split is a folder of two arrays in NumPy's format: `tokens.npy`, the ids of all blocks one after another (uint16 where
the vocabulary has at most 65,535 entries, else int32), and `offsets.npy` (n + 1 int64), so that block i is
tokens[offsets[i] : offsets[i + 1]]. Opening a split costs the same for any size.

Without torch, so that worker processes that write blocks start quickly.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from emkum.data.tokenizers import SpecialTokens
from emkum.errors import UserError
from emkum.files import staged_directory

TOKENS_NAME = "tokens.npy"
OFFSETS_NAME = "offsets.npy"
_LARGEST_UINT16_VOCABULARY = 65_535


def blocks_of(
    documents: Iterable[Sequence[int]], special: SpecialTokens, block_size: int, max_tokens: int = 512
) -> Iterator[list[int]]:
    """Cut documents into blocks that begin with the begin token and end with the end token.

    With a block size, the documents stand one after another with an end token between two of them, and each block takes
    the next `block_size` - 2 tokens of that. What is left over at the end is dropped, unless there is no block before
    it. Only one document and what is left of those before it are in memory.

    Args:
        documents: pieces of each, without begin and end tokens; empty ones are left out.
        special: ids of the special tokens.
        block_size: tokens of each block, special tokens included; 0 = one document a block.
        max_tokens: where a document is one block, its most tokens, special tokens included; the rest is dropped.

    Raises:
        UserError: a block has no room for a piece.
    """
    least = block_size or max_tokens
    if least < 3:
        raise UserError(f"blocks of {least} tokens have no room between begin and end; give at least 3")
    room = least - 2
    if block_size == 0:
        yield from ([special.bos, *document[:room], special.eos] for document in documents if len(document) > 0)
        return
    pending: list[int] = []
    begun = cut = False
    for document in documents:
        if len(document) == 0:
            continue
        if begun:
            pending.append(special.eos)
        begun = True
        pending.extend(document)
        end = len(pending) // room * room
        for start in range(0, end, room):
            cut = True
            yield [special.bos, *pending[start : start + room], special.eos]
        del pending[:end]
    if pending and not cut:
        yield [special.bos, *pending, special.eos]


class _ArrayWriter:
    """Append to a one-dimensional array in a file of NumPy's format; a context manager."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.length = 0
        self._file = open(path, "wb")
        self._write_header()
        self._begin = self._file.tell()

    def __enter__(self) -> "_ArrayWriter":
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()
            # NumPy leaves room for the length to grow.
            assert self._file.tell() == self._begin

    def _write_header(self) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: np.ndarray) -> None:
        self._file.write(values.astype(self.dtype).tobytes())
        self.length += len(values)


class TokenBlockWriter:
    """Write one split; a context manager.

    The folder appears whole when the block ends, and not at all when it raises. Memory does not grow with the text.

    Args:
        directory: the split's folder, absent or empty before.
        vocab_size: of the tokenizer.

    Raises:
        UserError: on leaving the block, without any block of tokens; on entering, where the folder is taken.
    """

    def __init__(self, directory: str | Path, vocab_size: int) -> None:
        self.directory = Path(directory)
        self.vocab_size = vocab_size
        self.num_blocks = 0
        self.num_tokens = 0
        self._stack = ExitStack()

    def __enter__(self) -> "TokenBlockWriter":
        dtype = np.dtype("<u2" if self.vocab_size <= _LARGEST_UINT16_VOCABULARY else "<i4")
        stage = self._stack.enter_context(staged_directory(self.directory))
        self._tokens = self._stack.enter_context(_ArrayWriter(stage / TOKENS_NAME, dtype))
        self._offsets = self._stack.enter_context(_ArrayWriter(stage / OFFSETS_NAME, np.dtype("<i8")))
        self._offsets.append(np.zeros(1, dtype=np.int64))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, value, trace)
            return
        with self._stack:
            if self.num_blocks == 0:
                raise UserError(f"no text to write into {self.directory}")

    def add(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one block: (L,) ids, special tokens included.

        Raises:
            ValueError: it is empty, or an id is outside the vocabulary.
        """
        block = np.asarray(ids, dtype=np.int64)
        if block.ndim != 1 or len(block) == 0:
            raise ValueError(f"a block of shape {block.shape}: want one dimension and at least one token")
        if block.min() < 0 or block.max() >= self.vocab_size:
            raise ValueError(f"ids from {block.min()} to {block.max()} for a vocabulary of {self.vocab_size}")
        self._tokens.append(block)
        self._offsets.append(np.array([self._tokens.length]))
        self.num_blocks += 1
        self.num_tokens += len(block)


class TokenBlocks:
    """One split, a read-only sequence of (L,) int64 arrays of token ids, special tokens included.

    It may be forked into data loader workers and pickled, which carries the folder's name alone.

    Args:
        directory: what `TokenBlockWriter` wrote.

    Raises:
        UserError: the folder or one of its files is missing or damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).absolute()
        if not self.directory.is_dir():
            raise UserError(f"text folder {self.directory} does not exist; make it with `emkum prepare text`")
        self._tokens = _map_array(self.directory / TOKENS_NAME, ("<u2", "<i4"))
        self._offsets = _map_array(self.directory / OFFSETS_NAME, ("<i8",))
        if len(self._offsets) < 2 or self._offsets[0] != 0 or self._offsets[-1] != len(self._tokens):
            raise UserError(f"{self.directory / OFFSETS_NAME} does not go with {TOKENS_NAME}: prepare the text again")

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["directory"])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Read one block.

        Raises:
            IndexError: there is no such block.
            UserError: its offsets are damaged.
        """
        position = int(index) + len(self) if index < 0 else int(index)
        if not 0 <= position < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start, end = self._offsets[position : position + 2].tolist()
        if not 0 <= start < end <= len(self._tokens):
            raise UserError(f"{self.directory / OFFSETS_NAME} is damaged at block {position}: prepare the text again")
        return self._tokens[start:end].astype(np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """(len,) int64, tokens of each block."""
        return np.diff(self._offsets)

    def content_hash(self) -> str:
        """SHA-256 (hex) of both files, which are read throughout: about a second a gigabyte."""
        digest = hashlib.sha256()
        for name in (TOKENS_NAME, OFFSETS_NAME):
            with open(self.directory / name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def _map_array(path: Path, dtypes: Sequence[str]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise UserError(f"{path} is missing or damaged: prepare the text again") from None
    if array.ndim != 1 or array.dtype.str not in dtypes:
        raise UserError(f"{path} is not the file of that name that `emkum prepare text` writes")
    # A plain array over the mapped memory: slices of it are arrays too, without memmap's cost on each access.
    return array.view(np.ndarray)
