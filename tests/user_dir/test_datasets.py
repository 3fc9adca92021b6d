"""Order and batches of an epoch, as fairseq asks for them."""

from types import SimpleNamespace

import numpy as np
import pytest
from fairseq.data.data_utils import numpy_seed

from emkum.data.order import OrderConfig
from emkum.errors import UserError
from user_dir.datasets import EpochDataset

LENGTHS = np.random.default_rng(0).integers(10, 80, 700)


class Numbers:
    """Samples that are their own numbers, of two sets."""

    samples = SimpleNamespace(lengths=[500, 200], caption_lengths=LENGTHS)

    def __len__(self) -> int:
        return 700

    def __getitem__(self, index: int) -> int:
        return index


def batches(seed: int, training: bool = True, size: int = 32, **order: object) -> list[np.ndarray]:
    data = EpochDataset(Numbers(), list, training, OrderConfig(**order))
    with numpy_seed(seed):
        indices = data.ordered_indices()
    return data.batch_by_size(indices, max_sentences=size)


def test_the_default_order_is_one_permutation() -> None:
    found = np.concatenate(batches(3))
    with numpy_seed(3):
        np.testing.assert_array_equal(found, np.random.permutation(700)[: 32 * 21])


@pytest.mark.parametrize("order", [{}, {"window": 16}, {"by_length": True}, {"window": 16, "by_length": True}])
def test_epochs_are_whole_reproducible_and_differ(order: dict) -> None:
    first, again, other = batches(1, **order), batches(1, **order), batches(2, **order)
    assert all(len(batch) == 32 for batch in first) and len(first) == 21
    assert len(set(np.concatenate(first))) == 32 * 21
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_batches_by_length_hold_similar_captions() -> None:
    spread = [np.mean([np.ptp(LENGTHS[batch]) for batch in batches(1, by_length=value)]) for value in (False, True)]
    assert spread[1] < spread[0] / 3


def test_weights_count_passes() -> None:
    counts = np.bincount(np.concatenate(batches(1, size=1, weights="0.5,2")), minlength=700)
    assert set(counts[:500]) == {0, 1} and counts[:500].sum() == 250
    assert set(counts[500:]) == {2}


@pytest.mark.parametrize("order", [{"weights": "1"}, {"weights": "1,x"}, {"weights": "0,0"}, {"window": -1}])
def test_wrong_options_name_themselves(order: dict) -> None:
    with pytest.raises(UserError, match=f"--order-{next(iter(order))}"):
        batches(1, **order)


def test_validation_keeps_the_order() -> None:
    found = batches(1, training=False, window=16, by_length=True, weights="3,1")
    np.testing.assert_array_equal(np.concatenate(found), np.arange(700))
    assert len(found[-1]) == 700 % 32


def test_fairseq_may_shuffle_batches_unless_the_order_is_the_disks() -> None:
    assert EpochDataset(Numbers(), list, True).shuffles_batches
    assert not EpochDataset(Numbers(), list, True, OrderConfig(window=8)).shuffles_batches
