"""Pictures of results: retrieval examples and training curves, as PNG and SVG."""

import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from PIL import Image

# Blue and vermilion of Okabe & Ito (2008), told apart with any color vision; the marks say the same without color.
RIGHT_COLOR, WRONG_COLOR = "#0072B2", "#D55E00"
RIGHT_MARK, WRONG_MARK = "\u2713", "\u2717"

WIDTH = 7.2  # inches, a page of two columns
ROW_HEIGHT = 1.15  # inches
HEADING_HEIGHT = 0.3  # inches
THUMBNAIL = 224  # pixels, the longer side

LINE_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00"]
LINE_STYLES = ["-", "--", "-.", ":"]

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "savefig.dpi": 200,
    "svg.hashsalt": "emkum",
}


def retrieval_examples(
    path: str | Path,
    images: Sequence[Image.Image] | Mapping[int, Image.Image],
    captions: Sequence[str] | Mapping[int, str],
    image_to_text: Mapping[int, Sequence[int]],
    text_to_image: Mapping[int, Sequence[int]],
    caption_image: Sequence[int],
) -> list[Path]:
    """Queries of both directions with what was retrieved for them, best first, each marked right or wrong.

    Args:
        path: where to write, with or without ".png" or ".svg"; both are written.
        images: by row; a mapping need hold those alone that are shown.
        captions: by row, likewise.
        image_to_text: for each image row to show, its ranked caption rows.
        text_to_image: for each caption row to show, its ranked image rows.
        caption_image: for each caption row the row of its image; says what is right.

    Returns:
        The files written.

    Raises:
        ValueError: nothing to show.
    """
    if not image_to_text and not text_to_image:
        raise ValueError("retrieval_examples needs at least one query")
    with matplotlib.rc_context(STYLE):
        blocks = [(rows, title) for rows, title in ((image_to_text, "i2t"), (text_to_image, "t2i")) if rows]
        rows = sum(len(block) for block, _ in blocks)
        figure = Figure(figsize=(WIDTH, rows * ROW_HEIGHT + len(blocks) * HEADING_HEIGHT))
        heights = [h for block, _ in blocks for h in [HEADING_HEIGHT, *[ROW_HEIGHT] * len(block)]]
        grid = figure.add_gridspec(
            len(heights), 1, height_ratios=heights, left=0.01, right=0.99, top=1, bottom=0.01, hspace=0
        )
        at = 0
        for block, direction in blocks:
            _heading(figure, grid, at, direction)
            for offset, (query, ranked) in enumerate(block.items(), start=1):
                if direction == "i2t":
                    right = [int(caption_image[row]) == query for row in ranked]
                    _image_query(figure, grid, at + offset, images[query], [captions[row] for row in ranked], right)
                else:
                    right = [row == int(caption_image[query]) for row in ranked]
                    _text_query(figure, grid, at + offset, captions[query], [images[row] for row in ranked], right)
            at += 1 + len(block)
        return save_figure(figure, path)


def loss_curves(
    path: str | Path, histories: Mapping[str, Sequence[Mapping[str, float]]], keys: Sequence[str]
) -> list[Path]:
    """One panel a key, one line a run, over the number of updates.

    Args:
        path: where to write, with or without ".png" or ".svg"; both are written.
        histories: by name of the run, records with "step" and values by key, as `emkum.training_log` gives them for
            one tag. Records without a key, or where it is not finite, are left out of its panel.
        keys: the values to show, such as "loss" or "mean_recall".

    Returns:
        The files written.

    Raises:
        ValueError: no key or no run given, or a key that no run has; the message names those that there are.
    """
    if not keys or not histories:
        raise ValueError("loss_curves needs at least one key and one run")
    present = {key for history in histories.values() for record in history for key in record} - {"step"}
    for key in keys:
        if key not in present:
            raise ValueError(f"no run has {key!r}; there are {', '.join(sorted(present))}")
    with matplotlib.rc_context(STYLE):
        columns = min(len(keys), 2)
        lines = math.ceil(len(keys) / columns)
        width = WIDTH / 2 * columns
        # A letter takes 0.055 inch, the line before a name 0.55 inch.
        entries = max(1, min(len(histories), int(width / (0.055 * max(map(len, histories)) + 0.55))))
        legend_lines = math.ceil(len(histories) / entries)
        figure = Figure(figsize=(width, 2.2 * lines + 0.2 * legend_lines), layout="constrained")
        for index, key in enumerate(keys):
            axes = figure.add_subplot(lines, columns, index + 1)
            _curves(axes, histories, key)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=entries, handlelength=2.8, frameon=False)
        return save_figure(figure, path)


