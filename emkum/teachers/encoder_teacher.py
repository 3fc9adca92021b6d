"""Encoders of this project's own kind as teachers: Data2Vec 2's, and whole students."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.layers.layer_targets import mean_of_layers
from emkum.layers.pooling import masked_maximum, masked_mean
from emkum.outputs import Encoded, TeacherOutput
from emkum.teachers.base import IMAGE, TEXT, FrozenTeacher, TeacherConfig, TeacherInput, shared_options
from emkum.weights import fingerprint

# Of images, the mean and the maximum over patches, side by side: Data2Vec 2's CLS token is trained to predict a mean
# over patches alone; the maximum adds which things are there at all.
POOLINGS = ("mean_max", "cls", "mean", "layers")


def encoder_teacher(
    encoder: nn.Module,
    identity: dict[str, Any],
    config: TeacherConfig | None = None,
    modality: str = IMAGE,
    tokenizer: Path | None = None,
    layers: bool = False,
) -> FrozenTeacher:
    """A Data2Vec 2 encoder.

    Args:
        encoder: `encoder(images)` or `encoder(text, padding_mask)` gives Encoded, `encoder.hidden_states` of the same
            a list of layers; an image encoder has `image_size`, `mean`, `std`, a text encoder `max_positions`.
        identity: plain data that says which one it is; pooling, hash of the weights and transform are added.
        config: pooling (default: mean_max of images, cls of text) and how to run; None = defaults.
        modality: "image" or "text".
        tokenizer: of a text encoder.
        layers: give all layers, as the released models predict them: each block's MLP output before residual and norm.

    Raises:
        UserError: there is no such pooling.
    """
    config = config or TeacherConfig()
    pooling = config.pooling
    if pooling == "default":
        pooling = "mean_max" if modality == IMAGE else "cls"
    if pooling not in POOLINGS:
        raise UserError(f"--teacher-pooling {pooling!r}: data2vec2 knows default, {', '.join(POOLINGS)}")
    options: dict[str, Any] = {"modalities": (modality,), "tokenizer": tokenizer}
    if modality == IMAGE:
        options |= {"image_size": encoder.image_size, "mean": encoder.mean, "std": encoder.std}
    else:
        options |= {"max_tokens": encoder.max_positions}
    return FrozenTeacher(
        _EncoderTeacher(encoder, modality, pooling),
        {**identity, "pooling": pooling, "weights_sha256": fingerprint(encoder)},
        layers=layers,
        **options,
        **shared_options(config),
    )


class _EncoderTeacher(nn.Module):
    def __init__(self, encoder: nn.Module, modality: str, pooling: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.modality = modality
        self.pooling = pooling

    def forward(
        self,
        images: Tensor | None,
        text: Tensor | None = None,
        padding_mask: Tensor | None = None,
        layers: bool = False,
    ) -> TeacherOutput:
        inputs = (images,) if self.modality == IMAGE else (text, padding_mask)
        padding_mask = None if self.modality == IMAGE else padding_mask
        states = tuple(self.encoder.hidden_states(*inputs)) if layers or self.pooling == "layers" else ()
        if self.pooling == "layers":
            tokens = mean_of_layers(states, padding_mask, norm_channels=self.modality == IMAGE)
        else:
            tokens = self.encoder(*inputs).tokens.float()
        return TeacherOutput(
            self._pool(tokens, padding_mask),
            patches=tokens[:, 1:] if self.modality == IMAGE else tokens,
            layers=states if layers else None,
        )

    def _pool(self, tokens: Tensor, padding_mask: Tensor | None) -> Tensor:
        # After instance norm the mean over tokens is 0: of the mean of layers, the CLS token is the global feature.
        if self.pooling in ("cls", "layers"):
            return tokens[:, 0]
        tokens, padding_mask = tokens[:, 1:], None if padding_mask is None else padding_mask[:, 1:]
        mean = masked_mean(tokens, padding_mask)
        return mean if self.pooling == "mean" else torch.cat([mean, masked_maximum(tokens, padding_mask)], dim=1)


def student_teacher(
    student: nn.Module,
    identity: dict[str, Any],
    config: TeacherConfig,
    image_size: int,
    tokenizer: Path,
    max_tokens: int,
    layers: bool = False,
) -> FrozenTeacher:
    """A student that this project trained, as teacher of the next one: CLS tokens of its shared encoder.

    Args:
        student: with `encode_normalized(images)`, `encode_text(text, padding_mask)` and `image_encoder`.
        identity: plain data that says which one it is.
        config: pooling (default = cls, or mean over the patches), target and how to run.
        image_size: side of its input in pixels.
        tokenizer: folder of its tokenizer.
        max_tokens: longest caption in tokens.
        layers: not known of students.

    Raises:
        UserError: there is no such pooling, or layers are asked for.
    """
    if config.pooling not in ("default", "cls", "mean"):
        raise UserError(f"--teacher-pooling {config.pooling!r}: a student knows default, cls, mean")
    if layers:
        raise UserError("a student as teacher gives no layers")
    return FrozenTeacher(
        _StudentTeacher(student, config.pooling),
        {**identity, "pooling": config.pooling, "weights_sha256": fingerprint(student)},
        image_size=image_size,
        mean=student.image_encoder.mean,
        std=student.image_encoder.std,
        modalities=(IMAGE, TEXT),
        tokenizer=tokenizer,
        max_tokens=max_tokens,
        **shared_options(config),
    )


class SelfTeacher:
    """The student's own moving average as teacher: what it makes of the image is what image and captions predict.

    The average is inside the model, which saves it; this is bound to it once the model is built.

    Args:
        image_size: side of the student's crops in pixels, which are the teacher's too.
    """

    # As wide as the student, whatever that is.
    width = 0
    num_classes, patch_width, max_tokens, grid, tokenizer = 0, 0, 0, None, None
    modalities = (IMAGE,)

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size
        self.identity: dict[str, Any] = {"teacher": "self"}
        self._average: nn.Module | None = None

    def bind(self, average: nn.Module) -> None:
        """Give targets by this average of the student from now on."""
        self._average = average

    def open_split(self, split: str, data_hash: str, crops: dict[str, Any]) -> None:
        pass

    @torch.no_grad()
    def __call__(self, batch: TeacherInput) -> TeacherOutput:
        encoded = self._average.encode_image(batch.images)
        return TeacherOutput(encoded.cls.float(), patches=encoded.tokens[:, 1:].float())


class _StudentTeacher(nn.Module):
    def __init__(self, student: nn.Module, pooling: str) -> None:
        super().__init__()
        self.student = student
        self.pooling = pooling

    def forward(
        self, images: Tensor, text: Tensor | None = None, padding_mask: Tensor | None = None, layers: bool = False
    ) -> TeacherOutput:
        encoded = self.student.encode_normalized(images)
        texts = None if text is None else self._pool(self.student.encode_text(text, padding_mask))
        return TeacherOutput(self._pool(encoded), text_features=texts, patches=encoded.tokens[:, 1:])

    def _pool(self, encoded: Encoded) -> Tensor:
        if self.pooling != "mean":
            return encoded.cls
        mask = encoded.padding_mask
        return masked_mean(encoded.tokens[:, 1:], None if mask is None else mask[:, 1:])
