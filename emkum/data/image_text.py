"""Image-caption pairs for training and for retrieval. Plain PyTorch: `user_dir` adapts it to fairseq."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emkum.data.shards import ShardedSamples
from emkum.data.tokenizers import PAD, Tokenizer, encode
from emkum.data.transforms import ImageTransform

# Streams of randomness of one sample; each derives from (seed, stream, epoch or view, index) alone, so that a resumed
# or differently sharded run sees the same crops and captions.
_CROP_STREAM, _CAPTION_STREAM = 0, 1


@dataclass
class CaptionConfig:
    tokenizer: str = field(
        default="",
        metadata={"help": "SentencePiece file, or folder with tokenizer.model or GPT-2's files; empty = DATA's own"},
    )
    per_image: int = field(
        default=1, metadata={"help": "captions drawn for each visit of a training image, all positives of it; 0 = all"}
    )
    max_tokens: int = field(default=64, metadata={"help": "longest caption in tokens, <s> and </s> included"})
    groups: int = field(
        default=4,
        metadata={"help": "captions of a batch run in this many groups of similar length, to save work on padding"},
    )


@dataclass
class ImageTextItem:
    """One image and the captions drawn for this visit.

    Attributes:
        id: index in the split.
        split: its name.
        image_id: equal for equal images.
        view: which of the repeating crops this is; -1 where crops do not repeat.
        image: (3, S, S) uint8.
        captions: token ids, special tokens included.
        teacher_image: (3, S_t, S_t) uint8, the same crop at the teacher's size; None where the teacher takes `image`.
    """

    id: int
    split: str
    image_id: int
    view: int
    image: Tensor
    captions: list[list[int]]
    teacher_image: Tensor | None = None


class ImageTextDataset(torch.utils.data.Dataset):
    """Images with captions from tar shards.

    Args:
        samples: one split.
        tokenizer: caption to ids.
        transform: crop for the student.
        captions_per_image: how many captions to draw for each visit of an image (without replacement while there are
            enough); 0 = all, in their order.
        max_tokens: longest caption in tokens, special tokens included.
        seed: of crops and caption choice.
        num_views: crops repeat after this many epochs, so that cached teacher targets of exactly these crops can be
            used; 0 = a new crop each epoch.
        teacher_size: side of a second copy of the crop in pixels; 0 = none.
        split: name, carried along in each item.
    """

    def __init__(
        self,
        samples: ShardedSamples,
        tokenizer: Tokenizer,
        transform: ImageTransform,
        captions_per_image: int = 1,
        max_tokens: int = 64,
        seed: int = 1,
        num_views: int = 0,
        teacher_size: int = 0,
        split: str = "train",
    ) -> None:
        self.samples = samples
        self.split = split
        self.tokenizer = tokenizer
        self.transform = transform
        self.captions_per_image = captions_per_image
        self.max_tokens = max_tokens
        self.seed = seed
        self.num_views = num_views
        self.teacher_size = teacher_size
        self.epoch = 1

    def __len__(self) -> int:
        return len(self.samples)

    def set_epoch(self, epoch: int) -> None:
        """Choose the crops and captions of an epoch, counted from 1."""
        self.epoch = epoch

    @property
    def view(self) -> int:
        """The crop of the present epoch; -1 where crops do not repeat."""
        if not self.transform.random:
            return 0
        return (self.epoch - 1) % self.num_views if self.num_views > 0 else -1

    def __getitem__(self, index: int) -> ImageTextItem:
        sample = self.samples[int(index)]
        image, teacher_image = self.crops(index, sample.image)
        return ImageTextItem(
            id=int(index),
            split=self.split,
            image_id=sample.image_id,
            view=self.view,
            image=image,
            captions=[encode(self.tokenizer, text, self.max_tokens) for text in self._draw(index, sample.captions)],
            teacher_image=teacher_image,
        )

    def crops(self, index: int, data: bytes) -> tuple[Tensor, Tensor | None]:
        """This epoch's crop of an encoded image for the student, and for the teacher where its size differs."""
        crop = self.view if self.view >= 0 else self.epoch
        rng = np.random.default_rng((self.seed, _CROP_STREAM, crop, index))
        if self.teacher_size in (0, self.transform.size):
            return self.transform(data, rng), None
        image, teacher_image = self.transform.views(data, (self.transform.size, self.teacher_size), rng)
        return image, teacher_image

    def describe_crops(self) -> dict[str, float | int | bool]:
        """What this split's crops depend on, beside the images."""
        transform = self.transform
        if not transform.random:
            return {"views": 0}
        return {
            "views": self.num_views,
            "min_scale": transform.min_scale,
            "flip": transform.flip,
            "seed": self.seed,
        }

    def _draw(self, index: int, captions: tuple[str, ...]) -> list[str]:
        if self.captions_per_image == 0:
            return list(captions)
        rng = np.random.default_rng((self.seed, _CAPTION_STREAM, self.epoch, index))
        rounds = -(-self.captions_per_image // len(captions))
        order = np.concatenate([rng.permutation(len(captions)) for _ in range(rounds)])
        return [captions[i] for i in order[: self.captions_per_image]]


def collate(items: list[ImageTextItem], num_groups: int = 1) -> dict[str, Any]:
    """Stack items to a batch of B images and T captions.

    Captions are ordered by length and cut into groups that a student can run each at its own length; the padding of
    the whole batch is to the longest caption.

    Args:
        items: what the dataset returned.
        num_groups: groups of about equal numbers of captions.

    Returns:
        id, view: (B,) int64. split: name of the split. teacher_image: (B, 3, S_t, S_t) uint8 or None.
        net_input: image (B, 3, S, S) uint8; text (T, L) int64; padding_mask (T, L) bool, True at padding; groups
        [(captions, length), ...]; image_ids (B,) int64; caption_image (T,) int64, the row of each caption's image.
        nsentences: B. ntokens: tokens without padding. Empty for no items.
    """
    if not items:
        return {}
    rows = [(row, caption) for row, item in enumerate(items) for caption in item.captions]
    rows.sort(key=lambda pair: len(pair[1]))
    lengths = np.array([len(caption) for _, caption in rows])
    text = torch.full((len(rows), int(lengths[-1])), PAD, dtype=torch.int64)
    for row, (_, caption) in enumerate(rows):
        text[row, : len(caption)] = torch.tensor(caption)
    groups = [(len(part), int(part[-1])) for part in np.array_split(lengths, num_groups) if len(part) > 0]
    has_teacher_image = items[0].teacher_image is not None
    return {
        "id": torch.tensor([item.id for item in items]),
        "split": items[0].split,
        "view": torch.tensor([item.view for item in items]),
        "teacher_image": torch.stack([item.teacher_image for item in items]) if has_teacher_image else None,
        "net_input": {
            "image": torch.stack([item.image for item in items]),
            "text": text,
            "padding_mask": text.eq(PAD),
            "groups": groups,
            "image_ids": torch.tensor([item.image_id for item in items]),
            "caption_image": torch.tensor([row for row, _ in rows]),
        },
        "nsentences": len(items),
        "ntokens": int(lengths.sum()),
    }
