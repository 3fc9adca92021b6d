"""Attention on fused kernels against fairseq's own."""

import pytest
import torch
from torch import Tensor

from emkum.errors import UserError
from emkum.models.data2vec2 import Data2Vec2ImageEncoder, FusedAttention, data2vec2_module

WIDTH, HEADS = 24, 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_fused_attention_agrees_in_value_and_gradient(padded, biased):
    stock = data2vec2_module("models.modalities.modules").AltAttention(WIDTH, HEADS, qkv_bias=True).double()
    fused = FusedAttention(stock)
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 0, 1, 1]], dtype=torch.bool) if padded else None
    bias = torch.randn(1, HEADS, 5, 5, dtype=torch.float64, requires_grad=True) if biased else None
    parameters = [x, *stock.parameters(), *([bias] if biased else [])]
    weight = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    outputs = [attention(x, mask, bias) for attention in (stock, fused)]
    close(outputs[1], outputs[0], 1e-6)  # the stock module takes its softmax in float32
    gradients = [torch.autograd.grad((output * weight).sum(), parameters) for output in outputs]
    for actual, expected in zip(gradients[1], gradients[0], strict=True):
        close(actual, expected, 1e-6)
    assert fused.state_dict().keys() == stock.state_dict().keys()


def test_fused_attention_under_bfloat16():
    stock = data2vec2_module("models.modalities.modules").AltAttention(WIDTH, HEADS, qkv_bias=True)
    fused = FusedAttention(stock)
    x = torch.randn(3, 5, WIDTH)
    mask, bias = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 0, 1, 1]]).bool(), torch.randn(1, HEADS, 5, 5)
    for arguments in ((), (mask,), (mask, bias)):
        with torch.autocast("cpu", torch.bfloat16):
            output = fused(x, *arguments)
        assert output.dtype == torch.bfloat16
        close(output.float(), stock(x, *arguments), 0.02)


def test_fused_attention_drops_attention_in_training():
    stock = data2vec2_module("models.modalities.modules").AltAttention(WIDTH, HEADS, attn_drop=0.5)
    fused = FusedAttention(stock)
    x = torch.randn(1, 5, WIDTH)
    assert not torch.equal(fused(x), fused(x))
    fused.eval()
    assert torch.equal(fused(x), fused(x))


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(UserError, match="5 attention heads do not divide a width of 24"):
        Data2Vec2ImageEncoder(WIDTH, 1, 0, num_heads=5, input_size=16, patch_size=8)
