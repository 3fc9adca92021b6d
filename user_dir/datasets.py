"""A map-style dataset as fairseq wants it."""

from collections.abc import Callable
from typing import Any

import numpy as np
from fairseq.data import FairseqDataset

from emkum.distributed import world_size
from emkum.errors import UserError


class EpochDataset(FairseqDataset):
    """Adapts a dataset whose items depend on (seed, epoch, index) alone.

    Training order is a new permutation each epoch; incomplete batches, and batches that not every device would get
    one of, are left out of an epoch, because losses over gathered features need equal batches.

    Args:
        dataset: has `__getitem__`, `__len__` and `set_epoch`.
        collate: list of items to a batch.
        training: shuffle and leave out the remainder; otherwise everything in order.
    """

    def __init__(self, dataset: Any, collate: Callable[[list], dict[str, Any]], training: bool) -> None:
        self.dataset = dataset
        self.collater = collate
        self.training = training

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

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
        # fairseq calls this under a seed made of the run's seed and the epoch.
        return np.random.permutation(len(self)) if self.training else np.arange(len(self))

    def batch_by_size(
        self,
        indices: np.ndarray,
        max_tokens: int | None = None,
        max_sentences: int | None = None,
        required_batch_size_multiple: int = 1,
    ) -> list[np.ndarray]:
        if max_sentences is None:
            raise UserError("batches are counted in images here: give --batch-size, not --max-tokens")
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
