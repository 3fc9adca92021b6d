"""The protocol of objectives."""

from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from emkum.outputs import Batch, ObjectiveOutput, StudentOutput, TeacherOutput


@dataclass(frozen=True)
class Requirements:
    """What an objective needs of the run; see `TeacherOutput` and `StudentOutput` for what each one is.

    Attributes:
        prediction: a teacher's global feature, and the student's prediction of it.
        features: a teacher's global feature alone.
        logits: a teacher's class logits, and the student's.
        patches: a teacher's patch features.
        tokens: all tokens of the student, not its CLS tokens alone.
        hidden: what the student's CLS token is inside the shared encoder's feed-forward part.
        cls_attention: how much the student's CLS token attends to each token.
        masked_image, masked_text, average, crops: further passes of the student.
        patch_grid: an image encoder with patches, as many as the teacher has where `patches` is asked for, too.
    """

    prediction: bool = False
    features: bool = False
    logits: bool = False
    patches: bool = False
    tokens: bool = False
    hidden: bool = False
    cls_attention: bool = False
    masked_image: bool = False
    masked_text: bool = False
    average: bool = False
    crops: bool = False
    patch_grid: bool = False

    @property
    def teacher(self) -> bool:
        """Whether any teacher is needed."""
        return self.prediction or self.features or self.logits or self.patches

    def __or__(self, other: "Requirements") -> "Requirements":
        """What both need together."""
        return Requirements(**{f.name: getattr(self, f.name) or getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True)
class Setting:
    """Sizes that an objective is built for.

    Attributes:
        width: D, channels of the student's tokens.
        contrast_width: D_c, channels of the features that are compared.
        vocab_size: ids of the student's tokenizer.
        num_images: images of the training data.
        max_updates: updates of the whole run; 0 = not known.
        target_width: D_t, channels of the teacher's global feature; 0 without a teacher.
        num_classes: C, of the teacher; 0 where it has no logits.
        patch_width: D_p, channels of the teacher's patch features; 0 where it has none.
        num_masked_patches: patches that are masked in each image; 0 = not known.
    """

    width: int
    contrast_width: int
    vocab_size: int = 0
    num_images: int = 0
    max_updates: int = 0
    target_width: int = 0
    num_classes: int = 0
    patch_width: int = 0
    num_masked_patches: int = 0


class Objective(nn.Module):
    """One loss of a student's output, and its metrics.

    State (scales, heads, banks) is parameters and persistent buffers, so that it is trained, saved and restored with
    the model. Objectives are built as `Objective(config, setting)`. What they need is checked when the run starts: they
    set `requires`, or, where it depends on options, override `requires_of`.
    """

    requires = Requirements()
    # Whether it compares captions with images, so that sounds may stand in the captions' place.
    pairs = True

    @classmethod
    def requires_of(cls, config: Any) -> Requirements:
        """What an objective with these options needs of the run.

        Args:
            config: the objective's own config dataclass.

        Raises:
            UserError: an option that decides it has no valid value.
        """
        return cls.requires

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        """Unweighted loss (mean over this rank's rows) and metrics of a batch."""
        raise NotImplementedError

    def begin_update(self, num_updates: int, decay: float) -> None:
        """Called once an update of the optimizer, before its first batch: the place for centers, codes and averages.

        Args:
            num_updates: updates done.
            decay: of the student's moving average at this update; 0 where none is kept.
        """
