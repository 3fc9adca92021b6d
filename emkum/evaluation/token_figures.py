"""Figures of single tokens: what they attend to, and which patches of an image captions' tokens are matched to.

N = 1 + R + P tokens of an image, the CLS token first, R register tokens, P patches row by row; L tokens of a caption.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from emkum.evaluation.figure_style import (
    BLUE,
    FAINT,
    HEAT,
    PLAIN,
    SMALL,
    TITLE,
    TWO_COLUMNS,
    VERMILION,
    fitted,
    frame_patch,
    label_points,
    one_line,
    place,
    save_figure,
    show_heat,
    show_image,
    styled,
    text_width,
)
from emkum.evaluation.fonts import printable

_GAP = 0.08  # inches

# ----------------------------------------------------------------------------------------------------------------------
# Attention
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """What the CLS token and one other token attend to, in shares of 1.

    Attributes:
        cls, token: (1 + P,) of an image or (L,) of a caption. Without register tokens, so that sums may be below 1.
    """

    cls: np.ndarray
    token: np.ndarray


@dataclass(frozen=True)
class AttentionExample:
    """An image and a caption with what their tokens attend to.

    Attributes:
        image: square, cut as the model sees it.
        patch: row and column of the patch whose attention is shown.
        tokens: (L,) of the caption, in words. word: place of the one whose attention is shown.
        image_layers, text_layers: by name of the layer; the same names.
    """

    image: Image.Image
    patch: tuple[int, int]
    tokens: Sequence[str]
    word: int
    image_layers: Mapping[str, Attention]
    text_layers: Mapping[str, Attention]


def rollout(layers: Sequence[Tensor]) -> Tensor:
    """(N, M) how much of each of the M tokens before the first layer is in each of the N tokens behind the last one:
    attention rollout (Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3).

    The residual counts as much as the attention: (A + I) / 2, layer by layer. Where a layer has fewer tokens than the
    one before, register tokens behind the CLS token were taken off.

    Args:
        layers: (N, N) each, mean over heads, rows of sum 1.
    """
    flow = torch.eye(len(layers[0]), dtype=layers[0].dtype, device=layers[0].device)
    for weights in layers:
        registers = len(flow) - len(weights)
        flow = torch.cat([flow[:1], flow[1 + registers :]])
        mixed = (weights + torch.eye(len(weights), dtype=weights.dtype, device=weights.device)) / 2
        flow = mixed @ flow
    return flow


def attended(weights: Tensor, token: int, tokens: int) -> np.ndarray:
    """(tokens,) what a token attends to, register tokens left out.

    Args:
        weights: (N, M), of one layer or rolled out.
        token: its place without register tokens; 0 = the CLS token.
        tokens: how many there are without register tokens.
    """
    row = weights[token if token == 0 else token + len(weights) - tokens]
    return torch.cat([row[:1], row[1 + len(row) - tokens :]]).cpu().numpy()


@styled
def attention_figure(path: str | Path, examples: Sequence[AttentionExample]) -> list[Path]:
    """For each example what the CLS token and a patch attend to, over the image, and what the CLS token and a word
    attend to in the caption. Each map has its own scale, whose end stands below it.

    Args:
        path: where to write, with or without ".png" or ".svg"; both are written.
        examples: at least one; all with the same layers.

    Returns:
        The files written.
    """
    names = list(examples[0].image_layers)
    columns = 1 + 2 * len(names)
    side = min(1.6, (TWO_COLUMNS - _GAP) / columns - _GAP)
    strip, title, below = 0.34, 0.34, 0.2
    block = side + below + 2 * len(names) * strip + 0.16
    figure = Figure(figsize=(TWO_COLUMNS, title + len(examples) * block))
    places = [_GAP + number * (side + _GAP) for number in range(columns)]
    _titles(figure, names, places, side, title)
    for number, example in enumerate(examples):
        top = title + number * block
        axes = place(figure, places[0], top, side, side)
        show_image(axes, example.image)
        frame_patch(axes, *example.patch, *_grid(example.image_layers[names[0]].cls[1:]).shape)
        for column, (layer, way) in enumerate(((n, w) for n in names for w in ("cls", "token")), start=1):
            _attention_map(figure, places[column], top, side, example, layer, way)
        strip_top = top + side + below
        for layer in names:
            for way in ("cls", "token"):
                _attention_strip(place(figure, 0, strip_top, TWO_COLUMNS, strip), example, layer, way, len(names) > 1)
                strip_top += strip
    return save_figure(figure, path)


def _titles(figure: Figure, names: Sequence[str], places: Sequence[float], side: float, height: float) -> None:
    for number, left in enumerate(places):
        axes = place(figure, left, 0, side, height)
        if number == 0:
            axes.text(0, 0.12, "image", size=SMALL)
            continue
        axes.text(0, 0.12, ("framed patch", "CLS token")[number % 2], size=SMALL)
        if number % 2:
            name = one_line(names[number // 2], 2 * side + _GAP, TITLE, bold=True)
            axes.text(0, 0.55, name, size=TITLE, weight="bold")


def _attention_map(
    figure: Figure, left: float, top: float, side: float, example: AttentionExample, layer: str, way: str
) -> None:
    shares = getattr(example.image_layers[layer], way)
    axes = place(figure, left, top, side, side)
    values = _grid(shares[1:])
    show_heat(axes, example.image, values)
    if way == "token":
        frame_patch(axes, *example.patch, *values.shape)
    note = f"0 to {_percent(shares[1:].max())}; CLS {_percent(shares[0])}"
    if text_width(note, SMALL) > side:
        note = f"0 to {_percent(shares[1:].max())}"
    place(figure, left, top + side, side, 0.2).text(0, 0.75, note, size=SMALL, va="top", color=FAINT)


def _attention_strip(axes: Axes, example: AttentionExample, layer: str, way: str, several: bool) -> None:
    """The caption's tokens on the colors of their shares, which stand below them in percent."""
    shares = getattr(example.text_layers[layer], way)
    name = "CLS token" if way == "cls" else f"\u201c{printable(example.tokens[example.word])}\u201d"
    label = f"{layer}, {name}" if several else name
    left = 1.25
    axes.text(_GAP / TWO_COLUMNS, 0.62, one_line(label, left - 2 * _GAP, SMALL), size=SMALL, va="center")
    colors, most = matplotlib.colormaps[HEAT], float(shares.max())
    for number, (token, share) in enumerate(zip(example.tokens, shares, strict=True)):
        # Pieces of one word touch one another.
        goes_on = token.startswith("##") and number > 1
        text = one_line(token.removeprefix("##") or token, 1.0, SMALL)
        width = max(text_width(text, SMALL), text_width("00", SMALL - 0.5)) + 0.05
        left += 0.0 if goes_on else 0.035
        if left + width > TWO_COLUMNS - (0.35 if number + 1 < len(example.tokens) else _GAP):
            axes.text((left + 0.03) / TWO_COLUMNS, 0.65, f"+ {len(example.tokens) - number}", size=SMALL, va="center")
            return
        color = colors(share / most if most > 0 else 0.0)
        box = Rectangle((left / TWO_COLUMNS, 0.42), width / TWO_COLUMNS, 0.46, facecolor=color)
        if way == "token" and number == example.word:
            box.set(edgecolor=VERMILION, linewidth=1.6, zorder=3)
        axes.add_patch(box)
        ink = "black" if np.dot(color[:3], (0.299, 0.587, 0.114)) > 0.5 else "white"
        middle = (left + width / 2) / TWO_COLUMNS
        axes.text(middle, 0.65, text, size=SMALL, ha="center", va="center", color=ink, zorder=4)
        axes.text(middle, 0.2, f"{100 * share:.0f}", size=SMALL - 0.5, ha="center", va="center", color=FAINT)
        left += width


