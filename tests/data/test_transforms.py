"""Crops: their boxes, their scales, and the very pixels."""

import io
import math
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from emkum.data.decoding import decode
from emkum.data.transforms import ImageTransform, center_box, crop_rows, random_box, stack_crops, to_tensor

WIDTH, HEIGHT = 96, 64


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """One thread, and any warning is an error."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def gradient(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Red grows by 2 a column, green by 3 a row: a pixel tells where it came from."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = 2 * np.arange(width)
    pixels[..., 1] = 3 * np.arange(height)[:, None]
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# Crops
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "box"),
    [((96, 64), (16, 0, 80, 64)), ((64, 96), (0, 16, 64, 80)), ((50, 50), (0, 0, 50, 50)), ((7, 4), (1.5, 0, 5.5, 4))],
)
def test_center_box(size: tuple[int, int], box: tuple[float, ...]) -> None:
    assert center_box(*size) == box


def test_random_boxes_keep_their_limits() -> None:
    rng = np.random.default_rng(0)
    areas, aspects = [], []
    for _ in range(500):
        left, top, right, bottom = random_box(120, 80, 0.25, rng)
        assert 0 <= left < right <= 120 and 0 <= top < bottom <= 80
        areas.append((right - left) * (bottom - top) / (120 * 80))
        aspects.append((right - left) / (bottom - top))
    assert 0.24 < min(areas) < 0.3 and max(areas) > 0.85
    assert 0.74 < min(aspects) < 0.8 and 1.25 < max(aspects) < 1.35


def test_random_boxes_keep_the_upper_limit() -> None:
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(500):
        left, top, right, bottom = random_box(400, 300, 0.05, rng, max_scale=0.25)
        areas.append((right - left) * (bottom - top) / (400 * 300))
    assert 0.048 < min(areas) < 0.06 and 0.24 < max(areas) < 0.252
    assert abs(np.mean(areas) - 0.15) < 0.01


def test_a_box_that_cannot_be_drawn_is_the_centered_one() -> None:
    assert random_box(1000, 10, 0.9, np.random.default_rng(0)) == center_box(1000, 10)


def test_scales_in_the_wrong_order() -> None:
    for scales in ({"min_scale": 0.5, "max_scale": 0.4}, {"max_scale": 0.9}):
        with pytest.raises(ValueError, match="max_scale .* is below min_scale"):
            ImageTransform(16, **scales)


def test_crops_are_bit_for_bit_what_they_always_were() -> None:
    """Written out once more: figures that were measured rest on these crops."""
    data = encoded(gradient(), "JPEG")
    for seed in range(20):
        rng = np.random.default_rng(seed)
        for _ in range(10):
            of_area, of_aspect, of_left, of_top = rng.random(4)
            area = WIDTH * HEIGHT * (0.3 + 0.7 * of_area)
            aspect = math.exp(math.log(3 / 4) + of_aspect * (math.log(4 / 3) - math.log(3 / 4)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w <= WIDTH and h <= HEIGHT:
                left, top = math.floor(of_left * (WIDTH - w + 1)), math.floor(of_top * (HEIGHT - h + 1))
                break
        image = Image.open(io.BytesIO(data)).convert("RGB")
        image = image.resize((16, 16), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        crop = ImageTransform(16, 0.3, True)(data, np.random.default_rng(seed))
        assert np.array_equal(crop.permute(1, 2, 0).numpy(), np.array(image))
        assert crop.dtype == torch.uint8


def test_views_show_one_crop_at_several_sizes() -> None:
    data, transform = encoded(gradient()), ImageTransform(16, 0.3, True, 0.6)
    views = transform.views(data, (16, 24, 16), np.random.default_rng(5))
    assert [tuple(view.shape) for view in views] == [(3, 16, 16), (3, 24, 24), (3, 16, 16)]
    assert torch.equal(views[0], views[2])
    assert torch.equal(views[0], transform(data, np.random.default_rng(5)))
    pictures = transform.crop(decode(data), (16, 24), np.random.default_rng(5))
    assert all(torch.equal(to_tensor(picture), view) for picture, view in zip(pictures, views, strict=False))


def test_flip_mirrors_half_of_the_crops() -> None:
    data = encoded(gradient())
    straight = ImageTransform(16)(data)
    transform = ImageTransform(16, flip=True)
    crops = [transform(data, np.random.default_rng(seed)) for seed in range(100)]
    mirrored = [torch.equal(crop, straight.flip(-1)) for crop in crops]
    assert all(flipped or torch.equal(crop, straight) for crop, flipped in zip(crops, mirrored, strict=True))
    assert 35 < sum(mirrored) < 65


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("CMYK", "JPEG")])
def test_every_image_mode_becomes_rgb(mode: str, kind: str) -> None:
    crop = ImageTransform(8)(encoded(Image.new(mode, (20, 10), 0 if mode == "P" else None), kind))
    assert crop.shape == (3, 8, 8) and crop.dtype == torch.uint8


def test_crops_in_rows_are_stacked_without_a_copy() -> None:
    data = encoded(gradient(), "JPEG")
    transform = ImageTransform(16, 0.3)
    rows = crop_rows(3, 16)
    crops = [transform.views(data, (16,), np.random.default_rng(i), row)[0] for i, row in enumerate(rows)]
    batch = stack_crops(crops)
    assert batch.shape == (3, 3, 16, 16) and batch.data_ptr() == rows[0].tensor.data_ptr()
    for i, crop in enumerate(crops):
        assert torch.equal(crop, transform(data, np.random.default_rng(i))) and torch.equal(batch[i], crop)


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 1], [0, 0, 1]])
def test_crops_that_are_not_the_rows_in_order_are_copied(order: list[int]) -> None:
    data = encoded(gradient(), "JPEG")
    rows = crop_rows(3, 16)
    views = [ImageTransform(16, 0.3).views(data, (16,), np.random.default_rng(i), row) for i, row in enumerate(rows)]
    crops = [views[i][0] for i in order]
    batch = stack_crops(crops)
    assert batch.data_ptr() != rows[0].tensor.data_ptr()
    for got, crop in zip(batch, crops, strict=True):
        assert torch.equal(got, crop)


def test_single_crops_are_stacked() -> None:
    crops = [torch.full((3, 4, 4), i, dtype=torch.uint8) for i in range(2)]
    assert stack_crops(crops)[:, 1, 2, 3].tolist() == [0, 1]
