"""Ranks of right candidates in retrieval both ways, from scores that are computed block by block.

N images, T captions; `caption_image` holds for each caption the row of its image. A block is some images with all
captions: one pass over all blocks gives both directions, and no more than a block of scores is ever there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from emkum.evaluation.pair_scores import Match, Score
from emkum.outputs import PairScores

# Cosines of equal pairs differ by some units of the last place, depending on where in a matrix product they stand.
# What is closer than this is a tie, so that a collapsed model scores 0 and blocks of any size give one result.
TIE = 1e-6
# The same of what a classifier says of pairs, sums of many products that are larger than cosines.
MATCH_TIE = 1e-5
# Rank of a query whose right candidates cannot be compared.
NEVER = torch.iinfo(torch.int64).max
# Images that are first scored with their own captions alone: few, so that few other pairs are scored for nothing.
_OWN_BLOCK = 32


@dataclass(frozen=True)
class Reranking:
    """A second opinion on the best candidates of each query.

    Attributes:
        match: what orders them.
        k: how many are ordered anew; the others keep their order behind them.
    """

    match: Match
    k: int


@dataclass
class Ranks:
    """How many wrong candidates stand ahead of the first right one; NEVER where none of the right ones is comparable.

    Attributes:
        images: (N,) int64, of images among captions; NEVER for an image without captions.
        captions: (T,) int64, of captions among images.
    """

    images: Tensor
    captions: Tensor


@torch.no_grad()
def find_ranks(
    score: Score, caption_image: Tensor, num_images: int, block: int = 256, reranking: Reranking | None = None
) -> Ranks:
    """Rank every image and every caption.

    Ties count against the model. A query or a right candidate that holds NaN is never found, and a wrong candidate that
    holds NaN stands ahead of the right one.

    Args:
        score: of image rows 0..N-1 and caption rows 0..T-1.
        caption_image: (T,) int64 in 0..N-1, on the device of the scores.
        num_images: N.
        block: images at once; bounds the memory and leaves the result alone.
        reranking: orders the best candidates anew; None = none does.
    """
    owned = _OwnedCaptions(caption_image, num_images)
    own = _own_scores(score, owned)
    text_best = own.text_to_image.nan_to_num(nan=-torch.inf)
    image_best = text_best.new_full((num_images,), -torch.inf)
    image_best.scatter_reduce_(0, caption_image, own.image_to_text.nan_to_num(nan=-torch.inf), "amax")
    image_bound, text_bound = image_best - TIE, text_best - TIE
    image_ahead = torch.empty(num_images, dtype=torch.int64, device=caption_image.device)
    text_ahead = torch.zeros_like(caption_image)
    candidates = None if reranking is None else _Candidates(reranking.k)
    for rows, mine, row in owned.blocks(block):
        scores = score(rows, slice(None))
        # Ahead is what is not clearly below, so that NaN, which compares as False, counts against the model.
        below = scores.image_to_text < image_bound[rows, None]
        right_ahead = torch.bincount(row[~below[row, mine]], minlength=len(below))
        image_ahead[rows] = below.shape[1] - below.sum(1, dtype=torch.int32) - right_ahead
        below = scores.text_to_image < text_bound
        text_ahead += len(below) - below.sum(0, dtype=torch.int32)
        text_ahead[mine] -= (~below[row, mine]).long()
        if candidates is not None:
            candidates.add(_lowered(scores.image_to_text, row, mine), _lowered(scores.text_to_image, row, mine))
    ranks = Ranks(image_ahead.masked_fill(image_best.isinf(), NEVER), text_ahead.masked_fill(text_best.isinf(), NEVER))
    return ranks if candidates is None else _reordered(ranks, candidates, caption_image, reranking.match, block)


class _OwnedCaptions:
    """Captions by their image.

    Args:
        caption_image: (T,) int64. num_images: N.
    """

    def __init__(self, caption_image: Tensor, num_images: int) -> None:
        self.caption_image, self.num_images = caption_image, num_images
        self.order = caption_image.argsort(stable=True)
        counts = torch.bincount(caption_image, minlength=num_images).cumsum(0)
        self._ends = [0, *counts.tolist()]

    def blocks(self, size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows of `size` images at a time; of their own captions (P,) the rows, and which image of the block it is."""
        for start in range(0, self.num_images, size):
            stop = min(start + size, self.num_images)
            mine = self.order[self._ends[start] : self._ends[stop]]
            yield slice(start, stop), mine, self.caption_image[mine] - start


