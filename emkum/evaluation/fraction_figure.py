"""Figures over parts of the data, as PNG and SVG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from emkum.evaluation.effects import mean_and_deviation
from emkum.evaluation.figure_style import LINE_COLORS, TWO_COLUMNS, save_figure, styled


@styled
def fraction_curves(path: str | Path, panels: Mapping[str, Mapping[float, Sequence[float]]]) -> list[Path]:
    """One panel a figure, over the part of the data on a logarithmic axis: each run, their mean and its deviation.

    Args:
        path: where to write, with or without ".png" or ".svg"; both are written.
        panels: by the figure's name, by the part of the data (0 to 1), the runs' values.

    Returns:
        The files written.

    Raises:
        ValueError: nothing to show.
    """
    if not panels or not all(panels.values()):
        raise ValueError("fraction_curves needs a figure with at least one part")
    figure = Figure(figsize=(TWO_COLUMNS / 2 * max(1, len(panels)), 2.4), layout="constrained")
    for index, (name, by_part) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), index + 1)
        parts = sorted(by_part)
        percent = [100 * part for part in parts]
        means, deviations = zip(*(mean_and_deviation(by_part[part]) for part in parts), strict=True)
        axes.errorbar(
            percent,
            means,
            [deviation or 0.0 for deviation in deviations],
            color=LINE_COLORS[0],
            linewidth=1.3,
            capsize=2.5,
            elinewidth=0.8,
        )
        for part, at in zip(parts, percent, strict=True):
            axes.plot([at] * len(by_part[part]), by_part[part], "o", color=LINE_COLORS[0], markersize=2.5, alpha=0.6)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(percent))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([f"{value:g}" for value in percent])
        axes.set_xlabel("% of the pairs")
        axes.set_title(name, loc="left")
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
    return save_figure(figure, path)
