"""The font of all pictures, and text that fits: DejaVu Sans, which Matplotlib brings."""

import re
import unicodedata
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

# No text fills more lines than this many characters do.
_LONGEST_TEXT = 600
_BOX = "\u25a1"
ELLIPSIS = "\u2026"


@lru_cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans at `size` pixels: it has more scripts than the font in Pillow."""
    return ImageFont.truetype(str(_file(bold)), size)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Lines of at most `width` pixels, broken between words, or within one that is wider than a line."""
    lines = [""]
    for word in text[:_LONGEST_TEXT].split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        while font.getlength(word) > width and len(word) > 1:
            end = len(word) - 1
            while end > 1 and font.getlength(word[:end]) > width:
                end -= 1
            lines[-1:] = [word[:end], ""]
            word = word[end:]
        lines[-1] = word
    return lines


def shortened(line: str, font: ImageFont.FreeTypeFont, width: float, cut: bool = False) -> str:
    """The line, with an ellipsis where it is cut already or is wider than `width` pixels."""
    if not cut and font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}{ELLIPSIS}") > width:
        line = line[:-1]
    return f"{line.rstrip()}{ELLIPSIS}"


def printable(text: str) -> str:
    """The text on one line, composed, with a box for each character that the font lacks.

    Punctuation that a tokenizer set apart is put back. Matplotlib would warn of each such character.
    """
    text = re.sub(r" ([.,;:!?])(?!\S)", r"\1", " ".join(unicodedata.normalize("NFC", text).split()))
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter if ord(letter) in _letters() and letter.isprintable() else _BOX for letter in text)


@lru_cache
def _letters() -> frozenset[int]:
    """Characters that both the plain and the bold font have."""
    from matplotlib.ft2font import FT2Font

    plain, bold = (frozenset(FT2Font(str(_file(weight))).get_charmap()) for weight in (False, True))
    return plain & bold


def _file(bold: bool) -> Path:
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
