"""Corpus metrics through fairseq's meters, so that `--best-checkpoint-metric mean_recall` finds them."""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fairseq.logging.meters import Meter
from torch import Tensor

from emkum.evaluation.retrieval import recall_metrics

RECALL_KEYS = (*(f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)), "mean_recall")


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

    An image that came twice (a device without data of its own repeats a batch) counts once, with its captions; also
    where both stand in one chunk, which holds the batches of all devices one after the other.
    """
    row_of: dict[int, int] = {}
    images, texts, rows = [], [], []
    for chunk in chunks:
        image_ids, caption_ids = chunk.image_ids.tolist(), chunk.caption_ids.tolist()
        copies, captions = Counter(image_ids), Counter(caption_ids)
        # How many captions of each new image to take; those of further copies follow them.
        left = {sample: captions[sample] // copies[sample] for sample in copies if sample not in row_of}
        first, own = [], []
        for row, sample in enumerate(image_ids):
            if sample not in row_of:
                row_of[sample] = len(row_of)
                first.append(row)
        for row, sample in enumerate(caption_ids):
            if left.get(sample, 0) > 0:
                left[sample] -= 1
                own.append(row)
        images.append(chunk.images[first])
        texts.append(chunk.texts[own])
        rows += [row_of[caption_ids[row]] for row in own]
    return torch.cat(images), torch.cat(texts), torch.tensor(rows)


class RetrievalMeter(Meter):
    """Collects features; its result is the recall over all of them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.chunks: list[FeatureChunk] = []
        self._result: dict[str, float] | None = None

    def update(self, chunks: list[FeatureChunk]) -> None:
        self.chunks = self.chunks + chunks
        self._result = None

    def result(self) -> dict[str, float]:
        if self._result is None:
            self._result = recall_metrics(*merge_chunks(self.chunks))
        return self._result

    @property
    def smoothed_value(self) -> float:
        return self.result()["mean_recall"]


def log_retrieval(metrics: Any, chunks: list[FeatureChunk]) -> None:
    """Log chunks to all active aggregators, with every recall derived from what each has collected."""
    metrics.log_custom(RetrievalMeter, "_retrieval", chunks)
    for key in RECALL_KEYS:
        metrics.log_derived(key, partial(_recall, key))


def _recall(key: str, meters: Any) -> float:
    return round(meters["_retrieval"].result()[key], 3)
