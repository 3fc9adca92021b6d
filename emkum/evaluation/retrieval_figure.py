"""Figure of queries of both directions with what was retrieved for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from emkum.evaluation.figure_style import (
    FAINT,
    PLAIN,
    RIGHT_COLOR,
    RIGHT_MARK,
    SMALL,
    TITLE,
    TWO_COLUMNS,
    WRONG_COLOR,
    WRONG_MARK,
    fitted,
    one_line,
    place,
    save_figure,
    show_image,
    styled,
)

_ROW, _HEADING = 1.0, 0.3  # inches
_QUERY_IMAGE, _QUERY_TEXT, _GAP = 1.2, 1.35, 0.06  # inches
_TITLES = {"i2t": "Image to text", "t2i": "Text to image"}


@dataclass(frozen=True)
class Example:
    """A query with its candidates.

    Attributes:
        query: its row. found: rows of the best candidates, best first.
        rank: of the first right candidate, from 1; None where it cannot be told.
    """

    query: int
    found: Sequence[int]
    rank: int | None = None


def choose_queries(ranks: Tensor, count: int, seed: int, rows: Tensor | None = None) -> list[int]:
    """Queries drawn by a seed: half of them (the larger one) found at once, half of them not, as far as there are such.

    Args:
        ranks: (Q,) how many wrong candidates stand ahead of the right one.
        count: how many; all where there are no more.
        seed: of the draw.
        rows: those that may be drawn; None = all.

    Returns:
        Rows, first those found at once, either ascending.
    """
    rows = torch.arange(len(ranks)) if rows is None else rows
    drawn = rows[torch.from_numpy(np.random.default_rng(seed).permutation(len(rows)))]
    is_right = ranks[drawn] == 0
    right, wrong = drawn[is_right].tolist(), drawn[~is_right].tolist()
    failures = min(len(wrong), max(count // 2, count - len(right)))
    return sorted(right[: max(0, count - failures)]) + sorted(wrong[:failures])


@styled
def retrieval_examples(
    path: str | Path,
    images: Sequence[Image.Image] | Mapping[int, Image.Image],
    captions: Sequence[str] | Mapping[int, str],
    image_to_text: Sequence[Example],
    text_to_image: Sequence[Example],
    caption_image: Sequence[int],
    notes: Mapping[str, str] | None = None,
) -> list[Path]:
    """Queries of both directions with what was retrieved for them, best first, each marked right or wrong.

    Args:
        path: where to write, with or without ".png" or ".svg"; both are written.
        images: by row; a mapping need hold those alone that are shown.
        captions: by row, likewise.
        image_to_text: image rows to show, with their caption rows.
        text_to_image: caption rows to show, with their image rows.
        caption_image: for each caption row the row of its image; says what is right.
        notes: to stand beside the headings "i2t" and "t2i".

    Returns:
        The files written.

    Raises:
        ValueError: nothing to show.
    """
    if not image_to_text and not text_to_image:
        raise ValueError("retrieval_examples needs at least one query")
    blocks = [(rows, title) for rows, title in ((image_to_text, "i2t"), (text_to_image, "t2i")) if rows]
    height = sum(len(block) for block, _ in blocks) * _ROW + len(blocks) * _HEADING + 0.05
    figure = Figure(figsize=(TWO_COLUMNS, height))
    top = 0.0
    for block, direction in blocks:
        _heading(place(figure, 0, top, TWO_COLUMNS, _HEADING), direction, (notes or {}).get(direction, ""))
        top += _HEADING
        for example in block:
            if direction == "i2t":
                right = [int(caption_image[row]) == example.query for row in example.found]
                texts = [captions[row] for row in example.found]
                _image_query(figure, top, images[example.query], texts, right, example.rank)
            else:
                right = [row == int(caption_image[example.query]) for row in example.found]
                shown = [images[row] for row in example.found]
                _text_query(figure, top, captions[example.query], shown, right, example.rank)
            top += _ROW
    return save_figure(figure, path)


def _heading(axes: Axes, direction: str, note: str) -> None:
    title = _TITLES[direction] + (f": {note}" if note else "")
    axes.text(0.01, 0.45, title, weight="bold", size=TITLE, va="center")
    key = f"{RIGHT_MARK} right   {WRONG_MARK} wrong, best first"
    axes.text(0.99, 0.45, key, size=SMALL, va="center", ha="right", color=FAINT)
    axes.axhline(0.08, color="0.6", linewidth=0.6)


def _rank_note(right: Sequence[bool], rank: int | None) -> str:
    return "" if any(right) or rank is None else f"the right one: rank {rank:,}"


def _image_query(
    figure: Figure, top: float, image: Image.Image, found: Sequence[str], right: Sequence[bool], rank: int | None
) -> None:
    show_image(place(figure, _GAP, top + _GAP / 2, _QUERY_IMAGE, _ROW - _GAP), image)
    left = _GAP + _QUERY_IMAGE
    width = TWO_COLUMNS - left
    axes = place(figure, left, top, width, _ROW)
    note = _rank_note(right, rank)
    step = 0.9 / (len(found) + bool(note))
    for number, (caption, is_right) in enumerate(zip(found, right, strict=True)):
        y = 0.95 - (number + 0.5) * step
        mark, color = (RIGHT_MARK, RIGHT_COLOR) if is_right else (WRONG_MARK, WRONG_COLOR)
        axes.text(0.13 / width, y, mark, color=color, weight="bold", size=9, va="center", ha="center")
        text = one_line(caption, width - 0.3, PLAIN, bold=is_right)
        axes.text(0.24 / width, y, text, va="center", weight="bold" if is_right else "normal")
    if note:
        axes.text(0.24 / width, 0.05 + 0.5 * step, note, size=SMALL, va="center", color=FAINT)


def _text_query(
    figure: Figure, top: float, caption: str, found: Sequence[Image.Image], right: Sequence[bool], rank: int | None
) -> None:
    note = _rank_note(right, rank)
    lines = fitted(caption, _QUERY_TEXT - _GAP, 6 - bool(note))
    axes = place(figure, _GAP, top, _QUERY_TEXT, _ROW)
    axes.text(0, 0.55 if note else 0.5, "\n".join(lines), va="center")
    if note:
        axes.text(0, 0.03, note, size=SMALL, va="bottom", color=FAINT)
    width = (TWO_COLUMNS - _QUERY_TEXT - 2 * _GAP) / len(found)
    for number, (image, is_right) in enumerate(zip(found, right, strict=True)):
        left = 2 * _GAP + _QUERY_TEXT + number * width
        show_image(place(figure, left, top + _GAP / 2, width - _GAP, _ROW - _GAP), image, is_right)
