"""A first-in, first-out bank of features as checkpointed, rank-identical state."""

import torch
from torch import Tensor, nn

EMPTY = -1


class FeatureQueue(nn.Module):
    """The last `size` rows given to `push`, with the id of the image that each came from.

    Everything is a persistent buffer, the write position included, so that a resumed run goes on with the same bank.
    The bank starts empty; rows whose id is EMPTY are not filled yet.

    Args:
        size: rows.
        width: channels D.
    """

    features: Tensor
    ids: Tensor
    position: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(size, width))
        self.register_buffer("ids", torch.full((size,), EMPTY, dtype=torch.int64))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return self.features.shape[0]

    @torch.no_grad()
    def push(self, features: Tensor, ids: Tensor) -> Tensor:
        """Write rows over the oldest ones; of more rows than the bank holds, the last ones stay.

        What is not finite becomes 0: it would spoil the loss for as long as the row stays.

        Args:
            features: (B, D), already gathered from all ranks so that every rank's bank is the same.
            ids: (B,) int64, not negative.

        Returns:
            (min(B, size),) int64, the places that were written.
        """
        size = len(self)
        features, ids = features[-size:].to(self.features.dtype), ids[-size:]
        # Index arithmetic on the device: no host synchronization.
        rows = (self.position + torch.arange(features.shape[0], device=features.device)) % size
        self.features[rows] = features.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        self.ids[rows] = ids
        self.position.copy_((self.position + features.shape[0]) % size)
        return rows
