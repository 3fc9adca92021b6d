"""Task `image_text`: owns the pairs, the tokenizer and the teacher; scores retrieval at every validation."""

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, OmegaConf, open_dict

from emkum.data.image_text import CaptionConfig, ImageTextDataset, collate
from emkum.data.shards import available_splits, open_split
from emkum.data.tokenizers import copy_tokenizer, load_tokenizer
from emkum.data.transforms import CropConfig, ImageTransform
from emkum.distributed import all_gather_rows, rank
from emkum.errors import UserError
from emkum.models.builders import build_teacher
from emkum.objectives import needs_teacher, parse_objectives
from emkum.options import collect_parts
from emkum.outputs import StudentOutput, TeacherOutput
from emkum.provenance import package_versions, write_json
from emkum.teachers.base import TeacherConfig, TeacherInput

from ..config import flat_dataclass
from ..datasets import EpochDataset
from ..meters import FeatureChunk, log_retrieval

logger = logging.getLogger(__name__)

TASK_PARTS = {"crop": CropConfig, "caption": CaptionConfig, "teacher": TeacherConfig}


@dataclass
class _Base(FairseqDataclass):
    data: str = field(default="", metadata={"help": "folder that `emkum prepare` wrote"})
    tokenizer: Optional[str] = field(
        default=None,
        metadata={"help": "SentencePiece file, or folder with tokenizer.model or GPT-2's files; empty = DATA's own"},
    )
    teacher: Optional[str] = field(
        default=None,
        metadata={"help": "frozen teacher: timm:NAME, data2vec2:FILE, cached:DIR; empty = none"},
    )
    seed: int = II("common.seed")
    save_dir: str = II("checkpoint.save_dir")


ImageTextConfig = flat_dataclass("ImageTextConfig", TASK_PARTS, base=_Base)


@register_task("image_text", dataclass=ImageTextConfig)
class ImageTextTask(FairseqTask):
    """Image-text training with an optional frozen teacher.

    The teacher lives here, outside every module that is wrapped or saved.
    """

    def __init__(self, cfg: Any, load_pretrained: bool = True) -> None:
        super().__init__(cfg)
        with open_dict(cfg):
            # Read by fairseq's iterator factory. New batches and new workers each epoch: kept workers would go on
            # drawing the first epoch's crops.
            cfg.rebuild_batches, cfg.reuse_dataloader, cfg.persistent_workers = True, False, False
        if not available_splits(cfg.data):
            raise UserError(f"{cfg.data or '(no folder)'} holds no prepared split; make one with `emkum prepare`")
        parts = collect_parts(TASK_PARTS, cfg)
        self.crops, self.captions, self.teacher_config = parts["crop"], parts["caption"], parts["teacher"]
        self.tokenizer = load_tokenizer(cfg.tokenizer or Path(cfg.data) / "tokenizer.model")
        self.load_pretrained = load_pretrained
        self.teacher = None
        self.image_size = 0
        self._features: list[FeatureChunk] = []

    @classmethod
    def setup_task(cls, cfg: Any, from_checkpoint: bool = False, **kwargs: Any) -> "ImageTextTask":
        _refuse_half_precision_on_cpu(cfg)
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
        samples = open_split(self.cfg.data, split)
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
        )
        if self.teacher is not None:
            self.teacher.open_split(split, samples.content_hash(), dataset.describe_crops())
        self.datasets[split] = EpochDataset(dataset, partial(collate, num_groups=self.captions.groups), training)
        if training and rank() == 0:
            self._record_run(samples.content_hash())

    def _record_run(self, data_hash: str) -> None:
        """Leave beside the checkpoints what the run was made with."""
        options = OmegaConf.to_container(self.cfg._get_root(), resolve=True, enum_to_str=True)
        record = {
            "options": options,
            "versions": package_versions(),
            "data": {"folder": str(Path(self.cfg.data).resolve()), "train_hash": data_hash},
            "teacher": None if self.teacher is None else self.teacher.identity,
        }
        write_json(Path(self.cfg.save_dir) / "run.json", record)
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
        tensors = (
            ids,
            student.image_features.float(),
            ids[sample["net_input"]["caption_image"]],
            student.text_features.float(),
        )
        self._features.append(FeatureChunk(*(all_gather_rows(tensor).cpu() for tensor in tensors)))

    def begin_valid_epoch(self, epoch: int, model: Any) -> None:
        self._features.clear()

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        super().reduce_metrics(logging_outputs, criterion)
        if not criterion.training and self._features:
            chunks, self._features = self._features, []
            log_retrieval(metrics, chunks)

    def max_positions(self) -> None:
        return None

    @property
    def source_dictionary(self) -> None:
        return None

    target_dictionary = source_dictionary


def _refuse_half_precision_on_cpu(cfg: Any) -> None:
    """fairseq's own half precision on a CPU ends in an assertion of CUDA, or takes the path for TPUs."""
    common = getattr(cfg._get_root(), "common", None)
    if common is None or not common.get("cpu", False):
        return
    wrong = [f"--{name}" for name in ("fp16", "bf16", "amp") if common.get(name, False)]
    if wrong:
        raise UserError(f"{wrong[0]} needs a GPU; on --cpu use float32, or --autocast bfloat16")
