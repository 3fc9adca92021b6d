"""Augmentation beyond crop and flip: color and erasing of single crops, mixing of batches, several crops of one image.

The transforms are timm's and torchvision's, with the parameters of the reference recipes; they are imported where an
option asks for them, because both take seconds. Here is what they lack: randomness that derives from a generator
alone. Crops go in and come out as uint8; normalization is left to the models, as student and teacher differ in theirs.
"""

import contextlib
import math
import random
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from emkum.data.decoding import decode
from emkum.data.transforms import ImageTransform, to_tensor
from emkum.errors import UserError

# timm's grammar, which itself passes over what it does not know.
_RAND_AUGMENT = re.compile(r"rand(-(m\d+|n[1-9]\d*|p\d+(\.\d+)?|mstd\d+(\.\d+)?|mmax\d+|inc[01]|tweights|t3aw?))*")


@dataclass
class AugmentConfig:
    color_jitter: float = field(
        default=0.0,
        metadata={"help": "strength of brightness, contrast and saturation changes, hue by a quarter of it; 0 = none"},
    )
    color_jitter_prob: float = field(default=0.8, metadata={"help": "part of the crops whose colors are jittered"})
    rand_augment: str = field(
        default="", metadata={"help": "timm's RandAugment, such as rand-m9-mstd0.5-inc1; empty = none"}
    )
    erasing_prob: float = field(
        default=0.0, metadata={"help": "part of the crops with a rectangle of noise in them; 0 = none"}
    )
    grayscale_prob: float = field(default=0.0, metadata={"help": "part of the crops turned gray; 0 = none"})
    blur_prob: float = field(default=0.0, metadata={"help": "part of the crops blurred; 0 = none"})
    solarize_prob: float = field(
        default=0.0, metadata={"help": "part of the crops whose bright pixels are inverted; 0 = none"}
    )


@dataclass
class MixConfig:
    prob: float = field(default=0.0, metadata={"help": "part of the training batches that are mixed; 0 = none"})
    mixup_alpha: float = field(
        default=0.8, metadata={"help": "mixup blends images by a weight from Beta(alpha, alpha); 0 = no mixup"}
    )
    cutmix_alpha: float = field(
        default=1.0, metadata={"help": "CutMix pastes a box of 1 - Beta(alpha, alpha) of the area; 0 = no CutMix"}
    )
    switch_prob: float = field(
        default=0.5, metadata={"help": "part of the mixed batches that CutMix does, where mixup is there too"}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "part of each label that is spread over all classes, mixed or not"}
    )


def _check_range(option: str, value: float, highest: float = 1.0) -> None:
    if not 0.0 <= value <= highest:
        raise UserError(f"{option} is {value}: want a number from 0 to {highest:g}")


class _Words(np.random.bit_generator.ISeedSequence):
    """A seed sequence that is known already."""

    def __init__(self, words: np.ndarray) -> None:
        self.words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        assert (n_words, self.words.dtype) == (len(self.words), dtype)
        return self.words


def generator(*key: int) -> np.random.Generator:
    """A generator that a key alone determines, made in a third of the time that `default_rng(key)` takes.

    PCG64 with BLAKE2b, in place of NumPy's seed sequence, to spread the key over its 256 bits of state.

    Args:
        key: integers from 0 to 2**64 - 1. Another number of them is another key.
    """
    digest = blake2b(struct.pack(f"<{len(key)}Q", *key), digest_size=32).digest()
    return np.random.Generator(np.random.PCG64(_Words(np.frombuffer(digest, dtype=np.uint64))))


@contextlib.contextmanager
def seeded(rng: np.random.Generator) -> Iterator[None]:
    """Let the global generators of Python, NumPy and torch (CPU) follow from `rng`; afterwards they are as before.

    Whatever draws from them inside depends on `rng` alone. Other threads that draw meanwhile would disturb it.
    """
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    seeds = rng.integers(2**32, size=3).tolist()
    try:
        random.seed(seeds[0])
        np.random.seed(seeds[1])
        # Not torch.manual_seed, which would reach out to the accelerators.
        torch.default_generator.manual_seed(seeds[2])
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.default_generator.set_state(pytorch)


# ----------------------------------------------------------------------------------------------------------------------
# One crop
# ----------------------------------------------------------------------------------------------------------------------


