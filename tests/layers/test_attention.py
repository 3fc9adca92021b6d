"""Recorded attention weights: those by which the layers weighed their values, of each kind of layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models import beit
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from emkum.layers.attention import AttentionRecorder, attention_weights
from emkum.models.beit3 import MultiwayLayer
from emkum.models.bert import BertEncoder
from emkum.models.builders import Targets, build_student
from emkum.models.data2vec2 import FusedAttention, data2vec2_module

WIDTH, HEADS, TOKENS = 24, 4, 5
MASK = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 0, 1]], dtype=torch.bool)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Kernel(TorchFunctionMode):
    """What fused kernels are given as values and what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.calls.append((args[2], result))
        return result


def relative_positions() -> nn.Module:
    layer = beit.Attention(WIDTH, HEADS, window_size=(2, 2))
    nn.init.normal_(layer.relative_position_bias_table)
    return layer


def additive(padding_mask: Tensor) -> Tensor:
    return torch.zeros(padding_mask.shape).masked_fill(padding_mask, float("-inf"))[:, None, None]


def bert() -> Callable[[Tensor], Tensor]:
    layer = BertEncoder(10, WIDTH, layers=1, heads=HEADS, ffn_width=8).eval().all_blocks()[0]
    return lambda x: layer(x, ~MASK[:, None, None])


def beit3(fused: bool) -> Callable[[Tensor], Tensor]:
    layer = MultiwayLayer(WIDTH, HEADS, 8, 1e-5).eval()
    layer.self_attn.fused_attn = fused
    return lambda x: layer(x, 0, ~MASK[:, None, None])


def data2vec2(fused: bool) -> Callable[[Tensor], Tensor]:
    stock = data2vec2_module("models.modalities.modules").AltAttention(WIDTH, HEADS, qkv_bias=True).eval()
    layer = FusedAttention(stock) if fused else stock
    return lambda x: layer(x, MASK)


def timm_layer(layer: nn.Module, fused: bool, **arguments: Tensor) -> Callable[[Tensor], Tensor]:
    layer.fused_attn = fused
    return lambda x: layer(x, **arguments)


# Each with fused kernels and, where it has one, in its plain form; both are made from the same seed.
LAYERS: dict[str, Callable[[bool], Callable[[Tensor], Tensor]]] = {
    "timm": lambda fused: timm_layer(Attention(WIDTH, HEADS, qk_norm=True, norm_layer=nn.LayerNorm), fused),
    "timm, padded": lambda fused: timm_layer(Attention(WIDTH, HEADS), fused, attn_mask=additive(MASK)),
    "relative positions": lambda fused: timm_layer(relative_positions(), fused),
    "bert": lambda fused: bert(),
    "beit3": beit3,
    "data2vec2": data2vec2,
}


def record(name: str, fused: bool, x: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(1)
    layer = LAYERS[name](fused)
    with torch.no_grad(), Kernel() as kernel, AttentionRecorder() as recorder:
        layer(x)
    return recorder.weights, kernel.calls


@pytest.mark.parametrize("name", LAYERS)
def test_weights_reproduce_what_the_layer_made_of_its_values(name: str) -> None:
    weights, calls = record(name, True, 3 * torch.randn(3, TOKENS, WIDTH))
    assert len(weights) == len(calls) == 1 and weights[0].shape == (3, HEADS, TOKENS, TOKENS)
    value, attended = calls[0]
    torch.testing.assert_close(weights[0] @ value, attended, rtol=0, atol=1e-5)
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(3, HEADS, TOKENS))
    hidden = weights[0].mean((1, 2)) == 0
    assert torch.equal(hidden, MASK if name not in ("timm", "relative positions") else torch.zeros_like(MASK))


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "bert"])
def test_plain_attention_is_recorded_as_fused_attention_is(name: str) -> None:
    x = 3 * torch.randn(3, TOKENS, WIDTH)
    plain, calls = record(name, False, x)
    assert calls == [] and len(plain) == 1
    torch.testing.assert_close(plain[0], record(name, True, x)[0][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["fused", "stock"])
def test_a_student_s_layers_in_their_order(attention: str) -> None:
    options = {"student_size": "tiny", "image_size": 32, "image_patch_size": 8, "image_layers": 2, "text_layers": 1}
    options |= {"student_attention": attention, "shared_layers": 2}
    student = build_student(options, 20, Targets(cls_attention=True)).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        with AttentionRecorder() as images:
            image = student.encode_image(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
        with AttentionRecorder() as texts:
            text = student.encode_text(torch.randint(4, 20, (3, TOKENS)), MASK.sort(1).values)
    shared = len(student.shared_encoder.blocks)
    assert [len(images.weights), len(texts.weights)] == [2 + shared, 1 + shared]
    for recorder, output in ((images, image), (texts, text)):
        # What the shared encoder says of its last block is computed by other means.
        torch.testing.assert_close(recorder.weights[-1].mean(1)[:, 0], output.cls_attention, rtol=0, atol=1e-5)
        assert not any(weights.requires_grad for weights in recorder.weights)


def test_nothing_is_kept_outside_of_it() -> None:
    layer = Attention(WIDTH, HEADS)
    with AttentionRecorder() as recorder:
        torch.randn(3, 4).softmax(-1)
    layer(torch.randn(1, 2, WIDTH))
    assert recorder.weights == []


def test_causal_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="causal"):
        attention_weights(torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4), is_causal=True)
