"""Corpus metrics through fairseq's meters, so that `--best-checkpoint-metric mean_recall` finds them."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from emkum.evaluation.retrieval import recall_metrics

RECALL_KEYS = (*(f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)), "mean_recall")

_SEEN = "_retrieval_batches"


@dataclass
class FeatureChunk:
    """Features of some validation batches.

    Attributes:
        image_ids: (B,) sample index of each image. images: (B, D).
        caption_ids: (T,) sample index of each caption's image. texts: (T, D).
    """

    image_ids: Tensor
    images: Tensor
    caption_ids: Tensor
    texts: Tensor


def merge_chunks(chunks: list[FeatureChunk]) -> tuple[Tensor, Tensor, Tensor]:
    """All images (N, D), all captions (T, D), and the row of each caption's image (T,).

    An image that comes again in a later chunk (a device without data of its own repeats a batch) counts once, with its
    captions.
    """
    row_of: dict[int, int] = {}
    images, texts, rows = [], [], []
    for chunk in chunks:
        samples, owners = chunk.image_ids.tolist(), chunk.caption_ids.tolist()
        new = [row for row, sample in enumerate(samples) if sample not in row_of]
        fresh = {samples[row] for row in new}
        row_of |= {samples[row]: len(row_of) + i for i, row in enumerate(new)}
        kept = [row for row, owner in enumerate(owners) if owner in fresh]
        images.append(chunk.images[new])
        texts.append(chunk.texts[kept])
        rows += [row_of[owners[row]] for row in kept]
    return torch.cat(images), torch.cat(texts), torch.tensor(rows)


class RetrievalScores:
    """Collects the features of one validation set and logs the recall over all of them.

    Recalls are logged as derived meters, the only kind that fairseq does not write into checkpoints. Each active
    aggregator counts the batches it has seen: one that has not seen all of them gives NaN instead of the recall of a
    part.
    """

    def __init__(self) -> None:
        self.start("")

    def start(self, split: str) -> None:
        """Forget what was collected; go on with `split`."""
        self.split = split
        self.chunks: list[FeatureChunk] = []
        self.batches = 0
        self._unlogged = 0
        self._result: dict[str, float] | None = None

    def add(self, split: str, chunks: list[FeatureChunk]) -> None:
        """Add one batch, a chunk from each device; another split than the last one's starts anew."""
        if split != self.split:
            self.start(split)
        self.chunks += chunks
        self.batches += 1
        self._unlogged += 1
        self._result = None

    def log(self, metrics: Any) -> None:
        """Log to all active aggregators of fairseq's `metrics` what was added since the last call."""
        if self._unlogged == 0:
            return
        metrics.log_scalar(_SEEN, 1.0, self._unlogged)
        self._unlogged = 0
        for key in RECALL_KEYS:
            metrics.log_derived(key, partial(self._recall, key))

    def _recall(self, key: str, meters: Any) -> float:
        if int(meters[_SEEN].count) != self.batches:
            return math.nan
        if self._result is None:
            self._result = recall_metrics(*merge_chunks(self.chunks))
        return round(self._result[key], 3)
