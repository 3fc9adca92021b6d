"""Task `image_pretraining`: images alone, for a model that brings its own losses."""

from typing import Any

from fairseq.tasks import register_task

from emkum.data.augment import Augment, AugmentConfig
from emkum.data.images import ImageCropConfig, ImageDataset, collate
from emkum.data.order import OrderConfig
from emkum.data.transforms import ImageTransform
from emkum.errors import UserError
from emkum.options import collect_parts

from ..config import flat_dataclass
from ..datasets import EpochDataset
from ..prepared_data import PreparedDataConfig, PreparedDataTask

TASK_PARTS = {"crop": ImageCropConfig, "augment": AugmentConfig, "order": OrderConfig}


ImagePretrainingConfig = flat_dataclass("ImagePretrainingConfig", TASK_PARTS, base=PreparedDataConfig)


@register_task("image_pretraining", dataclass=ImagePretrainingConfig)
class ImagePretrainingTask(PreparedDataTask):
    """Feeds random crops; the model's option `d2v_input_size` gives their size."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        parts = collect_parts(TASK_PARTS, cfg)
        self.crop, self.augment, self.order = parts["crop"], parts["augment"], parts["order"]
        self.image_size = 0

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> "ImagePretrainingTask":
        return cls(cfg)

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        if "d2v_input_size" not in cfg:
            raise UserError("task image_pretraining trains --arch data2vec2_image alone")
        self.image_size = cfg.d2v_input_size
        return super().build_model(cfg, from_checkpoint)

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> None:
        samples = self.open_samples(split, require_captions=False)
        training = split == "train"
        transform = ImageTransform(self.image_size, *((self.crop.min_scale, self.crop.flip) if training else ()))
        augment = Augment(self.augment) if training else None
        dataset = ImageDataset(samples, transform, self.cfg.seed, augment)
        self.datasets[split] = EpochDataset(dataset, collate, training, self.order)
        if training:
            self.record_run(samples.content_hash())
