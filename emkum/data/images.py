"""Images without captions, for self-supervised pretraining. Plain PyTorch: `user_dir` adapts it to fairseq."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emkum.data.shards import ShardedSamples
from emkum.data.transforms import ImageTransform


@dataclass
class ImageCropConfig:
    min_scale: float = field(
        default=0.2, metadata={"help": "smallest part of an image's area that a random training crop keeps; 1 = center"}
    )
    flip: bool = field(default=False, metadata={"help": "mirror half of the training crops"})


@dataclass
class ImageItem:
    """One image: its index in the split, and (3, S, S) uint8."""

    id: int
    image: Tensor


class ImageDataset(torch.utils.data.Dataset):
    """Crops of images from tar shards.

    Args:
        samples: one split.
        transform: the crop; where it is random, it derives from (seed, epoch, index) alone.
        seed: of the crops.
    """

    def __init__(self, samples: ShardedSamples, transform: ImageTransform, seed: int = 1) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed
        self.epoch = 1

    def __len__(self) -> int:
        return len(self.samples)

    def set_epoch(self, epoch: int) -> None:
        """Choose the crops of an epoch, counted from 1."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> ImageItem:
        rng = np.random.default_rng((self.seed, self.epoch, int(index)))
        return ImageItem(int(index), self.transform(self.samples[int(index)].image, rng))


def collate(items: list[ImageItem]) -> dict[str, Any]:
    """Stack items to a batch of B images.

    Returns:
        id: (B,) int64. net_input: image (B, 3, S, S) uint8. nsentences, ntokens: B. Empty for no items.
    """
    if not items:
        return {}
    return {
        "id": torch.tensor([item.id for item in items]),
        "net_input": {"image": torch.stack([item.image for item in items])},
        "nsentences": len(items),
        "ntokens": len(items),
    }
