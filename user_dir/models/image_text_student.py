"""The student and its objectives as one fairseq model."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Optional

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.models import register_model
from omegaconf import II
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from emkum.errors import UserError
from emkum.layers.attention import prepare_attention
from emkum.layers.ema import EmaCopy
from emkum.layers.precision import AUTOCAST_HELP, Autocast
from emkum.models.builders import STUDENT_PARTS, Targets, build_student, count_image_tokens
from emkum.models.chunked import encode_in_chunks, pieces_of_groups
from emkum.models.parameter_groups import FreezeConfig, LearningRateConfig, assign_overrides, freeze
from emkum.models.student import ImageTextStudent
from emkum.models.student_start import fill_objectives, fill_student
from emkum.objectives import (
    HEARD,
    OBJECTIVE_PARTS,
    Requirements,
    Setting,
    build_objectives,
    heard_objectives,
    objective_configs,
    parse_objectives,
    required,
)
from emkum.objectives.target_codes import assert_fitted_to
from emkum.options import collect_parts
from emkum.outputs import Batch, ModalityOutput, ObjectiveOutput, StudentOutput, TeacherOutput

from ..config import flat_dataclass
from ..updates import UpdatingModel, average_decay


@dataclass
class _ObjectiveChoice(FairseqDataclass):
    objectives: str = field(
        default="itc", metadata={"help": f"objectives, separated by commas: {', '.join(OBJECTIVE_PARTS)}"}
    )
    init_from: Optional[str] = field(
        default=None,
        metadata={
            "help": "run's folder or checkpoint of a student to start from, with its architecture and tokenizer; heads "
            "of objectives that it did not have begin anew; empty = from pretrained encoders or random weights"
        },
    )
    autocast: Optional[str] = field(default=None, metadata={"help": AUTOCAST_HELP})
    contrastive_chunk: int = field(
        default=0,
        metadata={
            "help": "encode this many images and their captions at a time, with the losses and gradients of the whole "
            "batch: less memory, more time; 0 = all at once"
        },
    )
    max_update: int = II("optimization.max_update")


@dataclass
class AverageConfig:
    decay: float = field(
        default=0.0,
        metadata={
            "help": "decay an update of a moving average of the student, for --teacher self and objectives that "
            "compare with it; 0 = none is kept"
        },
    )
    end_decay: float = field(
        default=0.0, metadata={"help": "decay at the end of the run, reached along half a cosine; 0 = constant"}
    )


ImageTextStudentConfig = flat_dataclass(
    "ImageTextStudentConfig",
    {
        **STUDENT_PARTS,
        "average": AverageConfig,
        "lr_scale": LearningRateConfig,
        "freeze": FreezeConfig,
        **OBJECTIVE_PARTS,
    },
    base=_ObjectiveChoice,
)


@register_model("image_text_student", dataclass=ImageTextStudentConfig)
class ImageTextStudentModel(UpdatingModel):
    """`emkum.models.student.ImageTextStudent` with the objectives that train it.

    Objectives are inside because their parameters and banks are trained, saved and restored with the model.

    Where the student hears, each objective that compares images with captions is there a second time, with a state of
    its own, for images and sounds: captions and sounds never meet.

    Args:
        student: is trained.
        objectives: by name.
        needs: what they need together.
        autocast: see AUTOCAST_HELP.
        ema: the student's moving average, or None.
        decay: of the average, from the number of updates done.
        chunk: see `--contrastive-chunk`.
        fused_attention: let the device choose among fused and plain attention.
        audio_objectives: by name, of images and sounds; None = the student does not hear.
    """

    def __init__(
        self,
        student: ImageTextStudent,
        objectives: nn.ModuleDict,
        needs: Requirements | None = None,
        autocast: str | None = None,
        ema: EmaCopy | None = None,
        decay: Callable[[int], float] = lambda num_updates: 0.0,
        chunk: int = 0,
        fused_attention: bool = True,
        audio_objectives: nn.ModuleDict | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.objectives = objectives
        self.audio_objectives = nn.ModuleDict() if audio_objectives is None else audio_objectives
        self.needs = needs or Requirements()
        self.autocast = Autocast(autocast)
        self.ema = ema
        self.decay = decay
        self.chunk = chunk
        self.fused_attention = fused_attention
        # Whether a checkpoint may hold more: it is scored without its teacher, and so without what compares with one.
        self.leaves_out = False

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "ImageTextStudentModel":
        names = parse_objectives(cfg.objectives)
        configs = objective_configs(names, cfg)
        if task.teacher is None:
            configs = {name: config for name, config in configs.items() if not required({name: config}).teacher}
        needs = required(configs)
        _assert_shared_encoder(cfg, needs)
        task.prepare_inputs(needs)
        targets = Targets(
            prediction=task.teacher.width if needs.prediction else None,
            logits=task.teacher.num_classes if needs.logits else None,
            masked_images=needs.masked_image,
            cls_attention=needs.cls_attention,
        )
        special, start = task.tokenizer.special, task.start
        pretrained = task.load_pretrained and start is None
        student = build_student(cfg, task.tokenizer.vocab_size, targets, pretrained, special.pad)
        if start is not None:
            fill_student(student, start)
        _assert_grids(needs, task.teacher, student)
        if cfg.contrastive_chunk > 0 and any(isinstance(part, _BatchNorm) for part in student.modules()):
            raise UserError(
                f"--contrastive-chunk {cfg.contrastive_chunk}: --image-encoder {cfg.image_encoder} normalizes over the "
                "batch, so that its chunks would not be the whole"
            )
        average = collect_parts({"average": AverageConfig}, cfg)["average"]
        decay = average_decay(average.decay, average.end_decay, cfg.max_update)
        if needs.average and decay(0) == 0:
            wanting = ", ".join(name for name, config in configs.items() if required({name: config}).average)
            raise UserError(
                f"{wanting} compares with the student's moving average: give --average-decay, such as 0.999"
            )
        ema = EmaCopy(student, decay(0)) if decay(0) > 0 else None
        setting = _setting(cfg, task, student)
        objectives = build_objectives(list(configs), cfg, setting)
        heard = heard_objectives(names) if student.audio_encoder is not None else []
        audio_objectives = build_objectives([name for name in heard if name in configs], cfg, setting)
        fused = cfg.student_attention == "fused"
        if task.teacher is not None:
            for group in (objectives, audio_objectives):
                assert_fitted_to(group, task.teacher.identity)
        chunk = cfg.contrastive_chunk
        model = cls(student, objectives, needs, cfg.autocast, ema, decay, chunk, fused, audio_objectives)
        if start is not None:
            fill_objectives(model, start)
        model.leaves_out = task.teacher is None and not task.load_pretrained
        task.bind_average(None if ema is None else ema.module)
        freeze(student, collect_parts({"freeze": FreezeConfig}, cfg)["freeze"])
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
        special: Tensor | None = None,
        masked_text: Tensor | None = None,
        text_targets: Tensor | None = None,
        num_text_targets: int | None = None,
        patch_mask: Tensor | None = None,
        crops: Tensor | None = None,
        sample_ids: Tensor | None = None,
        audio: Tensor | None = None,
        audio_padding_mask: Tensor | None = None,
    ) -> tuple[dict[str, ObjectiveOutput], StudentOutput]:
        """Losses of a batch of B images and T captions, by objective, and the student's output.

        Shapes are those of `emkum.data.image_text.collate`; `targets` are the teacher's for the same images. Losses of
        images and sounds are called as those of images and captions, with HEARD before the name.
        """
        prepare_attention(self, self.autocast, image.device, self.fused_attention)
        captions_of = partial(
            self._captions, padding_mask=padding_mask, groups=groups, chunk=self.chunk * len(text) // len(image)
        )
        average = None
        # Before the student's own pass, so that its activations are gone by then.
        if self.needs.average:
            with torch.no_grad():
                moving = self.ema.module
                average = StudentOutput(
                    self._images(moving, image),
                    captions_of(moving, text),
                    audio=self._sounds(moving, audio, audio_padding_mask),
                )
        student = StudentOutput(
            image=self._images(self.student, image),
            text=captions_of(self.student, text),
            masked_image=self._images(self.student, image, patch_mask) if self.needs.masked_image else None,
            masked_text=captions_of(self.student, masked_text) if self.needs.masked_text else None,
            average=average,
            # There are no further crops at validation.
            crops=None if crops is None else self._images(self.student, crops),
            audio=self._sounds(self.student, audio, audio_padding_mask),
        )
        batch = Batch(image_ids, caption_image, special, text_targets, patch_mask, num_text_targets, sample_ids)
        outputs = {name: objective(student, targets, batch) for name, objective in self.objectives.items()}
        if len(self.audio_objectives) > 0:
            outputs |= self._losses_of_sounds(student, targets, batch, audio_padding_mask)
        return outputs, student

    def _losses_of_sounds(
        self, student: StudentOutput, targets: TeacherOutput | None, batch: Batch, padding_mask: Tensor
    ) -> dict[str, ObjectiveOutput]:
        """Of images and sounds, whose padding mask (B, L) is of samples; other arguments as of `Objective.forward`."""
        special = self.student.audio_encoder.token_padding(padding_mask)
        special[:, 0] = True
        batch, heard = batch.with_sounds_for_captions(special), student.with_sounds_for_captions()
        # A sound is to predict what its image gives, as captions do without a target of their own.
        targets = None if targets is None else replace(targets, text_features=None)
        return {HEARD + name: part(heard, targets, batch) for name, part in self.audio_objectives.items()}

    def _images(self, student: ImageTextStudent, images: Tensor, patch_mask: Tensor | None = None) -> ModalityOutput:
        """Images through a student, in training in chunks."""

        def encode(pixels: Tensor, masked: Tensor | None) -> ModalityOutput:
            with self.autocast.context(images.device, enabled=self.training):
                return student.encode_image(pixels, masked)

        if not self._is_chunked(self.chunk, len(images)):
            return encode(images, patch_mask)
        masks = [None] * len(images) if patch_mask is None else patch_mask.split(self.chunk)
        pieces = list(zip(images.split(self.chunk), masks, strict=False))
        return encode_in_chunks(encode, pieces, student, keep_tokens=self.needs.tokens)

    def _captions(
        self,
        student: ImageTextStudent,
        text: Tensor,
        padding_mask: Tensor,
        groups: list[tuple[int, int]] | None,
        chunk: int = 0,
    ) -> ModalityOutput:
        """Captions through a student, likewise."""

        def encode(ids: Tensor, padding: Tensor, groups: list[tuple[int, int]] | None = None) -> ModalityOutput:
            with self.autocast.context(text.device, enabled=self.training):
                return student.encode_text(ids, padding, groups)

        if not self._is_chunked(chunk, len(text)):
            return encode(text, padding_mask, groups)
        places = pieces_of_groups(groups or [tuple(text.shape)], chunk)
        pieces = [(text[rows, :length], padding_mask[rows, :length]) for rows, length in places]
        return encode_in_chunks(encode, pieces, student, text.shape[1], self.needs.tokens, padding_mask)

    def _sounds(
        self, student: ImageTextStudent, audio: Tensor | None, padding_mask: Tensor | None
    ) -> ModalityOutput | None:
        """Sounds through a student, likewise; None where it hears none."""
        if student.audio_encoder is None:
            return None

        def encode(samples: Tensor, padding: Tensor) -> ModalityOutput:
            with self.autocast.context(audio.device, enabled=self.training):
                return student.encode_audio(samples, padding)

        if not self._is_chunked(self.chunk, len(audio)):
            return encode(audio, padding_mask)
        pieces = list(zip(audio.split(self.chunk), padding_mask.split(self.chunk), strict=True))
        hidden = student.audio_encoder.token_padding(padding_mask)
        return encode_in_chunks(encode, pieces, student, keep_tokens=self.needs.tokens, padding_mask=hidden)

    def _is_chunked(self, chunk: int, rows: int) -> bool:
        return 0 < chunk < rows and self.training

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Called by fairseq before it loads a checkpoint strictly."""
        super().upgrade_state_dict_named(state_dict, name)
        if self.leaves_out:
            own = self.state_dict()
            for key in [key for key in state_dict if key not in own and key.startswith(_OF_A_TEACHER)]:
                del state_dict[key]

    def begin_update(self, num_updates: int) -> None:
        """Let the average follow, and the objectives move what moves once an update."""
        decay = self.decay(num_updates)
        if self.ema is not None:
            self.ema.follow(self.student, num_updates, decay)
        for objective in (*self.objectives.values(), *self.audio_objectives.values()):
            objective.begin_update(num_updates, decay)


