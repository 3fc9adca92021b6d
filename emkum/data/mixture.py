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

    def __init__(self, parts: "Sequence[ShardedSamples | ReducedSamples]") -> None:
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

    @property
    def has_sound(self) -> np.ndarray:
        """(len,) bool, whether each sample has a sound."""
        return np.concatenate([part.has_sound for part in self.parts])

    def content_hash(self) -> str:
        """SHA-256 (hex) of the sets' own hashes; of one set, its own."""
        hashes = [part.content_hash() for part in self.parts]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


class ReducedSamples:
    """A part of a split, for the study of how much data it takes. A smaller part of the same seed lies in a larger one.

    Args:
        samples: the whole split.
        fraction: of its samples, more than 0; at least one is kept.
        seed: of which.
    """

    def __init__(self, samples: ShardedSamples, fraction: float, seed: int) -> None:
        self._samples = samples
        count = max(1, round(fraction * len(samples)))
        self._rows = np.sort(np.random.default_rng(seed).permutation(len(samples))[:count])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> ShardSample:
        return self._samples[int(self._rows[index])]

    @property
    def caption_lengths(self) -> np.ndarray:
        """(len,) uint16, mean characters of each sample's captions."""
        return self._samples.caption_lengths[self._rows]

    @property
    def has_sound(self) -> np.ndarray:
        """(len,) bool, whether each sample has a sound."""
        return self._samples.has_sound[self._rows]

    def content_hash(self) -> str:
        """That of the whole split, which is what targets are cached for."""
        return self._samples.content_hash()


def open_mixture(
    folders: Sequence[str | Path], split: str, require_captions: bool = True, fraction: float = 1.0, seed: int = 1
) -> MixedSamples:
    """Open one split of several prepared folders, or the same part of each; see `open_split` and `ReducedSamples`."""
    parts = [open_split(folder, split, require_captions) for folder in folders]
    return MixedSamples(parts if fraction == 1 else [ReducedSamples(part, fraction, seed) for part in parts])
