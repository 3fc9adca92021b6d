"""Distillation of single tokens: of all layers' means between unimodal encoders, of patches beside captions."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

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
        target_tokens: (B, N, D), what `mean_of_layers` made of the teacher's layers with the same arguments.
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

    requires = Requirements(patches=True, tokens=True, patch_grid=True)

    def __init__(self, config: PatchDistillationConfig, setting: Setting) -> None:
        super().__init__()
        self.whiten = config.whiten
        self.head = PredictionHead(setting.width, setting.patch_width)

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        prediction = self.head(student.image.tokens[:, 1:])
        target = whitened(teacher.patches) if self.whiten else teacher.patches
        return summed("agreement", Scored(regression_loss(prediction, target), mean_cosine(prediction, target)), None)
