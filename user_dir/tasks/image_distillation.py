"""Task `image_distillation`: all layers of an image teacher into a student that starts from some of them."""

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional

import torch
from fairseq.tasks import register_task

from emkum.data.augment import Augment, AugmentConfig
from emkum.data.images import ImageCropConfig, ImageDataset, collate
from emkum.data.order import OrderConfig
from emkum.data.transforms import ImageTransform
from emkum.errors import UserError
from emkum.models.builders import count_image_tokens
from emkum.models.encoder_sources import IMAGE_PARTS, LoadedEncoder, load_image_encoder
from emkum.objectives.patch_distillation import distillation_targets
from emkum.options import collect_parts
from emkum.teachers.base import IMAGE, TeacherConfig, TeacherInput

from ..config import flat_dataclass
from ..datasets import EpochDataset
from ..layer_distillation import TEACHER_HELP, assert_comparable, build_layer_teacher, copy_start, load_start
from ..prepared_data import PreparedDataConfig, PreparedDataTask

logger = logging.getLogger(__name__)

TASK_PARTS = {"crop": ImageCropConfig, "augment": AugmentConfig, "order": OrderConfig, "teacher": TeacherConfig}


@dataclass
class _Base(PreparedDataConfig):
    teacher: Optional[str] = field(default=None, metadata={"help": TEACHER_HELP})


ImageDistillationConfig = flat_dataclass("ImageDistillationConfig", TASK_PARTS, base=_Base)


@register_task("image_distillation", dataclass=ImageDistillationConfig)
class ImageDistillationTask(PreparedDataTask):
    """Feeds random crops of images and what a teacher makes of the same crops.

    The teacher lives here, outside every module that is wrapped or saved.
    """

    def __init__(self, cfg: Any, load_pretrained: bool = True) -> None:
        super().__init__(cfg)
        parts = collect_parts(TASK_PARTS, cfg)
        self.crop, self.augment, self.order = parts["crop"], parts["augment"], parts["order"]
        self.teacher_config = parts["teacher"]
        self.teacher = build_layer_teacher(cfg.teacher, self.teacher_config, IMAGE, cfg.seed)
        logger.info("teacher: %s", self.teacher.identity)
        self.load_pretrained = load_pretrained
        # Tokens of the student, its CLS token included; known once the model is built.
        self.num_tokens = 0

    @classmethod
    def setup_task(cls, cfg: Any, from_checkpoint: bool = False, **kwargs: Any) -> "ImageDistillationTask":
        return cls(cfg, load_pretrained=not from_checkpoint)

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        if "image_encoder" not in cfg or "init_from" not in cfg:
            raise UserError("task image_distillation trains --arch image_student alone")
        start = None
        if self.load_pretrained:
            start = load_start(cfg, self.cfg.teacher, self.teacher_config, IMAGE_PARTS, self._load)
        model = super().build_model(cfg, from_checkpoint)
        if start is not None:
            copy_start(model.encoder, start, cfg.image_layer_choice)
        assert_comparable(model.encoder, self.teacher, self.cfg.teacher)
        self.num_tokens = count_image_tokens(model.encoder)
        return model

    def _load(self, source: str, weights: str) -> LoadedEncoder:
        return load_image_encoder(source, weights, self.teacher.image_size)

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> None:
        samples = self.open_samples(split, require_captions=False)
        training = split == "train"
        random = (self.crop.min_scale, self.crop.flip) if training else ()
        transform = ImageTransform(self.teacher.image_size, *random)
        dataset = ImageDataset(samples, transform, self.cfg.seed, Augment(self.augment) if training else None)
        self.datasets[split] = EpochDataset(dataset, partial(collate, split=split), training, self.order)
        if training:
            self.record_run(samples.content_hash())

    def train_step(self, sample: dict[str, Any], *arguments: Any, **options: Any) -> tuple:
        return super().train_step(self._with_targets(sample), *arguments, **options)

    def valid_step(self, sample: dict[str, Any], *arguments: Any, **options: Any) -> tuple:
        return super().valid_step(self._with_targets(sample), *arguments, **options)

    def _with_targets(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A batch with the teacher's tokens."""
        image, ids = sample["net_input"]["image"], sample["id"]
        seen = TeacherInput(image, ids, torch.full_like(ids, -1), sample["split"])
        targets = distillation_targets(self.teacher(seen).layers, self.num_tokens)
        return sample | {"net_input": {"image": image, "targets": targets}}