def _own_scores(score: Score, owned: _OwnedCaptions) -> PairScores:
    """(T,) scores of each caption and its own image."""
    found = []
    for rows, mine, row in owned.blocks(_OWN_BLOCK):
        if len(mine) > 0:
            scores, column = score(rows, mine), torch.arange(len(mine), device=mine.device)
            found.append([scores.image_to_text[row, column], scores.text_to_image[row, column]])
    ways = (torch.cat(way) for way in zip(*found, strict=True))
    return PairScores(*(torch.empty_like(way).index_copy_(0, owned.order, way) for way in ways))


def _lowered(scores: Tensor, row: Tensor, mine: Tensor) -> Tensor:
    """(b, T) scores by which the best come first as they do in ranks: right pairs behind what ties with them, and NaN
    where it counts against the model.

    Args:
        scores: (b, T). row, mine: (P,) places of right pairs.
    """
    lowered = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    lowered[row, mine] = (scores[row, mine] - TIE).nan_to_num(nan=-torch.inf, posinf=torch.inf)
    return lowered


class _Candidates:
    """The best k candidates of each query, kept while blocks of images go by.

    Attributes:
        of_images: of each block (b, k) int64, rows of captions.
        of_captions: (k, T) int64, rows of images; fewer than k while there are fewer images.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.images = 0
        self.of_images: list[Tensor] = []
        self.of_captions: Tensor | None = None
        self._scores: Tensor | None = None

    def add(self, image_to_text: Tensor, text_to_image: Tensor) -> None:
        """Scores (b, T) of the next b images."""
        images, captions = image_to_text.shape
        self.of_images.append(image_to_text.topk(min(self.k, captions), dim=1).indices)
        found = text_to_image.topk(min(self.k, images), dim=0)
        scores, rows = found.values, found.indices + self.images
        if self.of_captions is not None:
            scores, rows = torch.cat([self._scores, scores]), torch.cat([self.of_captions, rows])
        best = scores.topk(min(self.k, len(scores)), dim=0)
        self._scores, self.of_captions = best.values, rows.gather(0, best.indices)
        self.images += images


def _reordered(ranks: Ranks, candidates: _Candidates, caption_image: Tensor, match: Match, block: int) -> Ranks:
    """Ranks after the candidates were put into the order of `match`."""
    captions = torch.cat(candidates.of_images)
    images = torch.arange(len(captions), device=captions.device)[:, None].expand_as(captions)
    odds = _match_all(match, images, captions, block)
    of_images = _rank_among(odds, caption_image[captions] == images, ranks.images)
    images = candidates.of_captions.T
    captions = torch.arange(len(images), device=images.device)[:, None].expand_as(images)
    odds = _match_all(match, images, captions, block)
    return Ranks(of_images, _rank_among(odds, caption_image[captions] == images, ranks.captions))


def _match_all(match: Match, images: Tensor, captions: Tensor, block: int) -> Tensor:
    """(Q, k) scores of pairs of rows (Q, k), those of `block` queries at a time."""
    parts = zip(images.split(block), captions.split(block), strict=True)
    return torch.cat([match(i.flatten(), c.flatten()).view(i.shape) for i, c in parts])


def _rank_among(odds: Tensor, right: Tensor, before: Tensor) -> Tensor:
    """(Q,) ranks of right candidates among those ordered anew; as before for queries with none among them.

    Args:
        odds: (Q, k) the higher the better. right: (Q, k) bool. before: (Q,) ranks.
    """
    best = odds.masked_fill(~right | odds.isnan(), -torch.inf).amax(1, keepdim=True)
    ahead = (~(odds < best - MATCH_TIE) & ~right).sum(1)
    return torch.where(right.any(1) & (before != NEVER), ahead, before)
