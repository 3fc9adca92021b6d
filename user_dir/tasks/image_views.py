"""Task `image_views`: several crops of each image, for self-supervised learning from views."""

from dataclasses import dataclass, field
from typing import Any

from fairseq.tasks import register_task

from emkum.data.augment import Augment, AugmentConfig, MultiCrop
from emkum.data.image_text import MultiCropConfig
from emkum.data.images import ImageDataset, ImageItem, collate
from emkum.data.order import OrderConfig
from emkum.data.transforms import ImageTransform
from emkum.errors import UserError
from emkum.options import collect_parts

from ..config import flat_dataclass
from ..datasets import EpochDataset
from ..prepared_data import PreparedDataConfig, PreparedDataTask


@dataclass
class ViewConfig:
    min_scale: float = field(
        default=0.4, metadata={"help": "smallest part of an image's area that either of both large crops keeps"}
    )
    flip: bool = field(default=False, metadata={"help": "mirror half of all crops"})


TASK_PARTS = {"crop": ViewConfig, "multi_crop": MultiCropConfig, "augment": AugmentConfig, "order": OrderConfig}

ImageViewsConfig = flat_dataclass("ImageViewsConfig", TASK_PARTS, base=PreparedDataConfig)


@register_task("image_views", dataclass=ImageViewsConfig)
class ImageViewsTask(PreparedDataTask):
    """Feeds two large crops of each image and `--multi-crop-number` small ones, all resized alike."""

    def __init__(self, cfg: Any, load_pretrained: bool = True) -> None:
        super().__init__(cfg)
        parts = collect_parts(TASK_PARTS, cfg)
        self.crop, self.small = parts["crop"], parts["multi_crop"]
        self.augment, self.order = parts["augment"], parts["order"]
        self.load_pretrained = load_pretrained
        self.image_size = 0

    @classmethod
    def setup_task(cls, cfg: Any, from_checkpoint: bool = False, **kwargs: Any) -> "ImageViewsTask":
        return cls(cfg, load_pretrained=not from_checkpoint)

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        if "dino_prototypes" not in cfg or "image_encoder" not in cfg or "text_encoder" in cfg:
            raise UserError("task image_views trains --arch dino_image alone")
        if cfg.dino_crops != (self.small.number > 0):
            raise UserError("--dino-crops and --multi-crop-number belong together: give both or neither")
        self.image_size = cfg.image_size
        return super().build_model(cfg, from_checkpoint)

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> None:
        samples = self.open_samples(split, require_captions=False)
        training = split == "train"
        # Validation compares the same views each time: its epoch is the first one always.
        large = ImageTransform(self.image_size, self.crop.min_scale, self.crop.flip)
        small = ImageTransform(self.image_size, self.small.min_scale, self.crop.flip, self.small.max_scale)
        augments = [Augment(self.augment)] * (2 + self.small.number) if training else []
        views = MultiCrop(large, small, num_local=self.small.number, augments=augments)
        dataset = ImageDataset(samples, views, self.cfg.seed)
        self.datasets[split] = EpochDataset(dataset, _collate, training, self.order)
        if training:
            self.record_run(samples.content_hash())


def _collate(items: list[ImageItem]) -> dict[str, Any]:
    """A batch whose input is all views."""
    batch = collate(items)
    return batch | {"net_input": {"views": batch.pop("views")}} if batch else batch
