"""Shared positions."""

import math

import pytest
import torch

from emkum.layers.positions import SharedPositions, sincos_table


def test_sines_and_cosines_by_the_formula() -> None:
    rows, width = 7, 6
    table = sincos_table(rows, width)
    for n in range(rows):
        for i in range(width // 2):
            angle = n / 10_000 ** (2 * i / width)
            assert table[n, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[n, width // 2 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)
    with pytest.raises(ValueError, match="even width, not 5"):
        sincos_table(3, 5)


@pytest.mark.parametrize("learned", [True, False])
def test_both_modalities_get_the_same_rows(learned: bool) -> None:
    torch.manual_seed(0)
    layer = SharedPositions(6, 4, learned)
    tokens = torch.randn(2, 5, 4)
    image, text = layer(tokens, 0), layer(tokens, 1)
    assert torch.equal(image, text)
    torch.testing.assert_close(image - tokens, layer.positions[:5].expand(2, -1, -1))
    assert [name for name, _ in layer.named_parameters()] == (["positions"] if learned else [])
    assert (not layer.state_dict()) == (not learned)
    with pytest.raises(ValueError, match="7 tokens exceed the 6"):
        layer(torch.randn(1, 7, 4), 0)


def test_the_fixed_table_is_scaled() -> None:
    layer = SharedPositions(5, 4, learned=False, scale=0.5)
    torch.testing.assert_close(layer.positions, 0.5 * sincos_table(5, 4))
