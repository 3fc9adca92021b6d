"""Centered crops of a split, decoded in worker processes, for evaluation."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from emkum.data.decoding import BadImage
from emkum.data.shards import ShardedSamples
from emkum.data.transforms import CropRow, ImageTransform, crop_rows, stack_crops
from emkum.data.worker_memory import hand_over
from emkum.errors import UserError


def centered_crops(
    samples: ShardedSamples, size: int, batch_size: int, workers: int = 0, positions: Sequence[int] | None = None
) -> Iterator[Tensor]:
    """Batches of crops, (B, 3, S, S) uint8; the last may be smaller. No random number is drawn.

    Args:
        samples: the split.
        size: S, side of the crops in pixels.
        batch_size: images.
        workers: decoding processes; 0 = none.
        positions: of the images, in the order wanted; None = all, in the order of the split.

    Raises:
        UserError: a shard or an image is damaged.
    """
    crops = _CropBatches(samples, size, batch_size, range(len(samples)) if positions is None else positions)
    # A generator of its own: a data loader would seed its processes from that of everything else.
    loader = DataLoader(crops, batch_size=None, collate_fn=hand_over, num_workers=workers, generator=torch.Generator())
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _CropBatches(Dataset):
    """One batch an item."""

    def __init__(self, samples: ShardedSamples, size: int, batch_size: int, positions: Sequence[int]) -> None:
        self.samples = samples
        self.transform = ImageTransform(size)
        self.batch_size = batch_size
        self.positions = positions

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)

    def __getitem__(self, number: int) -> Tensor | UserError:
        """(B, 3, S, S) uint8. What is wrong with the data is returned, not raised: a data loader's process would end
        without handing it on."""
        start = number * self.batch_size
        positions = self.positions[start : start + self.batch_size]
        try:
            rows = crop_rows(len(positions), self.transform.size)
            return stack_crops([self._crop(*pair) for pair in zip(positions, rows, strict=True)])
        except UserError as error:
            return error

    def _crop(self, position: int, row: CropRow) -> Tensor:
        sample = self.samples[position]
        try:
            return self.transform.views(sample.image, (self.transform.size,), row=row)[0]
        except BadImage as error:
            raise UserError(
                f"{self.samples.directory}: sample {position} ({sample.key}) has no usable image: {error}"
            ) from None
