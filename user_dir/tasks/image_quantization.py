"""Task `image_quantization`: images through a frozen teacher, for a model that makes codes of its features."""

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional

import torch
from fairseq.tasks import register_task

from emkum.data.augment import Augment, AugmentConfig, generator, seeded
from emkum.data.images import ImageCropConfig, ImageDataset, collate
from emkum.data.order import OrderConfig
from emkum.data.transforms import ImageTransform
from emkum.errors import UserError
from emkum.models.teacher_builders import FORMS, assert_reads_images, build_teacher
from emkum.options import collect_parts
from emkum.teachers.base import TeacherConfig, TeacherInput, reads_captions

from ..config import flat_dataclass
from ..datasets import EpochDataset
from ..prepared_data import PreparedDataConfig, PreparedDataTask

logger = logging.getLogger(__name__)

TASK_PARTS = {"crop": ImageCropConfig, "augment": AugmentConfig, "order": OrderConfig, "teacher": TeacherConfig}


@dataclass
class _Base(PreparedDataConfig):
    teacher: Optional[str] = field(default=None, metadata={"help": f"frozen teacher: {', '.join(FORMS)}"})


ImageQuantizationConfig = flat_dataclass("ImageQuantizationConfig", TASK_PARTS, base=_Base)


@register_task("image_quantization", dataclass=ImageQuantizationConfig)
class ImageQuantizationTask(PreparedDataTask):
    """Feeds what a teacher makes of random crops.

    The teacher lives here, outside every module that is wrapped or saved.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        parts = collect_parts(TASK_PARTS, cfg)
        self.crop, self.augment, self.order = parts["crop"], parts["augment"], parts["order"]
        if not cfg.teacher:
            raise UserError(f"task image_quantization needs --teacher: {', '.join(FORMS)}")
        # The model starts from the same weights whether its teacher is live or cached: making one draws from the
        # generators.
        with seeded(generator(cfg.seed)):
            self.teacher = build_teacher(cfg.teacher, parts["teacher"])
        assert_reads_images(self.teacher, cfg.teacher)
        if self.teacher.patch_width == 0:
            raise UserError(f"task image_quantization needs a teacher with patch features; {cfg.teacher} gives none")
        if reads_captions(self.teacher):
            raise UserError(f"--teacher-target {parts['teacher'].target}: here are no captions; leave it at image")
        logger.info("teacher: %s", self.teacher.identity)

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> "ImageQuantizationTask":
        return cls(cfg)

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> None:
        samples = self.open_samples(split, require_captions=False)
        training = split == "train"
        # A cached teacher looks at no pixels: the smallest crop will do.
        size = max(1, self.teacher.image_size)
        transform = ImageTransform(size, *((self.crop.min_scale, self.crop.flip) if training else ()))
        dataset = ImageDataset(samples, transform, self.cfg.seed, Augment(self.augment) if training else None)
        # Crops do not repeat: of a cache, the centered one is a target of any.
        self.teacher.open_split(split, samples.content_hash(), {"views": 0})
        gather = partial(collate, split=split)
        self.datasets[split] = EpochDataset(dataset, gather, training, self.order)
        if training:
            self.record_run(samples.content_hash())

    def train_step(self, sample: dict[str, Any], *arguments: Any, **options: Any) -> tuple:
        return super().train_step(self._with_targets(sample), *arguments, **options)

    def valid_step(self, sample: dict[str, Any], *arguments: Any, **options: Any) -> tuple:
        return super().valid_step(self._with_targets(sample), *arguments, **options)

    def _with_targets(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A batch whose input is what the teacher makes of its images."""
        ids = sample["id"]
        seen = TeacherInput(sample["net_input"]["image"], ids, torch.full_like(ids, -1), sample["split"])
        return sample | {"net_input": {"targets": self.teacher(seen)}}
