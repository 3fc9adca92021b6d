"""Distillation of single tokens: of all layers' means between unimodal encoders, of patches beside captions."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from emkum.errors import UserError
from emkum.layers.layer_targets import mean_of_layers
from emkum.layers.precision import at_least_float32
from emkum.objectives.base import Objective, Requirements, Setting
from emkum.objectives.knowledge_distillation import (
    PredictionHead,
    Scored,
    mean_cosine,
    regression_loss,
    summed,
    whitened,
)
from emkum.outputs import Batch, ObjectiveOutput, StudentOutput, TeacherOutput


@dataclass
class PatchDistillationConfig:
    whiten: bool = field(
        default=False, metadata={"help": "LayerNorm without parameters on each target patch (feature whitening)"}
    )


def distillation_targets(
    layers: Sequence[Tensor], num_tokens: int, padding_mask: Tensor | None = None, norm_channels: bool = True
) -> Tensor:
    """What `patch_distillation` compares with: `mean_of_layers` of a teacher, for a student's tokens alone.

    Args:
        layers: (B, N_t, D) each, special tokens first; of these the student has the CLS token, which is the first.
        num_tokens: N, the student's.
        padding_mask, norm_channels: as of `patch_distillation`.

    Returns:
        (B, N, D).

    Raises:
        UserError: the layers differ in shape, or there are fewer tokens than the student has.
    """
    shapes = sorted({tuple(layer.shape[1:]) for layer in layers})
    if len(shapes) > 1:
        listing = ", ".join(f"{tokens} x {width}" for tokens, width in shapes)
        raise UserError(f"the teacher's layers have several shapes ({listing}); give a Transformer as teacher")
    special = shapes[0][0] - num_tokens
    if special < 0:
        raise UserError(f"the teacher has {shapes[0][0]} tokens, the student {num_tokens}; give one with a CLS token")
    if special > 0:
        layers = [torch.cat([layer[:, :1], layer[:, 1 + special :]], dim=1) for layer in layers]
    return mean_of_layers(layers, padding_mask, norm_channels)


def patch_distillation(
    student_layers: Sequence[Tensor],
    target_tokens: Tensor,
    padding_mask: Tensor | None = None,
    norm_channels: bool = True,
) -> Tensor:
    """KD-patch between unimodal encoders of equal width: mean squared error over all tokens that are no padding.

    The student's layers are made into one set of tokens by `mean_of_layers`, as the teacher's were.

    Args:
        student_layers: (B, N, D) each, the CLS token included.
        target_tokens: (B, N, D), what `distillation_targets` made of the teacher's layers with the same arguments.
        padding_mask: (B, N), True at padding; None where nothing is padded.
        norm_channels: LayerNorm without parameters at the end, as for images.

    Returns:
        scalar, mean over tokens and channels.
    """
    tokens = mean_of_layers(student_layers, padding_mask, norm_channels)
    errors = (tokens - at_least_float32(target_tokens)).square().mean(-1)
    if padding_mask is None:
        return errors.mean()
    return errors.masked_fill(padding_mask, 0).sum() / (~padding_mask).sum()


class PatchDistillation(Objective):
    """Mean squared error between the student's image tokens, through LayerNorm and Linear, and the teacher's patches.

    Tokens are those behind the shared encoder, without CLS; captions have no part in it. Agreement is the mean cosine.
    """

    pairs = False
    requires = Requirements(patches=True, tokens=True, patch_grid=True)

    def __init__(self, config: PatchDistillationConfig, setting: Setting) -> None:
        super().__init__()
        self.whiten = config.whiten
        self.head = PredictionHead(setting.width, setting.patch_width)

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        prediction = self.head(student.image.tokens[:, 1:])
        target = whitened(teacher.patches) if self.whiten else teacher.patches
        return summed("agreement", Scored(regression_loss(prediction, target), mean_cosine(prediction, target)), None)
