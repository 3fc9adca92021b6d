"""What all figures of a student and a split share."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emkum.errors import UserError
from emkum.provenance import write_json

if TYPE_CHECKING:
    from PIL import Image

    from emkum.data.shards import ShardedSamples


def add_student_arguments(parser: argparse.ArgumentParser, examples: int, of_what: str) -> None:
    """Add a student, a split, the picture's file, and how many examples are drawn by which seed."""
    parser.add_argument("--checkpoint", required=True, help="checkpoint file, or a run's folder for its best one")
    parser.add_argument("--data", required=True, help="folder made by `emkum prepare`")
    parser.add_argument("--split", default="test", help="split that is shown (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="picture to write, NAME or NAME.png")
    parser.add_argument("--examples", type=int, default=examples, metavar="N", help=f"{of_what} (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="that draws them (default: %(default)s)")


def open_samples(data: str, split: str, require_captions: bool = True) -> "ShardedSamples":
    """A split with images, and with captions where these are required.

    Raises:
        UserError: there is no such split, or nothing in it.
    """
    from emkum.data.shards import open_split

    samples = open_split(data, split, require_captions=require_captions)
    if len(samples) == 0:
        raise UserError(f"split {split} of {data} has no images")
    return samples


def report_files(files: Sequence[Path], facts: Mapping[str, Any]) -> None:
    """Write what a picture shows beside it, and print its name."""
    write_json(files[0].with_suffix(".json"), facts)
    print("pictures:", *(str(file) for file in files))


def draw_samples(
    samples: "ShardedSamples", count: int, seed: int, keys: str = "", fits: Callable[[int], bool] = lambda row: True
) -> list[int]:
    """Rows of samples: those of some keys, in their order, or else drawn by a seed, ascending.

    Args:
        samples: the split.
        count: how many are drawn; all where there are no more.
        seed: of the draw.
        keys: separated by commas; empty = draw.
        fits: whether a row may be drawn; asked until there are enough.

    Raises:
        UserError: a key is not in the split.
    """
    import numpy as np

    if keys:
        rows = {samples[row].key: row for row in range(len(samples))}
        wanted = [key.strip() for key in keys.split(",") if key.strip()]
        if missing := [key for key in wanted if key not in rows]:
            raise UserError(f"--keys: {samples.directory} has no image {missing[0]}, but such as {next(iter(rows))}")
        return [rows[key] for key in wanted]
    chosen: list[int] = []
    for row in np.random.default_rng(seed).permutation(len(samples)).tolist():
        if len(chosen) == count:
            break
        if fits(row):
            chosen.append(row)
    return sorted(chosen)


def centered_square(image: "Image.Image") -> "Image.Image":
    """What of an image a student sees when it is evaluated, with all its pixels."""
    from emkum.data.transforms import center_box

    return image.crop([round(side) for side in center_box(*image.size)])
