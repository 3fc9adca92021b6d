"""Task `image_text`: owns the pairs, the tokenizer and the teacher; scores retrieval at every validation."""

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional

from fairseq.logging import metrics
from fairseq.tasks import register_task

from emkum.data.augment import Augment, AugmentConfig
from emkum.data.image_text import CaptionConfig, ImageTextDataset, collate
from emkum.data.order import OrderConfig
from emkum.data.tokenizers import copy_tokenizer, load_tokenizer
from emkum.data.transforms import CropConfig, ImageTransform
from emkum.distributed import all_gather_rows, rank
from emkum.errors import UserError
from emkum.models.builders import build_teacher
from emkum.objectives import needs_teacher, parse_objectives
from emkum.options import collect_parts
from emkum.outputs import StudentOutput, TeacherOutput
from emkum.teachers.base import TeacherConfig, TeacherInput

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
        metadata={"help": "frozen teacher: timm:NAME, data2vec2:FILE, cached:DIR; empty = none"},
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
        self.image_size = 0
        self.retrieval = RetrievalScores()

    @classmethod
    def setup_task(cls, cfg: Any, from_checkpoint: bool = False, **kwargs: Any) -> "ImageTextTask":
        return cls(cfg, load_pretrained=not from_checkpoint)

    @property
    def target_width(self) -> int | None:
        """Channels of the teacher's target; None without a teacher."""
        return None if self.teacher is None else self.teacher.width

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        names = parse_objectives(cfg.objectives)
        self.image_size = cfg.image_size
        if self.cfg.teacher:
            config = self.teacher_config
            self.teacher = build_teacher(self.cfg.teacher, config.weights, config.image_size)
            logger.info("teacher: %s", self.teacher.identity)
        elif needs_teacher(names) and not from_checkpoint:
            wanting = ", ".join(name for name in names if needs_teacher([name]))
            raise UserError(f"{wanting} needs --teacher: timm:NAME, data2vec2:FILE or cached:DIR")
        return super().build_model(cfg, from_checkpoint)

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
        )
        if self.teacher is not None:
            self.teacher.open_split(split, samples.content_hash(), dataset.describe_crops())
        gather = partial(collate, num_groups=self.captions.groups, pad=self.tokenizer.special.pad)
        self.datasets[split] = EpochDataset(dataset, gather, training, self.order)
        if training:
            self.record_run(samples.content_hash(), teacher=None if self.teacher is None else self.teacher.identity)
            if rank() == 0:
                copy_tokenizer(self.tokenizer, Path(self.cfg.save_dir) / "tokenizer")

    def teacher_targets(self, sample: dict[str, Any]) -> TeacherOutput | None:
        """The teacher's targets for a batch, without gradient; None without a teacher."""
        if self.teacher is None:
            return None
        images = sample["teacher_image"] if sample["teacher_image"] is not None else sample["net_input"]["image"]
        return self.teacher(TeacherInput(images, sample["id"], sample["view"], sample["split"]))

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
