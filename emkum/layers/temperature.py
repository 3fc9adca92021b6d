"""The learnable scale of contrastive logits."""

import math

import torch
from torch import Tensor, nn

from emkum.layers.precision import at_least_float32


class LogitScale(nn.Module):
    """exp(log_scale), clamped to [1, 100] (CLIP, Radford et al. 2021, section 2.5).

    Args:
        initial: initial scale, 1 / temperature.
    """

    def __init__(self, initial: float = 1 / 0.07) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(initial)))

    def forward(self) -> Tensor:
        """The scale, a scalar of float32 at least."""
        # Clamping the value alone would stop the gradient for good once the parameter has left the range.
        with torch.no_grad():
            self.log_scale.clamp_(0.0, math.log(100.0))
        return at_least_float32(self.log_scale).exp()
