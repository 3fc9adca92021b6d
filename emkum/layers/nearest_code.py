"""Which of many codes a feature is nearest to, and tables of codes that are fitted elsewhere."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emkum.layers.precision import at_least_float32, normalized


@torch.no_grad()
def nearest_by_distance(features: Tensor, centroids: Tensor) -> Tensor:
    """(B,) int64, row of the nearest of centroids (K, D) by Euclidean distance, for features (B, D).

    Of centroids of length 1 that is the nearest by cosine.
    """
    features = at_least_float32(features)
    centroids = centroids.to(features.dtype)
    # ||x - c||^2 without its part that is the same for all centroids, halved and negated.
    return (features @ centroids.T - 0.5 * centroids.square().sum(1)).argmax(1)


@torch.no_grad()
def nearest_by_cosine(features: Tensor, codes: Tensor) -> Tensor:
    """(B,) int64, row of the nearest of codes (J, S) by cosine, for features (B, S)."""
    features = normalized(features)
    return (features @ normalized(codes.to(features.dtype)).T).argmax(1)


class CodeTable(nn.Module):
    """Tensors that give features their codes, as persistent buffers, and not trained.

    They are filled from a file when a run begins; a checkpoint brings them along, whatever sizes they have, and needs
    the file no more.

    Args:
        shapes: of the tensors by name, as far as they are known.
    """

    filled: Tensor

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.names = tuple(shapes)
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("filled", torch.zeros((), dtype=torch.bool))
        # The same on the host, once it is so.
        self._is_filled = False

    def fill(self, **tensors: Tensor) -> None:
        """Set all tensors, given by name; sizes may differ from those before."""
        if tensors.keys() != set(self.names):
            raise ValueError(f"want {', '.join(self.names)}, not {', '.join(tensors)}")
        for name, value in tensors.items():
            own = getattr(self, name)
            setattr(self, name, value.detach().to(own.device, own.dtype, copy=True))
        self.filled.fill_(True)

    def is_filled(self) -> bool:
        """Whether the tensors are known; the device is asked until they are."""
        if not self._is_filled:
            self._is_filled = bool(self.filled)
        return self._is_filled

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        for name in self.names:
            own, saved = getattr(self, name), state_dict.get(prefix + name)
            if saved is not None and saved.shape != own.shape:
                setattr(self, name, own.new_zeros(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._is_filled = False


class NearestCentroid(CodeTable):
    """Nearest centroid (k-means).

    Args:
        count: centroids K.
        width: channels D of features and centroids.
    """

    centroids: Tensor

    def __init__(self, count: int, width: int) -> None:
        super().__init__(centroids=(count, width))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) to (B,) int64."""
        return nearest_by_distance(features, self.centroids)


class NearestCode(CodeTable):
    """Nearest code by cosine behind a linear map, as the image quantizer finds it.

    Args:
        count: codes J.
        width: channels D of features.
    """

    weight: Tensor
    bias: Tensor
    codes: Tensor

    def __init__(self, count: int, width: int) -> None:
        super().__init__(weight=(0, width), bias=(0,), codes=(count, 0))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) to (B,) int64."""
        return nearest_by_cosine(mapped(features, self.weight, self.bias), self.codes)


def mapped(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, D) through a linear map to (B, S), in the precision of losses."""
    features = at_least_float32(features)
    return F.linear(features, weight.to(features.dtype), bias.to(features.dtype))
