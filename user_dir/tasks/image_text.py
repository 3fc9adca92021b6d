"""Task `image_text`: owns the pairs, the tokenizer and the teacher; scores retrieval at every validation."""

import json
import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional

from fairseq.logging import metrics
from fairseq.tasks import register_task

from emkum.data.augment import Augment, AugmentConfig, generator, seeded
from emkum.data.image_text import CaptionConfig, ImageTextDataset, collate
from emkum.data.order import OrderConfig
from emkum.data.tokenizers import Tokenizer, copy_tokenizer, load_tokenizer
from emkum.data.transforms import CropConfig, ImageTransform
from emkum.distributed import all_gather_rows, rank
from emkum.errors import UserError
from emkum.models.teacher_builders import FORMS, assert_reads_images, build_teacher
from emkum.objectives import needs_teacher, parse_objectives
from emkum.options import collect_parts
from emkum.outputs import StudentOutput, TeacherOutput
from emkum.teachers.base import SELF, TeacherConfig, TeacherInput, reads_captions
from emkum.teachers.encoder_teacher import SelfTeacher

from ..config import flat_dataclass
from ..datasets import EpochDataset
from ..meters import FeatureChunk, RetrievalScores
from ..prepared_data import PreparedDataConfig, PreparedDataTask

logger = logging.getLogger(__name__)

TASK_PARTS = {
    "crop": CropConfig,
    "augment": AugmentConfig,
    "caption": CaptionConfig,
    "order": OrderConfig,
    "teacher": TeacherConfig,
}


@dataclass
class _Base(PreparedDataConfig):
    teacher: Optional[str] = field(
        default=None,
        metadata={"help": f"frozen teacher: {', '.join(FORMS)}, or {SELF} (a moving average); empty = none"},
    )


ImageTextConfig = flat_dataclass("ImageTextConfig", TASK_PARTS, base=_Base)


