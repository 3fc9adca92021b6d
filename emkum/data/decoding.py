"""Encoded images to RGB pixels, whatever people have: any orientation, color space, transparency, or damage.

Without torch, so that worker processes that only check images start quickly.
"""

import io
import warnings
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.JpegImagePlugin import JpegImageFile

# Pillow's name of each format that is read -> suffix of its files. An MPO is a JPEG with further pictures behind it.
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}

# EXIF orientation -> what turns the stored pixels upright; 1 and whatever is not listed need nothing.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """An encoded image that cannot be used; the message is a short reason on one line."""


@dataclass(frozen=True)
class ImageInfo:
    """What is in an image file.

    Attributes:
        suffix: jpg, png, webp, gif or bmp, by content.
        image: the decoded image: upright RGB.
    """

    suffix: str
    image: Image.Image = field(repr=False, compare=False)

    @property
    def width(self) -> int:
        """In pixels, upright."""
        return self.image.width

    @property
    def height(self) -> int:
        """In pixels, upright."""
        return self.image.height


def decode(data: bytes) -> Image.Image:
    """Decode a JPEG, PNG, WebP, GIF (first frame) or BMP file to an upright RGB image over white, without warnings.

    Raises:
        BadImage: not such a file, damaged, or of more pixels than PIL.Image.MAX_IMAGE_PIXELS.
    """
    return _read(data).image


def probe(data: bytes, min_side: int = 8) -> ImageInfo:
    """Decode an image file, as `decode` does, and say what it is.

    Raises:
        BadImage: `decode` refuses it, or a side is below `min_side` pixels.
    """
    info = _read(data)
    if min(info.width, info.height) < min_side:
        raise BadImage(f"{info.width} x {info.height} pixels: want a side of at least {min_side}")
    return info


def shrink(image: Image.Image, shorter_side: int, quality: int) -> bytes:
    """Encode an RGB image as JPEG, its shorter side at most `shorter_side` pixels. The same image gives the same bytes.

    Args:
        image: what `decode` returned; never enlarged.
        shorter_side: in pixels.
        quality: of the JPEG, 1 to 100.
    """
    ratio = shorter_side / min(image.size)
    if ratio < 1:
        image = image.resize([max(1, round(side * ratio)) for side in image.size], Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB from an image of any mode: transparent parts over white, 16-bit gray by its high byte, as Pillow itself does
    for 16-bit color."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")


def _read(data: bytes) -> ImageInfo:
    if not data:
        raise BadImage("empty file")
    try:
        if _is_plain_jpeg(data):
            image = JpegImageFile(io.BytesIO(data))
            _refuse_bomb(image)
            return ImageInfo("jpg", _without_metadata(image.convert("RGB")))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _read_any(data)
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(_bomb_reason()) from error
    except Exception as error:  # Pillow's parsers raise whatever a damaged file makes them stumble over.
        raise BadImage(" ".join(str(error).split()) or type(error).__name__) from error


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether the data starts like a JPEG and its header has no APP1 segments, which hold EXIF and XMP.

    Most photos in training sets are such. Pillow cannot warn about them, which matters beside the time: each
    `catch_warnings` makes Python forget which warnings it has shown, so that others' would come once a sample.
    """
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] not in (0xDA, 0xE1):
        position += 2 + (data[position + 2] << 8) + data[position + 3]
    return data.startswith(b"\xff\xd8") and data.startswith(b"\xff\xda", position)


def _read_any(data: bytes) -> ImageInfo:
    """Every format, EXIF orientation included; may warn."""
    try:
        image = Image.open(io.BytesIO(data), formats=[name for name in SUFFIXES if name != "MPO"])
    except UnidentifiedImageError:
        raise BadImage(_unknown_reason(data)) from None
    _refuse_bomb(image)
    image.load()  # Not left to getexif, whose errors are forgiven.
    try:
        turn = _UPRIGHT.get(image.getexif().get(Base.Orientation))
    except Exception:  # Damaged EXIF, about which the parser raises all sorts; the pixels are sound.
        turn = None
    upright = to_rgb(image)
    return ImageInfo(SUFFIXES[image.format], _without_metadata(upright if turn is None else upright.transpose(turn)))


def _refuse_bomb(image: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise BadImage(_bomb_reason())


def _bomb_reason() -> str:
    return f"more than {Image.MAX_IMAGE_PIXELS} pixels: refused as a decompression bomb"


def _unknown_reason(data: bytes) -> str:
    wanted = f"want {', '.join(dict.fromkeys(SUFFIXES.values()))}"
    try:
        return f"format {Image.open(io.BytesIO(data)).format} is not supported: {wanted}"
    except UnidentifiedImageError:
        return f"no image, or damaged at its start: {wanted}"


def _without_metadata(image: Image.Image) -> Image.Image:
    """Forget EXIF, comments and the like: the orientation is already applied."""
    image.info = {}
    return image
