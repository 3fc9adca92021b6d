"""One picture of many images with their captions, to see at a glance what is in a data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from emkum.evaluation.fonts import font, shortened, wrap
from emkum.files import replaced_file

# All in pixels.
COLUMNS = 6
TILE = 240
GAP = 18
LINE = 18
TEXT_SIZE, TITLE_SIZE = 13, 20
TITLE_HEIGHT = 46
# Between an image and its captions, and between two captions.
PAUSE = 6

MOST_LINES = 8

INK, FAINT, PAPER, MOUNT = "#1a1a1a", "#707070", "#ffffff", "#eeeeee"


@dataclass(frozen=True)
class Tile:
    """One image, None where it cannot be shown, and what is written below it; `name` is small print."""

    image: Image.Image | None
    captions: Sequence[str]
    name: str = ""


@dataclass(frozen=True)
class Section:
    """Tiles under one title."""

    title: str
    tiles: Sequence[Tile]


def contact_sheet(path: str | Path, sections: Sequence[Section]) -> None:
    """Write a PNG with rows of equal tiles, whole or not at all.

    An image keeps its proportions. Below it are its first caption, cut where it is very long, the next ones as far as
    they fit, and how many more there are.

    Args:
        path: the file.
        sections: at least one, none of them empty.
    """
    texts = [[_tile_text(tile) for tile in section.tiles] for section in sections]
    heights = [max(map(_text_height, section)) for section in texts]
    rows = [-(-len(section.tiles) // COLUMNS) for section in sections]
    columns = min(COLUMNS, max(len(section.tiles) for section in sections))
    total = sum(
        TITLE_HEIGHT + count * (TILE + PAUSE + height + GAP) for count, height in zip(rows, heights, strict=True)
    )
    sheet = Image.new("RGB", (GAP + columns * (TILE + GAP), total), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = 0
    for section, section_texts, height in zip(sections, texts, heights, strict=True):
        draw.text((GAP, top + TITLE_HEIGHT // 2), section.title, INK, font(TITLE_SIZE, bold=True), anchor="lm")
        top += TITLE_HEIGHT
        for number, (tile, text) in enumerate(zip(section.tiles, section_texts, strict=True)):
            row, column = divmod(number, COLUMNS)
            corner = (GAP + column * (TILE + GAP), top + row * (TILE + PAUSE + height + GAP))
            _draw_image(sheet, draw, tile.image, corner)
            _draw_text(draw, text, (corner[0], corner[1] + TILE + PAUSE))
        top += -(-len(section.tiles) // COLUMNS) * (TILE + PAUSE + height + GAP)
    with replaced_file(path) as temporary:
        sheet.save(temporary, "PNG")


# Lines of one tile: paragraphs of (line, color).
_Paragraphs = list[list[tuple[str, str]]]


def _tile_text(tile: Tile) -> _Paragraphs:
    """The captions that fit, and the tile's name."""
    paragraphs: _Paragraphs = []
    left = MOST_LINES
    for number, caption in enumerate(tile.captions):
        lines = wrap(caption, font(TEXT_SIZE), TILE)
        # The line "... more" needs room as well.
        room = left - (number + 1 < len(tile.captions))
        if len(lines) > room and number > 0:
            paragraphs.append([(f"+ {len(tile.captions) - number} more", FAINT)])
            break
        if len(lines) > room:
            lines = [*lines[: room - 1], shortened(lines[room - 1], font(TEXT_SIZE), TILE, cut=True)]
        paragraphs.append([(line, INK) for line in lines])
        left -= len(lines)
    if tile.name:
        paragraphs.append([(shortened(tile.name, font(TEXT_SIZE), TILE), FAINT)])
    return paragraphs


def _text_height(paragraphs: _Paragraphs) -> int:
    return sum(LINE * len(lines) for lines in paragraphs) + PAUSE * max(0, len(paragraphs) - 1)


def _draw_image(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, image: Image.Image | None, corner: tuple[int, int]
) -> None:
    left, top = corner
    draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), fill=MOUNT)
    if image is None:
        draw.text((left + TILE // 2, top + TILE // 2), "no image", FAINT, font(TEXT_SIZE), anchor="mm")
        return
    ratio = TILE / max(image.size)
    size = [max(1, round(side * ratio)) for side in image.size]
    shown = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    sheet.paste(shown, (left + (TILE - size[0]) // 2, top + (TILE - size[1]) // 2))


def _draw_text(draw: ImageDraw.ImageDraw, paragraphs: _Paragraphs, corner: tuple[int, int]) -> None:
    left, top = corner
    for lines in paragraphs:
        for line, color in lines:
            draw.text((left, top + LINE // 2), line, color, font(TEXT_SIZE), anchor="lm")
            top += LINE
        top += PAUSE
