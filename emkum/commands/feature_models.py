"""Models of images under one face for evaluation: uint8 crops in, one feature an image out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emkum.checkpoint import ImageTextModel
from emkum.errors import UserError
from emkum.layers.pooling import masked_mean
from emkum.models.encoder_sources import LoadedEncoder, image_encoder_of_student, load_image_encoder
from emkum.models.teacher_builders import build_teacher
from emkum.teachers.base import IMAGE, Teacher, TeacherConfig, TeacherInput
from emkum.teachers.encoder_teacher import student_teacher

FEATURES = DEFAULT, CLS, MEAN, BOTH = ("default", "cls", "mean", "both")

# Sources that are run whole, as teachers are, with whatever follows their blocks; of others their first blocks can be
# chosen, too.
_WHOLE = ("openclip", "checkpoint")
_WHOLE_UNLESS_CHOSEN = ("timm", "beit3")


@dataclass(frozen=True)
class FeatureModel:
    """What features are computed by.

    Attributes:
        extract: (B, 3, S, S) uint8 to (B, D) float32, on the device that it runs on.
        image_size: S in pixels.
        identity: what the features depend on, as plain data.
    """

    extract: Callable[[Tensor], Tensor]
    image_size: int
    identity: dict[str, Any]


def open_model(
    source: str,
    weights: str = "",
    image_size: int = 0,
    layers: int = 0,
    features: str = DEFAULT,
    device: torch.device | str = "cpu",
) -> FeatureModel:
    """The model of a source.

    Args:
        source: one of those of `load_image_encoder`, or a teacher's openclip:NAME or checkpoint:RUN. These two, and
            timm:NAME and beit3:FILE unless `layers` are chosen, are run whole; of all others the blocks alone.
        weights: of timm:NAME and openclip:NAME: a local file, `hub`, or empty for random ones.
        image_size: side of the input in pixels; 0 = as trained.
        layers: blocks to keep, the first ones; 0 = all.
        features: one of FEATURES.
        device: where to run.

    Raises:
        UserError: no such source or features, or the source does not have them.
    """
    if features not in FEATURES:
        raise UserError(f"--features {features!r} is unknown; choose from {', '.join(FEATURES)}")
    for name, value in (("image-size", image_size), ("layers", layers)):
        if value < 0:
            raise UserError(f"--{name} {value}: want 0 or more")
    kind = source.partition(":")[0]
    if kind == "cached":
        raise UserError(f"{source} holds what a teacher made of other crops; give the teacher itself")
    if kind in _WHOLE and layers:
        raise UserError(f"--layers {layers}: {source} is run whole; leave it out")
    if kind in _WHOLE or (kind in _WHOLE_UNLESS_CHOSEN and not layers):
        return _whole_model(source, weights, image_size, features, device)
    return _of_encoder(load_image_encoder(source, weights, image_size, layers), features, device)


def open_student(
    model: ImageTextModel, source: str, whole: bool, features: str = DEFAULT, device: torch.device | str = "cpu"
) -> FeatureModel:
    """The same of a student that is in memory already: its image encoder, or all of it.

    Args:
        model: the student. source: where it is from.
        whole: with the shared encoder, as checkpoint:RUN.
        features, device: as for `open_model`.
    """
    if not whole:
        return _of_encoder(image_encoder_of_student(model.student, source), features, device)
    config, tokenizer = TeacherConfig(pooling=_pooling(features)), Path(model.tokenizer.source)
    sizes = model.image_size, tokenizer, model.max_tokens
    teacher = student_teacher(model.student, {"teacher": "checkpoint"}, config, *sizes)
    return _of_teacher(teacher, source, features, device)


def _of_encoder(loaded: LoadedEncoder, features: str, device: torch.device | str) -> FeatureModel:
    identity = loaded.identity | {"features": CLS if features == DEFAULT else features}
    return FeatureModel(EncoderFeatures(loaded, features, device), loaded.encoder.image_size, identity)


def _pooling(features: str) -> str:
    """Of a teacher, whose global feature is the CLS token where that is asked for."""
    return CLS if features in (CLS, BOTH) else DEFAULT


def _whole_model(source: str, weights: str, image_size: int, features: str, device: torch.device | str) -> FeatureModel:
    config = TeacherConfig(weights=weights, image_size=image_size, pooling=_pooling(features))
    try:
        teacher = build_teacher(source, config)
    except UserError as error:
        # Its options have other names in training.
        message = error.message.replace("--teacher-pooling", "--features").replace("--teacher-", "--")
        raise UserError(message) from None
    if IMAGE not in teacher.modalities:
        raise UserError(f"{source} does not look at images")
    return _of_teacher(teacher, source, features, device)


def _of_teacher(teacher: Teacher, source: str, features: str, device: torch.device | str) -> FeatureModel:
    if features in (MEAN, BOTH) and teacher.patch_width == 0:
        raise UserError(f"--features {features}: {source} has no patches; choose default")
    return FeatureModel(
        TeacherFeatures(teacher, features, device), teacher.image_size, teacher.identity | {"features": features}
    )


class EncoderFeatures:
    """Features of an encoder: of its last block's tokens, without a norm.

    Args:
        loaded: the encoder.
        features: one of FEATURES; the default is the CLS token.
        device: where to run.
    """

    def __init__(self, loaded: LoadedEncoder, features: str, device: torch.device | str) -> None:
        self.encoder = loaded.encoder.eval().to(device)
        self.features = features
        self.device = device
        self.mean, self.std = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in (loaded.encoder.mean, loaded.encoder.std)
        )

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        # Crops come with their channels last in memory.
        images = images.to(self.device).to(torch.float32, memory_format=torch.contiguous_format)
        tokens = self.encoder((images / 255 - self.mean) / self.std).tokens.float()
        return _joined(self.features, lambda: tokens[:, 0], lambda: masked_mean(tokens[:, 1:]))


class TeacherFeatures:
    """Features of a teacher.

    Args:
        teacher: of images; its global feature is the CLS token where that is asked for.
        features: one of FEATURES; the default is its global feature.
        device: where to run.
    """

    def __init__(self, teacher: Teacher, features: str, device: torch.device | str) -> None:
        self.teacher = teacher
        self.features = features
        self.device = device

    def __call__(self, images: Tensor) -> Tensor:
        numbers = torch.arange(len(images))
        output = self.teacher(TeacherInput(images.to(self.device), numbers, torch.full_like(numbers, -1), "evaluation"))
        return _joined(self.features, lambda: output.features, lambda: masked_mean(output.patches))


def _joined(features: str, whole: Callable[[], Tensor], mean: Callable[[], Tensor]) -> Tensor:
    """(B, D) one feature or both side by side."""
    if features == MEAN:
        return mean()
    return torch.cat([whole(), mean()], dim=1) if features == BOTH else whole()
