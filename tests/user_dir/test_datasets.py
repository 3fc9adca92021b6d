"""Order and batches of an epoch, as fairseq asks for them, and the end of its reading ahead."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fairseq.data.data_utils import numpy_seed
from fairseq.data.iterators import BufferedIterator

from emkum.data.order import OrderConfig
from emkum.errors import UserError
from user_dir.datasets import EpochDataset, end_reading_ahead

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


def test_reading_ahead_ends_also_where_the_queue_is_full():
    iterator = BufferedIterator(2, list(range(50)))
    assert next(iterator) == 0
    thread = iterator._consumer
    assert thread.is_alive()
    end_reading_ahead()
    assert not thread.is_alive()
    assert thread.count < 50


# The reading thread is the last to hold a batch, and letting go of it lasts into the end of the process.
PROGRAM = """
import time
import torch
from emkum.data import worker_memory
from fairseq.data.iterators import BufferedIterator
import user_dir.datasets

def slow_release(*arguments):
    time.sleep(1)
    print("released", flush=True)

class Batches(list):
    def __iter__(self):
        place = worker_memory._Place(64, torch.uint8, torch.Size([4]), (1,))
        yield worker_memory._receive(torch.zeros(128, dtype=torch.uint8), {"image": place})

def put_and_stay(item, put):
    put(item)
    if not isinstance(item, dict):
        time.sleep(0.2)

worker_memory._release = slow_release
iterator = BufferedIterator(2, Batches([0]))
put = iterator._queue.put
iterator._queue.put = lambda item: put_and_stay(item, put)
for item in iterator:
    pass
del item
time.sleep(0.6)
"""


def test_a_batch_that_is_let_go_of_late_does_not_abort_the_process():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "released\n"
