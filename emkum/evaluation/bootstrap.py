"""How far figures would move on other images of the same kind: intervals by the percentile bootstrap.

Efron & Tibshirani (1993), "An Introduction to the Bootstrap", chapter 13. Images are drawn with replacement, as many as
the set has, and each image comes with all that belongs to it: its captions as queries, its class. What queries are
compared with (the candidates of retrieval, the captions of classes, the neighbors and classifiers that the training
split gives) stays as it is: the interval is over the images that are asked, not over other sets of candidates, training
images or seeds of training.

Every figure here is a ratio of sums over images, such as the captions that were found over all captions. A resample is
then told by how often it has each image, and all figures of all resamples are products of matrices.

N images, T captions, K numbers of candidates, F figures, R resamples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from emkum.evaluation.ranks import Ranks

RESAMPLES = 1000
LEVEL = 0.95
# Draws that are held at once.
_DRAWS = 1 << 22


class Estimate(NamedTuple):
    """A figure in percent with its interval.

    Attributes:
        value: of the images as they are. low, high: ends of the interval.
    """

    value: float
    low: float
    high: float


def resampled_ratios(
    numerators: np.ndarray, denominators: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Ratios of sums over images that are drawn with replacement, the same ones for all figures.

    Args:
        numerators, denominators: (N, F), what each image adds to either sum of each figure.
        resamples: R.
        seed: of the draws.

    Returns:
        (R, F) float64; NaN where the images of a resample add nothing to a denominator.

    Raises:
        ValueError: there is no image, or shapes differ.
    """
    numerators, denominators = (np.asarray(each, dtype=np.float64) for each in (numerators, denominators))
    if numerators.ndim != 2 or numerators.shape != denominators.shape or len(numerators) == 0:
        raise ValueError(f"want two arrays (N, F), N > 0, not {numerators.shape} and {denominators.shape}")
    images, rng = len(numerators), np.random.default_rng(seed)
    rows = max(1, _DRAWS // images)
    ratios = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, images, (min(rows, resamples - start), images))
        # Row r counts in the r-th stretch of `images` bins.
        drawn += images * np.arange(len(drawn))[:, None]
        counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
        with np.errstate(invalid="ignore"):
            ratios.append((counts @ numerators) / (counts @ denominators))
    return np.concatenate(ratios)


def percentile_interval(resampled: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the interval, (F,) each: quantiles of the resamples (R, F), those that are NaN left out."""
    tail = (1 - level) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail], axis=0)
    return low, high


def accuracy_estimates(
    ranks: Tensor, ks: Sequence[int] = (1, 5), resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Estimate]:
    """`top_k_accuracy` with intervals.

    Args:
        ranks: (N,) as `label_ranks` gives them.
        ks: how many classes a prediction may name.
        resamples, seed: of the bootstrap.

    Returns:
        `top_{k}` for each k.
    """
    hits = torch.stack([ranks < k for k in ks], dim=1).double().cpu().numpy()
    return _estimates([f"top_{k}" for k in ks], hits, np.ones_like(hits), resamples, seed)


def recall_estimates(
    ranks: Ranks,
    caption_image: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Recall both ways with intervals, as `retrieval_metrics` names it.

    An image that is drawn twice is asked for twice, and so is each of its captions. `mean_recall` of a resample is the
    plain mean of its recalls.

    Args:
        ranks: as `find_ranks` gives them.
        caption_image: (T,) int64 in 0..N-1, the row of each caption's image.
        ks: how many candidates a query may look at.
        resamples, seed: of the bootstrap.

    Returns:
        `mean_recall`, then `i2t_r{k}` and `t2i_r{k}` for each k.
    """
    owner, images, captions = (each.cpu().numpy() for each in (caption_image, ranks.images, ranks.captions))
    counts = np.bincount(owner, minlength=len(images)).astype(np.float64)
    # Images without captions are no queries.
    is_query = counts > 0
    numerators = [is_query & (images < k) for k in ks]
    numerators += [np.bincount(owner, weights=captions < k, minlength=len(images)) for k in ks]
    denominators = [is_query] * len(ks) + [counts] * len(ks)
    names = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in ks]
    sums = np.stack(numerators, axis=1).astype(np.float64), np.stack(denominators, axis=1).astype(np.float64)
    return _estimates(names, *sums, resamples, seed, mean="mean_recall")


def _estimates(
    names: Sequence[str], numerators: np.ndarray, denominators: np.ndarray, resamples: int, seed: int, mean: str = ""
) -> dict[str, Estimate]:
    """In percent; `mean` names the plain mean of all figures, which comes first."""
    values = 100 * (numerators.sum(0) / denominators.sum(0))[None]
    resampled = 100 * resampled_ratios(numerators, denominators, resamples, seed)
    if mean:
        names = [mean, *names]
        values, resampled = (
            np.concatenate([each.mean(1, keepdims=True), each], axis=1) for each in (values, resampled)
        )
    low, high = percentile_interval(resampled)
    return {name: Estimate(*map(float, each)) for name, *each in zip(names, values[0], low, high, strict=True)}
