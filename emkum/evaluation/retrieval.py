"""Image-text retrieval over a whole evaluation set: recall, ranks, chance level, and nearest neighbors.

N images, T captions, D channels; `caption_image` holds for each caption the row of its image.

Recall@k, after Karpathy & Fei-Fei (2015), "Deep Visual-Semantic Alignments for Generating Image Descriptions",
section 4.1: the percentage of queries for which something right stands among the first k candidates of the whole
set. Image to text, the best ranked of the image's own captions (five in Flickr and COCO) counts; text to image, the
caption's one image. Ranks begin at 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emkum.evaluation.pair_scores import Rows, Score, cosine_scores
from emkum.evaluation.ranks import NEVER, Reranking, find_ranks
from emkum.outputs import PairScores

Array = Tensor | np.ndarray


@dataclass
class Nearest:
    """Candidates of some queries by falling score, on the CPU.

    Attributes:
        image_to_text: (n, k) int64, rows of captions for each image asked for.
        text_to_image: (t, k) int64, rows of images for each caption asked for.
    """

    image_to_text: Tensor
    text_to_image: Tensor


def recall_metrics(
    image_features: Array,
    text_features: Array,
    caption_image: Array | Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
    block: int = 256,
) -> dict[str, float]:
    """`retrieval_metrics` by the cosine of features.

    Args:
        image_features: (N, D), normalized here.
        text_features: (T, D), normalized here.
        caption_image: (T,) integers in 0..N-1, the row of each caption's image.
        ks: how many candidates a query may look at.
        block: images compared with all captions at once; bounds the memory and leaves the result alone.

    Raises:
        ValueError: nothing to evaluate, or shapes that do not fit one another.
    """
    image, text, owner = _prepare(image_features, text_features, caption_image)
    return retrieval_metrics(cosine_scores(image, text), owner, len(image), ks, block)


def retrieval_metrics(
    score: Score,
    caption_image: Tensor,
    num_images: int,
    ks: Sequence[int] = (1, 5, 10),
    block: int = 256,
    reranking: Reranking | None = None,
) -> dict[str, float]:
    """Recall@k and ranks both ways over one evaluation set.

    Ties count against the model: ahead of the right candidate are the wrong ones that are at least as similar. A query
    or a right candidate that holds NaN is a miss, and a wrong candidate that holds NaN is one more ahead of the right
    one. A miss counts in medians and means as one rank behind the last candidate. Images without a caption stand among
    the candidates of text-to-image retrieval but are no queries of image-to-text retrieval.

    Args:
        score: of the N images and T captions.
        caption_image: (T,) int64 in 0..N-1, on the device of the scores.
        num_images: N.
        ks, block: as for `recall_metrics`.
        reranking: orders the best candidates anew; None = none does.

    Returns:
        `i2t_r{k}`, `t2i_r{k}` for each k and `mean_recall`, their plain mean, in percent; `num_images` (N),
        `num_captions` (T); `i2t_median_rank`, `i2t_mean_rank`, `t2i_median_rank`, `t2i_mean_rank`.
    """
    ranks = find_ranks(score, caption_image, num_images, block, reranking)
    has_caption = torch.bincount(caption_image, minlength=num_images) > 0
    image_ranks, text_ranks = ranks.images[has_caption], ranks.captions
    recalls = {f"i2t_r{k}": _percent_below(image_ranks, k) for k in ks}
    recalls |= {f"t2i_r{k}": _percent_below(text_ranks, k) for k in ks}
    places = {"i2t": _from_one(image_ranks, len(caption_image)), "t2i": _from_one(text_ranks, num_images)}
    metrics = _with_summary(recalls, num_images, len(caption_image))
    for way, values in places.items():
        metrics |= {f"{way}_median_rank": float(np.median(values)), f"{way}_mean_rank": float(values.mean())}
    return metrics


def average_median_rank(
    score: Score,
    caption_image: Tensor,
    num_images: int,
    reranking: Reranking | None = None,
    draws: int = 5,
    size: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Median rank among 1,000 pairs of an image and one of its captions, mean over draws of pairs.

    That of Aytar et al. (2017), "See, Hear, and Read: Deep Aligned Representations". With one caption an image chance
    is 500.5 both ways, and sets of different sizes compare. Images are shuffled into a circle of which each draw takes
    the next `size`, so that draws share images only where there are fewer than draws * size; captions are drawn anew
    for each. Of fewer than `size` images with captions there is one draw of all.

    Args:
        score, caption_image, num_images, reranking: as for `retrieval_metrics`.
        draws, size: how many draws of how many pairs.
        seed: of the draws.

    Returns:
        `i2t_average_median_rank`, `t2i_average_median_rank`; `average_median_rank_draws` and
        `average_median_rank_images`, how many draws of how many pairs it was.
    """
    medians = []
    pairs = draw_pairs(caption_image, num_images, draws, size, seed)
    for images, captions in pairs:
        part = None if reranking is None else _reranking_of(reranking, images, captions)
        own = torch.arange(len(images), device=images.device)
        ranks = find_ranks(_scores_of(score, images, captions), own, len(own), reranking=part)
        medians.append([np.median(_from_one(way, len(own))) for way in (ranks.images, ranks.captions)])
    i2t, t2i = np.mean(medians, axis=0).tolist()
    number = {"average_median_rank_draws": len(pairs), "average_median_rank_images": len(pairs[0][0])}
    return {"i2t_average_median_rank": i2t, "t2i_average_median_rank": t2i} | number


