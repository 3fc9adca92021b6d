"""The student and its objectives as one fairseq model."""

from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model
from torch import Tensor, nn

from emkum.layers.attention import choose_attention_kernel
from emkum.layers.precision import AUTOCAST_HELP, Autocast
from emkum.models.builders import STUDENT_PARTS, build_student
from emkum.models.parameter_groups import LearningRateConfig, assign_overrides
from emkum.models.student import ImageTextStudent
from emkum.objectives import OBJECTIVE_PARTS, build_objectives, needs_teacher, parse_objectives
from emkum.options import collect_parts
from emkum.outputs import Batch, ObjectiveOutput, StudentOutput, TeacherOutput

from ..config import flat_dataclass


@dataclass
class _ObjectiveChoice(FairseqDataclass):
    objectives: str = field(
        default="itc", metadata={"help": f"objectives, separated by commas: {', '.join(OBJECTIVE_PARTS)}"}
    )
    autocast: Optional[str] = field(default=None, metadata={"help": AUTOCAST_HELP})


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
        self.student = student
        self.objectives = objectives
        self.autocast = Autocast(autocast)

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "ImageTextStudentModel":
        names = parse_objectives(cfg.objectives)
        if task.target_width is None:
            names = [name for name in names if not needs_teacher([name])]
        student = build_student(
            cfg, task.tokenizer.vocab_size, task.target_width, task.load_pretrained, task.tokenizer.special.pad
        )
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
        dtype = self.autocast.dtype(image.device) if self.training else None
        choose_attention_kernel(self, image.device, dtype or next(self.parameters()).dtype)
        with self.autocast.context(image.device, enabled=self.training):
            output = self.student(image, text, padding_mask, groups)
        batch = Batch(image_ids=image_ids, caption_image=caption_image)
        return {name: objective(output, targets, batch) for name, objective in self.objectives.items()}, output

    def max_positions(self) -> None:
        return None
