"""A small set with classes: noisy squares, each class of its own color."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 7
SPLITS = {"train": 6, "valid": 2, "test": 2}


def write_class_folders(folder: Path, splits: Mapping[str, int] = SPLITS, classes: int = CLASSES) -> Path:
    """Write SPLIT/CLASS/NUMBER.png, so many a class as `splits` says, 24 pixels wide; gives the folder back."""
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (classes, 3))
    for split, count in splits.items():
        for label, color in enumerate(colors):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = (color + rng.normal(0, 40, (24, 24, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return folder
