"""The contact sheet: equal tiles, legible text that stays in its column."""

from pathlib import Path

import numpy as np
from PIL import Image

from emkum.evaluation.contact_sheet import (
    COLUMNS,
    GAP,
    MOST_LINES,
    PAPER,
    TEXT_SIZE,
    TILE,
    TITLE_HEIGHT,
    Section,
    Tile,
    _tile_text,
    contact_sheet,
)
from emkum.evaluation.fonts import font

WORDS = "a dog and two cats on the street near some house while it rains".split()


def _captions(seed: int, count: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 60))) for _ in range(count)]


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_images_stand_in_equal_tiles_and_text_below(tmp_path: Path) -> None:
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200), (200, 0, 200), (90, 30, 10)]
    sizes = [(40, 40), (500, 100), (100, 500), (8, 8), (240, 240), (3, 1000), (64, 32)]
    tiles = [
        Tile(Image.new("RGB", size, color), _captions(number, number % 5), f"name{number}" * (1 + 20 * (number == 2)))
        for number, (size, color) in enumerate(zip(sizes, colors, strict=True))
    ]
    contact_sheet(tmp_path / "sheet.png", [Section("train", tiles), Section("valid", tiles[:2])])
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    pixels = _pixels(tmp_path / "sheet.png")
    assert pixels.shape[1] == GAP + COLUMNS * (TILE + GAP)
    paper = tuple(int(PAPER[at : at + 2], 16) for at in (1, 3, 5))
    is_paper = (pixels == paper).all(axis=2)
    # Below the title no ink is outside the columns of tiles.
    second = np.flatnonzero((pixels == colors[0]).all(axis=2).any(axis=1))[-1] - TILE - TITLE_HEIGHT
    for column in range(COLUMNS + 1):
        assert is_paper[TITLE_HEIGHT:second, column * (TILE + GAP) : column * (TILE + GAP) + GAP].all()
    for number, (color, size) in enumerate(zip(colors, sizes, strict=True)):
        mask = (pixels == color).all(axis=2)[:second]
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        left = GAP + number % COLUMNS * (TILE + GAP)
        assert left <= columns[0] and columns[-1] < left + TILE
        shown = (columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
        expected = [max(1, round(side * TILE / max(size))) for side in size]
        assert shown == tuple(expected)
        if number < COLUMNS:
            assert TITLE_HEIGHT <= rows[0] and rows[-1] < TITLE_HEIGHT + TILE
            text = ~is_paper[TITLE_HEIGHT + TILE : TITLE_HEIGHT + TILE + 60, left : left + TILE]
            assert text.any()


def _lines(tile: Tile) -> list[str]:
    return [line for paragraph in _tile_text(tile) for line, _ in paragraph]


def test_what_does_not_fit_is_told() -> None:
    assert _lines(Tile(None, ["one", "two"], "name")) == ["one", "two", "name"]
    many = _lines(Tile(None, [f"caption {number}" for number in range(20)], "name"))
    assert many == [*(f"caption {number}" for number in range(MOST_LINES - 1)), f"+ {21 - MOST_LINES} more", "name"]
    exactly = _lines(Tile(None, [str(number) for number in range(MOST_LINES)]))
    assert exactly == [str(number) for number in range(MOST_LINES)]
    long = _lines(Tile(None, ["word " * 4000]))
    assert len(long) == MOST_LINES and long[-1].endswith("\u2026")
    both = _lines(Tile(None, ["word " * 4000, "second", "third"], "name"))
    assert len(both) == MOST_LINES + 1 and both[-2:] == ["+ 2 more", "name"] and both[-3].endswith("\u2026")
    assert all(font(TEXT_SIZE).getlength(line) <= TILE for line in both + long + _lines(Tile(None, [], "n" * 200)))


def test_a_missing_image_is_said(tmp_path: Path) -> None:
    contact_sheet(tmp_path / "sheet.png", [Section("train", [Tile(None, ["text"])])])
    pixels = _pixels(tmp_path / "sheet.png")
    assert pixels.shape[1] == TILE + 2 * GAP
    tile = pixels[TITLE_HEIGHT : TITLE_HEIGHT + TILE, GAP : GAP + TILE]
    assert len(np.unique(tile.reshape(-1, 3), axis=0)) > 2
