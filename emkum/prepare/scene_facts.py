"""What a rendered scene shows: one to three colored shapes on a background, drawn at random without ambiguity.

Objects sit near the cells of a 3 x 3 grid, so that "left of" or "in the top left" is never a matter of a pixel; a color
is used on those backgrounds alone from which it stands out.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart")
COLORS = {
    "red": (222, 36, 36),
    "green": (44, 165, 62),
    "blue": (36, 84, 226),
    "yellow": (248, 220, 36),
    "orange": (246, 134, 22),
    "purple": (138, 46, 184),
    "pink": (250, 142, 196),
    "brown": (122, 70, 30),
    "black": (12, 12, 12),
    "white": (252, 252, 252),
}
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "checkered", "gradient")
BACKGROUND_COLORS = {
    "gray": (128, 128, 128),
    "beige": (216, 198, 156),
    "navy": (26, 34, 92),
    "teal": (18, 112, 116),
    "lavender": (184, 172, 224),
    "maroon": (104, 18, 48),
}
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MAX_OBJECTS = 3

# Lengths in units of the image's side.
_CELL_CENTERS = (0.22, 0.5, 0.78)
_RADII = {"small": (0.095, 0.115), "large": (0.17, 0.195)}
_JITTER = 0.03
_GAP = 0.02
_MAX_TILT_DEGREES = 12.0
# The backgrounds' second tone is their color darkened or lightened by up to this fraction; see `tones`.
_DARKER, _LIGHTER = 0.82, 0.22
_MIN_COLOR_DISTANCE = 92.0


@dataclass(frozen=True)
class SceneObject:
    """One shape.

    Attributes:
        shape, color, size: names.
        row, column: cell of the 3 x 3 grid, from the top left.
        x, y, radius: center and half extent in units of the image's side; y points down.
        tilt: degrees.
    """

    shape: str
    color: str
    size: str
    row: int
    column: int
    x: float
    y: float
    radius: float
    tilt: float

    @property
    def position(self) -> str:
        """Name of the cell."""
        return POSITIONS[3 * self.row + self.column]

    @property
    def facts(self) -> tuple[str, str, str, str]:
        return self.shape, self.color, self.size, self.position


@dataclass(frozen=True)
class Scene:
    """Objects in reading order (rows from the top, then columns from the left) on a background."""

    objects: tuple[SceneObject, ...]
    texture: str
    background: str

    @property
    def main_object(self) -> SceneObject:
        """The largest object; among equals the first in reading order."""
        return min(self.objects, key=lambda item: -SIZES.index(item.size))

    def content(self) -> bytes:
        """16-byte digest of all that captions can tell: equal scenes in words have equal contents."""
        facts = (sorted(item.facts for item in self.objects), self.texture, self.background)
        return hashlib.blake2b(repr(facts).encode(), digest_size=16).digest()


def tones(background: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Darker and lighter RGB tone (0..255) of a background color."""
    base = BACKGROUND_COLORS[background]
    red, green, blue = (value + (255 - value) * _LIGHTER for value in base)
    return tuple(value * _DARKER for value in base), (red, green, blue)


def visible_colors(background: str) -> tuple[str, ...]:
    """Object colors that stand out from a background in each of its tones."""
    grounds = (BACKGROUND_COLORS[background], *tones(background))

    def distance(a: Sequence[float], b: Sequence[float]) -> float:
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5

    return tuple(
        name for name, rgb in COLORS.items() if min(distance(rgb, ground) for ground in grounds) >= _MIN_COLOR_DISTANCE
    )


def holds(relation: str, a: Sequence[SceneObject], b: Sequence[SceneObject]) -> bool:
    """Whether each object of `a` is left of, right of, above or below each one of `b`, by grid cells."""
    if relation in ("right of", "below"):
        return holds(OPPOSITE[relation], b, a)
    axis = "column" if relation == "left of" else "row"
    return max(getattr(item, axis) for item in a) < min(getattr(item, axis) for item in b)


def draw_scene(rng: random.Random, count: int) -> Scene:
    """Draw a scene of `count` objects.

    Each attribute alone is uniform: count and sizes are never drawn again because objects do not fit, only their cells
    are. False statements are drawn from the same distributions, so that language alone tells nothing of their truth.
    """
    texture = rng.choice(TEXTURES)
    background = rng.choice(tuple(BACKGROUND_COLORS))
    colors = visible_colors(background)
    kinds = [(rng.choice(SHAPES), rng.choice(colors))]
    sizes = [rng.choice(SIZES)]
    while len(kinds) < count:
        if rng.random() < 0.25:
            kinds.append(kinds[-1])
            sizes.append(sizes[-1] if rng.random() < 0.8 else rng.choice(SIZES))
        else:
            kinds.append((rng.choice(SHAPES), rng.choice(colors)))
            sizes.append(rng.choice(SIZES))
    places = _draw_places(rng, sizes)
    objects = [
        SceneObject(shape, color, size, *place, tilt=rng.uniform(-_MAX_TILT_DEGREES, _MAX_TILT_DEGREES))
        for (shape, color), size, place in zip(kinds, sizes, places, strict=True)
    ]
    return Scene(tuple(sorted(objects, key=lambda item: (item.row, item.column))), texture, background)


def _draw_places(rng: random.Random, sizes: Sequence[str]) -> list[tuple[int, int, float, float, float]]:
    """Row, column, x, y and radius of each object such that no two come nearer than the gap."""
    while True:
        places = []
        for size, cell in zip(sizes, rng.sample(range(9), len(sizes)), strict=True):
            row, column = divmod(cell, 3)
            radius = rng.uniform(*_RADII[size])
            x, y = (_CELL_CENTERS[cell] + rng.uniform(-_JITTER, _JITTER) for cell in (column, row))
            x, y = (min(max(value, radius + 0.01), 0.99 - radius) for value in (x, y))
            places.append((row, column, x, y, radius))
        pairs = ((a, b) for position, a in enumerate(places) for b in places[:position])
        if all(max(abs(a[2] - b[2]), abs(a[3] - b[3])) >= a[4] + b[4] + _GAP for a, b in pairs):
            return places
