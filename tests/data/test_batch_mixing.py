"""Mixup and CutMix: blends, labels, odd batches, and randomness from the key alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from emkum.data.augment import BatchMixer, MixConfig
from emkum.errors import UserError

ALWAYS = {"prob": 1.0}
CLASSES = 5


def batch(size: int, side: int = 8) -> tuple[Tensor, Tensor]:
    """Image i is i + 1 everywhere and of class i."""
    images = torch.arange(1.0, size + 1)[:, None, None, None].expand(size, 3, side, side).clone()
    return images, torch.arange(size)


def mix(size: int = 4, key: tuple[int, ...] = (1, 2, 3), side: int = 8, **options: Any) -> tuple[Tensor, Tensor]:
    return BatchMixer(MixConfig(**options), CLASSES)(*batch(size, side), key)


def test_a_blend_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np.random, "beta", lambda a, b: 0.25 if (a, b) == (0.8, 0.8) else None)
    images, soft = mix(4, cutmix_alpha=0.0, label_smoothing=0.1, **ALWAYS)
    assert torch.allclose(images, torch.tensor([3.25, 2.75, 2.25, 1.75])[:, None, None, None].expand(4, 3, 8, 8))
    # One-hot labels, smoothed: 0.92 and 0.02. Blended 1 : 3: 0.02 + 0.9 * 0.25 and 0.02 + 0.9 * 0.75.
    expected = [
        [0.245, 0.02, 0.02, 0.695, 0.02],
        [0.02, 0.245, 0.695, 0.02, 0.02],
        [0.02, 0.695, 0.245, 0.02, 0.02],
        [0.695, 0.02, 0.02, 0.245, 0.02],
    ]
    assert torch.allclose(soft, torch.tensor(expected))


def test_a_pasted_box_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the area, so a box of 4 x 4, around row 1 and column 4: rows 0 to 2 and columns 2 to 5 remain."""
    monkeypatch.setattr(np.random, "beta", lambda a, b: 0.75 if (a, b) == (1.0, 1.0) else None)
    centers = iter((1, 4))
    monkeypatch.setattr(np.random, "randint", lambda low, high, size: next(centers))
    images, soft = mix(2, mixup_alpha=0.0, **ALWAYS)
    expected, _ = batch(2)
    expected[0, :, 0:3, 2:6], expected[1, :, 0:3, 2:6] = 2, 1
    assert torch.equal(images, expected)
    part = 1 - 12 / 64
    assert torch.allclose(soft[:, :2], torch.tensor([[part, 1 - part], [1 - part, part]])) and (soft[:, 2:] == 0).all()


def test_images_and_labels_are_mixed_alike() -> None:
    weights = {"mixup": [], "cutmix": []}
    for number in range(200):
        images, soft = mix(4, (0, number), 16, **ALWAYS)
        for row in range(4):
            own, other = soft[row, row].item(), soft[row, 3 - row].item()
            assert abs(own + other - 1) < 1e-6
            assert abs(images[row].mean().item() - (own * (row + 1) + other * (4 - row))) < 1e-4
        weights["mixup" if images[0].std() < 1e-5 and 0 < own < 1 else "cutmix"].append(own)
    assert 70 < len(weights["mixup"]) < 130
    assert all(np.std(drawn) > 0.15 for drawn in weights.values())
    assert abs(np.mean(weights["mixup"]) - 0.5) < 0.1
    assert 0.55 < np.mean(weights["cutmix"]) < 0.8, "boxes are cut off at the edge"


def test_mixing_depends_on_the_key_alone() -> None:
    options = {"label_smoothing": 0.1, **ALWAYS}
    images, soft = mix(4, (1, 2, 3), **options)
    for outside in (1, 2):
        np.random.seed(outside)
        again = mix(4, (1, 2, 3), **options)
        assert torch.equal(again[0], images) and torch.equal(again[1], soft)
        assert np.random.rand() == np.random.RandomState(outside).rand(), "the global state is as before"
    for key in ((1, 2, 4), (1, 3, 3), (2, 2, 3), (1, 2)):
        assert not torch.equal(mix(4, key, **options)[1], soft)


@pytest.mark.parametrize("size", [0, 1, 3, 5])
def test_the_last_of_an_odd_batch_stays(size: int) -> None:
    images, soft = mix(size, label_smoothing=0.1, cutmix_alpha=0.0, **ALWAYS)
    assert images.shape == (size, 3, 8, 8) and soft.shape == (size, CLASSES)
    even = mix(size - size % 2, label_smoothing=0.1, cutmix_alpha=0.0, **ALWAYS)
    assert torch.equal(images[: len(even[0])], even[0]) and torch.equal(soft[: len(even[1])], even[1])
    if size % 2:
        assert (images[-1] == size).all()
        assert torch.allclose(soft[-1], torch.full((CLASSES,), 0.02) + 0.9 * torch.eye(CLASSES)[size - 1])


def test_the_batch_that_comes_in_is_left_as_it_is() -> None:
    images, labels = batch(4)
    mixed, _ = BatchMixer(MixConfig(prob=1.0), CLASSES)(images, labels, (1,))
    assert torch.equal(images, batch(4)[0]) and torch.equal(labels, batch(4)[1])
    assert not torch.equal(mixed, images)


@pytest.mark.parametrize("options", [{}, {"prob": 0.0}, {"prob": 1.0, "mixup_alpha": 0.0, "cutmix_alpha": 0.0}])
def test_without_mixing_labels_may_still_be_smoothed(options: dict[str, float]) -> None:
    for smoothing in (0.0, 0.2):
        images, soft = mix(5, label_smoothing=smoothing, **options)
        assert torch.equal(images, batch(5)[0])
        assert torch.allclose(soft, (1 - smoothing) * torch.eye(5) + smoothing / 5)
        assert not BatchMixer(MixConfig(label_smoothing=smoothing, **options), CLASSES).active


def test_mix_probabilities() -> None:
    mixed = [not torch.equal(mix(4, (number,), prob=0.3)[0], batch(4)[0]) for number in range(200)]
    assert 40 < sum(mixed) < 80
    for switch, cut in ((0.0, False), (1.0, True)):
        pasted = [mix(4, (number,), switch_prob=switch, **ALWAYS)[0][0].unique().numel() > 1 for number in range(30)]
        assert any(pasted) == cut


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_mixing_keeps_the_precision(dtype: torch.dtype) -> None:
    images, labels = batch(4)
    mixed, soft = BatchMixer(MixConfig(prob=1.0), CLASSES)(images.to(dtype), labels, (1,))
    assert mixed.dtype == dtype and soft.dtype == torch.float32


def test_bytes_cannot_be_mixed() -> None:
    images, labels = batch(4)
    with pytest.raises(TypeError, match="uint8: want floating point"):
        BatchMixer(MixConfig(), CLASSES)(images.byte(), labels, (1,))


@pytest.mark.parametrize("option", ["prob", "switch_prob", "label_smoothing", "mixup_alpha", "cutmix_alpha"])
def test_mix_numbers_out_of_range(option: str) -> None:
    for value in (-0.1, float("nan"), *(() if option.endswith("alpha") else (1.1,))):
        with pytest.raises(UserError, match=f"--mix-{option.replace('_', '-')} is .*: want a number from 0"):
            BatchMixer(MixConfig(**{option: value}), CLASSES)
