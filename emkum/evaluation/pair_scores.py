"""How similar images and captions are: what `emkum.evaluation.ranks` takes scores from.

N images, T captions. Rows are slices or indices, as a tensor is indexed by.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from emkum.outputs import PairScores

Rows = slice | Tensor
# Rows of b images and rows of t captions to the scores of all their pairs, (b, t) either way, the higher the better.
Score = Callable[[Rows, Rows], PairScores]
# (P,) rows of images and (P,) rows of captions to (P,) scores of these pairs, the higher the better.
Match = Callable[[Tensor, Tensor], Tensor]


def cosines(query: Tensor, candidate: Tensor) -> Tensor:
    """(Q, C) of unit vectors (Q, D), (C, D), in their own precision, also where validation runs under autocast."""
    with torch.autocast(query.device.type, enabled=False):
        return query @ candidate.T


def cosine_scores(images: Tensor, texts: Tensor) -> Score:
    """Cosines, the same either way, of unit vectors (N, D) and (T, D)."""

    def score(image_rows: Rows, caption_rows: Rows) -> PairScores:
        similarity = cosines(images[image_rows], texts[caption_rows])
        return PairScores(similarity, similarity)

    return score
