"""Several prepared sets of text as one sequence of blocks."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from emkum.data.shards import available_splits
from emkum.data.token_blocks import TOKENS_NAME, TokenBlocks
from emkum.data.tokenizers import Tokenizer
from emkum.errors import UserError


class MixedBlocks:
    """Splits of text one behind the other.

    Args:
        parts: one split of each set, all by the same tokenizer.
    """

    def __init__(self, parts: Sequence[TokenBlocks]) -> None:
        self.parts = list(parts)
        self._starts = [0, *accumulate(len(part) for part in self.parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        number = bisect_right(self._starts, index) - 1
        return self.parts[number][index - self._starts[number]]

    @property
    def directory(self) -> str:
        """The splits' folders, for messages."""
        return os.pathsep.join(str(part.directory) for part in self.parts)

    @property
    def lengths(self) -> list[int]:
        """Blocks of each set."""
        return [len(part) for part in self.parts]

    @property
    def caption_lengths(self) -> np.ndarray:
        """(len,) int64, tokens of each block."""
        return np.concatenate([part.lengths for part in self.parts])

    def content_hash(self) -> str:
        """SHA-256 (hex) of the sets' own hashes; of one set, its own."""
        hashes = [part.content_hash() for part in self.parts]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def open_blocks(folders: Sequence[str | Path], split: str) -> MixedBlocks:
    """Open one split of several folders that `emkum prepare text` wrote.

    Raises:
        UserError: a folder has no such split, or a damaged one.
    """
    for folder in folders:
        splits = available_splits(folder, TOKENS_NAME)
        if split not in splits:
            there = f"there are {', '.join(splits)}" if splits else "make one with `emkum prepare text`"
            raise UserError(f"text folder {folder} has no split {split!r}; {there}")
    return MixedBlocks([TokenBlocks(Path(folder) / split) for folder in folders])


def assert_same_tokenizer(one: Tokenizer, other: Tokenizer, name: str, other_name: str) -> None:
    """Ids mean the same by two tokenizers.

    Raises:
        UserError: they are of another kind, or their files differ.
    """
    contents = [{name: path.read_bytes() for name, path in tokenizer.files.items()} for tokenizer in (one, other)]
    if contents[0] != contents[1]:
        raise UserError(f"{name} and {other_name} have different tokenizers: prepare the text with the same one")
