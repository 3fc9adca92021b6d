"""What Data2Vec 2 (Baevski et al. 2022) and distillation of tokens take from several layers of an encoder."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from emkum.layers.precision import at_least_float32


def instance_norm(tokens: Tensor, padding_mask: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """Each channel of each sample to mean 0 and variance 1 over its tokens, in float32 at least.

    Args:
        tokens: (B, N, D).
        padding_mask: (B, N), True at padding, which counts for nothing and comes out as 0.
        eps: added to the variance.
    """
    tokens = at_least_float32(tokens)
    if padding_mask is None:
        return F.instance_norm(tokens.transpose(1, 2), eps=eps).transpose(1, 2)
    visible = ~padding_mask[..., None]
    count = visible.sum(1, keepdim=True)
    centered = torch.where(visible, tokens - torch.where(visible, tokens, 0).sum(1, keepdim=True) / count, 0)
    variance = centered.square().sum(1, keepdim=True) / count
    return centered * (variance + eps).rsqrt()


def mean_of_layers(layers: Sequence[Tensor], padding_mask: Tensor | None = None, norm_channels: bool = True) -> Tensor:
    """Mean over instance-normed layers, (B, N, D) of float32 at least.

    Args:
        layers: (B, N, D) each.
        padding_mask: see `instance_norm`.
        norm_channels: LayerNorm without parameters at the end, as for images.
    """
    mean = torch.stack([instance_norm(layer, padding_mask) for layer in layers]).mean(0)
    return F.layer_norm(mean, mean.shape[-1:]) if norm_channels else mean
