"""The mean of the patches, LayerNorm and a linear map, against the same written out."""

import math

import torch
from torch import Tensor

from emkum.models.classification_head import PatchMeanHead
from emkum.outputs import Encoded

BATCH, TOKENS, WIDTH, CLASSES = 3, 5, 4, 6


def naive(tokens: Tensor, head: PatchMeanHead) -> Tensor:
    rows = []
    for sample in tokens:
        mean = [sum(sample[token, channel] for token in range(1, TOKENS)) / (TOKENS - 1) for channel in range(WIDTH)]
        center = sum(mean) / WIDTH
        spread = sum((value - center) ** 2 for value in mean) / WIDTH
        normed = [
            head.norm.weight[i] * (mean[i] - center) / (spread + 1e-6).sqrt() + head.norm.bias[i] for i in range(WIDTH)
        ]
        rows.append(
            torch.stack(
                [
                    sum(head.linear.weight[c, i] * normed[i] for i in range(WIDTH)) + head.linear.bias[c]
                    for c in range(CLASSES)
                ]
            )
        )
    return torch.stack(rows)


def test_values_and_gradients_equal_the_naive_ones() -> None:
    torch.manual_seed(0)
    head = PatchMeanHead(WIDTH, CLASSES).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter))
    tokens = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    found, expected = (tokens.clone().requires_grad_() for _ in range(2))
    outputs = head(Encoded(found)), naive(expected, head)
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    weights = torch.randn(BATCH, CLASSES, dtype=torch.float64)
    for output in outputs:
        (weights * output).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-6, atol=1e-6)
    assert not found.grad[:, 0].any(), "the CLS token has no part in it"


def test_it_begins_with_small_weights() -> None:
    torch.manual_seed(0)
    head = PatchMeanHead(64, 100)
    assert not head.linear.bias.any() and math.isclose(head.linear.weight.std().item(), 0.02, rel_tol=0.1)
