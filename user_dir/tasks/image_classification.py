"""Task `image_classification`: images with labels, mixed for training; accuracy over whole validation sets."""

import math
from typing import Any

import numpy as np
from fairseq import utils
from fairseq.logging import metrics
from fairseq.tasks import register_task
from omegaconf import open_dict

from emkum.data.augment import Augment, AugmentConfig, BatchMixer, MixConfig, generator, seeded
from emkum.data.images import ImageCropConfig, ImageDataset
from emkum.data.labels import LabeledImages, assert_learnable, read_class_names, read_labels
from emkum.data.order import OrderConfig
from emkum.data.transforms import ImageTransform
from emkum.errors import UserError
from emkum.models.encoder_sources import LoadedEncoder
from emkum.options import collect_parts

from ..config import flat_dataclass
from ..datasets import EpochDataset
from ..models.image_classifier import load_start
from ..prepared_data import PreparedDataConfig, PreparedDataTask

TASK_PARTS = {"crop": ImageCropConfig, "augment": AugmentConfig, "mix": MixConfig, "order": OrderConfig}

ImageClassificationConfig = flat_dataclass("ImageClassificationConfig", TASK_PARTS, base=PreparedDataConfig)


@register_task("image_classification", dataclass=ImageClassificationConfig)
class ImageClassificationTask(PreparedDataTask):
    """Fine-tuning of an image encoder on a prepared set with classes.

    Attributes:
        class_names: by label.
        start: the encoder that the model starts from, while it is built; None = the options alone say what it is.
        identity: of that encoder, as plain data.
        load_pretrained: whether the model is to read weights; False where a checkpoint of all of it follows.
    """

    def __init__(self, cfg: Any, load_pretrained: bool = True) -> None:
        super().__init__(cfg)
        parts = collect_parts(TASK_PARTS, cfg)
        self.crop, self.augment, self.order = parts["crop"], parts["augment"], parts["order"]
        self.class_names = read_class_names(self.folders[0])
        for folder in self.folders[1:]:
            if read_class_names(folder) != self.class_names:
                raise UserError(f"{folder} has other classes than {self.folders[0]}: choose sets with the same ones")
        self.mixer = BatchMixer(parts["mix"], len(self.class_names))
        self.load_pretrained = load_pretrained
        self.start: LoadedEncoder | None = None
        self.identity: dict[str, Any] | None = None
        # Labels of the splits to score, which fairseq loads before the one to train on.
        self._asked: dict[str, np.ndarray] = {}
        self.identity: dict[str, Any] | None = None
        self.image_size = 0

    @classmethod
    def setup_task(cls, cfg: Any, from_checkpoint: bool = False, **kwargs: Any) -> "ImageClassificationTask":
        return cls(cfg, load_pretrained=not from_checkpoint)

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        if "init_from" not in cfg:
            raise UserError("task image_classification trains --arch image_classifier alone")
        if self.load_pretrained:
            # Encoders of one architecture get the same head, whatever loading them drew from the generators.
            with seeded(generator(self.cfg.seed)), open_dict(cfg):
                self.start = load_start(cfg)
            self.identity = None if self.start is None else self.start.identity
        model = super().build_model(cfg, from_checkpoint)
        self.start = None
        self.image_size = model.encoder.image_size
        return model

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints keep of the task: the classes."""
        return super().state_dict() | {"class_names": self.class_names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Raises:
            UserError: the checkpoint is of other classes than the data.
        """
        before = state_dict.get("class_names", self.class_names)
        if before != self.class_names:
            raise UserError(
                f"the checkpoint tells {len(before)} classes from {before[0]!r} on; {self.folders[0]} has "
                f"{len(self.class_names)}, from {self.class_names[0]!r} on"
            )
        super().load_state_dict(state_dict)

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> None:
        samples = self.open_samples(split, require_captions=False)
        training = split == "train"
        labels = read_labels(samples, len(self.class_names))
        if training:
            asked = np.concatenate([labels[:0], *self._asked.values()])
            assert_learnable(labels, asked, self.class_names, self.cfg.data)
        else:
            self._asked[split] = labels
        transform = ImageTransform(self.image_size, *((self.crop.min_scale, self.crop.flip) if training else ()))
        images = ImageDataset(samples, transform, self.cfg.seed, Augment(self.augment) if training else None)
        dataset = LabeledImages(images, labels)
        self.datasets[split] = EpochDataset(dataset, dataset.collate, training, self.order)
        if training:
            self.record_run(samples.content_hash(), encoder=self.identity, class_names=self.class_names)

    def train_step(self, sample: dict[str, Any], *arguments: Any, **options: Any) -> tuple:
        return super().train_step(self._mixed(sample), *arguments, **options)

    def _mixed(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A batch with its images mixed and its labels as shares of the classes."""
        inputs = sample["net_input"]
        images, labels = self.mixer(inputs["image"].float(), inputs["labels"], sample["key"])
        return sample | {"net_input": {"image": images, "labels": labels}}

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        super().reduce_metrics(logging_outputs, criterion)
        log_accuracy(logging_outputs)


def log_accuracy(logging_outputs: list[dict[str, Any]]) -> None:
    """Log `top1` and `top5`, percent of all images that an aggregator has seen, of all devices.

    They are derived from sums, so that batches of any size count right. fairseq leaves out of the logs what a device
    without data of its own did with a repeated batch.
    """
    sums = {
        name: utils.item(sum(log.get(name, 0) for log in logging_outputs)) for name in ("_images", "_top1", "_top5")
    }
    if sums["_images"] == 0:
        return
    for name, value in sums.items():
        metrics.log_scalar(name, value)
    for name in ("top1", "top5"):
        metrics.log_derived(name, lambda meters, key=f"_{name}": _percent(meters[key].sum, meters["_images"].sum))


def _percent(part: float, whole: float) -> float:
    return round(100 * part / whole, 3) if whole > 0 else math.nan
