"""Figure of what runs logged over their updates."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from emkum.evaluation.figure_style import (
    LINE_COLORS,
    LINE_STYLES,
    TWO_COLUMNS,
    legend_entries,
    one_line,
    save_figure,
    styled,
)

# What a loss of an image side is called, and the loss of the caption side beside it.
_SIDES = {"image_loss": "text_loss", "i2t_loss": "t2i_loss"}
_LINE_HEIGHT, _LEGEND_HEIGHT = 1.75, 0.17  # inches

History = Sequence[Mapping[str, float]]


def logged_keys(histories: Mapping[str, History]) -> list[str]:
    """Every key but "step", in the order of the log."""
    keys = dict.fromkeys(key for run in histories.values() for record in run for key in record)
    return [key for key in keys if key != "step"]


def part_pairs(keys: Sequence[str]) -> list[tuple[str, str]]:
    """Keys of losses of the image side, each with that of the caption side: NAME_image_loss and NAME_text_loss, or
    NAME_i2t_loss and NAME_t2i_loss."""
    pairs = []
    for key in keys:
        for image, text in _SIDES.items():
            other = key.removesuffix(image) + text
            if key.endswith(image) and other in keys:
                pairs.append((key, other))
    return pairs


@styled
def loss_curves(
    path: str | Path, histories: Mapping[str, History], keys: Sequence[str | tuple[str, str]]
) -> list[Path]:
    """One panel a key, one line a run, over the number of updates.

    Args:
        path: where to write, with or without ".png" or ".svg"; both are written.
        histories: by name of the run, records with "step" and values by key, as `emkum.training_log` gives them for
            one tag. Records without a key, or where it is not finite, are left out of its panel.
        keys: the values to show, such as "loss" or "mean_recall"; two that are given as a pair stand side by side and
            have one scale.

    Returns:
        The files written.

    Raises:
        ValueError: no key or no run given, or a key that no run has; the message names those that there are.
    """
    if not keys or not histories:
        raise ValueError("loss_curves needs at least one key and one run")
    flat = [key for entry in keys for key in ([entry] if isinstance(entry, str) else entry)]
    present = logged_keys(histories)
    for key in flat:
        if key not in present:
            raise ValueError(f"no run has {key!r}; there are {', '.join(sorted(present))}")
    columns = min(len(flat), 2)
    lines = math.ceil(len(flat) / columns)
    width = TWO_COLUMNS / 2 * columns
    entries = legend_entries(list(histories), width - 0.3)
    height = _LINE_HEIGHT * lines + _LEGEND_HEIGHT * math.ceil(len(histories) / entries) + 0.1
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = {key: figure.add_subplot(lines, columns, number) for number, key in enumerate(flat, start=1)}
    for key, axes in panels.items():
        _curves(axes, histories, key)
    for pair in (entry for entry in keys if not isinstance(entry, str)):
        panels[pair[1]].sharey(panels[pair[0]])
        panels[pair[0]].autoscale_view()
    handles, _ = figure.axes[0].get_legend_handles_labels()
    labels = [one_line(name, width - 0.9) for name in histories]
    figure.legend(handles, labels, loc="outside upper center", ncols=entries, handlelength=2.8, frameon=False)
    return save_figure(figure, path)


def _curves(axes: Axes, histories: Mapping[str, History], key: str) -> None:
    for index, (name, history) in enumerate(histories.items()):
        points = [(record["step"], record[key]) for record in history if math.isfinite(record.get(key, math.nan))]
        axes.plot(
            [step for step, _ in points],
            [value for _, value in points],
            label=name if name[:1] != "_" else f" {name}",  # Matplotlib hides names that begin so
            color=LINE_COLORS[index % len(LINE_COLORS)],
            linestyle=LINE_STYLES[index % len(LINE_STYLES)],
            linewidth=1.2,
            marker="o" if len(points) <= 30 else None,
            markersize=2.2,
        )
    axes.set_title(key.replace("_", " "), loc="left")
    axes.set_xlabel("updates")
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
