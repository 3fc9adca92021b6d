"""Encoded images of every kind, sound and damaged."""

import io
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, ImageSequence

from emkum.data.decoding import BadImage, decode, probe, shrink, to_rgb

WIDTH, HEIGHT = 96, 64
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}


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


def plain(data: bytes) -> np.ndarray:
    """What Pillow alone makes of a file."""
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces its size and has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# ----------------------------------------------------------------------------------------------------------------------
# Decoding
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 30}, {"comment": b"x"}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_decodes_as_pillow_does_it(mode: str, options: dict[str, object]) -> None:
    data = encoded(gradient().convert(mode), "JPEG", **options)
    image = decode(data)
    assert image.mode == "RGB" and image.info == {}
    assert np.array_equal(np.array(image), plain(data))


@pytest.mark.parametrize("archive", ["coco_mini/images.zip", "imagenet_sample/images.zip"])
def test_real_photos_decode_as_pillow_does_it(shared_data: Path, archive: str) -> None:
    with zipfile.ZipFile(shared_data / archive) as images:
        names = [name for name in images.namelist() if name.lower().endswith((".jpg", ".jpeg"))][:150]
        assert len(names) == 150
        for name in names:
            data = images.read(name)
            expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
            info = probe(data)
            assert info.suffix == "jpg" and info.image.tobytes() == expected.tobytes(), name


def test_cmyk_colors_are_close_to_the_printed_ones() -> None:
    colors = {(0, 0, 0, 0): (255, 255, 255), (0, 255, 255, 0): (255, 0, 0), (128, 0, 0, 51): (102, 204, 204)}
    for cmyk, rgb in colors.items():
        image = decode(encoded(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=95))
        assert np.abs(np.array(image).astype(int) - rgb).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100})])
def test_exif_orientation_is_applied(orientation: int, kind: str, options: dict[str, object]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(gradient(), kind, exif=exif, **options)
    stored = plain(data)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(stored, 1),
    }
    info = probe(data)
    assert np.array_equal(np.array(info.image), upright[orientation])
    assert (info.width, info.height) == ((WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH))
    assert info.image.info == {} and 0x0112 not in info.image.getexif(), "nobody should turn it once more"


@pytest.mark.parametrize("orientation", [0, 9, 700])
def test_an_orientation_that_is_none_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.array(decode(encoded(gradient(), exif=exif))), np.array(gradient()))


@pytest.mark.parametrize(
    "exif", [b"", b"MM\0*", b"MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03", b"II*\0\xff\xff\xff\xff", b"garbage"]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_costs_nothing(kind: str, exif: bytes) -> None:
    data = encoded(gradient(), kind, exif=b"Exif\0\0" + exif)
    assert np.array_equal(np.array(decode(data)), np.array(decode(encoded(gradient(), kind))))


def test_transparent_parts_are_white() -> None:
    alpha = np.tile(np.linspace(0, 255, WIDTH).round().astype(np.uint8), (HEIGHT, 1))
    image = gradient()
    image.putalpha(Image.fromarray(alpha))
    over_white = np.array(gradient()) * (alpha / 255)[..., None] + 255 * (1 - alpha / 255)[..., None]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        assert np.abs(np.array(decode(encoded(image, kind, **options))) - over_white).max() <= 1


@pytest.mark.parametrize("mode", ["LA", "PA"])
def test_gray_and_palette_with_alpha(mode: str) -> None:
    image = Image.new("LA", (20, 10), (40, 255))
    image.paste((40, 0), (0, 0, 10, 10))
    pixels = np.array(to_rgb(image.convert("RGBA").convert("P").convert("PA") if mode == "PA" else image))
    if mode == "LA":
        assert np.array_equal(np.array(decode(encoded(image))), pixels)
        assert (pixels[:, :10] == 255).all()
    assert (pixels[:, 10:] == 40).all()


def test_palette_with_transparency() -> None:
    image = Image.new("P", (20, 10), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(0, (0, 0, 10, 10))
    for kind, transparency in (("PNG", b"\x00\xff"), ("PNG", 0), ("GIF", 0)):
        pixels = np.array(decode(encoded(image, kind, transparency=transparency)))
        assert (pixels[:, :10] == 255).all() and (pixels[:, 10:] == (200, 100, 50)).all()
    pixels = np.array(decode(encoded(image, "PNG", transparency=b"\x80\xff")))
    assert np.abs(pixels[0, 0].astype(int) - (132, 137, 142)).max() <= 1
    assert (np.array(decode(encoded(image)))[:, :10] == (10, 20, 30)).all()


def test_a_color_that_stands_for_transparency() -> None:
    image = Image.new("RGB", (20, 10), (1, 2, 3))
    image.paste((9, 8, 7), (10, 0, 20, 10))
    pixels = np.array(decode(encoded(image, transparency=(1, 2, 3))))
    assert (pixels[:, :10] == 255).all() and (pixels[:, 10:] == (9, 8, 7)).all()


def test_sixteen_bit_gray_is_scaled() -> None:
    values = np.linspace(0, 65535, 30 * 20).astype(np.uint16).reshape(20, 30)
    data = encoded(Image.fromarray(values))
    assert Image.open(io.BytesIO(data)).mode.startswith("I;16")
    pixels = np.array(decode(data))
    assert np.abs(pixels - (values / 257)[..., None]).max() <= 1
    assert (pixels[0, 0] == 0).all() and (pixels[-1, -1] == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_gray_and_palette_become_rgb(mode: str) -> None:
    data = encoded(gradient().convert(mode))
    assert np.array_equal(np.array(decode(data)), plain(data))


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "blue", "lime")]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(data))))) == 3
        assert (np.array(decode(data)) == (255, 0, 0)).all()


