"""Image-caption pairs for training and for retrieval. Plain PyTorch: `user_dir` adapts it to fairseq."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emkum.data.augment import Augment, MultiCrop, augmented_views, generator
from emkum.data.masking import IGNORE, BlockMasking, MaskedText, TextMaskingConfig, mask_text
from emkum.data.mixture import MixedSamples
from emkum.data.shards import ShardedSamples
from emkum.data.sounds import SoundConfig, crop_sound, decode_sound, stack_sounds
from emkum.data.tokenizers import PAD, Tokenizer, encode
from emkum.data.transforms import CropRow, ImageTransform, crop_rows, stack_crops
from emkum.errors import UserError

# Streams of randomness of one sample; each derives from (seed, stream, epoch or view, index) alone, so that a resumed
# or differently sharded run sees the same crops, captions and masks.
(
    _CROP_STREAM,
    _CAPTION_STREAM,
    _TEXT_MASK_STREAM,
    _PATCH_MASK_STREAM,
    _FURTHER_CROP_STREAM,
    _SOUND_STREAM,
) = range(6)


@dataclass
class CaptionConfig:
    tokenizer: str = field(
        default="",
        metadata={
            "help": "SentencePiece file, BERT's vocab.txt, CLIP's vocabulary, or a folder with one of these or with "
            "GPT-2's files; empty = DATA's own"
        },
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
class MultiCropConfig:
    number: int = field(
        default=0,
        metadata={"help": "further crops of each training image, resized as the first one, for dino; 0 = none"},
    )
    min_scale: float = field(default=0.05, metadata={"help": "smallest part of an image's area that they keep"})
    max_scale: float = field(default=0.4, metadata={"help": "largest part of an image's area that they keep"})

    def __post_init__(self) -> None:
        if self.number < 0:
            raise UserError(f"--multi-crop-number {self.number}: want 0 (none) or more")
        if not 0 < self.min_scale <= self.max_scale <= 1:
            raise UserError(
                f"--multi-crop-min-scale {self.min_scale} and --multi-crop-max-scale {self.max_scale}: want numbers "
                "above 0 up to 1, the first not above the second"
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
        teacher_image: (3, S_t, S_t) uint8, the same crop without augmentation at the teacher's size; None where the
            teacher takes `image`.
        teacher_captions: the captions by the teacher's own tokenizer; None where it reads none.
        masked_captions: of each caption, the ids with some masked and what is to be predicted; None without masking.
        patch_mask: (H, W) bool, True where a patch is masked; None without masking.
        crops: further crops of the image, (3, S, S) uint8 each; None where there are none.
        sound: (n,) int16 samples at 16 kHz; None where sounds are not read.
    """

    id: int
    split: str
    image_id: int
    view: int
    image: Tensor
    captions: list[list[int]]
    teacher_image: Tensor | None = None
    teacher_captions: list[list[int]] | None = None
    masked_captions: list[MaskedText] | None = None
    patch_mask: np.ndarray | None = None
    crops: list[Tensor] | None = None
    sound: np.ndarray | None = None


