"""The student and its objectives as one fairseq model."""

from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.layers.attention import choose_attention_kernel
from emkum.layers.ema import EmaCopy
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


@dataclass
class AverageConfig:
    decay: float = field(
        default=0.0,
        metadata={"help": "decay an update of a moving average of the student, for --teacher self; 0 = none is kept"},
    )


ImageTextStudentConfig = flat_dataclass(
    "ImageTextStudentConfig",
    {**STUDENT_PARTS, "average": AverageConfig, "lr_scale": LearningRateConfig, **OBJECTIVE_PARTS},
    base=_ObjectiveChoice,
)


@register_model("image_text_student", dataclass=ImageTextStudentConfig)
class ImageTextStudentModel(BaseFairseqModel):
    """`emkum.models.student.ImageTextStudent` with the objectives that train it.

    Objectives are inside because their parameters and banks are trained, saved and restored with the model.
    """

    def __init__(
        self,
        student: ImageTextStudent,
        objectives: nn.ModuleDict,
        autocast: str | None = None,
        ema: EmaCopy | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.objectives = objectives
        self.autocast = Autocast(autocast)
        self.ema = ema

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "ImageTextStudentModel":
        names = parse_objectives(cfg.objectives)
        if task.target_width is None:
            names = [name for name in names if not needs_teacher([name])]
        width = task.target_width
        student = build_student(cfg, task.tokenizer.vocab_size, width, task.load_pretrained, task.tokenizer.special.pad)
        decay = collect_parts({"average": AverageConfig}, cfg)["average"].decay
        if not 0 <= decay < 1:
            raise UserError(f"--average-decay {decay}: want a number from 0 (no average) to below 1")
        ema = EmaCopy(student, decay) if decay > 0 else None
        model = cls(student, build_objectives(names, cfg, student.width if width == 0 else width), cfg.autocast, ema)
        task.bind_average(None if ema is None else ema.module)
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

    def set_num_updates(self, num_updates: int) -> None:
        """fairseq calls this before each batch and before it restores a checkpoint, with the number of updates done."""
        super().set_num_updates(num_updates)
        if self.ema is not None:
            self.ema.follow(self.student, num_updates)

    def max_positions(self) -> None:
        return None
