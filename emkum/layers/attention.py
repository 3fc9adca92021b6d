"""Which attention kernel pays on which device, and what layers attend to."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from emkum.layers.precision import Autocast, at_least_float32


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


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """(B, heads, N, N) by which `scaled_dot_product_attention` of the same arguments weighs values, without dropout.

    Raises:
        ValueError: it is causal, which no encoder here is.
    """
    if is_causal:
        raise ValueError("attention_weights knows no causal attention")
    logits = at_least_float32(query) @ at_least_float32(key).transpose(-2, -1)
    logits = logits * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(-1)


class AttentionRecorder(TorchFunctionMode):
    """Keeps the attention weights of each layer that runs under it, in their order, whatever kernel computes them.

    Fused kernels keep none: theirs are computed from what the kernel is given. Plain attention is known by its softmax
    over (B, heads, N, N).

        with AttentionRecorder() as recorder:
            student.encode_image(images)

    Attributes:
        weights: (B, heads, N, N) float32 a layer, detached; a row sums to 1 over what its token attends to.
    """

    _SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.weights.append(attention_weights(*args, **(kwargs or {})).detach())
        elif func in self._SOFTMAX and result.ndim == 4:
            self.weights.append(result.detach().float())
        return result
