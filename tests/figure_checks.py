"""Whether a figure can be read as it is printed."""

import itertools

import matplotlib
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from emkum.evaluation.figure_style import ONE_COLUMN, STYLE, TWO_COLUMNS

SMALLEST = 6.0  # points
# Pixels an inch as in print, where letters have their true widths; by how many boxes of texts may overlap, which have
# room above and below letters.
_DPI, _TOLERANCE = 300, 3.0


def assert_readable(figure: Figure) -> None:
    """It has a column's width, no empty axes, and no text that is clipped, too small, or over another one."""
    with matplotlib.rc_context(STYLE):
        FigureCanvasAgg(figure)
        figure.set_dpi(_DPI)
        figure.draw_without_rendering()
        width, height = figure.get_size_inches()
        assert width in (ONE_COLUMN, TWO_COLUMNS) or width < TWO_COLUMNS
        texts = shown_texts(figure)
        assert texts
        small = [text.get_text() for text in texts if text.get_fontsize() < SMALLEST]
        assert not small, small
        # Without the line of an annotation.
        boxes = [Text.get_window_extent(text) for text in texts]
        outside = [t.get_text() for t, box in zip(texts, boxes, strict=True) if not _is_inside(box, figure.bbox)]
        assert not outside, outside
        covered = [
            (one.get_text(), other.get_text())
            for (one, a), (other, b) in itertools.combinations(zip(texts, boxes, strict=True), 2)
            if _overlap(a, b) > _TOLERANCE
        ]
        assert not covered, covered
    kinds = ("lines", "collections", "images", "patches", "texts")
    assert [axes for axes in figure.axes if not any(getattr(axes, kind) for kind in kinds)] == []


def shown_texts(figure: Figure) -> list[Text]:
    """Those that are drawn: not of axes that are off, and no labels of ticks beyond the limits."""
    hidden: set[int] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            drawn = _ticks_inside(axis) if axes.axison else []
            hidden |= {id(text) for text in axis.findobj(Text)} - {id(text) for text in drawn}
    texts = [text for text in figure.findobj(Text) if id(text) not in hidden]
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


def _ticks_inside(axis: Axis) -> list[Text]:
    low, high = sorted(axis.get_view_interval())
    room = 1e-6 * min(abs(low), high - low)
    ticks = [tick for tick in axis.get_major_ticks() if low - room <= tick.get_loc() <= high + room]
    labels = [label for tick in ticks for label in (tick.label1, tick.label2) if label.get_visible()]
    return [*labels, axis.label, axis.offsetText]


def _is_inside(box: Bbox, whole: Bbox) -> bool:
    return box.x0 > -0.5 and box.y0 > -0.5 and box.x1 < whole.x1 + 0.5 and box.y1 < whole.y1 + 0.5


def _overlap(one: Bbox, other: Bbox) -> float:
    """Pixels by which two boxes overlap in the direction where they do so less; 0 = they do not."""
    return max(0.0, min(min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0)))
