"""A trained student, ready for use."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from emkum.data.decoding import to_rgb
from emkum.data.tokenizers import Tokenizer, encode, load_tokenizer
from emkum.data.transforms import center_box, to_tensor
from emkum.errors import UserError
from emkum.models.builders import build_student
from emkum.models.student import ImageTextStudent
from emkum.weights import read_checkpoint

MODEL = "image_text_student"
_STUDENT = "student."
# What only training needs.
_TRAINING_ALONE = ("heads.prediction.", "heads.logits.", "mask_token")


class ImageTextModel:
    """Encodes images and captions into one space; the right crop and tokenizer come with it.

    Args:
        student: in eval mode.
        tokenizer: of the run.
        image_size: side of the student's input in pixels.
        max_tokens: longest caption in tokens.
        device: where to run.
    """

    def __init__(
        self, student: ImageTextStudent, tokenizer: Tokenizer, image_size: int, max_tokens: int, device: str = "cpu"
    ) -> None:
        self.student = student.eval().to(device)
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.max_tokens = max_tokens
        self.device = torch.device(device)

    def encode_image(self, images: Sequence[Image.Image], batch_size: int = 128) -> Tensor:
        """PIL images to unit vectors (n, D), float32 on the CPU."""
        chunks = _chunks(images, batch_size)
        parts = [self.encode_crops(torch.stack([self._crop(image) for image in chunk])) for chunk in chunks]
        return torch.cat(parts) if parts else self._empty()

    # Not in inference mode: a student may be scored between updates, and what its modules keep must serve those too.
    @torch.no_grad()
    def encode_crops(self, crops: Tensor) -> Tensor:
        """(B, 3, S, S) uint8, centered crops of the model's image size, to unit vectors (B, D), float32 on the CPU."""
        features = self.student.encode_image(crops.to(self.device)).features
        return F.normalize(features.float(), dim=-1).cpu()

    def encode_text(self, texts: Sequence[str], batch_size: int = 512) -> Tensor:
        """Captions to unit vectors (n, D), float32 on the CPU."""
        return self.encode_tokens(self.tokenize(texts), batch_size)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption, special ones included, cut to the longest caption."""
        return [encode(self.tokenizer, text, self.max_tokens) for text in texts]

    @torch.no_grad()
    def encode_tokens(self, tokens: Sequence[list[int]], batch_size: int = 512) -> Tensor:
        """What `tokenize` gives to unit vectors (n, D), float32 on the CPU."""
        # Similar lengths together: little padding. The order is restored below.
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        parts = []
        for chunk in _chunks(order, batch_size):
            longest = max(len(tokens[i]) for i in chunk)
            lengths = torch.tensor([len(tokens[i]) for i in chunk])
            padding = (torch.arange(longest) >= lengths[:, None]).to(self.device)
            pad = self.tokenizer.special.pad
            batch = torch.tensor([tokens[i] + [pad] * (longest - len(tokens[i])) for i in chunk], device=self.device)
            parts.append(F.normalize(self.student.encode_text(batch, padding).features.float(), dim=-1).cpu())
        if not parts:
            return self._empty()
        features = torch.cat(parts)
        return torch.empty_like(features).index_copy_(0, torch.tensor(order), features)

    def _crop(self, image: Image.Image) -> Tensor:
        image = to_rgb(image)
        size = (self.image_size, self.image_size)
        return to_tensor(image.resize(size, Image.Resampling.BICUBIC, box=center_box(*image.size)))

    def _empty(self) -> Tensor:
        return torch.empty(0, self.student.contrast_width)


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint file, or the best (else last) one of a run's folder.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if path.is_dir():
        for name in ("checkpoint_best.pt", "checkpoint_last.pt"):
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path} holds neither checkpoint_best.pt nor checkpoint_last.pt")
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}")
    return path


def model_name(state: Any) -> str | None:
    """What kind of model a checkpoint's content is of; None where it does not say."""
    options = state.get("cfg") if isinstance(state, dict) else None
    model = options.get("model") if isinstance(options, dict) else None
    return model.get("_name") if isinstance(model, dict) else None


def load(checkpoint: str | Path, device: str = "cpu") -> ImageTextModel:
    """Load a student from a training checkpoint or a run's folder.

    The tokenizer is read from `tokenizer/` beside the checkpoint, else from where training had it.

    Raises:
        UserError: no such file, a damaged one, or one of another kind of model.
    """
    path = find_checkpoint(checkpoint)
    state = read_checkpoint(path)
    name = model_name(state)
    if name != MODEL:
        raise UserError(f"{path} is a checkpoint of {name or 'an unknown kind'}, not of {MODEL}")
    model_options, task_options = state["cfg"]["model"], state["cfg"]["task"]
    tokenizer = load_tokenizer(_tokenizer_path(path, task_options))
    pad = tokenizer.special.pad
    student = build_student(model_options, tokenizer.vocab_size, pretrained=False, pad_index=pad)
    weights = {key.removeprefix(_STUDENT): value for key, value in state["model"].items() if key.startswith(_STUDENT)}
    weights = {key: value for key, value in weights.items() if not key.startswith(_TRAINING_ALONE)}
    try:
        student.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its own options: {' '.join(str(error).split())[:300]}") from None
    return ImageTextModel(
        student, tokenizer, model_options["image_size"], task_options["caption_max_tokens"], device=device
    )


def _tokenizer_path(checkpoint: Path, task_options: dict[str, Any]) -> Path:
    beside = checkpoint.parent / "tokenizer"
    if beside.is_dir():
        return beside
    return Path(task_options["caption_tokenizer"] or task_options["data"].split(os.pathsep)[0])
