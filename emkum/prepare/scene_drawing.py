"""Scenes to pixels."""

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from emkum.prepare.scene_facts import BACKGROUND_COLORS, COLORS, Scene, SceneObject, tones

# Masks are drawn this much larger and averaged down.
_SUPERSAMPLING = 4
_COLOR_JITTER = 12
_NOISE_STD = 4.0
_JPEG_QUALITY = 95

Points = list[tuple[float, float]]


def _star() -> Points:
    radii = (1.0, 0.45)
    angles = [math.pi * (index / 5 - 0.5) for index in range(10)]
    return [(radii[i % 2] * math.cos(angle), radii[i % 2] * math.sin(angle)) for i, angle in enumerate(angles)]


def _heart() -> Points:
    angles = [2 * math.pi * index / 48 for index in range(48)]
    x = [0.92 * math.sin(t) ** 3 for t in angles]
    y = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in angles]
    return [(a, -(b + 2.5) / 15.5) for a, b in zip(x, y, strict=True)]


def _round(radius: float) -> Points:
    angles = [2 * math.pi * index / 64 for index in range(64)]
    return [(radius * math.cos(t), radius * math.sin(t)) for t in angles]


def _cross() -> Points:
    arm, end = 0.32, 0.95
    corner = [(arm, end), (arm, arm), (end, arm)]
    quarters = []
    for _ in range(4):
        quarters += corner
        corner = [(y, -x) for x, y in corner]
    return quarters


# Outlines in units of the radius, y down; tilted by up to 12 degrees they stay within the square of side 2.
_OUTLINES: dict[str, Callable[[], Points]] = {
    "circle": lambda: _round(0.96),
    "ring": lambda: _round(0.96),
    "square": lambda: [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": lambda: [(0.0, -0.95), (0.86, 0.65), (-0.86, 0.65)],
    "star": _star,
    "diamond": lambda: [(0.0, -0.98), (0.66, 0.0), (0.0, 0.98), (-0.66, 0.0)],
    "cross": _cross,
    "heart": _heart,
}
_RING_HOLE = 0.52


def draw_mask(item: SceneObject, size: int) -> np.ndarray:
    """(size, size) uint8 coverage of an object, 0 to 255."""
    side = size * _SUPERSAMPLING
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    cosine, sine = math.cos(math.radians(item.tilt)), math.sin(math.radians(item.tilt))

    def place(points: Points) -> Points:
        scale = item.radius * side
        # Polygon corners name pixel centers.
        left, top = item.x * side - 0.5, item.y * side - 0.5
        return [(left + scale * (cosine * x - sine * y), top + scale * (sine * x + cosine * y)) for x, y in points]

    draw.polygon(place(_OUTLINES[item.shape]()), fill=255)
    if item.shape == "ring":
        draw.polygon(place(_round(_RING_HOLE)), fill=0)
    return np.asarray(mask.reduce(_SUPERSAMPLING))


def draw_background(texture: str, color: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size, 3) float64 RGB, 0 to 255; direction and spacing of a texture are drawn at random."""
    dark, light = (np.array(tone) for tone in tones(color))
    # Coordinates in units of the image's side, at pixel centers.
    y, x = (np.indices((size, size)) + 0.5) / size
    if texture == "plain":
        return np.broadcast_to(np.array(BACKGROUND_COLORS[color], dtype=np.float64), (size, size, 3)).copy()
    if texture == "gradient":
        weight = (x, 1 - x, y, 1 - y)[rng.integers(4)]
    elif texture == "striped":
        along = (x, y, (x + y) / math.sqrt(2), (x - y) / math.sqrt(2) + 1)[rng.integers(4)]
        weight = _bands(along, rng.uniform(7, 9), size)
    else:
        frequency = rng.uniform(6, 8)
        a, b = (_bands(axis, frequency, size) for axis in (x, y))
        weight = a * (1 - b) + b * (1 - a)
    return dark + weight[..., None] * (light - dark)


def _bands(along: np.ndarray, number: float, size: int) -> np.ndarray:
    """Alternate 0 and 1, `number` bands over a unit length, with edges one pixel wide."""
    phase = along * number % 2.0
    distance = np.where(phase < 1, np.minimum(phase, 1 - phase), -np.minimum(phase - 1, 2 - phase))
    return np.clip(0.5 + distance * size / number, 0, 1)


def render(scene: Scene, size: int, rng: np.random.Generator) -> tuple[bytes, list[list[int]]]:
    """Draw a scene.

    Args:
        scene: what to draw.
        size: side in pixels.
        rng: of texture, color jitter and noise.

    Returns:
        The JPEG file, and for each object the tight box [x0, y0, x1, y1] in pixels, x1 and y1 exclusive.
    """
    image = draw_background(scene.texture, scene.background, size, rng)
    boxes = []
    for item in scene.objects:
        mask = draw_mask(item, size)
        color = np.array(COLORS[item.color]) + rng.uniform(-_COLOR_JITTER, _COLOR_JITTER, 3)
        image += (mask[..., None] / 255.0) * (color - image)
        rows, columns = np.flatnonzero(mask.max(axis=1) >= 128), np.flatnonzero(mask.max(axis=0) >= 128)
        boxes.append([int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1])
    image += rng.normal(0.0, _NOISE_STD, image.shape)
    file = io.BytesIO()
    pixels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    # Full color resolution: the usual halving would smear small shapes.
    Image.fromarray(pixels).save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return file.getvalue(), boxes
