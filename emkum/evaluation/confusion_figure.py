"""Picture of what a classifier takes for what, as PNG and SVG: the whole matrix, or the most confused pairs."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from emkum.evaluation.arrays import Array
from emkum.evaluation.figure_style import TWO_COLUMNS, WRONG_COLOR, save_figure, styled
from emkum.evaluation.zero_shot import Confusion, confusion_matrix, most_confused

# More classes than this are shown by their most confused pairs.
MOST_CLASSES = 40
# Up to so many, each cell has its number.
_MOST_NUMBERED = 16
_PAIRS = 24

_CELL, _LEAST_SIDE, _MOST_SIDE = 0.44, 2.4, 5.2  # inches
_NAME_LETTERS, _PAIR_LETTERS = 18, 28
_BAR_HEIGHT, _PAIR_MARGIN = 0.22, 0.9  # inches


@styled
@styled
def confusion_picture(
    path: str | Path, predicted: Tensor, labels: Array | Sequence[int], class_names: Sequence[str]
) -> list[Path]:
    """Draw how often images of each class were taken for each class, in percent of the former.

    Args:
        path: where to write, with or without ".png" or ".svg"; both are written.
        predicted, labels: (n,) integers in 0..C-1.
        class_names: by label. Above MOST_CLASSES, the pairs with the most images stand for the matrix.

    Returns:
        The files written.
    """
    if len(class_names) > MOST_CLASSES:
        pairs = most_confused(predicted, labels, len(class_names), _PAIRS)
        wrong = int((predicted != torch.as_tensor(labels).to(predicted.device)).sum())
        figure = _pairs_figure(pairs, class_names, wrong, len(predicted))
    else:
        figure = _matrix_figure(confusion_matrix(predicted, labels, len(class_names)).cpu(), class_names)
    return save_figure(figure, path)


def _matrix_figure(confusion: Tensor, class_names: Sequence[str]) -> Figure:
    number = len(class_names)
    side = min(max(_CELL * number, _LEAST_SIDE), _MOST_SIDE)
    figure = Figure(figsize=(min(side + 1.9, TWO_COLUMNS), side + 1.2), layout="constrained")
    # The label beside square axes would else touch the edge.
    figure.get_layout_engine().set(w_pad=0.08)
    axes = figure.add_subplot()
    sizes = confusion.sum(dim=1, keepdim=True)
    # Rows without images stay white, without numbers.
    percent = (100.0 * confusion / sizes).masked_fill(sizes == 0, torch.nan).numpy()
    picture = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    names = [_short(name, _NAME_LETTERS) for name in class_names]
    size = 8 if number <= _MOST_NUMBERED else min(7.0, 0.8 * 72 * side / number)
    axes.set_xticks(range(number), names, rotation=90 if number > _MOST_NUMBERED else 45, size=size)
    if number <= _MOST_NUMBERED:
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
        _number_cells(axes, percent)
    axes.set_yticks(range(number), names, size=size)
    for texts in (axes.get_xticklabels(), axes.get_yticklabels()):
        for label in texts:
            label.set_parse_math(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    figure.colorbar(picture, ax=axes, shrink=0.6, label="% of the class's images").outline.set_visible(False)
    return figure


def _number_cells(axes: Axes, percent: np.ndarray) -> None:
    for row, values in enumerate(percent):
        for column, value in enumerate(values):
            # Not below a half: a matrix of zeros hides what is not zero.
            if value >= 0.5:
                color = "white" if value > 55 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", size=7, color=color)


def _pairs_figure(pairs: Sequence[Confusion], class_names: Sequence[str], wrong: int, total: int) -> Figure:
    figure = Figure(figsize=(TWO_COLUMNS, _BAR_HEIGHT * max(len(pairs), 1) + _PAIR_MARGIN), layout="constrained")
    axes = figure.add_subplot()
    if not pairs:
        axes.set_axis_off()
        axes.text(0.0, 0.5, f"None of {total:,} images was taken for another class.", transform=axes.transAxes)
        return figure
    shown = sum(pair.images for pair in pairs)
    # Texts of the whole figure: the names leave the axes too little room for them.
    title = f"Most confused classes: {shown:,} of {wrong:,} images that were taken for another class, of {total:,}"
    figure.suptitle(title, x=0.01, ha="left", size=9)
    figure.supxlabel("images of the class before the arrow that were taken for the other (% of its images)", size=8)
    rows = range(len(pairs))
    axes.barh(rows, [pair.images for pair in pairs], height=0.7, color=WRONG_COLOR)
    for row, pair in zip(rows, pairs, strict=True):
        text = f" {pair.images:,} ({pair.percent:.0f} %)"
        axes.text(pair.images, row, text, va="center", size=7)
    names = [
        f"{_short(class_names[pair.true], _PAIR_LETTERS)} \u2192 {_short(class_names[pair.predicted], _PAIR_LETTERS)}"
        for pair in pairs
    ]
    axes.set_yticks(rows, names, size=7.5)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlim(0, 1.18 * pairs[0].images)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _short(name: str, letters: int) -> str:
    """The name on one line, cut within a word only where one alone is too long."""
    name = " ".join(name.replace("_", " ").split())
    if len(name) <= letters:
        return name
    cut = textwrap.shorten(name, letters, placeholder="\u2026")
    return cut if len(cut) > letters // 2 else name[: letters - 1] + "\u2026"