class ImageTextDataset(torch.utils.data.Dataset):
    """Images with captions from tar shards.

    Args:
        samples: one split, or those of several sets.
        tokenizer: caption to ids.
        transform: crop for the student.
        captions_per_image: how many captions to draw for each visit of an image (without replacement while there are
            enough); 0 = all, in their order.
        max_tokens: longest caption in tokens, special tokens included.
        seed: of crops and caption choice.
        num_views: crops repeat after this many epochs, so that cached teacher targets of exactly these crops can be
            used; 0 = a new crop each epoch.
        teacher_size: side of a second copy of the crop in pixels; 0 = none.
        teacher_tokenizer, teacher_max_tokens: by which a teacher reads the captions, too; None = it does not.
        split: name, carried along in each item.
        augment: what changes the student's crop alone; None = nothing.
        text_masking, patch_masking: masks to draw for each caption and image; None = none.
        multi_crop: further crops, of the student's size, mirrored and augmented as its first one; new ones each epoch,
            whatever `num_views` is; None = none.
        sounds: read each image's sound, too, and how much of it; None = no sounds.

    Raises:
        UserError: sounds are to be read, and a sample has none.
    """

    def __init__(
        self,
        samples: ShardedSamples | MixedSamples,
        tokenizer: Tokenizer,
        transform: ImageTransform,
        captions_per_image: int = 1,
        max_tokens: int = 64,
        seed: int = 1,
        num_views: int = 0,
        teacher_size: int = 0,
        split: str = "train",
        augment: Augment | None = None,
        text_masking: TextMaskingConfig | None = None,
        patch_masking: BlockMasking | None = None,
        teacher_tokenizer: Tokenizer | None = None,
        teacher_max_tokens: int = 0,
        multi_crop: MultiCropConfig | None = None,
        sounds: SoundConfig | None = None,
    ) -> None:
        if sounds is not None and not samples.has_sound.all():
            without = int((~samples.has_sound).sum())
            raise UserError(
                f"split {split} has {without:,} of {len(samples):,} images without a sound; prepare it with --sounds, "
                "or train without --audio-encoder"
            )
        self.sounds = sounds
        self.samples = samples
        self.split = split
        self.tokenizer = tokenizer
        self.transform = transform
        self.captions_per_image = captions_per_image
        self.max_tokens = max_tokens
        self.seed = seed
        self.num_views = num_views
        self.teacher_size = teacher_size
        self.augment = augment if augment is not None and augment.active else None
        self.text_masking = text_masking
        self.patch_masking = patch_masking
        self.teacher_tokenizer = teacher_tokenizer
        self.teacher_max_tokens = teacher_max_tokens
        self.further_crops = None if multi_crop is None else self._further_crops(multi_crop)
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
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[ImageTextItem]:
        """The items of a batch, whose crops are rows of one tensor that `collate` takes as it is.

        Each step is done for all samples before the next one: the processor's caches then hold what a step needs.
        """
        numbers = [int(index) for index in indices]
        samples = [self.samples[number] for number in numbers]
        rows = crop_rows(len(numbers), self.transform.size) if self.augment is None else [None] * len(numbers)
        crops = [self.crops(n, sample.image, row) for n, sample, row in zip(numbers, samples, rows, strict=True)]
        drawn = [self._draw(n, sample.captions) for n, sample in zip(numbers, samples, strict=True)]
        captions = [[encode(self.tokenizer, text, self.max_tokens) for text in texts] for texts in drawn]
        view = self.view
        items = []
        for number, sample, (image, teacher_image), texts, ids in zip(
            numbers, samples, crops, drawn, captions, strict=True
        ):
            item = ImageTextItem(number, self.split, sample.image_id, view, image, ids, teacher_image)
            if self.teacher_tokenizer is not None:
                limit = self.teacher_max_tokens
                item.teacher_captions = [encode(self.teacher_tokenizer, text, limit) for text in texts]
            self._mask(item)
            if self.sounds is not None:
                item.sound = self._sound(number, sample.sound)
            if self.further_crops is not None:
                item.crops = self.further_crops(sample.image, self._generator(_FURTHER_CROP_STREAM, number))
            items.append(item)
        return items

    def _sound(self, index: int, data: bytes) -> np.ndarray:
        rng = self._generator(_SOUND_STREAM, index) if self.transform.random else None
        return crop_sound(decode_sound(data), self.sounds.max_samples, rng)

    def _further_crops(self, config: MultiCropConfig) -> MultiCrop | None:
        if config.number == 0:
            return None
        crop = ImageTransform(self.transform.size, config.min_scale, self.transform.flip, config.max_scale)
        augments = () if self.augment is None else (self.augment,) * config.number
        return MultiCrop(crop, crop, num_global=0, num_local=config.number, augments=augments)

    def _mask(self, item: ImageTextItem) -> None:
        """Add what is masked, where anything is."""
        if self.text_masking is not None:
            rng = self._generator(_TEXT_MASK_STREAM, item.id)
            masked = [mask_text(ids, self.tokenizer, self.text_masking, rng) for ids in item.captions]
            item.masked_captions = masked
        if self.patch_masking is not None:
            item.patch_mask = self.patch_masking(self._generator(_PATCH_MASK_STREAM, item.id))

    def _generator(self, stream: int, index: int) -> np.random.Generator:
        return generator(self.seed, stream, self.epoch, index)

    def crops(self, index: int, data: bytes, row: CropRow | None = None) -> tuple[Tensor, Tensor | None]:
        """This epoch's crop of an encoded image for the student, and for the teacher where its size differs.

        Args:
            index: number of the sample.
            data: its image.
            row: where to write the student's crop, unless it is augmented; None = a tensor of its own.
        """
        crop = self.view if self.view >= 0 else self.epoch
        rng = generator(self.seed, _CROP_STREAM, crop, index)
        # An augmented crop is the student's alone, even where the teacher's is of the same size.
        shared = self.teacher_size == 0 or (self.teacher_size == self.transform.size and self.augment is None)
        sizes = (self.transform.size,) if shared else (self.transform.size, self.teacher_size)
        if self.augment is None:
            views = self.transform.views(data, sizes, rng, row)
        else:
            views = augmented_views(self.transform, self.augment, data, sizes, rng)
        return views[0], None if shared else views[1]

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
        count = self.captions_per_image
        if count == 0 or (count == 1 and len(captions) == 1):
            return list(captions)
        rng = self._generator(_CAPTION_STREAM, index)
        if count == 1:
            return [captions[int(rng.integers(len(captions)))]]
        order: list[int] = []
        while len(order) < count:
            order += rng.permutation(len(captions)).tolist()
        return [captions[i] for i in order[:count]]


# Of a batch's tensors, those that every student reads, and those beside them, of which some batches have not all.
_INPUT = ("text", "padding_mask", "image_ids", "caption_image")
_BESIDE_THE_INPUT = (
    "id",
    "view",
    "special",
    "teacher_text",
    "teacher_padding_mask",
    "masked_text",
    "masked_text_targets",
    "patch_mask",
)


