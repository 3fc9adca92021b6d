"""Augmentation: what each option does, where its randomness comes from, and multi-crop views."""

import hashlib
import io
import math
import pickle
import random
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from emkum.data import augment as module
from emkum.data.augment import Augment, AugmentConfig, MixConfig, MultiCrop, augmented_views, generator, seeded
from emkum.data.transforms import ImageTransform, to_tensor
from emkum.errors import UserError
from emkum.options import collect_parts

SIDE = 32
EACH = [
    {"color_jitter": 0.4, "color_jitter_prob": 1.0},
    {"rand_augment": "rand-m9-n4-p1-mstd0.5-inc1"},
    {"erasing_prob": 1.0},
    {"grayscale_prob": 0.5, "color_jitter": 0.4},
    {"blur_prob": 1.0},
    {"solarize_prob": 0.5},
    {"color_jitter": 0.4, "rand_augment": "rand-t3aw", "erasing_prob": 0.5, "blur_prob": 0.5, "solarize_prob": 0.2},
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def picture(seed: int = 0, width: int = SIDE, height: int = SIDE) -> Image.Image:
    """Smooth and colorful."""
    coarse = np.random.default_rng(seed).integers(256, size=(6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def augment(**options: Any) -> Augment:
    return Augment(AugmentConfig(**options))


def apply(transform: Augment, seed: int, image: Image.Image | None = None) -> Tensor:
    return transform(picture() if image is None else image, np.random.default_rng(seed))


def global_draws() -> tuple[float, ...]:
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()


def set_globals(seed: int) -> None:
    """One Gaussian of a pair drawn, so that the other waits in the state."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    random.gauss(0, 1)
    np.random.randn()


# ----------------------------------------------------------------------------------------------------------------------
# Randomness
# ----------------------------------------------------------------------------------------------------------------------


def test_global_draws_follow_the_generator_alone() -> None:
    drawn = []
    for outside in (1, 2):
        for seed in (5, 6):
            set_globals(outside)
            with seeded(np.random.default_rng(seed)):
                drawn.append(global_draws())
    assert drawn[:2] == drawn[2:]
    assert all(one != other for one, other in zip(drawn[0], drawn[1], strict=True))


def test_consecutive_uses_of_a_generator_differ() -> None:
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(2):
        with seeded(rng):
            drawn.append(global_draws())
    assert all(one != other for one, other in zip(*drawn, strict=True))


def test_global_states_are_as_before() -> None:
    set_globals(7)
    expected = global_draws()
    set_globals(7)
    with seeded(np.random.default_rng(0)):
        global_draws()
        with seeded(np.random.default_rng(1)):
            global_draws()
    with pytest.raises(KeyError), seeded(np.random.default_rng(0)):
        global_draws()
        raise KeyError
    assert global_draws() == expected


@pytest.mark.parametrize("options", EACH)
def test_an_augmentation_depends_on_the_generator_alone(options: dict[str, Any]) -> None:
    transform = augment(**options)
    expected = [apply(transform, seed) for seed in range(8)]
    assert len({crop.numpy().tobytes() for crop in expected}) > 1
    again = pickle.loads(pickle.dumps(transform))
    for outside, seed in enumerate((3, 0, 7, 7)):
        set_globals(outside)
        assert torch.equal(apply(again, seed), expected[seed])
        after = global_draws()
        set_globals(outside)
        assert after == global_draws()


# ----------------------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------------------


def test_nothing_is_done_by_default() -> None:
    transform, rng = augment(), np.random.default_rng(0)
    assert not transform.active
    assert torch.equal(transform(picture(), rng), to_tensor(picture()))
    assert rng.random() == np.random.default_rng(0).random(), "nothing is drawn"
    for options in ({"color_jitter": 0.4, "color_jitter_prob": 0.0}, {"color_jitter_prob": 1.0}):
        assert not augment(**options).active
    assert all(augment(**options).active for options in EACH)


def test_every_option_is_described() -> None:
    for config in (AugmentConfig, MixConfig):
        for option in fields(config):
            assert option.metadata["help"] and option.default is not True
    parts = collect_parts({"augment": AugmentConfig}, {"augment_rand_augment": None, "augment_blur_prob": 0.1})
    assert parts["augment"] == AugmentConfig(blur_prob=0.1)


@pytest.mark.parametrize("options", EACH)
def test_crops_stay_crops(options: dict[str, Any]) -> None:
    for size in ((SIDE, SIDE), (40, 24)):
        crop = apply(augment(**options), 1, picture(0, *size))
        assert crop.shape == (3, *reversed(size)) and crop.dtype == torch.uint8


def test_jitter_keeps_to_its_strength() -> None:
    """Contrast, saturation and hue leave an even gray as it is: what remains is brightness."""
    gray = Image.new("RGB", (8, 8), (100, 100, 100))
    transform = augment(color_jitter=0.4, color_jitter_prob=1.0)
    levels = [apply(transform, seed, gray).float().mean().item() for seed in range(300)]
    assert 59 <= min(levels) < 64 and 136 < max(levels) <= 141


def test_jitter_changes_the_hue_by_a_quarter() -> None:
    """Red, green and blue keep their order within a sixth of the circle: 0.4 / 4 of it never shifts red past yellow,
    2.0 / 4 reaches every color."""
    red = Image.new("RGB", (8, 8), (250, 5, 5))
    for strength, brightest in ((0.4, {0}), (2.0, {0, 1, 2})):
        transform = augment(color_jitter=strength, color_jitter_prob=1.0)
        crops = [apply(transform, seed, red)[:, 0, 0] for seed in range(200)]
        assert {int(crop.argmax()) for crop in crops if crop.max() > crop.min()} == brightest


@pytest.mark.parametrize(
    ("option", "changed"),
    [
        ("grayscale_prob", lambda crop: torch.equal(crop[0], crop[1]) and torch.equal(crop[1], crop[2])),
        ("blur_prob", lambda crop: not torch.equal(crop, to_tensor(picture()))),
        ("solarize_prob", lambda crop: not torch.equal(crop, to_tensor(picture()))),
        ("erasing_prob", lambda crop: not torch.equal(crop, to_tensor(picture()))),
        ("color_jitter_prob", lambda crop: not torch.equal(crop, to_tensor(picture()))),
    ],
)
def test_probabilities(option: str, changed: Callable[[Tensor], bool]) -> None:
    jitter = {"color_jitter": 0.4} if option == "color_jitter_prob" else {}
    for prob, lowest, highest in ((0.0, 0, 0), (0.25, 30, 70), (1.0, 180, 200)):
        transform = augment(**{option: prob}, **jitter)
        count = sum(changed(apply(transform, seed)) for seed in range(200))
        assert lowest <= count <= highest


def test_solarize_inverts_what_is_bright() -> None:
    before = to_tensor(picture())
    expected = torch.where(before < 128, before, 255 - before)
    assert torch.equal(apply(augment(solarize_prob=1.0), 0), expected)
    assert not torch.equal(before, expected)


def test_blur_smooths_and_keeps_the_mean() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8))
    before = to_tensor(noise).float()
    stds = []
    for seed in range(50):
        after = apply(augment(blur_prob=1.0), seed, noise).float()
        assert (after.mean((1, 2)) - before.mean((1, 2))).abs().max() < 4
        stds.append((after.std() / before.std()).item())
    assert max(stds) > 0.8 and min(stds) < 0.25, "from a radius of 0.1 to one of 2 pixels"


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "rand-m9-n3-mstd0.5", "rand", "rand-tweights", "rand-m5-p1"])
def test_rand_augment_is_that_of_timm(text: str) -> None:
    transform = augment(rand_augment=text)
    reference = rand_augment_transform(text, {"img_mean": (124, 116, 104)})
    changed = 0
    for seed in range(20):
        with seeded(np.random.default_rng(seed)):
            expected = to_tensor(reference(picture()))
        assert torch.equal(apply(transform, seed), expected)
        changed += not torch.equal(expected, to_tensor(picture()))
    assert changed > 5


def test_erasing_fills_a_rectangle_with_noise() -> None:
    before = torch.full((3, 64, 64), 77, dtype=torch.uint8)
    image, mean, std = Image.new("RGB", (64, 64), (77, 77, 77)), *map(torch.tensor, ((0.485, 0.456, 0.406), (0.225,)))
    parts, noise = [], []
    for seed in range(100):
        crop = apply(augment(erasing_prob=1.0), seed, image)
        changed = (crop != before).any(0)
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        box = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
        assert changed[box].float().mean() > 0.98, "all of the rectangle, but for noise that equals the crop"
        parts.append(changed[box].numel() / 64**2)
        noise.append(((crop[:, *box].float() / 255 - mean[:, None, None]) / std).flatten())
    assert 0.015 < min(parts) < 0.05 and 0.29 < max(parts) < 0.34
    values = torch.cat(noise)
    assert abs(values.mean().item()) < 0.03 and 0.9 < values.std().item() < 1.0, "a unit normal cut at black and white"


def test_erasing_is_that_of_timm_on_a_normalized_crop() -> None:
    transform = module._Erase()
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    before = to_tensor(picture())
    for seed in range(20):
        with seeded(np.random.default_rng(seed)):
            expected = RandomErasing(1.0, mode="pixel", device="cpu")((before / 255 - mean) / std)
        with seeded(np.random.default_rng(seed)):
            crop = transform(before)
        levels = (255 * (expected * std + mean)).clamp(0, 255)
        assert (crop - levels).abs().max() <= 0.501
    assert torch.equal(before, to_tensor(picture())), "the crop that came in is left as it is"


@pytest.mark.parametrize(
    "option", ["color_jitter_prob", "erasing_prob", "grayscale_prob", "blur_prob", "solarize_prob", "color_jitter"]
)
def test_numbers_out_of_range(option: str) -> None:
    highest = 2 if option == "color_jitter" else 1
    augment(**{option: float(highest)})
    for value in (-0.1, highest + 0.1, float("nan")):
        with pytest.raises(
            UserError, match=f"--augment-{option.replace('_', '-')} is .*: want a number from 0 to {highest}"
        ):
            augment(**{option: value})


@pytest.mark.parametrize(
    "text",
    ["auto", "rand_m9", "original-mstd0.5", "augmix-m3", "rand-", "rand-m", "rand-mfive", "rand-x9", "rand-m9-foo"]
    + ["rand-m9-inc", "rand-inc2", "rand-n0", "rand-tx", "rand-m-9", "rand-m1.5", " rand-m9", "rand-m9\n"]
    + ["rand-tweights-n50"],
)
def test_rand_augment_that_is_none(text: str) -> None:
    with pytest.raises(UserError, match="--augment-rand-augment .*such as rand-m9-mstd0.5-inc1"):
        augment(rand_augment=text)


# ----------------------------------------------------------------------------------------------------------------------
# Views
# ----------------------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


PHOTO = encoded(picture(1, 96, 64))


def test_the_teacher_sees_the_same_crop_as_it_is() -> None:
    transform, sizes = ImageTransform(16, 0.3, True), (16, 24, 16)
    for seed in range(10):
        plain = transform.views(PHOTO, sizes, np.random.default_rng(seed))
        for options in EACH:
            views = augmented_views(transform, augment(**options), PHOTO, sizes, np.random.default_rng(seed))
            assert torch.equal(views[1], plain[1]) and torch.equal(views[2], plain[2])
        views = augmented_views(transform, augment(), PHOTO, sizes, np.random.default_rng(seed))
        assert all(torch.equal(one, other) for one, other in zip(views, plain, strict=True))
        student, _, teacher = augmented_views(
            transform, augment(solarize_prob=1.0), PHOTO, sizes, np.random.default_rng(seed)
        )
        assert torch.equal(student, torch.where(teacher < 128, teacher, 255 - teacher)), "the student's geometry too"


GLOBAL, LOCAL = ImageTransform(32, 0.25, True), ImageTransform(16, 0.05, True, 0.25)


def same(views: list[Tensor], others: list[Tensor]) -> bool:
    return len(views) == len(others) and all(map(torch.equal, views, others))


def test_multi_crop_views() -> None:
    views = MultiCrop(GLOBAL, LOCAL, 2, 6)(PHOTO, np.random.default_rng(0))
    assert [tuple(view.shape) for view in views] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 6
    assert len({view.numpy().tobytes() for view in views}) == 8
    assert same(views, MultiCrop(GLOBAL, LOCAL, 2, 6)(PHOTO, np.random.default_rng(0)))
    assert not any(map(torch.equal, views, MultiCrop(GLOBAL, LOCAL, 2, 6)(PHOTO, np.random.default_rng(1))))
    alike = MultiCrop(LOCAL, LOCAL, 2, 2)(PHOTO, np.random.default_rng(0))
    assert len({view.numpy().tobytes() for view in alike}) == 4, "the first of one kind is not the first of the other"


def test_a_view_is_the_same_however_many_there_are() -> None:
    options = [augment(**options) for options in (*EACH, {})]
    views = MultiCrop(GLOBAL, LOCAL, 2, 6, options)(PHOTO, np.random.default_rng(0))
    fewer = MultiCrop(GLOBAL, LOCAL, 1, 3, (options[0], *options[2:5]))(PHOTO, np.random.default_rng(0))
    assert same(fewer, [views[0], *views[2:5]])
    other_globals = MultiCrop(ImageTransform(24), LOCAL, 2, 6, [augment()] * 2 + options[2:])
    assert same(other_globals(PHOTO, np.random.default_rng(0))[2:], views[2:])


def test_multi_crop_decodes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(module, "decode", lambda data: calls.append(data) or picture(1, 96, 64))
    MultiCrop(GLOBAL, LOCAL)(PHOTO, np.random.default_rng(0))
    assert calls == [PHOTO]


def test_small_views_show_small_parts() -> None:
    """Red grows by 1 a column and green by 1 a row, so that their ranges span the area shown."""
    rows, columns = np.mgrid[:200, :250].astype(np.uint8)
    data = encoded(Image.fromarray(np.stack([columns, rows, 0 * rows], -1)))
    crops = MultiCrop(GLOBAL, LOCAL, 20, 20)(data, np.random.default_rng(0))
    parts = []
    for crop in crops:
        (width, height), last = ((crop[c].max() - crop[c].min()).item() for c in (0, 1)), crop.shape[-1]
        parts.append(width * height * (last / (last - 1)) ** 2 / (200 * 250))
    assert 0.2 < min(parts[:20]) < 0.45 and 0.6 < max(parts[:20]) < 1.1
    assert 0.04 < min(parts[20:]) < 0.1 and 0.18 < max(parts[20:]) < 0.28


def test_each_view_has_its_augmentation() -> None:
    """DINO's: the first global view is blurred, the second one may be solarized."""
    plain = MultiCrop(GLOBAL, LOCAL, 2, 2)(PHOTO, np.random.default_rng(0))
    augments = [augment(), augment(solarize_prob=1.0), augment(grayscale_prob=1.0), augment()]
    views = MultiCrop(GLOBAL, LOCAL, 2, 2, augments)(PHOTO, np.random.default_rng(0))
    assert torch.equal(views[0], plain[0]) and torch.equal(views[3], plain[3])
    assert torch.equal(views[1], torch.where(plain[1] < 128, plain[1], 255 - plain[1]))
    assert torch.equal(views[2][0], views[2][1]) and not torch.equal(plain[2][0], plain[2][1])
    with pytest.raises(ValueError, match=r"4 augments for 2 \+ 3 views"):
        MultiCrop(GLOBAL, LOCAL, 2, 3, augments)


@pytest.mark.parametrize("key", [(0,), (1, 0, 3, 77), (2**32 - 1, 5, 2**63)])
def test_generator_has_the_state_that_the_hash_of_its_key_gives(key: tuple[int, ...]) -> None:
    digest = hashlib.blake2b(b"".join(number.to_bytes(8, "little") for number in key), digest_size=32).digest()
    high, low, inc_high, inc_low = (int.from_bytes(digest[i : i + 8], "little") for i in range(0, 32, 8))
    # PCG's own way to start from a state and a stream (O'Neill 2014): two steps of its recurrence.
    start, stream, modulus = (high << 64) + low, (inc_high << 64) + inc_low, 2**128
    increment = (2 * stream + 1) % modulus
    state = ((increment + start) * 0x2360ED051FC65DA44385DF649FCCF645 + increment) % modulus
    assert generator(*key).bit_generator.state["state"] == {"state": state, "inc": increment}


def test_generators_of_different_keys_are_independent() -> None:
    keys = [(seed, stream, epoch, i) for seed in (1, 2) for stream in (0, 1) for epoch in (1, 2) for i in range(2000)]
    draws = np.array([generator(*key).random(2) for key in keys])
    assert len(np.unique(draws)) == draws.size
    assert len(np.unique(np.array([generator(*key[:3]).random() for key in keys[::2000]]))) == 8
    # Uniform, and without correlation between the draws, between neighbors and between epochs.
    counts = np.histogram(draws[:, 0], bins=20, range=(0, 1))[0]
    assert ((counts - 800) ** 2 / 800).sum() < 43.8, "chi-squared with 19 degrees of freedom at 0.1 %"
    first = draws[:, 0]
    for one, other in ((first, draws[:, 1]), (first[:-1], first[1:]), (first[:-2000], first[2000:])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 3.3 / math.sqrt(len(one))


def test_rand_augment_that_keeps_no_bit_is_black() -> None:
    transform = augment(rand_augment="rand-m20-n4-p1-mmax20-inc1")
    posterize = [operation for step in transform.steps if hasattr(step, "ops") for operation in step.ops]
    posterize = [operation for operation in posterize if operation.name == "PosterizeIncreasing"]
    assert posterize
    photo = Image.open(io.BytesIO(PHOTO)).convert("RGB")
    for operation in posterize:
        assert operation(photo).getextrema() == ((0, 0),) * 3
    for seed in range(40):
        transform(photo, np.random.default_rng(seed))
