"""Task `image_pretraining`: images alone, for a model that brings its own losses."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, OmegaConf, open_dict

from emkum.data.images import ImageCropConfig, ImageDataset, collate
from emkum.data.shards import available_splits, open_split
from emkum.data.transforms import ImageTransform
from emkum.distributed import rank
from emkum.errors import UserError
from emkum.options import collect_parts
from emkum.provenance import package_versions, write_json

from ..config import flat_dataclass
from ..datasets import EpochDataset
from .image_text import _refuse_half_precision_on_cpu

TASK_PARTS = {"crop": ImageCropConfig}


@dataclass
class _Base(FairseqDataclass):
    data: str = field(default="", metadata={"help": "folder that `emkum prepare` wrote; captions are not needed"})
    seed: int = II("common.seed")
    save_dir: str = II("checkpoint.save_dir")


ImagePretrainingConfig = flat_dataclass("ImagePretrainingConfig", TASK_PARTS, base=_Base)


@register_task("image_pretraining", dataclass=ImagePretrainingConfig)
class ImagePretrainingTask(FairseqTask):
    """Feeds random crops; the model's option `d2v_input_size` gives their size."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        with open_dict(cfg):
            # Read by fairseq's iterator factory. New batches and new workers each epoch: kept workers would go on
            # drawing the first epoch's crops.
            cfg.rebuild_batches, cfg.reuse_dataloader, cfg.persistent_workers = True, False, False
        if not available_splits(cfg.data):
            raise UserError(f"{cfg.data or '(no folder)'} holds no prepared split; make one with `emkum prepare`")
        self.crop = collect_parts(TASK_PARTS, cfg)["crop"]
        self.image_size = 0

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> "ImagePretrainingTask":
        _refuse_half_precision_on_cpu(cfg)
        return cls(cfg)

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        if "d2v_input_size" not in cfg:
            raise UserError("task image_pretraining trains --arch data2vec2_image alone")
        self.image_size = cfg.d2v_input_size
        return super().build_model(cfg, from_checkpoint)

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> None:
        samples = open_split(self.cfg.data, split, require_captions=False)
        training = split == "train"
        transform = ImageTransform(self.image_size, *((self.crop.min_scale, self.crop.flip) if training else ()))
        self.datasets[split] = EpochDataset(ImageDataset(samples, transform, self.cfg.seed), collate, training)
        if training and rank() == 0:
            record = {
                "options": OmegaConf.to_container(self.cfg._get_root(), resolve=True, enum_to_str=True),
                "versions": package_versions(),
                "data": {"folder": str(Path(self.cfg.data).resolve()), "train_hash": samples.content_hash()},
            }
            write_json(Path(self.cfg.save_dir) / "run.json", record)

    def max_positions(self) -> None:
        return None

    @property
    def source_dictionary(self) -> None:
        return None

    target_dictionary = source_dictionary
