"""Which attention kernel pays on which device."""

import torch
from torch import nn


def choose_attention_kernel(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Set timm's attention layers to the faster of fused and plain attention.

    On a CPU in bfloat16 the fused kernel's backward is several times slower than plain matrix products; everywhere
    else the fused one is at least as fast and keeps no attention matrix.
    """
    fused = not (device.type == "cpu" and dtype == torch.bfloat16)
    for layer in module.modules():
        if hasattr(layer, "fused_attn"):
            layer.fused_attn = fused