def _heading(figure: Figure, grid: GridSpec, row: int, direction: str) -> None:
    titles = {"i2t": "Image to text", "t2i": "Text to image"}
    axes = _blank(figure, grid[row])
    axes.text(0.005, 0.45, titles[direction], weight="bold", size=9, va="center")
    key = f"{RIGHT_MARK} right   {WRONG_MARK} wrong, best first"
    axes.text(0.995, 0.45, key, size=7, va="center", ha="right", color="0.35")
    axes.axhline(0.08, color="0.6", linewidth=0.6)


def _image_query(
    figure: Figure, grid: GridSpec, row: int, image: Image.Image, found: Sequence[str], right: Sequence[bool]
) -> None:
    cells = grid[row].subgridspec(1, 2, width_ratios=[1, 4.6], wspace=0.03)
    _thumbnail(_blank(figure, cells[0]), image)
    axes = _blank(figure, cells[1])
    step = 1 / max(len(found), 1)
    for rank, (caption, is_right) in enumerate(zip(found, right, strict=True)):
        y = 1 - (rank + 0.5) * step * 0.9 - 0.05
        mark, color = (RIGHT_MARK, RIGHT_COLOR) if is_right else (WRONG_MARK, WRONG_COLOR)
        axes.text(0.012, y, mark, color=color, weight="bold", size=10, va="center", ha="center")
        weight = "bold" if is_right else "normal"
        text = textwrap.shorten(_tidy(caption), 84 if is_right else 94, placeholder=" \u2026")
        axes.text(0.035, y, text, size=7.5, va="center", weight=weight, parse_math=False)


def _text_query(
    figure: Figure, grid: GridSpec, row: int, caption: str, found: Sequence[Image.Image], right: Sequence[bool]
) -> None:
    cells = grid[row].subgridspec(1, 1 + len(found), width_ratios=[1.4, *[1] * len(found)], wspace=0.06)
    text = "\n".join(textwrap.wrap(_tidy(caption), 23, max_lines=6, placeholder=" \u2026"))
    _blank(figure, cells[0]).text(0.02, 0.5, text, size=7.5, va="center", parse_math=False)
    for rank, (image, is_right) in enumerate(zip(found, right, strict=True), start=1):
        _thumbnail(_blank(figure, cells[rank]), image, is_right)


def _thumbnail(axes: Axes, image: Image.Image, is_right: bool | None = None) -> None:
    """The picture in its own proportions within the cell; framed and marked where it is an answer."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    inner = axes.inset_axes([0.03, 0.04, 0.94, 0.92])
    inner.imshow(small, interpolation="lanczos")
    inner.set_xticks([])
    inner.set_yticks([])
    inner.spines[:].set_visible(is_right is not None)
    if is_right is None:
        return
    color = RIGHT_COLOR if is_right else WRONG_COLOR
    inner.spines[:].set(color=color, linewidth=2.2 if is_right else 1.2, linestyle="-" if is_right else (0, (3, 2)))
    inner.text(
        0.045,
        0.955,
        RIGHT_MARK if is_right else WRONG_MARK,
        transform=inner.transAxes,
        color="white",
        size=9,
        weight="bold",
        ha="left",
        va="top",
        bbox={"facecolor": color, "edgecolor": "none", "boxstyle": "square,pad=0.12"},
    )


def _tidy(caption: str) -> str:
    """The caption on one line, punctuation that a tokenizer set apart put back."""
    return re.sub(r" ([.,;:!?])", r"\1", " ".join(caption.split()))


def _blank(figure: Figure, cell: Any) -> Axes:
    axes = figure.add_subplot(cell)
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    return axes


def _curves(axes: Axes, histories: Mapping[str, Sequence[Mapping[str, float]]], key: str) -> None:
    for index, (name, history) in enumerate(histories.items()):
        points = [(record["step"], record[key]) for record in history if math.isfinite(record.get(key, math.nan))]
        axes.plot(
            [step for step, _ in points],
            [value for _, value in points],
            label=name,
            color=LINE_COLORS[index % len(LINE_COLORS)],
            linestyle=LINE_STYLES[index % len(LINE_STYLES)],
            linewidth=1.3,
            marker="o" if len(points) <= 30 else None,
            markersize=2.5,
        )
    axes.set_title(key.replace("_", " "), size=9, loc="left")
    axes.set_xlabel("updates")
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def save_figure(figure: Figure, path: str | Path) -> list[Path]:
    """Writes `path`.png and `path`.svg, each whole or not at all."""
    path = Path(path)
    stem = path.with_suffix("") if path.suffix.lower() in (".png", ".svg") else path
    stem.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    written = []
    for kind, metadata in (("png", {}), ("svg", {"Date": None})):
        target = stem.with_name(f"{stem.name}.{kind}")
        unfinished = stem.with_name(f".{stem.name}.{os.getpid()}.{kind}")
        try:
            figure.savefig(unfinished, format=kind, metadata=metadata)
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)
        written.append(target)
    return written
