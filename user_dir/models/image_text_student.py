"""The student and its objectives as one fairseq model."""

from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.layers.attention import choose_attention_kernel
from emkum.models.builders import STUDENT_PARTS, build_student
from emkum.models.parameter_groups import LearningRateConfig, assign_overrides
from emkum.models.student import ImageTextStudent
from emkum.objectives import OBJECTIVE_PARTS, build_objectives, needs_teacher, parse_objectives
from emkum.options import collect_parts
from emkum.outputs import Batch, ObjectiveOutput, StudentOutput, TeacherOutput

from ..config import flat_dataclass

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class _ObjectiveChoice(FairseqDataclass):
    objectives: str = field(
        default="itc", metadata={"help": f"objectives, separated by commas: {', '.join(OBJECTIVE_PARTS)}"}
    )
    autocast: Optional[str] = field(
        default=None,
        metadata={"help": "run the student under torch.autocast: bfloat16 (CPU too) or float16; empty = off"},
    )


ImageTextStudentConfig = flat_dataclass(
    "ImageTextStudentConfig",
    {**STUDENT_PARTS, "lr_scale": LearningRateConfig, **OBJECTIVE_PARTS},
    base=_ObjectiveChoice,
)


@register_model("image_text_student", dataclass=ImageTextStudentConfig)
class ImageTextStudentModel(BaseFairseqModel):
    """`emkum.models.student.ImageTextStudent` with the objectives that train it.

    Objectives are inside because their parameters and banks are trained, saved and restored with the model.
    """

    def __init__(self, student: ImageTextStudent, objectives: nn.ModuleDict, autocast: str | None = None) -> None:
        super().__init__()
        if autocast and autocast not in _AUTOCAST:
            raise UserError(f"--autocast {autocast!r} is unknown; choose from {', '.join(_AUTOCAST)}")
        self.student = student
        self.objectives = objectives
        self.autocast_dtype = _AUTOCAST[autocast] if autocast else None

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "ImageTextStudentModel":
        names = parse_objectives(cfg.objectives)
        if task.target_width is None:
            names = [name for name in names if not needs_teacher([name])]
        student = build_student(cfg, task.tokenizer.vocab_size, task.target_width, pretrained=task.load_pretrained)
        model = cls(student, build_objectives(names, cfg, task.target_width), cfg.autocast)
        assign_overrides(model, student, collect_parts({"lr_scale": LearningRateConfig}, cfg)["lr_scale"])
        return model

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        padding_mask: Tensor,
        image_ids: Tensor,
        caption_image: Tensor,
        groups: list[tuple[int, int]] | None = None,
        targets: TeacherOutput | None = None,
    ) -> tuple[dict[str, ObjectiveOutput], StudentOutput]:
        """Losses of a batch of B images and T captions, by objective, and the student's output.

        Shapes are those of `emkum.data.image_text.collate`; `targets` are the teacher's for the same images.
        """
        # Validation runs in full precision: its figures are those that `emkum evaluate` prints.
        dtype = self.autocast_dtype if self.training else None
        choose_attention_kernel(self, image.device, dtype or next(self.parameters()).dtype)
        with torch.autocast(image.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            output = self.student(image, text, padding_mask, groups)
        batch = Batch(image_ids=image_ids, caption_image=caption_image)
        return {name: objective(output, targets, batch) for name, objective in self.objectives.items()}, output

    def max_positions(self) -> None:
        return None
