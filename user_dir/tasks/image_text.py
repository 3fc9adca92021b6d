"""Task `image_text`: owns the pairs, the tokenizer and the teacher; scores retrieval at every validation."""

import logging
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import isqrt
from pathlib import Path
from typing import Any, Optional

from fairseq.logging import metrics
from fairseq.tasks import register_task
from omegaconf import II, open_dict

from emkum.data.augment import Augment, AugmentConfig, generator, seeded
from emkum.data.image_text import CaptionConfig, ImageTextDataset, MultiCropConfig, collate
from emkum.data.masking import BlockMasking, PatchMaskingConfig, TextMaskingConfig, assert_mask_token
from emkum.data.order import OrderConfig
from emkum.data.shards import available_splits
from emkum.data.sounds import SoundConfig
from emkum.data.tokenizers import Tokenizer, copy_tokenizer, load_tokenizer
from emkum.data.transforms import CropConfig, ImageTransform
from emkum.distributed import all_gather_rows, rank, world_size
from emkum.errors import UserError
from emkum.layers.token_types import TokenTypes
from emkum.models.builders import count_image_tokens
from emkum.models.encoder_builders import NO_AUDIO
from emkum.models.student_start import StudentStart, assert_same_tokenizer, read_start
from emkum.models.teacher_builders import FORMS, assert_reads_images, build_teacher
from emkum.objectives import Requirements, assert_teacher_gives, objective_configs, parse_objectives
from emkum.options import collect_parts
from emkum.outputs import StudentOutput, TeacherOutput
from emkum.teachers.base import SELF, TeacherConfig, TeacherInput, reads_captions
from emkum.teachers.encoder_teacher import SelfTeacher

from ..config import flat_dataclass
from ..datasets import EpochDataset
from ..meters import FeatureChunk, RetrievalScores
from ..prepared_data import PreparedDataConfig, PreparedDataTask
from ..zero_shot import ZeroShotConfig, ZeroShotScores

logger = logging.getLogger(__name__)

TASK_PARTS = {
    "crop": CropConfig,
    "augment": AugmentConfig,
    "caption": CaptionConfig,
    "order": OrderConfig,
    "multi_crop": MultiCropConfig,
    "text_mask": TextMaskingConfig,
    "patch_mask": PatchMaskingConfig,
    "sound": SoundConfig,
    "teacher": TeacherConfig,
    "zero_shot": ZeroShotConfig,
}


@dataclass
class _Base(PreparedDataConfig):
    teacher: Optional[str] = field(
        default=None,
        metadata={"help": f"frozen teacher: {', '.join(FORMS)}, or {SELF} (a moving average); empty = none"},
    )
    data_fraction: float = field(
        default=1.0, metadata={"help": "part of each folder's training images to use, the same ones in each epoch"}
    )
    batch_size_valid: Optional[int] = II("dataset.batch_size_valid")
    num_workers: int = II("dataset.num_workers")


ImageTextConfig = flat_dataclass("ImageTextConfig", TASK_PARTS, base=_Base)


