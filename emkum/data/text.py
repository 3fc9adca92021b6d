"""Text as blocks of token ids in memory-mapped files, for language modeling and text teachers.

A split is a folder of two arrays in NumPy's format: `tokens.npy`, the ids of all blocks one after another (uint16 where
the vocabulary has at most 65,535 entries, else int32), and `offsets.npy` (n + 1 int64), so that block i is
tokens[offsets[i] : offsets[i + 1]]. Opening a split costs the same for any size.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emkum.data.masking import IGNORE, TextMaskingConfig, mask_text
from emkum.data.tokenizers import SpecialTokens, Tokenizer
from emkum.errors import UserError
from emkum.files import staged_directory

TOKENS_NAME = "tokens.npy"
OFFSETS_NAME = "offsets.npy"
_LARGEST_UINT16_VOCABULARY = 65_535

# The masks derive from (seed, stream, epoch, index) alone. Not one of the streams of `emkum.data.image_text`: texts and
# image-text pairs of one run share its seed.
_MASK_STREAM = 4


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


@dataclass
class TextItem:
    """One block.

    Attributes:
        id: index in the split.
        ids: (L,) int64, special tokens included.
        inputs: (L,) int64, the ids with some masked; None without masking.
        targets: (L,) int64, what is to be predicted, else IGNORE; None without masking.
    """

    id: int
    ids: np.ndarray
    inputs: np.ndarray | None = None
    targets: np.ndarray | None = None


class TextDataset(torch.utils.data.Dataset):
    """Blocks of text with masks that are drawn anew each epoch.

    Args:
        blocks: one split.
        tokenizer: the one that made the blocks.
        masking: how many tokens to predict; None = no masks.
        seed: of the masks.
    """

    def __init__(
        self, blocks: TokenBlocks, tokenizer: Tokenizer, masking: TextMaskingConfig | None = None, seed: int = 1
    ) -> None:
        self.blocks = blocks
        self.tokenizer = tokenizer
        self.masking = masking
        self.seed = seed
        self.epoch = 1

    def __len__(self) -> int:
        return len(self.blocks)

    def set_epoch(self, epoch: int) -> None:
        """Choose the masks of an epoch, counted from 1."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> TextItem:
        """Read one block and draw its mask.

        Raises:
            UserError: another tokenizer made it, or masks are wanted of one without a mask token.
        """
        index = int(index)
        ids = self.blocks[index]
        if ids.max() >= self.tokenizer.vocab_size:
            raise UserError(
                f"{self.blocks.directory} holds token {ids.max()}, but the tokenizer has {self.tokenizer.vocab_size} "
                "entries: give the one that the text was prepared with"
            )
        if self.masking is None:
            return TextItem(index, ids)
        rng = np.random.default_rng((self.seed, _MASK_STREAM, self.epoch, index))
        masked = mask_text(ids, self.tokenizer, self.masking, rng)
        return TextItem(index, ids, masked.inputs, masked.targets)


def collate_text(items: list[TextItem], pad: int) -> dict[str, Any]:
    """Stack items to a batch of B texts, padded to the longest.

    Args:
        items: what the dataset returned.
        pad: id at padding.

    Returns:
        id: (B,) int64. net_input: text (B, L) int64; padding_mask (B, L) bool, True at padding. masked_text,
        masked_text_targets: (B, L) int64 or None, with IGNORE where nothing is to be predicted. nsentences: B.
        ntokens: tokens without padding. Empty for no items.
    """
    if not items:
        return {}
    lengths = np.array([len(item.ids) for item in items])
    padding = np.arange(lengths.max()) >= lengths[:, None]
    masked = items[0].inputs is not None
    return {
        "id": torch.tensor([item.id for item in items]),
        "net_input": {
            "text": _padded([item.ids for item in items], padding, pad),
            "padding_mask": torch.from_numpy(padding),
        },
        "masked_text": _padded([item.inputs for item in items], padding, pad) if masked else None,
        "masked_text_targets": _padded([item.targets for item in items], padding, IGNORE) if masked else None,
        "nsentences": len(items),
        "ntokens": int(lengths.sum()),
    }


def _padded(rows: list[np.ndarray], padding: np.ndarray, value: int) -> Tensor:
    """(B, L) int64: the rows, with `value` where `padding` (B, L) is True."""
    table = np.full(padding.shape, value, dtype=np.int64)
    table[~padding] = np.concatenate(rows)
    return torch.from_numpy(table)
