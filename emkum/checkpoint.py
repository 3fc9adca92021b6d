"""A trained student, ready for use."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from emkum.data.decoding import to_rgb
from emkum.data.sounds import SoundConfig, crop_sound, stack_sounds
from emkum.data.tokenizers import Tokenizer, encode, load_tokenizer
from emkum.data.transforms import center_box, to_tensor
from emkum.errors import UserError
from emkum.models.builders import Targets, build_student
from emkum.models.student import ImageTextStudent
from emkum.objectives import Objective, Setting, build_objectives, objective_configs, parse_objectives, required
from emkum.options import collect_parts
from emkum.outputs import ModalityOutput
from emkum.weights import read_checkpoint

MODEL = "image_text_student"
_STUDENT = "student."
_OBJECTIVE = "objectives.{}."
# What only training needs.
_TRAINING_ALONE = ("heads.prediction.", "heads.logits.", "mask_token")


@dataclass
class TextOutput:
    """Some captions behind the student.

    Attributes:
        rows: (t,) int64 on the CPU, which captions of those that were given.
        output: of the student.
        special: (t, L) bool, True at each caption's first and last token and at padding.
    """

    rows: Tensor
    output: ModalityOutput
    special: Tensor


class ImageTextModel:
    """Encodes images, captions and, where the student hears, sounds into one space; the right crop and tokenizer come
    with it.

    Args:
        student: in eval mode.
        tokenizer: of the run.
        image_size: side of the student's input in pixels.
        max_tokens: longest caption in tokens.
        device: where to run.
        objectives: by name, those that `load` was asked for, in eval mode.
        sounds: how much of a sound is heard; None = as the options' default.
    """

    def __init__(
        self,
        student: ImageTextStudent,
        tokenizer: Tokenizer,
        image_size: int,
        max_tokens: int,
        device: str = "cpu",
        objectives: Mapping[str, Objective] | None = None,
        sounds: SoundConfig | None = None,
    ) -> None:
        self.sounds = sounds or SoundConfig()
        self.student = student.eval().to(device)
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.max_tokens = max_tokens
        self.device = torch.device(device)
        self.objectives = {name: objective.eval().to(device) for name, objective in (objectives or {}).items()}

    def encode_image(self, images: Sequence[Image.Image], batch_size: int = 128) -> Tensor:
        """PIL images to unit vectors (n, D), float32 on the CPU."""
        parts = [unit_features(output) for output in self.image_outputs(images, batch_size)]
        return torch.cat(parts) if parts else self._empty()

    def encode_text(self, texts: Sequence[str], batch_size: int = 512) -> Tensor:
        """Captions to unit vectors (n, D), float32 on the CPU."""
        return self.encode_tokens(self.tokenize(texts), batch_size)

    @torch.no_grad()
    def encode_audio(self, sounds: Sequence[np.ndarray], batch_size: int = 128) -> Tensor:
        """Sounds, (n,) int16 at 16 kHz each, to unit vectors (n, D), float32 on the CPU.

        Raises:
            UserError: the student does not hear.
        """
        if self.student.audio_encoder is None:
            raise UserError("this student was trained without --audio-encoder: it hears nothing")
        parts = []
        for chunk in _chunks(sounds, batch_size):
            batch = stack_sounds([crop_sound(sound, self.sounds.max_samples) for sound in chunk])
            output = self.student.encode_audio(batch.samples.to(self.device), batch.padding_mask.to(self.device))
            parts.append(unit_features(output))
        return torch.cat(parts) if parts else self._empty()

    def encode_crops(self, crops: Tensor) -> Tensor:
        """(B, 3, S, S) uint8, centered crops of the model's image size, to unit vectors (B, D), float32 on the CPU."""
        return unit_features(self._run_crops(crops))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption, special ones included, cut to the longest caption."""
        return [encode(self.tokenizer, text, self.max_tokens) for text in texts]

    def encode_tokens(self, tokens: Sequence[list[int]], batch_size: int = 512) -> Tensor:
        """What `tokenize` gives to unit vectors (n, D), float32 on the CPU."""
        features = self._empty(len(tokens))
        for part in self.text_outputs(tokens, batch_size):
            features[part.rows] = unit_features(part.output)
        return features

    def image_outputs(self, images: Sequence[Image.Image], batch_size: int = 128) -> Iterator[ModalityOutput]:
        """All that the student makes of PIL images, batch by batch, on its device."""
        for chunk in _chunks(images, batch_size):
            yield self._run_crops(torch.stack([self._crop(image) for image in chunk]))

    # Not in inference mode: a student may be scored between updates, and what its modules keep must serve those too.
    @torch.no_grad()
    def text_outputs(self, tokens: Sequence[list[int]], batch_size: int = 512) -> Iterator[TextOutput]:
        """The same of what `tokenize` gives, in another order: similar lengths together, for little padding."""
        for chunk in _chunks(sorted(range(len(tokens)), key=lambda i: len(tokens[i])), batch_size):
            longest = max(len(tokens[i]) for i in chunk)
            lengths = torch.tensor([len(tokens[i]) for i in chunk], device=self.device)[:, None]
            places = torch.arange(longest, device=self.device)
            pad = self.tokenizer.special.pad
            batch = torch.tensor([tokens[i] + [pad] * (longest - len(tokens[i])) for i in chunk], device=self.device)
            output = self.student.encode_text(batch, places >= lengths)
            yield TextOutput(torch.tensor(chunk), output, (places == 0) | (places >= lengths - 1))

    @torch.no_grad()
    def _run_crops(self, crops: Tensor) -> ModalityOutput:
        return self.student.encode_image(crops.to(self.device))

    def _crop(self, image: Image.Image) -> Tensor:
        image = to_rgb(image)
        size = (self.image_size, self.image_size)
        return to_tensor(image.resize(size, Image.Resampling.BICUBIC, box=center_box(*image.size)))

    def _empty(self, rows: int = 0) -> Tensor:
        return torch.empty(rows, self.student.contrast_width)


def unit_features(output: ModalityOutput) -> Tensor:
    """(n, D) unit vectors, float32 on the CPU."""
    return F.normalize(output.features.float(), dim=-1).cpu()


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


def load(checkpoint: str | Path, device: str = "cpu", objectives: Sequence[str] = ()) -> ImageTextModel:
    """Load a student from a training checkpoint or a run's folder.

    The tokenizer is read from `tokenizer/` beside the checkpoint, else from where training had it.

    Args:
        checkpoint: file or folder.
        device: where to run.
        objectives: names of those that it was trained with and whose own parts are wanted, such as projections; none
            that needs a teacher.

    Raises:
        UserError: no such file, a damaged one, one of another kind of model, or one trained without such an objective.
    """
    path = find_checkpoint(checkpoint)
    state = read_checkpoint(path)
    name = model_name(state)
    if name != MODEL:
        raise UserError(f"{path} is a checkpoint of {name or 'an unknown kind'}, not of {MODEL}")
    model_options, task_options = state["cfg"]["model"], state["cfg"]["task"]
    trained = parse_objectives(model_options["objectives"]) if objectives else []
    for lacking in [name for name in objectives if name not in trained]:
        raise UserError(f"{path} was trained with {', '.join(trained)}, without the objective {lacking}")
    tokenizer = load_tokenizer(_tokenizer_path(path, task_options))
    pad = tokenizer.special.pad
    targets = Targets(cls_attention=required(objective_configs(list(objectives), model_options)).cls_attention)
    student = build_student(model_options, tokenizer.vocab_size, targets, pretrained=False, pad_index=pad)
    weights = {key: value for key, value in _of(state, _STUDENT).items() if not key.startswith(_TRAINING_ALONE)}
    setting = Setting(student.width, student.contrast_width, tokenizer.vocab_size)
    heads = build_objectives(list(objectives), model_options, setting)
    try:
        student.load_state_dict(weights)
        for name, head in heads.items():
            head.load_state_dict(_of(state, _OBJECTIVE.format(name)))
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its own options: {' '.join(str(error).split())[:300]}") from None
    size, longest = model_options["image_size"], task_options["caption_max_tokens"]
    sounds = collect_parts({"sound": SoundConfig}, task_options)["sound"]
    return ImageTextModel(student, tokenizer, size, longest, device, dict(heads.items()), sounds)


def _of(state: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """Parameters and buffers of one part of the model."""
    return {key.removeprefix(prefix): value for key, value in state["model"].items() if key.startswith(prefix)}


def _tokenizer_path(checkpoint: Path, task_options: dict[str, Any]) -> Path:
    beside = checkpoint.parent / "tokenizer"
    if beside.is_dir():
        return beside
    return Path(task_options["caption_tokenizer"] or task_options["data"].split(os.pathsep)[0])