@register_task("image_text", dataclass=ImageTextConfig)
class ImageTextTask(PreparedDataTask):
    """Image-text training with an optional frozen teacher.

    The teacher lives here, outside every module that is wrapped or saved.
    """

    def __init__(self, cfg: Any, load_pretrained: bool = True) -> None:
        if not 0 < cfg.data_fraction <= 1:
            raise UserError(f"--data-fraction {cfg.data_fraction:g}: want more than 0, and at most 1")
        super().__init__(cfg)
        parts = collect_parts(TASK_PARTS, cfg)
        self.crops, self.augment, self.captions = parts["crop"], parts["augment"], parts["caption"]
        self.order, self.teacher_config = parts["order"], parts["teacher"]
        self.sounds, self.hears = parts["sound"], False
        self.multi_crop, self.text_mask, self.patch_mask = parts["multi_crop"], parts["text_mask"], parts["patch_mask"]
        # What the objectives want of each sample beside images and captions; known once the model is built.
        self.needs = Requirements()
        self.patch_masking: BlockMasking | None = None
        self.tokenizer = load_tokenizer(self.captions.tokenizer or self.folders[0])
        self.load_pretrained = load_pretrained
        # The student that the run starts from, while the model is built; None = none.
        self.start: StudentStart | None = None
        # By which the teacher reads captions; None where it reads none.
        self.teacher_tokenizer = None
        self.image_size = 0
        self.retrieval = RetrievalScores()
        self.zero_shot_config = parts["zero_shot"]
        # Of the token types' LayerScale, at the beginning of a validation.
        self._scales: dict[str, float] = {}

    @classmethod
    def setup_task(cls, cfg: Any, from_checkpoint: bool = False, **kwargs: Any) -> "ImageTextTask":
        return cls(cfg, load_pretrained=not from_checkpoint)

    @cached_property
    def num_train_images(self) -> int:
        """Images of the training data; 0 where there are none."""
        if "train" not in available_splits(self.folders[0]):
            return 0
        return len(self.open_samples("train", fraction=self.cfg.data_fraction))

    @cached_property
    def zero_shot(self) -> ZeroShotScores | None:
        """Scores of a set with classes; None without `--zero-shot-data`. Opened with the first split: a checkpoint is
        loaded without it."""
        return ZeroShotScores.build(self.zero_shot_config, self.tokenizer, self.captions.max_tokens)

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        names = parse_objectives(cfg.objectives)
        if self.load_pretrained and cfg.init_from:
            self.start = read_start(cfg.init_from)
            assert_same_tokenizer(self.tokenizer, self.start)
            # The checkpoint's own options rebuild the student, without the source.
            with open_dict(cfg):
                cfg.update(self.start.options)
        self.image_size = cfg.image_size
        self.hears = (cfg.audio_encoder or NO_AUDIO) != NO_AUDIO
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
        # A checkpoint is scored without its teacher, too: what needs one is left out.
        if self.teacher is not None or not from_checkpoint:
            assert_teacher_gives(objective_configs(names, cfg), self._offers(), self.cfg.teacher or ", ".join(FORMS))
        if self.captions.max_tokens > cfg.text_max_positions:
            raise UserError(
                f"--caption-max-tokens {self.captions.max_tokens} exceeds --text-max-positions {cfg.text_max_positions}"
            )
        model = super().build_model(cfg, from_checkpoint)
        self.start = None
        return model

    def prepare_inputs(self, needs: Requirements) -> None:
        """Give the objectives what they need of each sample.

        Raises:
            UserError: options that make it are missing.
        """
        if needs.crops and self.multi_crop.number == 0:
            raise UserError("an objective compares further crops of each image: give --multi-crop-number")
        if needs.masked_text:
            assert_mask_token(self.tokenizer)
        self.needs = needs

    def masking_of(self, student: Any) -> int:
        """Patches that are masked in each image for this student; 0 where none are.

        Raises:
            UserError: its image encoder has no square grid of patches.
        """
        if not self.needs.masked_image:
            return 0
        patches = count_image_tokens(student.image_encoder) - 1
        side = isqrt(patches)
        number = self.patch_mask.number_of(patches)
        if side * side != patches or number == 0:
            raise UserError(f"--patch-mask-ratio {self.patch_mask.ratio}: nothing to mask in {patches} patches")
        block = min(self.patch_mask.min_block, number)
        self.patch_masking = BlockMasking((side, side), number, block, self.patch_mask.min_aspect)
        return number

    def _offers(self) -> Requirements | None:
        """What the teacher gives; None without a teacher."""
        if self.teacher is None:
            return None
        return Requirements(features=True, logits=self.teacher.num_classes > 0, patches=self.teacher.patch_width > 0)

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

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> None:
        samples = self.open_samples(split, fraction=self.cfg.data_fraction)
        training = split == "train"
        if self.zero_shot is not None:
            logger.info("zero-shot classification: %s", self.zero_shot)
        if training and self.captions.per_image == 0 and world_size() > 1:
            raise UserError(
                "--caption-per-image 0: on several devices batches need equal numbers of captions; give one"
            )
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
            text_masking=self.text_mask if self.needs.masked_text else None,
            patch_masking=self.patch_masking,
            multi_crop=self.multi_crop if training and self.needs.crops else None,
            sounds=self.sounds if self.hears else None,
        )
        if self.teacher is not None:
            self.teacher.open_split(split, samples.content_hash(), dataset.describe_crops())
        gather = partial(collate, num_groups=self.captions.groups, pad=self.tokenizer.special.pad)
        if self.teacher_tokenizer is not None:
            gather = partial(gather, teacher_pad=self.teacher_tokenizer.special.pad)
        self.datasets[split] = EpochDataset(dataset, gather, training, self.order)
        if training:
            self.record_run(samples.content_hash())
            if rank() == 0:
                copy_tokenizer(self.tokenizer, Path(self.cfg.save_dir) / "tokenizer")

    def student_input(self, sample: dict[str, Any]) -> dict[str, Any]:
        """What the model reads of a batch."""
        patch_mask = sample["patch_mask"]
        return {
            **sample["net_input"],
            "special": sample["special"],
            "masked_text": sample["masked_text"],
            "text_targets": sample["masked_text_targets"],
            "num_text_targets": sample["num_text_targets"],
            "patch_mask": None if patch_mask is None else patch_mask.flatten(1),
            "crops": sample["crops"],
            "sample_ids": sample["id"],
        }

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
                student.image.features.float(),
                ids[sample["net_input"]["caption_image"]],
                student.text.features.float(),
            )
        )
        self.retrieval.add(
            sample["split"], [FeatureChunk(*(p.cpu() for p in rank)) for rank in zip(*parts, strict=True)]
        )

    def valid_step(self, sample: dict[str, Any], model: Any, criterion: Any) -> tuple:
        output = super().valid_step(sample, model, criterion)
        # Once a validation, however many sets it has; all devices have the same number of batches.
        if self.zero_shot is not None and self.zero_shot.figures is None:
            self.zero_shot.score(model.student, self.image_size, self.cfg.batch_size_valid, self.cfg.num_workers)
        return output

    def begin_valid_epoch(self, epoch: int, model: Any) -> None:
        self.retrieval.start("")
        if self.zero_shot is not None:
            self.zero_shot.figures = None
        types = [layer for layer in model.student.modules() if isinstance(layer, TokenTypes)]
        found = types[0].scale_statistics() if types else {}
        self._scales = {name: float(value) for name, value in found.items()}

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        super().reduce_metrics(logging_outputs, criterion)
        if not criterion.training:
            self.retrieval.log(metrics)
            if self.zero_shot is not None:
                self.zero_shot.log(metrics)
            for name, value in self._scales.items():
                metrics.log_scalar(f"token_type_scale_{name}", value, weight=0, round=6)
