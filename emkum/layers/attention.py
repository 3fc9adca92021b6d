"""Which attention kernel pays on which device."""

import torch
from torch import nn

from emkum.layers.precision import Autocast


def choose_attention_kernel(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Set timm's attention layers to the faster of fused and plain attention.

    On a CPU in bfloat16 the fused kernel's backward is several times slower than plain matrix products; everywhere
    else the fused one is at least as fast and keeps no attention matrix.
    """
    fused = not (device.type == "cpu" and dtype == torch.bfloat16)
    for layer in module.modules():
        if hasattr(layer, "fused_attn"):
            layer.fused_attn = fused


def prepare_attention(model: nn.Module, autocast: Autocast, device: torch.device, fused: bool = True) -> None:
    """Set a model's attention layers for a forward: training runs under autocast, validation in full precision.

    Args:
        model: in either mode.
        autocast: that its training runs under.
        device: where its inputs are.
        fused: let device and precision choose; False = leave the layers as they are.
    """
    if fused:
        dtype = autocast.dtype(device) if model.training else None
        choose_attention_kernel(model, device, dtype or next(model.parameters()).dtype)
