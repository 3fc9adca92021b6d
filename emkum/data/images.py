"""Images without captions, for self-supervised pretraining. Plain PyTorch: `user_dir` adapts it to fairseq."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from emkum.data.augment import Augment, MultiCrop, augmented_views, generator
from emkum.data.mixture import MixedSamples
from emkum.data.shards import ShardedSamples
from emkum.data.transforms import ImageTransform, stack_crops


@dataclass
class ImageCropConfig:
    min_scale: float = field(
        default=0.2, metadata={"help": "smallest part of an image's area that a random training crop keeps; 1 = center"}
    )
    flip: bool = field(default=False, metadata={"help": "mirror half of the training crops"})


@dataclass
class ImageItem:
    """One image: its index in the split, and its crops, (3, S, S) uint8 each; several with `MultiCrop`."""

    id: int
    views: list[Tensor]


class ImageDataset(torch.utils.data.Dataset):
    """Crops of images from tar shards.

    Args:
        samples: one split, or those of several sets.
        transform: the crop, or several crops; where it is random, it derives from (seed, epoch, index) alone.
        seed: of the crops.
        augment: what changes a single crop; None = nothing. Several crops bring their own.
    """

    def __init__(
        self,
        samples: ShardedSamples | MixedSamples,
        transform: ImageTransform | MultiCrop,
        seed: int = 1,
        augment: Augment | None = None,
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed
        self.augment = augment if augment is not None and augment.active else None
        self.epoch = 1

    def __len__(self) -> int:
        return len(self.samples)

    def set_epoch(self, epoch: int) -> None:
        """Choose the crops of an epoch, counted from 1."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> ImageItem:
        rng = generator(self.seed, self.epoch, int(index))
        image = self.samples[int(index)].image
        if isinstance(self.transform, MultiCrop):
            return ImageItem(int(index), self.transform(image, rng))
        if self.augment is not None:
            views = augmented_views(self.transform, self.augment, image, [self.transform.size], rng)
            return ImageItem(int(index), views)
        return ImageItem(int(index), [self.transform(image, rng)])


def collate(items: list[ImageItem], split: str = "train") -> dict[str, Any]:
    """Stack items to a batch of B images.

    Args:
        items: what the dataset returned.
        split: name of the split that they are of.

    Returns:
        id: (B,) int64. split: its name. net_input: image (B, 3, S, S) uint8, the first crop. views: all crops,
        (B, 3, S, S) uint8 each.
        nsentences, ntokens: B. Empty for no items.
    """
    if not items:
        return {}
    views = [stack_crops(list(crops)) for crops in zip(*(item.views for item in items), strict=True)]
    return {
        "id": torch.tensor([item.id for item in items]),
        "split": split,
        "net_input": {"image": views[0]},
        "views": views,
        "nsentences": len(items),
        "ntokens": len(items),
    }
