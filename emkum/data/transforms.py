"""From encoded image to uint8 crop. Normalization is left to the models: student and teacher differ in theirs, so
crops travel as uint8."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from emkum.data.decoding import decode
from emkum.data.worker_memory import empty_bytes


@dataclass
class CropConfig:
    min_scale: float = field(
        default=0.9, metadata={"help": "smallest part of an image's area that a random training crop keeps; 1 = center"}
    )
    flip: bool = field(default=False, metadata={"help": "mirror half of the training crops"})
    views: int = field(
        default=0,
        metadata={"help": "training crops repeat after this many epochs, for cached teacher targets; 0 = never"},
    )


def center_box(width: int, height: int) -> tuple[float, float, float, float]:
    """The largest centered square (left, top, right, bottom), in pixels."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(
    width: int,
    height: int,
    min_scale: float,
    rng: np.random.Generator,
    max_aspect: float = 4 / 3,
    max_scale: float = 1.0,
) -> tuple[float, float, float, float]:
    """A random crop (left, top, right, bottom) in pixels: area in [min_scale, max_scale] of the image, aspect ratio
    log-uniform (Inception crop, Szegedy et al. 2015). The centered square where ten tries do not fit."""
    for _ in range(10):
        # One call for all four: each costs a microsecond or more, whatever it draws.
        scale, aspect, left, top = rng.random(4).tolist()
        area = width * height * (min_scale + (max_scale - min_scale) * scale)
        aspect = max_aspect ** (2 * aspect - 1)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(left * (width - w + 1)), int(top * (height - h + 1))
            return float(left), float(top), float(left + w), float(top + h)
    return center_box(width, height)


class CropRow(NamedTuple):
    """Where a crop of a batch is to be written.

    Attributes:
        tensor: (3, S, S) uint8, the channels last in memory.
        array: (S, S, 3) uint8, the same memory.
    """

    tensor: Tensor
    array: np.ndarray


def crop_rows(count: int, size: int) -> list[CropRow]:
    """Places for the `count` crops of a batch, `size` pixels wide, that need no copy on their way."""
    memory = empty_bytes(count * size * size * 3)
    # Not a view: what is made of it is to have it as its base.
    shape, strides = (count, size, size, 3), (size * size * 3, size * 3, 3, 1)
    rows = torch.empty(0, dtype=torch.uint8).set_(memory.untyped_storage(), memory.storage_offset(), shape, strides)
    return list(map(CropRow, rows.permute(0, 3, 1, 2).unbind(), rows.numpy()))


def to_tensor(image: Image.Image, row: CropRow | None = None) -> Tensor:
    """(3, H, W) uint8, with the channels last in memory as the image has them: whoever needs another order makes it on
    the device, in the pass that makes floating point of it. Written into `row` where there is one."""
    if row is None:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    row.array[...] = np.asarray(image)
    return row.tensor


def stack_crops(crops: list[Tensor]) -> Tensor:
    """(3, S, S) uint8 crops to (B, 3, S, S); without a copy where they are the rows of one `crop_rows`, in order."""
    rows = crops[0]._base
    step = crops[0].numel()
    if (
        rows is not None
        and rows.ndim == 4
        and rows.shape == (len(crops), *crops[0].shape[1:], 3)
        and all(crop.data_ptr() == rows.data_ptr() + i * step for i, crop in enumerate(crops))
    ):
        return rows.permute(0, 3, 1, 2)
    return default_collate([crop.permute(1, 2, 0) for crop in crops]).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ImageTransform:
    """Crop, flip and resize to a square.

    Attributes:
        size: side of the result in pixels.
        min_scale: smallest part of the image's area that a random crop keeps; 1 and no flip means the centered square.
        flip: mirror half of the images.
        max_scale: largest part of the image's area that a random crop keeps.

    Raises:
        ValueError: max_scale is below min_scale.
    """

    size: int
    min_scale: float = 1.0
    flip: bool = False
    max_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.max_scale < min(self.min_scale, 1.0):
            raise ValueError(f"max_scale {self.max_scale} is below min_scale {self.min_scale}")

    @property
    def random(self) -> bool:
        return self.min_scale < 1.0 or self.flip

    def __call__(self, data: bytes, rng: np.random.Generator | None = None) -> Tensor:
        """(3, size, size) uint8 of an encoded image; `rng` is needed where the transform is random."""
        return self.views(data, (self.size,), rng)[0]

    def views(
        self,
        data: bytes,
        sizes: tuple[int, ...],
        rng: np.random.Generator | None = None,
        row: CropRow | None = None,
    ) -> list[Tensor]:
        """The same crop and flip at several sizes, (3, s, s) uint8 each; the first in `row` where there is one."""
        first, *others = self.crop(decode(data), sizes, rng)
        return [to_tensor(first, row), *map(to_tensor, others)]

    def crop(
        self, image: Image.Image, sizes: tuple[int, ...], rng: np.random.Generator | None = None
    ) -> list[Image.Image]:
        """The same crop and flip of a decoded image at several sizes, s x s pixels each."""
        if self.min_scale < 1.0:
            box = random_box(*image.size, self.min_scale, rng, max_scale=self.max_scale)
        else:
            box = center_box(*image.size)
        mirrored = self.flip and rng.random() < 0.5
        views = [image.resize((size, size), Image.Resampling.BICUBIC, box=box) for size in sizes]
        if mirrored:
            views = [view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for view in views]
        return views