class Augment:
    """Photometric changes of a crop, in timm's order: RandAugment, color jitter, gray, blur, solarize, erasing.

    Color jitter has the proportions of SimCLR (Chen et al. 2020); blur (radius 0.1 to 2 pixels, Pillow's filter) and
    solarization (from 128 up) are those of DINO (Caron et al. 2021); erasing fills 2 to 33 % of the area with noise
    (Zhong et al. 2020). RandAugment (Cubuk et al. 2020) also shears, shifts and rotates.

    Args:
        config: which changes; by default none.

    Raises:
        UserError: a number out of its range, or a RandAugment that timm does not know.
    """

    def __init__(self, config: AugmentConfig) -> None:
        for name in ("color_jitter_prob", "erasing_prob", "grayscale_prob", "blur_prob", "solarize_prob"):
            _check_range(f"--augment-{name.replace('_', '-')}", getattr(config, name))
        # A quarter of it shifts the hue, which has turned half around at 0.5.
        _check_range("--augment-color-jitter", config.color_jitter, 2.0)
        jittered = config.color_jitter > 0 and config.color_jitter_prob > 0
        probs = (config.grayscale_prob, config.blur_prob, config.solarize_prob, config.erasing_prob)
        self.active = jittered or bool(config.rand_augment) or max(probs) > 0
        self.steps = list(_steps(config)) if self.active else []

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """(3, H, W) uint8 of an RGB crop of H x W pixels; an inactive one draws nothing from `rng`."""
        if not self.active:
            return to_tensor(image)
        with seeded(rng):
            for step in self.steps:
                image = step(image)
        return image


def _steps(config: AugmentConfig) -> Iterator[Callable[[Any], Any]]:
    """Images to images, then one to (3, H, W) uint8, then such tensors to tensors."""
    from timm.data.auto_augment import gaussian_blur_rand
    from torchvision.transforms import v2

    if config.rand_augment:
        yield _rand_augment(config.rand_augment)
    if config.color_jitter > 0:
        strength = config.color_jitter
        jitter = v2.ColorJitter(strength, strength, strength, strength / 4)
        yield v2.RandomApply([jitter], config.color_jitter_prob)
    if config.grayscale_prob > 0:
        yield v2.RandomGrayscale(config.grayscale_prob)
    if config.blur_prob > 0:
        # Not torchvision's blur: DINO's own code uses Pillow's filter, as timm does, and it is several times faster.
        yield v2.RandomApply([partial(gaussian_blur_rand, factor=1.0)], config.blur_prob)
    if config.solarize_prob > 0:
        yield v2.RandomSolarize(threshold=128, p=config.solarize_prob)
    yield to_tensor
    if config.erasing_prob > 0:
        yield v2.RandomApply([_Erase()], config.erasing_prob)


def _rand_augment(text: str) -> Callable[[Image.Image], Image.Image]:
    from timm.data import IMAGENET_DEFAULT_MEAN
    from timm.data.auto_augment import rand_augment_transform

    problem = "no such setting"
    if _RAND_AUGMENT.fullmatch(text):
        transform = rand_augment_transform(text, {"img_mean": tuple(round(255 * x) for x in IMAGENET_DEFAULT_MEAN)})
        for operation in transform.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
        try:
            with seeded(np.random.default_rng(0)):
                transform(Image.new("RGB", (8, 8)))
            return transform
        except ValueError as error:
            problem = str(error)
    raise UserError(
        f"--augment-rand-augment {text!r}: {problem}: want rand and any of -mMAGNITUDE -nLAYERS -pPROB -mstdSTD "
        "-mmaxMAX -inc0 -inc1 -tweights -t3a -t3aw, such as rand-m9-mstd0.5-inc1"
    )


def _posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """timm's, and black where no bit is left, as it was meant: Pillow now refuses to keep none."""
    from timm.data.auto_augment import posterize

    return posterize(image, bits) if bits > 0 else Image.new("RGB", image.size)


class _Erase:
    """Random erasing with timm's rectangles and noise, made for normalized crops, on a uint8 crop.

    timm's refuses bytes, and torchvision's would turn its noise of unit variance into bytes next to 0 and 255. Here
    timm's erases a blank sheet, and what is new on it goes, back from ImageNet's normalization, into the crop.
    """

    def __init__(self) -> None:
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        from timm.data.random_erasing import RandomErasing

        self.erasing = RandomErasing(probability=1.0, mode="pixel", device="cpu")
        self.mean, self.std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))

    def __call__(self, crop: Tensor) -> Tensor:
        """(3, H, W) uint8."""
        noise = self.erasing(torch.full(crop.shape, math.nan))
        pixels = (255 * (noise * self.std + self.mean)).round().clamp(0, 255)
        erased = ~noise.isnan()
        return crop.masked_scatter(erased, pixels[erased].byte())


