"""Figure of models among one another: a score against parameters and against training pairs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from emkum.evaluation.figure_style import (
    LINE_COLORS,
    MARKERS,
    SMALL,
    TWO_COLUMNS,
    fitted,
    label_points,
    legend_entries,
    one_line,
    save_figure,
    styled,
)

# What stands below the panels, by the attribute that they show.
SIZES = {"parameters": "parameters (millions)", "pairs": "training pairs (millions)"}
_PANEL_HEIGHT, _LEGEND_LINE = 2.5, 0.17  # inches


@dataclass(frozen=True)
class Model:
    """A point of the landscape.

    Attributes:
        name: beside it.
        score: what is compared.
        parameters, pairs: in millions; None = not known, and the panel goes without it.
        group: models of one group have one color and mark.
    """

    name: str
    score: float
    parameters: float | None = None
    pairs: float | None = None
    group: str = ""


@styled
def landscape_figure(path: str | Path, models: Sequence[Model], score: str) -> list[Path]:
    """A panel for parameters and one for training pairs, each on a logarithmic axis, with every model that has both.

    Args:
        path: where to write, with or without ".png" or ".svg"; both are written.
        models: in any order.
        score: what is compared, in words with its unit.

    Returns:
        The files written.

    Raises:
        ValueError: no model has parameters or pairs.
    """
    panels = [size for size in SIZES if any(getattr(model, size) for model in models)]
    if not panels:
        raise ValueError("landscape_figure needs a model with parameters or pairs")
    groups = list(dict.fromkeys(model.group for model in models))
    width = TWO_COLUMNS * len(panels) / 2
    entries = legend_entries(groups, width - 0.3)
    lines = math.ceil(len(groups) / entries) if any(groups) else 0
    figure = Figure(figsize=(width, _PANEL_HEIGHT + lines * _LEGEND_LINE), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, size in zip(all_axes, panels, strict=True):
        _panel(axes, [model for model in models if getattr(model, size)], size, groups)
    all_axes[0].set_ylabel("\n".join(fitted(score, _PANEL_HEIGHT - 0.6, 3)))
    all_axes[0].margins(y=0.14)
    if lines:
        marks = [_mark(all_axes[0], group, groups) for group in groups]
        names = [one_line(group or "other", width - 0.8) for group in groups]
        figure.legend(marks, names, loc="outside upper center", ncols=entries, frameon=False, handletextpad=0.2)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes, size in zip(all_axes, panels, strict=True):
        chosen = [model for model in models if getattr(model, size)]
        points = np.array([(getattr(model, size), model.score) for model in chosen])
        label_points(axes, points, [one_line(model.name, 1.4, SMALL) for model in chosen])
    return save_figure(figure, path)


def _mark(axes: Axes, group: str, groups: Sequence[str]) -> object:
    number = groups.index(group)
    style = {"color": LINE_COLORS[number % len(LINE_COLORS)], "marker": MARKERS[number % len(MARKERS)]}
    return axes.plot([], [], linestyle="", markersize=5, markeredgecolor="white", markeredgewidth=0.4, **style)[0]


def _panel(axes: Axes, models: Sequence[Model], size: str, groups: Sequence[str]) -> None:
    for group in groups:
        chosen = [model for model in models if model.group == group]
        _mark(axes, group, groups).set_data([getattr(m, size) for m in chosen], [m.score for m in chosen])
    axes.relim()
    axes.autoscale_view()
    axes.set_xscale("log")
    sizes = [getattr(model, size) for model in models]
    # Room for names: half a power of ten at least, and more where sizes are far apart.
    room = max(0.3, 0.2 * math.log10(max(sizes) / min(sizes)))
    axes.set_xlim(min(sizes) / 10**room, max(sizes) * 10**room)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if max(sizes) / min(sizes) < 300 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(SIZES[size])
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
