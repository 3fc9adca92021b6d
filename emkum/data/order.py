"""In which order an epoch visits the samples: weights of several sets, windows for slow disks, batches by length.

Everything derives from the generator that is passed in: NumPy's legacy one, or its module, since that is what fairseq
seeds for each epoch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

# Windows that are read side by side. Neighbors in the order are from the same window with a chance of one in so many.
OPEN_WINDOWS = 64
# Batches whose samples are sorted by length together.
_POOL_BATCHES = 50


@dataclass
class OrderConfig:
    window: int = field(
        default=0,
        metadata={
            "help": "read runs of this many samples front to back, many runs side by side, for network disks; "
            "0 = full shuffle"
        },
    )
    by_length: bool = field(default=False, metadata={"help": "batches of images whose captions are of similar length"})
    weights: str = field(
        default="",
        metadata={
            "help": "passes over each of several folders (DATA given as A:B) in an epoch, separated by commas: 2 = "
            "each image twice, 0.5 = another half each epoch; empty = 1 each"
        },
    )


def weighted_runs(lengths: Sequence[int], weights: Sequence[float], window: int, rng: np.random.RandomState) -> list:
    """Runs of samples that make an epoch of several sets that lie one behind the other.

    A weight's whole part visits everything as often; its fraction visits that part of the set's runs, drawn anew.

    Args:
        lengths: samples of each set.
        weights: passes over each set; 0 or more.
        window: samples of a run; 0 = one sample.
        rng: draws the part of a set that a fraction visits.

    Returns:
        List of (runs, 2) int64 arrays, first sample of each run and the one after its last.
    """
    size = max(window, 1)
    chosen, start = [], 0
    for length, weight in zip(lengths, weights, strict=True):
        begins = np.arange(start, start + length, size)
        runs = np.stack([begins, np.minimum(begins + size, start + length)], axis=1)
        chosen += [runs] * int(weight)
        count = round((weight - int(weight)) * len(runs))
        if count > 0:
            chosen.append(runs[np.sort(rng.permutation(len(runs))[:count])])
        start += length
    return chosen


def shuffled(runs: np.ndarray, open_windows: int, rng: np.random.RandomState) -> np.ndarray:
    """Visit runs of samples in random order, `open_windows` of them side by side, each front to back.

    Args:
        runs: (runs, 2) int64, as `weighted_runs` gives them.
        open_windows: at each step the next sample of one of so many runs is drawn, each with the chance that its
            remaining samples have.
        rng: of the order.

    Returns:
        (samples,) int64. Runs of one sample give a uniformly random permutation.
    """
    runs = runs[rng.permutation(len(runs))]
    lengths = runs[:, 1] - runs[:, 0]
    if len(runs) == 0 or lengths.max() == 1:
        return runs[:, 0].copy()
    pieces = []
    for first in range(0, len(runs), open_windows):
        begins, sizes = runs[first : first + open_windows, 0], lengths[first : first + open_windows]
        # Which run each step takes from; the stable sort then deals every run's samples in their order to its steps.
        turns = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
        samples = np.concatenate([np.arange(begin, begin + size) for begin, size in zip(begins, sizes, strict=True)])
        order = np.empty(len(turns), dtype=np.int64)
        order[np.argsort(turns, kind="stable")] = samples
        pieces.append(order)
    return np.concatenate(pieces)


def epoch_order(
    lengths: Sequence[int],
    rng: np.random.RandomState,
    weights: Sequence[float] | None = None,
    window: int = 0,
    open_windows: int = OPEN_WINDOWS,
) -> np.ndarray:
    """The samples of an epoch, int64, in the order of their visits.

    Args:
        lengths: samples of each set; sample numbers run on from one set to the next.
        rng: of the order; equal states give equal orders.
        weights: passes over each set; None = 1.
        window: samples of a run that is read front to back; 0 = full shuffle.
        open_windows: runs that are read side by side.
    """
    if window == 0 and (weights is None or all(weight == 1 for weight in weights)):
        return rng.permutation(sum(lengths))
    runs = weighted_runs(lengths, weights or [1.0] * len(lengths), window, rng)
    return shuffled(np.concatenate(runs), open_windows, rng)


def batches_by_length(
    order: np.ndarray, lengths: np.ndarray, batch_size: int, rng: np.random.RandomState, pool: int = _POOL_BATCHES
) -> list[np.ndarray]:
    """Cut an order into batches of samples of similar length.

    Samples are sorted within pools of consecutive batches alone, so that batches stay random; the batches of a pool are
    shuffled.

    Args:
        order: (samples,) int64.
        lengths: length of each sample, by its number.
        batch_size: samples of a batch.
        rng: of the order of batches, and of samples of equal length.
        pool: batches sorted together.
    """
    batches: list[np.ndarray] = []
    for start in range(0, len(order), pool * batch_size):
        chunk = order[start : start + pool * batch_size]
        chunk = chunk[rng.permutation(len(chunk))]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        cut = [chunk[first : first + batch_size] for first in range(0, len(chunk), batch_size)]
        # The last batch of all may be smaller; it holds the longest of its pool and stays last.
        whole = [batch for batch in cut if len(batch) == batch_size]
        batches += [whole[i] for i in rng.permutation(len(whole))] + cut[len(whole) :]
    return batches


def parse_weights(text: str, num_sets: int) -> list[float]:
    """`--order-weights` to one number a set.

    Raises:
        ValueError: another number of weights than sets, or one that is no number or negative, or none above 0.
    """
    if not text:
        return [1.0] * num_sets
    weights = [float(word) for word in text.split(",")]
    if len(weights) != num_sets:
        raise ValueError(f"{len(weights)} weights for {num_sets} data folders")
    if min(weights) < 0 or not max(weights) > 0 or not np.isfinite(weights).all():
        raise ValueError("weights must be 0 or more, and one of them above 0")
    return weights
