"""Several prepared sets as one sequence of samples."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from emkum.data.shards import ShardedSamples, ShardSample, open_split


class MixedSamples:
    """Splits one behind the other; image ids are moved apart, so that images of two sets are never taken for equal.

    Args:
        parts: one split of each set.
    """

    def __init__(self, parts: Sequence[ShardedSamples]) -> None:
        self.parts = list(parts)
        self._starts = [0, *accumulate(len(part) for part in self.parts)]
        # Ids may be any below 2**31; 64 bits hold those of many sets.
        self._id_starts = [number << 32 for number in range(len(self.parts))]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> ShardSample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._starts, index) - 1
        sample = self.parts[number][index - self._starts[number]]
        return sample._replace(image_id=sample.image_id + self._id_starts[number])

    @property
    def lengths(self) -> list[int]:
        """Samples of each set."""
        return [len(part) for part in self.parts]

    @property
    def caption_lengths(self) -> np.ndarray:
        """(len,) uint16, mean characters of each sample's captions."""
        return np.concatenate([part.caption_lengths for part in self.parts])

    def content_hash(self) -> str:
        """SHA-256 (hex) of the sets' own hashes; of one set, its own."""
        hashes = [part.content_hash() for part in self.parts]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def open_mixture(folders: Sequence[str | Path], split: str, require_captions: bool = True) -> MixedSamples:
    """Open one split of several prepared folders; see `open_split`."""
    return MixedSamples([open_split(folder, split, require_captions) for folder in folders])
