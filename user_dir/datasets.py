"""A map-style dataset as fairseq wants it, and an orderly end of fairseq's reading ahead."""

import atexit
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from fairseq.data import FairseqDataset
from fairseq.data.iterators import BackgroundConsumer

from emkum.data.order import OrderConfig, batches_by_length, epoch_order, parse_weights
from emkum.data.worker_memory import hand_over
from emkum.distributed import world_size
from emkum.errors import UserError


class EpochDataset(FairseqDataset):
    """Adapts a dataset whose items depend on (seed, epoch, index) alone.

    Training order is a new one each epoch; incomplete batches, and batches that not every device would get one of, are
    left out of an epoch, because losses over gathered features need equal batches.

    Args:
        dataset: has `__getitem__`, `__len__`, `set_epoch` and `samples` (a `MixedSamples`).
        collate: list of items to a batch.
        training: shuffle and leave out the remainder; otherwise everything in order.
        order: how to shuffle.

    Raises:
        UserError: the order's weights do not fit the sets.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list], dict[str, Any]],
        training: bool,
        order: OrderConfig | None = None,
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.training = training
        self.order = order or OrderConfig()
        try:
            self.weights = parse_weights(self.order.weights, len(dataset.samples.lengths)) if training else []
        except ValueError as error:
            raise UserError(f"--order-weights {self.order.weights!r}: {error}") from None
        if self.order.window < 0:
            raise UserError(f"--order-window {self.order.window}: want 0 (full shuffle) or more")

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        # The data loader asks for whole batches where a data set gives them.
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(indices)
        return [self.dataset[index] for index in indices]

    def collater(self, items: list[Any]) -> Any:
        return hand_over(self.collate(items))

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        # Workers hold a copy of the dataset: only new ones see the next epoch's number.
        return False

    def num_tokens(self, index: int) -> int:
        return 1

    def size(self, index: int) -> int:
        return 1

    def ordered_indices(self) -> np.ndarray:
        if not self.training:
            return np.arange(len(self))
        # fairseq calls this under a seed made of the run's seed and the epoch.
        return epoch_order(self.dataset.samples.lengths, np.random, self.weights, self.order.window)

    @property
    def shuffles_batches(self) -> bool:
        """Whether fairseq may shuffle the batches once more: not where their order is that of the disk."""
        return self.order.window == 0

    def batch_by_size(
        self,
        indices: np.ndarray,
        max_tokens: int | None = None,
        max_sentences: int | None = None,
        required_batch_size_multiple: int = 1,
    ) -> list[np.ndarray]:
        if max_sentences is None:
            raise UserError("batches are counted in images here: give --batch-size, not --max-tokens")
        if self.training and self.order.by_length:
            # fairseq's seed is gone by now; the epoch's order seeds what follows from it.
            rng = np.random.RandomState(indices[:8])
            batches = batches_by_length(indices, self.dataset.samples.caption_lengths, max_sentences, rng)
        else:
            batches = [indices[start : start + max_sentences] for start in range(0, len(indices), max_sentences)]
        if not self.training:
            return batches
        whole = [batch for batch in batches if len(batch) == max_sentences]
        usable = len(whole) - len(whole) % world_size()
        if usable == 0:
            raise UserError(
                f"{len(indices)} training images are too few for --batch-size {max_sentences} on {world_size()} devices"
            )
        return whole[:usable]


@atexit.register
def end_reading_ahead(seconds: float = 10.0) -> None:
    """Wait until fairseq's threads that read batches ahead have ended; called before the interpreter does.

    They are daemon threads. One that lets go of a tensor while the interpreter is being taken down aborts the process,
    whose work is done but whose exit status then says that it failed.

    Args:
        seconds: how long to wait at most, for a worker process may never answer.
    """
    deadline = time.monotonic() + seconds
    for thread in threading.enumerate():
        if not isinstance(thread, BackgroundConsumer):
            continue
        # After the batch that it is on; one that waits for room in its queue gets that.
        thread._max_len = 0
        while thread.is_alive() and time.monotonic() < deadline:
            with suppress(queue.Empty):
                thread._queue.get_nowait()
            thread.join(0.01)
