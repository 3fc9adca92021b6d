"""What all figures share: sizes for print, fonts, colors, and files as PNG and SVG."""

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox
from PIL import Image

from emkum.evaluation.fonts import font, printable, shortened, wrap

# Inches, as figures stand in a paper of two columns.
ONE_COLUMN, TWO_COLUMNS = 3.3, 6.9
# Points, at that size.
SMALL, PLAIN, TITLE = 6.5, 7.5, 8.5

# Blue and vermilion of Okabe & Ito (2008), told apart with any color vision; marks and line styles say the same without
# color.
BLUE, VERMILION = "#0072B2", "#D55E00"
LINE_COLORS = [BLUE, VERMILION, "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00"]
LINE_STYLES = ["-", "--", "-.", ":"]
MARKERS = ["o", "^", "s", "D", "v", "P", "X"]
RIGHT_COLOR, WRONG_COLOR = BLUE, VERMILION
RIGHT_MARK, WRONG_MARK = "\u2713", "\u2717"
FAINT = "0.35"
# Of shares and similarities: it rises in lightness alone for those who see no color.
HEAT = "viridis"

THUMBNAIL = 224  # pixels, the longer side
_DPI = 300

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": PLAIN,
    "axes.titlesize": TITLE,
    "axes.labelsize": PLAIN,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL + 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "text.parse_math": False,
    "savefig.dpi": _DPI,
    "svg.hashsalt": "emkum",
}
# Widths are measured ten times larger than in points, where whole pixels matter little; letters of a picture are up to
# 2 % wider.
_SCALE, _MARGIN = 10, 0.98

P, R = ParamSpec("P"), TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Run a function that draws and saves a figure under STYLE."""

    @functools.wraps(draw)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return run


def save_figure(figure: Figure, path: str | Path) -> list[Path]:
    """Writes `path`.png and `path`.svg, each whole or not at all."""
    stem = stem_of(path)
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


def stem_of(path: str | Path) -> Path:
    """A figure's name without ".png" or ".svg", which a user may have given."""
    path = Path(path)
    return path.with_suffix("") if path.suffix.lower() in (".png", ".svg") else path


# ----------------------------------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------------------------------


def text_width(text: str, size: float = PLAIN, bold: bool = False) -> float:
    """Inches that a line takes, printed at `size` points."""
    return font(round(size * _SCALE), bold).getlength(text) / _SCALE / 72 / _MARGIN


def one_line(text: str, inches: float, size: float = PLAIN, bold: bool = False) -> str:
    """As much of the text as fits into a line, with an ellipsis where it is cut."""
    return fitted(text, inches, 1, size, bold)[0]


def fitted(text: str, inches: float, most: int, size: float = PLAIN, bold: bool = False) -> list[str]:
    """At most `most` lines of at most `inches`, the last one with an ellipsis where the text is cut."""
    letters, width = font(round(size * _SCALE), bold), inches * 72 * _SCALE * _MARGIN
    lines = wrap(printable(text), letters, width)
    if len(lines) > most or "".join(lines).replace(" ", "") != printable(text).replace(" ", ""):
        lines = [*lines[: most - 1], shortened(lines[min(most, len(lines)) - 1], letters, width, cut=True)]
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Images
# ----------------------------------------------------------------------------------------------------------------------


def place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes without a frame, of 0 to 1 either way; all in inches, from the figure's upper left corner."""
    whole_width, whole_height = figure.get_size_inches()
    bottom = whole_height - top - height
    axes = figure.add_axes((left / whole_width, bottom / whole_height, width / whole_width, height / whole_height))
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    return axes


def show_image(axes: Axes, image: Image.Image, is_right: bool | None = None) -> None:
    """The image in its own proportions; framed and marked where it is an answer."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    axes.set_axis_on()
    axes.imshow(small, interpolation="lanczos")
    width, height = small.size
    axes.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.spines[:].set_visible(True)
    # A hairline keeps an image that is as light as the paper apart from it.
    axes.spines[:].set(color="0.7", linewidth=0.4)
    if is_right is None:
        return
    color = RIGHT_COLOR if is_right else WRONG_COLOR
    axes.spines[:].set(color=color, linewidth=2.2 if is_right else 1.2, linestyle="-" if is_right else (0, (3, 2)))
    box = {"facecolor": color, "edgecolor": "none", "boxstyle": "square,pad=0.12"}
    style = {"color": "white", "size": 9, "weight": "bold", "ha": "left", "va": "top", "bbox": box}
    axes.text(0.045, 0.955, RIGHT_MARK if is_right else WRONG_MARK, transform=axes.transAxes, **style)


def show_heat(axes: Axes, image: Image.Image, values: np.ndarray, least: float = 0.0) -> None:
    """Values of patches over a pale copy of their image; a dot is on the largest.

    Args:
        axes: where.
        image: square, cut as the model sees it.
        values: (rows, columns); NaN where there is none.
        least: value of the darkest color; the largest value has the lightest.
    """
    gray = np.asarray(image.convert("L").resize((THUMBNAIL, THUMBNAIL)), dtype=float) / 255
    rows, columns = values.shape
    extent = (0, columns, rows, 0)
    axes.set_axis_on()
    # Not from black: what is dark shows under the colors, too.
    axes.imshow(0.25 + 0.75 * gray, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="lanczos")
    most = float(np.nanmax(values))
    norm = Normalize(least, most if most > least else least + 1)
    axes.imshow(values, cmap=HEAT, norm=norm, alpha=0.62, extent=extent, interpolation="nearest")
    axes.set(xticks=[], yticks=[], xlim=(0, columns), ylim=(rows, 0))
    axes.spines[:].set_visible(True)
    axes.spines[:].set(color="0.7", linewidth=0.4)
    row, column = np.unravel_index(int(np.nanargmax(values)), values.shape)
    dot = {"marker": "o", "markersize": 3.6, "color": "white", "markeredgecolor": "black", "markeredgewidth": 0.7}
    axes.plot([column + 0.5], [row + 0.5], zorder=5, **dot)


def frame_patch(axes: Axes, row: int, column: int, rows: int, columns: int) -> None:
    """A frame around one of rows x columns patches of axes that show an image, dark around so that it shows on
    anything."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    width, height = (right - left) / columns, (top - bottom) / rows
    for line, color in ((2.6, "black"), (1.3, VERMILION)):
        corner = left + column * width, top - row * height
        box = Rectangle(corner, width, -height, fill=False, edgecolor=color, linewidth=line, zorder=4, clip_on=False)
        axes.add_patch(box)


