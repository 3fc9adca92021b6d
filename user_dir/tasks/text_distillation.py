"""Task `text_distillation`: all layers of a text teacher into a student that starts from some of them."""

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional

import torch
from fairseq.tasks import register_task

from emkum.data.order import OrderConfig
from emkum.data.text_mixture import assert_same_tokenizer
from emkum.data.tokenizers import load_tokenizer
from emkum.errors import UserError
from emkum.models.encoder_sources import TEXT_PARTS, load_text_encoder
from emkum.objectives.patch_distillation import distillation_targets
from emkum.options import collect_parts
from emkum.teachers.base import TEXT, TeacherConfig, TeacherInput

from ..config import flat_dataclass
from ..datasets import EpochDataset
from ..layer_distillation import TEACHER_HELP, assert_comparable, build_layer_teacher, copy_start, load_start
from ..text_data import SampledText, TextDataConfig, TextDataTask, collate

logger = logging.getLogger(__name__)

TASK_PARTS = {"order": OrderConfig, "teacher": TeacherConfig}


@dataclass
class _Base(TextDataConfig):
    teacher: Optional[str] = field(default=None, metadata={"help": TEACHER_HELP})


TextDistillationConfig = flat_dataclass("TextDistillationConfig", TASK_PARTS, base=_Base)


@register_task("text_distillation", dataclass=TextDistillationConfig)
class TextDistillationTask(TextDataTask):
    """Feeds texts and what a teacher makes of them.

    The teacher lives here, outside every module that is wrapped or saved.
    """

    def __init__(self, cfg: Any, load_pretrained: bool = True) -> None:
        super().__init__(cfg, load_pretrained)
        parts = collect_parts(TASK_PARTS, cfg)
        self.order, self.teacher_config = parts["order"], parts["teacher"]
        self.teacher = build_layer_teacher(cfg.teacher, self.teacher_config, TEXT, cfg.seed)
        logger.info("teacher: %s", self.teacher.identity)
        if self.teacher.tokenizer is not None:
            theirs = load_tokenizer(self.teacher.tokenizer)
            assert_same_tokenizer(self.tokenizer, theirs, self.folders[0], f"--teacher {cfg.teacher}")
        self.max_tokens = 0

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        if "text_encoder" not in cfg or "init_from" not in cfg:
            raise UserError("task text_distillation trains --arch text_student alone")
        start = None
        if self.load_pretrained:
            start = load_start(cfg, self.cfg.teacher, self.teacher_config, TEXT_PARTS, self._load)
        model = super().build_model(cfg, from_checkpoint)
        if start is not None:
            copy_start(model.encoder, start, cfg.text_layer_choice)
        assert_comparable(model.encoder, self.teacher, self.cfg.teacher)
        self.max_tokens = min(model.encoder.max_positions, self.teacher.max_tokens)
        return model

    def _load(self, source: str, weights: str) -> Any:
        return load_text_encoder(source, str(self.tokenizer.source))

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> None:
        blocks = self.open_blocks(split, self.max_tokens)
        dataset = SampledText(blocks, self.tokenizer, seed=self.cfg.seed)
        gather = partial(collate, pad=self.tokenizer.special.pad, split=split)
        self.datasets[split] = EpochDataset(dataset, gather, split == "train", self.order)
        if split == "train":
            self.record_run(blocks.content_hash())
            self.keep_tokenizer()

    def train_step(self, sample: dict[str, Any], *arguments: Any, **options: Any) -> tuple:
        return super().train_step(self._with_targets(sample), *arguments, **options)

    def valid_step(self, sample: dict[str, Any], *arguments: Any, **options: Any) -> tuple:
        return super().valid_step(self._with_targets(sample), *arguments, **options)

    def _with_targets(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A batch with the teacher's tokens."""
        inputs, ids = sample["net_input"], sample["id"]
        text, padding = inputs["text"], inputs["padding_mask"]
        seen = TeacherInput(None, ids, torch.full_like(ids, -1), sample["split"], text, padding)
        targets = distillation_targets(self.teacher(seen).layers, text.shape[1], padding, norm_channels=False)
        return sample | {"net_input": inputs | {"targets": targets, "num_tokens": sample["ntokens"]}}