def _grid(values: np.ndarray) -> np.ndarray:
    """(P,) of a square of patches to (rows, columns)."""
    side = round(len(values) ** 0.5)
    return values.reshape(side, side)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.095 else f"{100 * share:.1f} %"


# ----------------------------------------------------------------------------------------------------------------------
# Matches
# ----------------------------------------------------------------------------------------------------------------------

# Tokens that are listed beside an image; further ones are counted.
_MOST_TOKENS = 32
_MATCH_SIDE, _LIST_LINES = 1.75, 16


@dataclass(frozen=True)
class MatchExample:
    """An image with the tokens of a caption and the patches that they are most similar to.

    Attributes:
        image: square, cut as the model sees it. caption: whole.
        tokens: (M,) in words, special ones left out. word: place of the one whose map is shown.
        similarity: (M, rows, columns) cosine of each token with each patch; NaN at patches that take no part.
    """

    image: Image.Image
    caption: str
    tokens: Sequence[str]
    word: int
    similarity: np.ndarray

    @property
    def patches(self) -> np.ndarray:
        """(M,) the patch that each token is most similar to, counted row by row."""
        return np.nanargmax(self.similarity.reshape(len(self.tokens), -1), axis=1)


@styled
def match_figure(path: str | Path, examples: Sequence[MatchExample]) -> list[Path]:
    """For each example the image with the numbers of its caption's tokens on the patches that they are most similar to,
    the similarity of one word with each patch, and the tokens with the cosines.

    Args:
        path: where to write, with or without ".png" or ".svg"; both are written.
        examples: at least one.

    Returns:
        The files written.
    """
    block = _MATCH_SIDE + 0.62
    figure = Figure(figsize=(TWO_COLUMNS, len(examples) * block))
    for number, example in enumerate(examples):
        top = number * block
        caption = fitted(example.caption, TWO_COLUMNS - 2 * _GAP, 2, PLAIN)
        axes = place(figure, _GAP, top + 0.04, TWO_COLUMNS - 2 * _GAP, 0.3)
        axes.text(0, 0.5, "\n".join(caption), va="center", size=PLAIN)
        top += 0.37
        _numbered_patches(place(figure, _GAP, top, _MATCH_SIDE, _MATCH_SIDE), example)
        left = 2 * _GAP + _MATCH_SIDE
        _word_map(figure, left, top, example)
        left += _MATCH_SIDE + 0.2
        _token_list(place(figure, left, top, TWO_COLUMNS - left - _GAP, _MATCH_SIDE), example)
    return save_figure(figure, path)


