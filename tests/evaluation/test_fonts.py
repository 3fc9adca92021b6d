"""Text that fits, and text that the font has no letters for."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import ImageFont

from emkum.evaluation.figure_style import PLAIN, fitted, one_line, save_figure, styled, text_width
from emkum.evaluation.fonts import font, printable, shortened, wrap

WORDS = "a dog and two cats on the street near some house while it rains".split()
LONG = "Donaudampfschifffahrt" * 9
SIZE = 13  # pixels


@pytest.fixture(scope="module")
def letters() -> ImageFont.FreeTypeFont:
    return font(SIZE)


@pytest.mark.parametrize("width", [60, 240])
def test_wrap(letters: ImageFont.FreeTypeFont, width: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        text = " ".join(rng.choice(WORDS, rng.integers(1, 60)))
        lines = wrap(text, letters, width)
        assert " ".join(lines) == text
        assert all(letters.getlength(line) <= width for line in lines)
        # No line could take the first word of the next.
        pairs = zip(lines, lines[1:], strict=False)
        assert all(letters.getlength(f"{line} {after.split()[0]}") > width for line, after in pairs)
    long = wrap(f"tiny {LONG} end", letters, width)
    assert all(letters.getlength(line) <= width for line in long)
    assert "".join(long).replace(" ", "") == f"tiny{LONG}end"


def test_a_letter_wider_than_a_line_ends(letters: ImageFont.FreeTypeFont) -> None:
    assert wrap("WWW", letters, 1) == ["W", "W", "W"]


def test_shortened(letters: ImageFont.FreeTypeFont) -> None:
    assert shortened("short", letters, 100) == "short"
    assert shortened("short", letters, 100, cut=True) == "short\u2026"
    cut = shortened("word " * 50, letters, 100)
    assert cut.endswith("\u2026") and letters.getlength(cut) <= 100


def test_fitted_cuts_what_has_no_room_and_says_so() -> None:
    assert fitted("two words", 3.0, 2) == ["two words"]
    lines = fitted("word " * 100, 1.0, 3)
    assert len(lines) == 3 and lines[-1].endswith("\u2026")
    assert all(text_width(line) <= 1.0 for line in lines)
    # Longer than what is wrapped at all.
    assert fitted("w " * 2000, 100.0, 50)[-1].endswith("\u2026")
    assert one_line("word " * 10, 0.5).endswith("\u2026")
    assert fitted("", 1.0, 2) == [""]


def test_printable() -> None:
    assert printable("a dog , two\ncats !  \t end .") == "a dog, two cats! end."
    # Of a number or a name, what stands before the point is no space that a tokenizer made.
    assert printable("costs .5 in a .csv") == "costs .5 in a .csv"
    assert printable("e\u0301t\u00e9 \u0434\u043e\u043c") == "\u00e9t\u00e9 \u0434\u043e\u043c"
    assert printable("\u732b \U0001f642 cat") == "\u25a1 \u25a1 cat"
    assert printable("\x00a\x1b[3m\u200b") == "\u25a1a\u25a1[3m\u25a1"


def test_measured_widths_are_those_of_a_picture(tmp_path: Path) -> None:
    """To the right of it nothing is drawn, and no warning is given."""

    @styled
    def draw(text: str) -> float:
        figure = Figure(figsize=(6.9, 1), dpi=300)
        drawn = figure.text(0, 0.5, text)
        save_figure(figure, tmp_path / "line")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return drawn.get_window_extent(canvas.get_renderer()).width / figure.dpi

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in ("iiiiiiii WWWWWW", "costs $5_x and $6^2 <b> & \\alpha", printable("\u732b \u0416\u00df\u00e9")):
            assert draw(text) == pytest.approx(text_width(text, PLAIN), rel=0.05)
            assert draw(text) <= text_width(text, PLAIN)