def draw_pairs(caption_image: Tensor, num_images: int, draws: int, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """For each draw (n,) rows of images and, for each, the row of one of its captions; see `average_median_rank`."""
    counts = torch.bincount(caption_image, minlength=num_images).cpu()
    order, first = caption_image.argsort(stable=True).cpu(), counts.cumsum(0) - counts
    present = counts.nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    circle = present[torch.randperm(len(present), generator=generator)]
    found = []
    for draw in range(draws if len(present) >= size else 1):
        images = circle.roll(-draw * size)[:size]
        # Below the count: the largest number that `rand` gives is 1 - 2^-53.
        place = (torch.rand(len(images), dtype=torch.float64, generator=generator) * counts[images]).long()
        found.append((images.to(caption_image.device), order[first[images] + place].to(caption_image.device)))
    return found


def chance_recall(
    num_images: int, caption_image: Array | Sequence[int], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """What `recall_metrics` is expected to give, exactly, where all rankings are equally likely.

    Text to image k / N. Image to text, for an image with c of the T captions, 1 - C(T - c, k) / C(T, k): all but the
    rankings whose first k hold captions of other images alone.

    Args:
        num_images: N.
        caption_image: (T,) integers in 0..N-1, the row of each caption's image.
        ks: as for `recall_metrics`.

    Returns:
        The keys of `recall_metrics` but for the ranks.

    Raises:
        ValueError: nothing to evaluate, or a row out of range.
    """
    owner = _as_owner(caption_image, num_images)
    total = len(owner)
    own_counts, images_with = torch.unique(torch.bincount(owner, minlength=num_images), return_counts=True)
    groups = [(c, n) for c, n in zip(own_counts.tolist(), images_with.tolist(), strict=True) if c > 0]
    queries = sum(n for _, n in groups)
    recalls = {}
    for k in ks:
        seen = min(k, total)
        missed = sum(n * (comb(total - c, seen) / comb(total, seen)) for c, n in groups) / queries
        recalls[f"i2t_r{k}"] = 100.0 * (1.0 - missed)
    recalls |= {f"t2i_r{k}": 100.0 * min(k, num_images) / num_images for k in ks}
    return _with_summary(recalls, num_images, total)


@torch.no_grad()
def nearest(score: Score, images: Sequence[int], captions: Sequence[int], device: torch.device, k: int = 5) -> Nearest:
    """The k best candidates of some images and of some captions, for pictures and error analysis.

    Args:
        score: of the N images and T captions.
        images, captions: rows of the queries.
        device: of the scores.
        k: length of the lists; cut to the number of candidates.

    Returns:
        Lists by falling score; candidates whose scores are not numbers come last.
    """
    image_rows, caption_rows = (torch.tensor(rows, dtype=torch.int64, device=device) for rows in (images, captions))
    return Nearest(
        _top(score(image_rows, slice(None)).image_to_text, k),
        _top(score(slice(None), caption_rows).text_to_image.T, k),
    )


def _prepare(
    image_features: Array, text_features: Array, caption_image: Array | Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked inputs on the images' device: (N, D) and (T, D) of unit length in float32, and (T,) int64."""
    image, text = torch.as_tensor(image_features).detach(), torch.as_tensor(text_features).detach()
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(f"features must be (N, D) and (T, D), not {tuple(image.shape)} and {tuple(text.shape)}")
    if len(image) == 0 or len(text) == 0:
        raise ValueError(f"retrieval needs images and captions; got {len(image)} and {len(text)}")
    text = text.to(image.device)
    owner = _as_owner(caption_image, len(image))
    if len(owner) != len(text):
        raise ValueError(f"{len(text)} captions but {len(owner)} entries in caption_image")
    return _normalized(image), _normalized(text), owner.to(image.device)


def _normalized(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=1)


def _as_owner(caption_image: Array | Sequence[int], num_images: int) -> Tensor:
    owner = torch.as_tensor(caption_image).cpu()
    if owner.ndim != 1 or len(owner) == 0:
        raise ValueError(f"caption_image must be (T,) with T > 0, not {tuple(owner.shape)}")
    if owner.is_floating_point() or owner.dtype == torch.bool:
        raise ValueError(f"caption_image must hold integers, not {owner.dtype}")
    owner = owner.to(torch.int64)
    low, high = int(owner.min()), int(owner.max())
    if low < 0 or high >= num_images:
        raise ValueError(f"caption_image must lie in 0..{num_images - 1}; it spans {low}..{high}")
    return owner


def _scores_of(score: Score, images: Tensor, captions: Tensor) -> Score:
    """Scores of a part of the set, whose rows are those of `images` and `captions`."""

    def part(image_rows: Rows, caption_rows: Rows) -> PairScores:
        return score(images[image_rows], captions[caption_rows])

    return part


def _reranking_of(reranking: Reranking, images: Tensor, captions: Tensor) -> Reranking:
    """The same of what orders candidates anew."""

    def match(image_rows: Tensor, caption_rows: Tensor) -> Tensor:
        return reranking.match(images[image_rows], captions[caption_rows])

    return Reranking(match, reranking.k)


def _from_one(ranks: Tensor, candidates: int) -> np.ndarray:
    """(Q,) float64 ranks from 1, those that were never found behind all candidates."""
    return (ranks.masked_fill(ranks == NEVER, candidates) + 1).double().cpu().numpy()


def _percent_below(ranks: Tensor, k: int) -> float:
    return 100.0 * (ranks < k).double().mean().item()


def _top(scores: Tensor, k: int) -> Tensor:
    scores = torch.nan_to_num(scores, nan=-torch.inf)
    return scores.topk(min(k, scores.shape[1]), dim=1).indices.cpu()


def _with_summary(recalls: dict[str, float], num_images: int, num_captions: int) -> dict[str, Any]:
    mean = sum(recalls.values()) / len(recalls)
    return recalls | {"mean_recall": mean, "num_images": num_images, "num_captions": num_captions}
