"""What `emkum teacher check` shows a teacher: photos, rendered scenes, sentences."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emkum.commands.data import spread
from emkum.data.decoding import BadImage, decode
from emkum.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from emkum.teachers.base import TeacherInput

SCENES = 16
_SCENE_SIDE = 224

SENTENCES = (
    "A brown dog runs along the beach.",
    "Two children build a tower of wooden blocks.",
    "The train to the coast leaves at half past nine.",
    "She has studied chemistry for three years.",
    "Snow covered the roofs of the old town.",
    "An orange cat sleeps on a kitchen chair.",
    "The price of bread rose again last winter.",
    "He plays the violin in a small orchestra.",
    "Boats rest in the harbor at low tide.",
    "Turn left at the bridge and follow the river.",
    "A man in a red jacket climbs a wall of ice.",
    "Parliament votes on the new law tomorrow.",
    "Bees carry pollen from flower to flower.",
    "The recipe calls for two eggs and a pinch of salt.",
    "A yellow bus waits in front of the museum.",
    "Stars of this kind end as white dwarfs.",
)


@dataclass(frozen=True)
class Pictures:
    """Encoded images that are read one by one.

    Attributes:
        origin: in words.
        names: of them.
        read: from a name to the content of its file; it may raise anything for one that cannot be read.
    """

    origin: str
    names: Sequence[str]
    read: Callable[[str], bytes]


def open_photos(path: Path, limit: int) -> Pictures:
    """Photos of a folder, zip or tar, in the order of their names.

    Args:
        path: folder or archive.
        limit: most of them, evenly spread; 0 = all.

    Raises:
        UserError: it is neither, or holds no images.
    """
    from emkum.prepare.image_folder import is_image
    from emkum.prepare.sources import ImageFiles

    files = ImageFiles(path)
    names = sorted(name for name in files.names if is_image(name))
    if not names:
        raise UserError(f"--images: {path} holds no images")
    chosen = [names[position] for position in spread(len(names), limit or len(names))]
    return Pictures(str(path), chosen, files.read)


def render_scenes(count: int) -> Pictures:
    """Rendered scenes, the same ones every time."""
    from emkum.prepare.scenes import make_sample

    samples = (make_sample(number, 0, seed=1, size=_SCENE_SIDE, num_captions=1) for number in range(count))
    images = {f"scene {number}": sample.image for number, sample in enumerate(samples)}
    return Pictures("rendered scenes, not photos", tuple(images), images.__getitem__)


def crop_batches(
    pictures: Pictures, size: int, fraction: float, batch_size: int, bad: dict[str, str]
) -> Iterator[tuple[list[str], "Tensor"]]:
    """Batches of centered squares, made as training makes them for validation; shows its progress.

    Args:
        pictures: read one by one; no more than a batch is held.
        size: side of the crops in pixels.
        fraction: side of the square, as part of the image's shorter side.
        batch_size: images.
        bad: gets the names of images that cannot be used, with the reason.

    Yields:
        Names and (B, 3, size, size) uint8 crops.
    """
    from tqdm import tqdm

    from emkum.data.tokenizers import well_formed
    from emkum.data.transforms import ImageTransform, stack_crops, to_tensor

    transform = ImageTransform(size)
    names, crops = [], []
    for name in tqdm(pictures.names, desc="teacher", unit="image", disable=None):
        # Names of files may hold bytes that cannot be printed.
        printable = well_formed(name)
        try:
            image = center_part(_decode(pictures, name), fraction)
        except BadImage as error:
            bad[printable] = str(error)
            continue
        names.append(printable)
        crops.append(to_tensor(transform.crop(image, (size,))[0]))
        if len(names) == batch_size:
            yield names, stack_crops(crops)
            names, crops = [], []
    if names:
        yield names, stack_crops(crops)


def _decode(pictures: Pictures, name: str) -> "Image.Image":
    from emkum.prepare.sources import read_error

    try:
        data = pictures.read(name)
    except Exception as error:  # zipfile and zlib raise many kinds for broken files
        raise BadImage(read_error(error)) from None
    return decode(data)


def center_part(image: "Image.Image", fraction: float) -> "Image.Image":
    """The centered part of an image that has this fraction of either side, at least a pixel."""
    if fraction == 1:
        return image
    width, height = (max(1, round(fraction * side)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def tokenize_sentences(tokenizer: Path, max_tokens: int) -> tuple["Tensor", "Tensor"]:
    """SENTENCES as a teacher reads them.

    Args:
        tokenizer: file or folder.
        max_tokens: longest text in tokens.

    Returns:
        Ids (16, L) int64, and (16, L) bool, True at padding.
    """
    import torch

    from emkum.data.tokenizers import encode, load_tokenizer

    reader = load_tokenizer(tokenizer)
    rows = [torch.tensor(encode(reader, sentence, max_tokens)) for sentence in SENTENCES]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=reader.special.pad)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) >= lengths[:, None]


def make_input(
    images: "Tensor | None", texts: tuple["Tensor", "Tensor"] | None, start: int, count: int
) -> "TeacherInput":
    """A batch on the device that there is.

    Args:
        images: (B, 3, S, S) uint8; None for texts alone.
        texts: what `tokenize_sentences` returned: each sample gets the next one, over and over. None = none.
        start: number of the first sample.
        count: B.
    """
    import torch

    from emkum.teachers.base import TeacherInput

    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers = torch.arange(start, start + count)
    views = torch.full_like(numbers, -1)
    if texts is None:
        return TeacherInput(images.to(device), numbers, views, "check")
    ids, mask = (part[numbers % len(SENTENCES)].to(device) for part in texts)
    if images is None:
        return TeacherInput(None, numbers, views, "check", ids, mask)
    return TeacherInput(images.to(device), numbers, views, "check", ids, mask, torch.arange(count, device=device))
