"""Pooling over tokens, padding left out."""

import pytest
import torch

from emkum.layers.pooling import masked_maximum, masked_mean


@pytest.mark.parametrize("padded", [False, True])
def test_mean_and_maximum(padded: bool) -> None:
    torch.manual_seed(0)
    tokens, lengths = torch.randn(3, 5, 4), [5, 2, 1] if padded else [5, 5, 5]
    mask = torch.arange(5) >= torch.tensor(lengths)[:, None]
    given = mask if padded else None
    filled = tokens.masked_fill(mask[..., None], float("nan"))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(masked_mean(filled, given)[row], tokens[row, :length].mean(0))
        torch.testing.assert_close(masked_maximum(filled, given)[row], tokens[row, :length].max(0).values)