def augmented_views(
    transform: ImageTransform, augment: Augment, data: bytes, sizes: Sequence[int], rng: np.random.Generator
) -> list[Tensor]:
    """The same crop at several sizes, (3, s, s) uint8 each; the first, the student's, augmented.

    The others, the teachers', are those of `transform.views` for the same `rng`, whatever the augmentation.
    """
    first, *others = transform.crop(decode(data), tuple(sizes), rng)
    return [augment(first, rng), *map(to_tensor, others)]


@dataclass(frozen=True)
class MultiCrop:
    """Multi-crop views of one image (Caron et al. 2020; DINO, Caron et al. 2021).

    Attributes:
        global_: crop of the large views; in DINO from 0.25 or 0.4 to 1 of the area.
        local: crop of the small views; in DINO up to the scale at which the large ones begin.
        num_global, num_local: how many of each.
        augments: one for each view, the global ones first; none = no view is augmented.

    Raises:
        ValueError: another number of augments than of views.
    """

    global_: ImageTransform
    local: ImageTransform
    num_global: int = 2
    num_local: int = 8
    augments: Sequence[Augment] = ()

    def __post_init__(self) -> None:
        if self.augments and len(self.augments) != self.num_global + self.num_local:
            raise ValueError(f"{len(self.augments)} augments for {self.num_global} + {self.num_local} views")

    def __call__(self, data: bytes, rng: np.random.Generator) -> list[Tensor]:
        """Views of an encoded image, (3, S, S) uint8 each: first the global ones, then the local ones.

        Each view has its own generator, by its kind and number: it is the same however many others there are.
        """
        image, seed = decode(data), int(rng.integers(2**63))
        views: list[Tensor] = []
        for kind, transform, count in ((0, self.global_, self.num_global), (1, self.local, self.num_local)):
            for number in range(count):
                own = generator(seed, kind, number)
                (crop,) = transform.crop(image, (transform.size,), own)
                views.append(self.augments[len(views)](crop, own) if self.augments else to_tensor(crop))
        return views


# ----------------------------------------------------------------------------------------------------------------------
# One batch
# ----------------------------------------------------------------------------------------------------------------------


class BatchMixer:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of a batch, with soft labels.

    timm's, not torchvision's: it chooses between the two, corrects CutMix's weight and smooths the labels as the
    reference recipes for fine-tuning do, with one draw a batch. It pairs the first sample with the last; in a batch
    of odd size the last sample stays as it is.

    Args:
        config: how; by default nothing is mixed and labels are one-hot.
        num_classes: C.

    Raises:
        UserError: a number out of its range.
    """

    def __init__(self, config: MixConfig, num_classes: int) -> None:
        from timm.data.mixup import Mixup, mixup_target

        for name in ("prob", "switch_prob", "label_smoothing"):
            _check_range(f"--mix-{name.replace('_', '-')}", getattr(config, name))
        for name in ("mixup_alpha", "cutmix_alpha"):
            _check_range(f"--mix-{name.replace('_', '-')}", getattr(config, name), math.inf)
        self.active = config.prob > 0 and (config.mixup_alpha > 0 or config.cutmix_alpha > 0)
        self.mixup = Mixup(
            mixup_alpha=config.mixup_alpha,
            cutmix_alpha=config.cutmix_alpha,
            prob=config.prob,
            switch_prob=config.switch_prob,
            label_smoothing=config.label_smoothing,
            num_classes=num_classes,
        )
        self.soften = partial(mixup_target, num_classes=num_classes, smoothing=config.label_smoothing)

    def __call__(self, images: Tensor, labels: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: (B, 3, S, S) float; left as it is.
            labels: (B,) int64.
            key: non-negative numbers that the randomness derives from alone: seed, epoch, id of the first sample.

        Returns:
            Images, (B, 3, S, S), and soft labels, (B, C) float32.
        """
        if not images.is_floating_point():
            raise TypeError(f"images are {images.dtype}: want floating point, as bytes cannot be blended")
        soft = self.soften(labels)
        even = len(images) // 2 * 2
        if not self.active or even == 0:
            return images, soft
        # timm mixes in place.
        images = images.clone()
        with seeded(np.random.default_rng(key)):
            _, soft[:even] = self.mixup(images[:even], labels[:even])
        return images, soft