def _numbered_patches(axes: Axes, example: MatchExample) -> None:
    show_image(axes, example.image)
    rows, columns = example.similarity.shape[1:]
    by_patch: dict[int, list[int]] = {}
    for number, patch in enumerate(example.patches[:_MOST_TOKENS], start=1):
        by_patch.setdefault(int(patch), []).append(number)
    # From patches to pixels of the image.
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    corners = np.array([divmod(patch, columns) for patch in by_patch], dtype=float) + 0.5
    points = np.stack([corners[:, 1] / columns * (right - left) + left, corners[:, 0] / rows * (bottom - top) + top], 1)
    axes.plot(
        *points.T, linestyle="", marker="s", markersize=2.4, color="white", markeredgecolor="black", markeredgewidth=0.6
    )
    texts = ["\n".join(fitted(_ranges(numbers), 0.4, 3, SMALL - 0.5)) for numbers in by_patch.values()]
    box = {"facecolor": "white", "edgecolor": "black", "linewidth": 0.5, "boxstyle": "square,pad=0.15", "alpha": 0.9}
    label_points(axes, points, texts, on_top=True, box=box)


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers; of those that follow one another the first and the last alone."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return " ".join(("\u2013" if run[-1] > run[0] + 1 else " ").join(map(str, run)) for run in runs)


def _word_map(figure: Figure, left: float, top: float, example: MatchExample) -> None:
    values = example.similarity[example.word]
    least = float(np.nanmin(values))
    show_heat(place(figure, left, top, _MATCH_SIDE, _MATCH_SIDE), example.image, values, least)
    word = one_line(example.tokens[example.word], 0.7, SMALL)
    note = f"{example.word + 1} \u201c{word}\u201d: cosine {_signed(least)} to {_signed(np.nanmax(values))}"
    axes = place(figure, left, top + _MATCH_SIDE, _MATCH_SIDE + 0.2, 0.2)
    axes.text(0, 0.75, note, size=SMALL, va="top", color=FAINT)


def _token_list(axes: Axes, example: MatchExample) -> None:
    """Number, token and cosine with its patch, as a bar and as a figure."""
    best = np.nanmax(example.similarity.reshape(len(example.tokens), -1), axis=1)
    shown = min(len(best), _MOST_TOKENS)
    columns = 1 if shown <= _LIST_LINES else 2
    lines = min(shown, _LIST_LINES)
    step = min(1 / lines, 0.105)
    whole = axes.get_window_extent().width / axes.figure.dpi
    width = whole / columns
    text = 0.75 if columns == 1 else 0.62
    bars = width - text - 0.6
    for number in range(shown):
        column, line = divmod(number, lines)
        left, y = column * width, 1 - (line + 0.5) * step
        style = {"size": SMALL, "va": "center"}
        axes.text((left + 0.15) / whole, y, str(number + 1), ha="right", color=FAINT, **style)
        axes.text((left + 0.2) / whole, y, one_line(example.tokens[number], text - 0.05, SMALL), **style)
        start = left + 0.25 + text
        length = max(0.0, float(best[number])) * bars
        color = BLUE if number == example.word else "0.6"
        axes.barh(y, length / whole, 0.62 * step, start / whole, color=color)
        axes.text((start + length + 0.03) / whole, y, _signed(best[number]), color=FAINT, **style)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    if shown < len(best):
        note = f"+ {len(best) - shown} further tokens"
        axes.text(1, 0, note, size=SMALL, va="top", ha="right", color=FAINT)


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "\u2212")