def collate(items: list[ImageTextItem], num_groups: int = 1, pad: int = PAD, teacher_pad: int = PAD) -> dict[str, Any]:
    """Stack items to a batch of B images and T captions.

    Captions are ordered by length and cut into groups that a student can run each at its own length; the padding of
    the whole batch is to the longest caption.

    Args:
        items: what the dataset returned.
        num_groups: groups of about equal numbers of captions.
        pad: id at padding.
        teacher_pad: the same by the teacher's tokenizer.

    Returns:
        id, view: (B,) int64. split: name of the split. teacher_image: (B, 3, S_t, S_t) uint8 or None.
        teacher_text: (T, L_t) int64, teacher_padding_mask: (T, L_t) bool, or None both.
        net_input: image (B, 3, S, S) uint8; text (T, L) int64; padding_mask (T, L) bool, True at padding; groups
        [(captions, length), ...]; image_ids (B,) int64; caption_image (T,) int64, the row of each caption's image;
        where sounds are read audio (B, L_a) int16 and audio_padding_mask (B, L_a) bool.
        masked_text, masked_text_targets: (T, L) int64 or None, with IGNORE where nothing is to be predicted.
        patch_mask: (B, H, W) bool, True where masked, or None.
        num_text_targets: how many tokens are to be predicted, or None.
        special: (T, L) bool, True at the first and the last token of each caption and at padding.
        crops: (V * B, 3, S, S) uint8, of V further crops of each image, those of the first crop of all images first, or
        None.
        nsentences: B. ntokens: tokens without padding. Empty for no items.
    """
    if not items:
        return {}
    owners = np.repeat(np.arange(len(items)), [len(item.captions) for item in items])
    lengths = np.array([len(caption) for item in items for caption in item.captions])
    order = np.argsort(lengths, kind="stable")
    lengths = lengths[order]
    places = np.arange(int(lengths[-1]))
    padding = places >= lengths[:, None]
    captions = [caption for item in items for caption in item.captions]
    groups = [(len(part), int(part[-1])) for part in np.array_split(lengths, num_groups) if len(part) > 0]
    first = items[0]
    small = {
        "id": np.array([item.id for item in items]),
        "view": np.array([item.view for item in items]),
        "image_ids": np.array([item.image_id for item in items]),
        "caption_image": owners[order],
        "text": _padded(captions, order, padding, pad),
        "padding_mask": padding,
        "special": (places == 0) | (places >= lengths[:, None] - 1),
    }
    small |= _where_asked_for(items, order, padding, pad, teacher_pad)
    targets = small.get("masked_text_targets")
    tensors = {name: torch.from_numpy(array) for name, array in small.items()}
    return {
        **{name: tensors.get(name) for name in _BESIDE_THE_INPUT},
        "split": first.split,
        "teacher_image": None if first.teacher_image is None else stack_crops([item.teacher_image for item in items]),
        "num_text_targets": None if targets is None else int((targets != IGNORE).sum()),
        "crops": None if first.crops is None else stack_crops(_by_view([item.crops for item in items])),
        "net_input": {
            **{name: tensors[name] for name in _INPUT},
            "image": stack_crops([item.image for item in items]),
            "groups": groups,
            **_sounds_of(items),
        },
        "nsentences": len(items),
        "ntokens": int(lengths.sum()),
    }


def _sounds_of(items: list[ImageTextItem]) -> dict[str, Tensor]:
    if items[0].sound is None:
        return {}
    batch = stack_sounds([item.sound for item in items])
    return {"audio": batch.samples, "audio_padding_mask": batch.padding_mask}


def _by_view(crops: list[list[Tensor]]) -> list[Tensor]:
    """The first crop of all images, then the second of all, and so on."""
    return [crop for view in zip(*crops, strict=True) for crop in view]


def _where_asked_for(
    items: list[ImageTextItem], order: np.ndarray, padding: np.ndarray, pad: int, teacher_pad: int
) -> dict[str, np.ndarray]:
    """Masked captions, captions for the teacher and patch masks, of a batch that has them; see `collate`."""
    found: dict[str, np.ndarray] = {}
    first = items[0]
    if first.masked_captions is not None:
        masked = [text for item in items for text in item.masked_captions]
        found["masked_text"] = _padded([text.inputs for text in masked], order, padding, pad)
        found["masked_text_targets"] = _padded([text.targets for text in masked], order, padding, IGNORE)
    if first.teacher_captions is not None:
        captions = [caption for item in items for caption in item.teacher_captions]
        lengths = np.array([len(captions[i]) for i in order])
        hidden = np.arange(int(lengths.max())) >= lengths[:, None]
        found["teacher_text"] = _padded(captions, order, hidden, teacher_pad)
        found["teacher_padding_mask"] = hidden
    if first.patch_mask is not None:
        found["patch_mask"] = np.stack([item.patch_mask for item in items])
    return found


def _padded(rows: Sequence[Sequence[int]], order: np.ndarray, padding: np.ndarray, value: int) -> np.ndarray:
    """(T, L) int64: the rows in the given order, with `value` where `padding` (T, L) is True."""
    table = np.full(padding.shape, value, dtype=np.int64)
    table[~padding] = np.concatenate([rows[i] for i in order])
    return table