@register_task("image_text", dataclass=ImageTextConfig)
class ImageTextTask(PreparedDataTask):
    """Image-text training with an optional frozen teacher.

    The teacher lives here, outside every module that is wrapped or saved.
    """

    def __init__(self, cfg: Any, load_pretrained: bool = True) -> None:
        super().__init__(cfg)
        parts = collect_parts(TASK_PARTS, cfg)
        self.crops, self.augment, self.captions = parts["crop"], parts["augment"], parts["caption"]
        self.order, self.teacher_config = parts["order"], parts["teacher"]
        self.tokenizer = load_tokenizer(self.captions.tokenizer or self.folders[0])
        self.load_pretrained = load_pretrained
        self.teacher = None
        # By which the teacher reads captions; None where it reads none.
        self.teacher_tokenizer = None
        self.image_size = 0
        self.retrieval = RetrievalScores()

    @classmethod
    def setup_task(cls, cfg: Any, from_checkpoint: bool = False, **kwargs: Any) -> "ImageTextTask":
        return cls(cfg, load_pretrained=not from_checkpoint)

    @property
    def target_width(self) -> int | None:
        """Channels of the teacher's target; 0 = as many as the student has; None without a teacher."""
        return None if self.teacher is None else self.teacher.width

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        names = parse_objectives(cfg.objectives)
        self.image_size = cfg.image_size
        if self.cfg.teacher:
            if self.cfg.teacher == SELF:
                self.teacher = SelfTeacher(cfg.image_size)
            else:
                # The student starts from the same weights whether its teacher is live, cached or none: making one
                # draws from the generators.
                with seeded(generator(self.cfg.seed)):
                    self.teacher = build_teacher(self.cfg.teacher, self.teacher_config)
            assert_reads_images(self.teacher, self.cfg.teacher)
            logger.info("teacher: %s", self.teacher.identity)
            if reads_captions(self.teacher):
                self.teacher_tokenizer = self._tokenizer_of_teacher()
        elif needs_teacher(names) and not from_checkpoint:
            wanting = ", ".join(name for name in names if needs_teacher([name]))
            raise UserError(f"{wanting} needs --teacher: {', '.join(FORMS[:-1])} or {FORMS[-1]}")
        return super().build_model(cfg, from_checkpoint)

    def bind_average(self, average: Any) -> None:
        """The student's moving average, or None, once the model is built."""
        if self.cfg.teacher != SELF or self.teacher is None:
            return
        if average is None:
            raise UserError("--teacher self is the student's moving average: give --average-decay, such as 0.999")
        self.teacher.bind(average)

    def _tokenizer_of_teacher(self) -> Tokenizer:
        if self.teacher.tokenizer is None:
            raise UserError(
                f"--teacher {self.cfg.teacher} comes without the tokenizer that --teacher-target "
                "needs; of beit3:FILE it is beit3.spm, beside the file"
            )
        return load_tokenizer(self.teacher.tokenizer)

    def _assert_same_teacher(self, identity: dict[str, Any] | None) -> None:
        """A run that goes on from its checkpoint goes on with its teacher."""
        folder = Path(self.cfg.save_dir)
        if not (folder / "checkpoint_last.pt").is_file() or not (folder / "run.json").is_file():
            return
        before = json.loads((folder / "run.json").read_text(encoding="utf-8")).get("teacher")
        if before != identity:
            old, new = before or {}, identity or {}
            differing = sorted(key for key in old | new if old.get(key) != new.get(key))
            raise UserError(
                f"{folder} was begun with another teacher (it differs in {', '.join(differing)}); choose another "
                "--save-dir, and --restore-file to start from its checkpoint"
            )

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints keep of the task: which teacher it was."""
        return super().state_dict() | ({} if self.teacher is None else {"teacher": self.teacher.identity})

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> None:
        samples = self.open_samples(split)
        training = split == "train"
        transform = ImageTransform(self.image_size, *((self.crops.min_scale, self.crops.flip) if training else ()))
        dataset = ImageTextDataset(
            samples,
            self.tokenizer,
            transform,
            captions_per_image=self.captions.per_image if training else 0,
            max_tokens=self.captions.max_tokens,
            seed=self.cfg.seed,
            num_views=self.crops.views,
            teacher_size=0 if self.teacher is None else self.teacher.image_size,
            split=split,
            augment=Augment(self.augment) if training else None,
            teacher_tokenizer=self.teacher_tokenizer,
            teacher_max_tokens=0 if self.teacher is None else self.teacher.max_tokens,
        )
        if self.teacher is not None:
            self.teacher.open_split(split, samples.content_hash(), dataset.describe_crops())
        gather = partial(collate, num_groups=self.captions.groups, pad=self.tokenizer.special.pad)
        if self.teacher_tokenizer is not None:
            gather = partial(gather, teacher_pad=self.teacher_tokenizer.special.pad)
        self.datasets[split] = EpochDataset(dataset, gather, training, self.order)
        if training:
            identity = None if self.teacher is None else self.teacher.identity
            self._assert_same_teacher(identity)
            self.record_run(samples.content_hash(), teacher=identity)
            if rank() == 0:
                copy_tokenizer(self.tokenizer, Path(self.cfg.save_dir) / "tokenizer")

    def teacher_targets(self, sample: dict[str, Any]) -> TeacherOutput | None:
        """The teacher's targets for a batch, without gradient; None without a teacher."""
        if self.teacher is None:
            return None
        images = sample["teacher_image"] if sample["teacher_image"] is not None else sample["net_input"]["image"]
        return self.teacher(
            TeacherInput(
                images,
                sample["id"],
                sample["view"],
                sample["split"],
                sample["teacher_text"],
                sample["teacher_padding_mask"],
                sample["net_input"]["caption_image"],
            )
        )

    def collect_features(self, sample: dict[str, Any], student: StudentOutput) -> None:
        """Keep a validation batch's features, of all devices, for the corpus metrics."""
        ids = sample["id"]
        parts = (
            all_gather_rows(tensor.detach())
            for tensor in (
                ids,
                student.image_features.float(),
                ids[sample["net_input"]["caption_image"]],
                student.text_features.float(),
            )
        )
        self.retrieval.add(
            sample["split"], [FeatureChunk(*(p.cpu() for p in rank)) for rank in zip(*parts, strict=True)]
        )

    def begin_valid_epoch(self, epoch: int, model: Any) -> None:
        self.retrieval.start("")

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        super().reduce_metrics(logging_outputs, criterion)
        if not criterion.training:
            self.retrieval.log(metrics)
