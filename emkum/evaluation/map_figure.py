"""Figure of the space that images and captions share: both in one map, and the gap between them.

n pairs of an image and one of its captions, D channels.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from emkum.evaluation.figure_style import BLUE, ONE_COLUMN, PLAIN, SMALL, VERMILION, save_figure, styled


@dataclass(frozen=True)
class ModalityGap:
    """How far images and captions are apart.

    Attributes:
        distance: of the mean of images and the mean of captions (Liang et al. 2022, "Mind the Gap", section 2.1),
            between 0 and 2.
        pairs, others: mean cosine of an image with its caption, and with the captions of the others; the latter NaN of
            one pair alone.
    """

    distance: float
    pairs: float
    others: float


@dataclass(frozen=True)
class Plane:
    """Features in two dimensions.

    Attributes:
        images, texts: (n, 2).
        shares: of the variance that each axis has, in 0..1; None where axes have no such meaning.
    """

    images: np.ndarray
    texts: np.ndarray
    shares: tuple[float, float] | None


def modality_gap(images: np.ndarray, texts: np.ndarray) -> ModalityGap:
    """Of unit vectors (n, D) both, row by row a pair."""
    means = images.mean(axis=0), texts.mean(axis=0)
    own = float((images * texts).sum(axis=1).mean())
    count = len(images)
    # The sum over all pairs is the product of the sums.
    others = (
        (count**2 * float(means[0] @ means[1]) - count * own) / (count * (count - 1)) if count > 1 else float("nan")
    )
    return ModalityGap(float(np.linalg.norm(means[0] - means[1])), own, others)


def principal_plane(images: np.ndarray, texts: np.ndarray) -> Plane:
    """The first two principal components of all 2 n features together.

    The sign of an axis is chosen so that its largest coordinate is positive: the same features give the same map.
    """
    features = np.concatenate([images, texts]).astype(np.float64)
    centered = features - features.mean(axis=0)
    _, values, axes = np.linalg.svd(centered, full_matrices=False)
    axes = np.concatenate([axes[:2], np.zeros((max(0, 2 - len(axes)), axes.shape[1]))])
    points = centered @ axes.T
    points = points * np.where(points[np.abs(points).argmax(axis=0), [0, 1]] < 0, -1.0, 1.0)
    variance = np.concatenate([values**2, [0.0, 0.0]])
    shares = variance[:2] / max(variance.sum(), np.finfo(float).tiny)
    return Plane(points[: len(images)], points[len(images) :], (float(shares[0]), float(shares[1])))


@styled
def feature_map(path: str | Path, plane: Plane, gap: ModalityGap, joined: np.ndarray, method: str) -> list[Path]:
    """Images and captions as points, some pairs joined.

    Args:
        path: where to write, with or without ".png" or ".svg"; both are written.
        plane: the points.
        gap: stands in the title.
        joined: (k,) rows of pairs that are joined by a line.
        method: that made the plane, for the axes.

    Returns:
        The files written.
    """
    figure = Figure(figsize=(ONE_COLUMN, 3.35), layout="constrained")
    axes = figure.add_subplot()
    size = 5.0 if len(plane.images) > 300 else 9.0
    style = {"s": size, "linewidths": 0, "alpha": 0.55}
    axes.scatter(*plane.images.T, color=BLUE, marker="o", label=f"images ({len(plane.images):,})", **style)
    axes.scatter(*plane.texts.T, color=VERMILION, marker="^", label=f"captions ({len(plane.texts):,})", **style)
    for row in joined:
        ends = np.stack([plane.images[row], plane.texts[row]])
        axes.plot(*ends.T, color="black", linewidth=0.6, zorder=3)
        axes.plot(
            *ends[:1].T, color=BLUE, marker="o", markersize=4, markeredgecolor="black", markeredgewidth=0.5, zorder=4
        )
        axes.plot(
            *ends[1:].T,
            color=VERMILION,
            marker="^",
            markersize=4.5,
            markeredgecolor="black",
            markeredgewidth=0.5,
            zorder=4,
        )
    names = [f"{method} {number}" for number in (1, 2)]
    if plane.shares is not None:
        names = [f"{name} ({100 * share:.0f} % of variance)" for name, share in zip(names, plane.shares, strict=True)]
        axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    axes.tick_params(labelsize=SMALL)
    others = "" if np.isnan(gap.others) else f", of others {gap.others:.2f}"
    note = f"mean cosine of pairs {gap.pairs:.2f}{others}".replace("-", "\u2212")
    axes.set_title(f"modality gap {gap.distance:.2f}\n{note}", loc="left", size=PLAIN)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, handletextpad=0.2, markerscale=1.6)
    return save_figure(figure, path)
