"""Means of instance-normed layers against sums written out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from emkum.layers.layer_targets import instance_norm, mean_of_layers


def naive(tokens: np.ndarray, hidden: np.ndarray, eps: float) -> np.ndarray:
    """Sample by sample and channel by channel, in float64."""
    result = np.zeros(tokens.shape)
    for b in range(len(tokens)):
        rows = np.flatnonzero(~hidden[b])
        for d in range(tokens.shape[2]):
            values = tokens[b, rows, d].astype(np.float64)
            result[b, rows, d] = (values - values.mean()) / np.sqrt(values.var() + eps)
    return result


@pytest.fixture
def tokens() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 7, 5) * torch.tensor([1.0, 1e-2, 10.0, 1.0, 1.0]) + 4


@pytest.mark.parametrize("padded", [False, True])
def test_instance_norm(tokens: torch.Tensor, padded: bool) -> None:
    hidden = torch.zeros(3, 7, dtype=torch.bool)
    if padded:
        hidden[0, 5:], hidden[2, 2:] = True, True
    normed = instance_norm(tokens, hidden if padded else None)
    np.testing.assert_allclose(normed.numpy(), naive(tokens.numpy(), hidden.numpy(), 1e-8), atol=2e-4)
    # Whatever stands at padding changes nothing.
    filled = tokens.masked_fill(hidden[..., None], float("nan"))
    torch.testing.assert_close(instance_norm(filled, hidden), normed, rtol=0, atol=1e-4)


def test_mean_of_layers(tokens: torch.Tensor) -> None:
    layers = [tokens, tokens.flip(1) ** 2, tokens.sin()]
    expected = sum(naive(layer.numpy(), np.zeros((3, 7), bool), 1e-8) for layer in layers) / 3
    np.testing.assert_allclose(mean_of_layers(layers, norm_channels=False).numpy(), expected, atol=2e-4)
    normed = F.layer_norm(torch.from_numpy(expected), (5,)).numpy()
    np.testing.assert_allclose(mean_of_layers(layers).numpy(), normed, atol=2e-3)


def test_half_precision_is_normed_in_float32(tokens: torch.Tensor) -> None:
    assert instance_norm(tokens.bfloat16()).dtype == torch.float32