# Of a checkpoint, what is there for a teacher's sake.
_OF_A_TEACHER = (
    "objectives.",
    "audio_objectives.",
    "student.heads.prediction.",
    "student.heads.logits.",
    "student.mask_token",
)


def _assert_shared_encoder(cfg: Any, needs: Requirements) -> None:
    """Raise UserError where an objective needs what this kind of shared encoder does not give."""
    if needs.tokens and cfg.shared_kind == "mlp":
        raise UserError(
            "--shared-kind mlp gives the CLS token alone; an objective here needs all tokens: choose blocks"
        )
    if needs.hidden and cfg.shared_kind == "none":
        raise UserError("--itc-layers hidden needs a shared encoder: --shared-kind blocks or mlp, not none")


def _assert_grids(needs: Requirements, teacher: Any, student: ImageTextStudent) -> None:
    """Raise UserError where patches are compared one by one and student and teacher have different ones."""
    if not (needs.patch_grid and needs.patches) or teacher is None or teacher.grid is None:
        return
    own, theirs = count_image_tokens(student.image_encoder) - 1, teacher.grid[0] * teacher.grid[1]
    if own != theirs:
        raise UserError(
            f"an objective compares patches one by one; the student has {own} and the teacher {theirs}: change "
            "--image-size, --image-patch-size or --teacher-image-size"
        )


def _setting(cfg: Any, task: Any, student: ImageTextStudent) -> Setting:
    teacher = task.teacher
    return Setting(
        width=student.width,
        contrast_width=student.contrast_width,
        vocab_size=task.tokenizer.vocab_size,
        num_images=task.num_train_images,
        max_updates=max(0, cfg.max_update),
        target_width=0 if teacher is None else teacher.width or student.width,
        num_classes=0 if teacher is None else teacher.num_classes,
        patch_width=0 if teacher is None else teacher.patch_width,
        num_masked_patches=task.masking_of(student),
    )
