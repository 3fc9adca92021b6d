"""Distillation in fewer dimensions: student and teacher each through a linear map, the teacher's the student's average.

The map of the student learns; the one of the teacher follows it as a moving average, as a bootstrapped target (BYOL,
Grill et al. 2020) does, and gets no gradient.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.layers.ema import EmaCopy
from emkum.layers.shared_encoders import initialize_weights
from emkum.layers.temperature import LogitScale
from emkum.objectives.base import Objective, Requirements, Setting
from emkum.objectives.knowledge_distillation import (
    Scored,
    Targets,
    chosen,
    classify_targets,
    contrast_captions,
    mean_cosine,
    own_rows,
    regression_loss,
    summed,
)
from emkum.outputs import Batch, ObjectiveOutput, StudentOutput, TeacherOutput

LOSSES = ("mse", "contrastive")


@dataclass
class ReducedDistillationConfig:
    dim: int = field(default=128, metadata={"help": "channels that student and teacher are mapped to"})
    decay: float = field(
        default=0.995, metadata={"help": "how much of the teacher's map stays at an update; 0 = it is the student's"}
    )
    loss: str = field(
        default="mse",
        metadata={
            "help": "mse (which shrinking maps make small as well), contrastive (each target in the batch is a class)"
        },
    )
    initial_scale: float = field(
        default=1 / 0.07,
        metadata={"help": "initial scale of the contrastive logits (1 / temperature), learned within [1, 100]"},
    )


class ReducedDistillation(Objective):
    """Half the images' loss plus half the captions', both in `dim` channels.

    The student's part is its CLS token behind the shared encoder.

    Raises:
        UserError: the student's width is not the teacher's, which one map could not serve, or an option is out of its
            range.
    """

    requires = Requirements(features=True)

    def __init__(self, config: ReducedDistillationConfig, setting: Setting) -> None:
        super().__init__()
        if setting.width != setting.target_width:
            raise UserError(
                f"objective kd_reduced: the student has {setting.width} channels, the teacher {setting.target_width}; "
                "the teacher's map is an average of the student's: choose a student and a teacher of equal width"
            )
        if not 0 < config.dim <= setting.width:
            raise UserError(f"--kd-reduced-dim {config.dim}: want 1 to {setting.width}, the student's width")
        if not 0 <= config.decay < 1:
            raise UserError(f"--kd-reduced-decay {config.decay:g}: want 0 to below 1")
        loss = chosen("--kd-reduced-loss", config.loss, LOSSES)
        # Without bias: it would cancel between the two.
        self.student_map = nn.Linear(setting.width, config.dim, bias=False).apply(initialize_weights)
        self.teacher_map = EmaCopy(self.student_map, config.decay)
        self.scale = LogitScale(config.initial_scale) if loss == "contrastive" else None

    def begin_update(self, num_updates: int, decay: float) -> None:
        self.teacher_map.follow(self.student_map, num_updates)

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        # In the type of the maps, whatever autocast made of the tokens.
        kind = self.student_map.weight.dtype
        image, text = (self.student_map(part.cls.to(kind)) for part in (student.image, student.text))
        with torch.no_grad():
            targets, own_targets = (
                None if features is None else self.teacher_map.module(features.to(kind))
                for features in (teacher.features, teacher.text_features)
            )
        if self.scale is not None:
            return self._contrast(image, text, targets, own_targets, batch)
        text_targets = targets[batch.caption_image] if own_targets is None else own_targets
        pairs = ((image, targets), (text, text_targets))
        return summed("agreement", *(Scored(regression_loss(*pair), mean_cosine(*pair)) for pair in pairs))

    def _contrast(
        self, image: Tensor, text: Tensor, reduced: Tensor, own_targets: Tensor | None, batch: Batch
    ) -> ObjectiveOutput:
        gathered = self.training
        targets = Targets(reduced, batch.image_ids)
        targets = targets.gathered() if gathered else targets
        scale, own = self.scale(), own_rows(len(batch.image_ids), gathered, batch.image_ids.device)
        output = summed(
            "accuracy",
            classify_targets(image, batch.image_ids, own, targets, scale),
            contrast_captions(text, own_targets, targets, batch, scale, gathered),
        )
        output.metrics["scale"] = scale.detach()
        return output