# ----------------------------------------------------------------------------------------------------------------------
# What is refused
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_format_is_told_by_content(suffix: str) -> None:
    data = encoded(gradient(), FORMATS[suffix])
    info = probe(data)
    assert (info.suffix, info.width, info.height) == (suffix, WIDTH, HEIGHT)
    assert info.image.tobytes() == decode(data).tobytes()


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "PDF", "EPS"])
def test_other_formats_are_named(kind: str) -> None:
    if kind == "PDF":
        data, message = b"%PDF-1.4 of a kind", "no image, or damaged at its start"
    else:
        data, message = encoded(gradient(), kind), f"format {kind} is not supported: want jpg, png, webp, gif, bmp"
    for function in (decode, probe):
        with pytest.raises(BadImage, match=message):
            function(data)


@pytest.mark.parametrize(
    "data", [b"two dogs\n", b"\xff\xd8\xff", b"\xff\xd8\xff\xda", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM"]
)
def test_text_and_bare_signatures(data: bytes) -> None:
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert str(caught.value) and "\n" not in str(caught.value) and "0x" not in str(caught.value)


def test_an_empty_file() -> None:
    with pytest.raises(BadImage, match="^empty file$"):
        decode(b"")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_truncated_file(suffix: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8))
    for part in (0.02, 0.5, 0.9):
        data = encoded(noise, FORMATS[suffix])
        with pytest.raises(BadImage):
            decode(data[: int(part * len(data))])


def test_a_truncated_jpeg_says_so() -> None:
    data = encoded(gradient(), "JPEG")
    for cut in (data[:-100], encoded(gradient(), "JPEG", exif=Image.Exif().tobytes())[:-100]):
        with pytest.raises(BadImage, match="truncated"):
            decode(cut)


@pytest.mark.parametrize("suffix", FORMATS)
def test_damage_gives_an_image_or_one_exception(suffix: str) -> None:
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    image = gradient(24, 16)
    image.putalpha(200) if suffix in ("png", "webp") else None
    data = encoded(image, FORMATS[suffix], **({} if suffix in ("gif", "bmp") else {"exif": exif}))
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for position in rng.integers(len(data), size=rng.integers(1, 6)):
            damaged[position] = rng.integers(256)
        try:
            assert decode(bytes(damaged)).mode == "RGB"
        except BadImage as error:
            assert str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 0


def test_a_side_that_is_too_small() -> None:
    with pytest.raises(BadImage, match="^1 x 1 pixels: want a side of at least 8$"):
        probe(encoded(Image.new("RGB", (1, 1))))
    with pytest.raises(BadImage, match="^7 x 50 pixels"):
        probe(encoded(Image.new("RGB", (7, 50)), "JPEG"))
    assert probe(encoded(Image.new("RGB", (8, 50)))).width == 8
    assert probe(encoded(Image.new("RGB", (1, 1))), min_side=1).height == 1
    assert decode(encoded(Image.new("RGB", (1, 1)))).size == (1, 1)


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_limit_on_pixels_is_a_limit(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(gradient(), FORMATS[suffix])
    for limit in (WIDTH * HEIGHT, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert decode(data).size == (WIDTH, HEIGHT)
    for limit in (WIDTH * HEIGHT - 1, WIDTH * HEIGHT // 2 + 1, WIDTH * HEIGHT // 2 - 1, 1):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(BadImage, match=f"^more than {limit} pixels: refused as a decompression bomb$"):
            decode(data)


@pytest.mark.parametrize("side", [9460, 14000, 60000, 2**31 - 1])
def test_a_decompression_bomb(side: int) -> None:
    with pytest.raises(BadImage, match="decompression bomb"):
        probe(png_header(side, side))


def test_plain_jpegs_let_others_warn_once() -> None:
    data = encoded(gradient(), "JPEG")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            decode(data)
            warnings.warn("shown once a place", UserWarning, stacklevel=1)
    assert len(shown) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Shrinking
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [((96, 64), 32, (48, 32)), ((64, 96), 32, (32, 48)), ((96, 64), 64, (96, 64)), ((50, 1000), 1, (1, 20))],
)
def test_shrink_bounds_the_shorter_side(size: tuple[int, int], side: int, expected: tuple[int, int]) -> None:
    data = shrink(gradient(*size), side, 90)
    assert (Image.open(io.BytesIO(data)).format, decode(data).size) == ("JPEG", expected)


def test_shrink_never_enlarges() -> None:
    assert shrink(gradient(), 1000, 90) == encoded(gradient(), "JPEG", quality=90)


def test_shrink_is_deterministic_and_keeps_the_picture() -> None:
    image = decode(encoded(gradient(), "JPEG", quality=95, comment=b"by hand"))
    assert shrink(image, 40, 90) == shrink(image, 40, 90)
    assert b"by hand" not in shrink(image, 40, 90)
    assert len(shrink(image, 40, 95)) > len(shrink(image, 40, 30))
    small = np.array(decode(shrink(image, 32, 95))).astype(int)
    expected = np.array(image.reduce(2)).astype(int)
    assert np.abs(small - expected).mean() < 3
