"""Encoding in chunks against encoding the whole at once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from emkum.models.chunked import encode_in_chunks, pieces_of_groups
from emkum.outputs import ModalityOutput

ROWS, LENGTH, WIDTH = 10, 5, 4


class Noisy(nn.Module):
    """Tokens and features with dropout, and one parameter that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)
        self.unused = nn.Parameter(torch.zeros(2))
        self.dropout = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> ModalityOutput:
        tokens = self.dropout(self.linear(x).tanh())
        return ModalityOutput(tokens, features=self.head(tokens[:, 0]))


def loss_of(output: ModalityOutput) -> Tensor:
    """Something that no sum over rows equals."""
    similarity = output.features @ output.features.T
    return similarity.logsumexp(1).sum() + output.tokens.mean((0, 1)).square().sum()


def run(encode: Callable[[nn.Module], ModalityOutput]) -> tuple[Tensor, dict[str, Tensor | None]]:
    torch.manual_seed(0)
    model = Noisy().double().train()
    loss = loss_of(encode(model))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("chunk", [1, 3, 5, 10])
def test_loss_and_gradients_equal_those_of_one_graph(chunk: int) -> None:
    x = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pieces = [(part,) for part in x.split(chunk)]

    def at_once(model: nn.Module) -> ModalityOutput:
        # Piece by piece, so that dropout draws the same numbers, in one graph.
        parts = [model(*piece) for piece in pieces]
        return ModalityOutput(torch.cat([p.tokens for p in parts]), features=torch.cat([p.features for p in parts]))

    want, gradients = run(at_once)
    got, ours = run(lambda model: encode_in_chunks(model, pieces, model))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert ours["unused"] is None and gradients["unused"] is None
    for name in ("linear.weight", "linear.bias", "head.weight"):
        torch.testing.assert_close(ours[name], gradients[name], rtol=1e-10, atol=1e-14)


def test_random_numbers_go_on_as_if_nothing_were_replayed() -> None:
    x = torch.randn(ROWS, LENGTH, WIDTH).double()
    model = Noisy().double().train()
    torch.manual_seed(3)
    output = encode_in_chunks(model, [(part,) for part in x.split(2)], model)
    expected = torch.rand(3)
    torch.manual_seed(3)
    output = encode_in_chunks(model, [(part,) for part in x.split(2)], model)
    loss_of(output).backward()
    assert torch.equal(torch.rand(3), expected)


def test_graph_of_a_chunk_alone_is_kept() -> None:
    """Bytes that autograd keeps do not grow with the number of chunks, but for the outputs."""
    model = Noisy().double().train()
    kept = []
    for rows in (4, 32):
        x, sizes = torch.randn(rows, 64, WIDTH).double(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            output = encode_in_chunks(model, [(part,) for part in x.split(4)], model, keep_tokens=False)
            output.features.sum().backward()
        assert output.tokens.shape == (rows, 1, WIDTH)
        kept.append(max(sizes))
    assert kept[0] == kept[1]


def test_shorter_pieces_are_padded() -> None:
    model = Noisy().double().eval()
    x = torch.randn(4, LENGTH, WIDTH).double()
    mask = torch.tensor([[False] * 3 + [True] * 2] * 2 + [[False] * 5] * 2)
    places = pieces_of_groups([(2, 3), (2, 5)], 1)
    assert places == [(slice(0, 1), 3), (slice(1, 2), 3), (slice(2, 3), 5), (slice(3, 4), 5)]
    output = encode_in_chunks(model, [(x[rows, :n],) for rows, n in places], model, LENGTH, padding_mask=mask)
    assert output.tokens.shape == (4, LENGTH, WIDTH) and output.padding_mask is mask
    torch.testing.assert_close(output.tokens[0, :3], model(x[:1, :3]).tokens[0])
    assert (output.tokens[0, 3:] == 0).all()
    assert pieces_of_groups([(5, 2)], 2) == [(slice(0, 2), 2), (slice(2, 4), 2), (slice(4, 5), 2)]
