"""Accuracy of a classifier over a whole evaluation set, and figures that tell living features from dead ones.

B images, C classes; n rows of features (of images, texts or patches), D channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# A channel whose standard deviation is below this part of the features' root mean square is constant: what is left are
# roundings, which differ with the size of a batch.
CONSTANT = 1e-4

# Rows that are held in float64 at once.
_CHUNK = 4096


def label_ranks(logits: Tensor, labels: Tensor, tie: float = 0.0) -> Tensor:
    """(B,) int64, for each image how many wrong classes are at least as likely as the right one.

    So ties count against the model, and a classifier that says the same of every class is never right. A wrong class
    whose logit is NaN is ahead of the right one; a right class whose logit is NaN is behind any number of classes.

    Args:
        logits: (B, C) real.
        labels: (B,) integers in 0..C-1.
        tie: logits that differ by no more than this are equally likely.

    Raises:
        ValueError: shapes that do not fit each other, or a label out of range.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"want logits (B, C) and labels (B,), not {tuple(logits.shape)} and {tuple(labels.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(f"labels must be in 0..{logits.shape[1] - 1}")
    right = logits.gather(1, labels.long()[:, None])
    # Written as "not below", so that NaN, which compares as False, counts against the model. The right class is not
    # below itself either.
    ranks = (~(logits < right - tie)).sum(dim=1) - 1
    return ranks.masked_fill(right.isnan()[:, 0], torch.iinfo(torch.int64).max)


def top_k_accuracy(ranks: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Percentage of images whose right class is among the first k.

    Args:
        ranks: (images,) as `label_ranks` gives them.
        ks: how many classes a prediction may name.

    Returns:
        `top_{k}` for each k, in percent.

    Raises:
        ValueError: there are no images.
    """
    if len(ranks) == 0:
        raise ValueError("accuracy needs images")
    return {f"top_{k}": 100.0 * (ranks < k).double().mean().item() for k in ks}


class FeatureStatistics:
    """What features look like, added up batch by batch in float64: the result does not depend on how rows are batched.

    Rows that hold NaN or infinity are counted and left out of everything else.
    """

    def __init__(self) -> None:
        self._count = 0
        self._bad_values = 0
        # Of the channels and, as a further column, of the norm: means and sums of squared deviations, (D + 1,).
        self._mean: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0
        # Sum of the unit vectors, (D,), of rows that are not zero, and their number.
        self._direction: Tensor | float = 0.0
        self._directed = 0

    def add(self, rows: Tensor) -> None:
        """Add (n, D) rows, real, on any device, the same one each time."""
        for chunk in rows.split(_CHUNK):
            self._add(chunk.double())

    def _add(self, rows: Tensor) -> None:
        finite = rows.isfinite()
        self._bad_values += int((~finite).sum())
        rows = rows[finite.all(dim=1)]
        if len(rows) == 0:
            return
        norms = rows.norm(dim=1, keepdim=True)
        directed = norms[:, 0] > 0
        self._direction = self._direction + (rows[directed] / norms[directed]).sum(dim=0)
        self._directed += int(directed.sum())
        values = torch.cat([rows, norms], dim=1)
        mean = values.mean(dim=0)
        # Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
        total = self._count + len(rows)
        shift = mean - self._mean
        self._squares = self._squares + (values - mean).square().sum(dim=0)
        self._squares = self._squares + shift.square() * (self._count * len(rows) / total)
        self._mean = self._mean + shift * (len(rows) / total)
        self._count = total

    def figures(self) -> dict[str, float | int | None]:
        """The statistics of all rows so far; standard deviations are those of the rows themselves (divided by n).

        Returns:
            count: rows that are finite.
            bad_values: numbers that are NaN or infinite.
            norm_mean, norm_std: of the rows' Euclidean norms.
            channel_mean: mean over channels of the absolute value of the channel's mean.
            channel_std: mean over channels of the channel's standard deviation.
            constant_channels: percentage of channels that are (almost) constant, see CONSTANT.
            mean_cosine: over all pairs of different rows; rows of zeros have none.
            What needs one row (norm_mean, channel_mean) or two (the others) is None where there are fewer.
        """
        figures: dict[str, float | int | None] = {"count": self._count, "bad_values": self._bad_values}
        figures |= dict.fromkeys(("norm_mean", "norm_std", "channel_mean", "channel_std"))
        figures |= dict.fromkeys(("constant_channels", "mean_cosine"))
        if self._count == 0:
            return figures
        means = self._mean[:-1]
        figures["norm_mean"] = self._mean[-1].item()
        figures["channel_mean"] = means.abs().mean().item()
        if self._count > 1:
            stds = (self._squares / self._count).sqrt()
            scale = (means.square() + stds[:-1].square()).mean().sqrt()
            figures["norm_std"] = stds[-1].item()
            figures["channel_std"] = stds[:-1].mean().item()
            figures["constant_channels"] = 100.0 * (stds[:-1] <= CONSTANT * scale).double().mean().item()
        if self._directed > 1:
            # |sum of unit vectors|^2 holds each pair twice, and every vector with itself once.
            pairs = self._directed * (self._directed - 1)
            figures["mean_cosine"] = (self._direction.square().sum().item() - self._directed) / pairs
        return figures
