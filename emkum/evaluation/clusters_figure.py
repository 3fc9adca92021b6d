"""Figure of codes: images of the most used ones, and how much each code is used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from emkum.evaluation.figure_style import (
    BLUE,
    FAINT,
    PLAIN,
    SMALL,
    TWO_COLUMNS,
    VERMILION,
    place,
    save_figure,
    show_image,
    styled,
)

_ROW, _LABEL, _GAP = 0.82, 0.75, 0.05  # inches
_HISTOGRAM = 1.45


@dataclass(frozen=True)
class CodeUsage:
    """How much codes are used.

    Attributes:
        counts: (J,) images by code.
        order: (J,) codes, the most used one first; of equally used ones the lower number.
        used: how many have an image at all.
        perplexity: exp of the entropy of usage in nats: of J codes that are used alike, J.
    """

    counts: np.ndarray
    order: np.ndarray
    used: int
    perplexity: float


def code_usage(codes: np.ndarray, count: int) -> CodeUsage:
    """
    Args:
        codes: (n,) integers in 0..J-1, n above 0.
        count: J.
    """
    counts = np.bincount(codes, minlength=count)
    shares = counts[counts > 0] / len(codes)
    perplexity = float(np.exp(-(shares * np.log(shares)).sum()))
    return CodeUsage(counts, np.argsort(-counts, kind="stable"), len(shares), perplexity)


def draw_members(codes: np.ndarray, shown: Sequence[int], count: int, seed: int) -> dict[int, list[int]]:
    """Up to `count` positions of images of each of some codes, drawn by the seed, ascending."""
    rng = np.random.default_rng(seed)
    members = {}
    for code in shown:
        rows = np.flatnonzero(codes == code)
        members[int(code)] = sorted(rng.permutation(rows)[:count].tolist())
    return members


@styled
def cluster_figure(
    path: str | Path,
    usage: CodeUsage,
    members: Mapping[int, Sequence[int]],
    images: Mapping[int, Image.Image],
    columns: int,
) -> list[Path]:
    """A histogram of usage, and below it a row of images for each of some codes.

    Args:
        path: where to write, with or without ".png" or ".svg"; both are written.
        usage: of all codes.
        members: positions of images by code, in the order of the rows.
        images: by position.
        columns: images in a full row.

    Returns:
        The files written.
    """
    figure = Figure(figsize=(TWO_COLUMNS, _HISTOGRAM + len(members) * _ROW + _GAP))
    _histogram(place(figure, 0.55, 0.28, TWO_COLUMNS - 0.7, _HISTOGRAM - 0.75), usage, list(members))
    total = int(usage.counts.sum())
    width = (TWO_COLUMNS - _LABEL - _GAP) / columns
    for number, (code, rows) in enumerate(members.items()):
        top = _HISTOGRAM + number * _ROW
        share = 100 * usage.counts[code] / total
        label = place(figure, 0.1, top, _LABEL, _ROW)
        label.text(0, 0.66, f"code {code}", size=PLAIN, weight="bold", va="center")
        label.text(0, 0.46, f"{usage.counts[code]:,} images", size=SMALL, va="center")
        label.text(0, 0.3, f"{share:.1f} %", size=SMALL, va="center", color=FAINT)
        for column, row in enumerate(rows):
            left = _LABEL + _GAP + column * width
            show_image(place(figure, left, top, width - _GAP, _ROW - _GAP), images[row])
    return save_figure(figure, path)


def _histogram(axes: Axes, usage: CodeUsage, shown: Sequence[int]) -> None:
    counts = usage.counts[usage.order]
    places = np.arange(1, len(counts) + 1)
    axes.set_axis_on()
    colors = np.where(np.isin(usage.order, shown), VERMILION, BLUE)
    axes.bar(places, counts, width=1.0 if len(counts) > 100 else 0.85, color=colors)
    axes.set(xlim=(0.4, len(counts) + 0.6), ylim=(0, 1.08 * counts.max()))
    axes.yaxis.get_major_locator().set_params(integer=True, nbins=4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("images")
    axes.set_xlabel(f"codes by usage; the first {len(shown)} are shown below")
    used = f"{usage.used:,} of {len(counts):,} codes used by {int(counts.sum()):,} images"
    axes.set_title(f"{used}; perplexity {usage.perplexity:.1f}", loc="left")