# ----------------------------------------------------------------------------------------------------------------------
# Labels
# ----------------------------------------------------------------------------------------------------------------------

# Where a label is tried beside its point, in points: how far to the right or the left, and how far up or down.
_SIDEWAYS, _UPWARDS = (6, 14, 24, 36, 50), (0, *(sign * step for step in range(9, 82, 9) for sign in (1, -1)))
# Left, bottom, right and top, in pixels.
_Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class _Place:
    """Where a label stands: from its point, in points, and to which side of that it goes on (0 = both)."""

    x: float
    y: float
    side: int


def label_points(
    axes: Axes, points: np.ndarray, texts: Sequence[str], on_top: bool = False, box: dict[str, Any] | None = None
) -> None:
    """Write a label to each point where it covers neither a point nor another label, as near as there is room; a line
    joins the two where they are apart.

    The axes must have their final place and limits.

    Args:
        axes: where. points: (n, 2) in their coordinates. texts: (n,) of one or more lines.
        on_top: try the point itself first, which is then covered.
        box: around each label, as Matplotlib's `bbox`; None = none.
    """
    scale = axes.figure.dpi / 72
    size = SMALL if box is None else SMALL - 0.5
    pixels = axes.transData.transform(points)
    inside = axes.get_window_extent().padded(-3 * scale)
    taken = [_box(x, y, 6 * scale, 6 * scale) for x, y in pixels]
    # Those with little room choose first, from above.
    crowd = [sum(np.hypot(*(pixels - point).T) < 30 * scale) for point in pixels]
    for number in sorted(range(len(texts)), key=lambda i: (-crowd[i], -pixels[i][1])):
        lines = texts[number].split("\n")
        pad = (0.4 if box is None else 0.6) * size
        width = (max(text_width(line, size) for line in lines) * 72 + pad) * scale
        height = (1.2 * size * len(lines) + pad) * scale
        others = taken[:number] + taken[number + 1 :]
        found = _free_place(pixels[number], (width, height), others, inside, scale, on_top)
        corner = pixels[number] + np.array([found.x, found.y]) * scale
        taken.append(_box(corner[0] + found.side * width / 2, corner[1], width, height))
        line = {"arrowstyle": "-", "color": "0.4", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0 if on_top else 2.5}
        axes.annotate(
            texts[number],
            points[number],
            xytext=(found.x, found.y),
            textcoords="offset points",
            size=size,
            ha=("center", "left", "right")[found.side],
            va="center",
            multialignment="center",
            linespacing=1.0,
            bbox=box,
            arrowprops=line | {"relpos": (0.5 - 0.5 * found.side, 0.5)} if abs(found.x) > _SIDEWAYS[0] else None,
        )


def _free_place(
    point: np.ndarray, size: tuple[float, float], taken: Sequence[_Box], inside: Bbox, scale: float, on_top: bool
) -> _Place:
    """The nearest place where a label, and the line from the point to it, cover as little as can be."""
    places = [_Place(0, 0, 0)] * on_top
    beside = [(dx, dy, side) for dx in _SIDEWAYS for dy in _UPWARDS for side in (1, -1) if dy == 0 or dx > _SIDEWAYS[0]]
    beside.sort(key=lambda at: at[0] + abs(at[1]) + 3 * (at[2] < 0))
    places += [_Place(dx * side, dy, side) for dx, dy, side in beside]
    # A line cannot but leave what covers its point.
    ahead = [box for box in taken if not (box[0] < point[0] < box[2] and box[1] < point[1] < box[3])]
    best, least = places[0], math.inf
    for place in places:
        end = point + np.array([place.x, place.y]) * scale
        box = _box(end[0] + place.side * size[0] / 2, end[1], *size)
        outside = max(0, inside.x0 - box[0], box[2] - inside.x1) + max(0, inside.y0 - box[1], box[3] - inside.y1)
        on_line = [point + (end - point) * part for part in np.linspace(0, 1, 15)]
        crossed = sum(left < x < right and low < y < high for x, y in on_line for left, low, right, high in ahead)
        cost = 1e6 * outside + 100 * sum(_overlap(box, other) for other in taken) + crossed
        if cost < least:
            best, least = place, cost
    return best


def _box(x: float, y: float, width: float, height: float) -> _Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(one: _Box, other: _Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0


def legend_entries(names: Sequence[str], inches: float, handle: float = 0.5) -> int:
    """How many entries of a legend stand side by side in a width; `handle` is what stands before a name, in inches."""
    widest = max(text_width(printable(name), SMALL + 0.5) for name in names) + handle
    return max(1, min(len(names), int(inches / widest)))
