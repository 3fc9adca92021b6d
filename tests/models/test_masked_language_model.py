"""Masked language modeling by an encoder alone, against loops."""

import math

import pytest
import torch
from torch import Tensor

from emkum.models.bert import BertEncoder
from emkum.models.masked_language_model import MaskedLanguageHead, masked_language_modeling

VOCABULARY, WIDTH = 11, 8


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def parts() -> tuple[BertEncoder, MaskedLanguageHead]:
    encoder = BertEncoder(
        VOCABULARY, WIDTH, 2, heads=2, ffn_width=12, max_positions=9, dropout=0.0, attention_dropout=0.0
    )
    head = MaskedLanguageHead(WIDTH, VOCABULARY)
    with torch.no_grad():
        for parameter in [*encoder.parameters(), *head.parameters()]:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return encoder.double(), head.double()


def reference(encoder: BertEncoder, head: MaskedLanguageHead, text: Tensor, targets: Tensor, padding: Tensor | None):
    """Sum of losses and number of right ones, token by token."""
    tokens = encoder(text, padding).tokens
    linear, _, norm = head.transform
    words = encoder.embeddings.word_embeddings.weight
    losses, right = [], 0
    for row in range(len(text)):
        for place in range(text.shape[1]):
            if targets[row, place] == -100:
                continue
            x = linear.weight @ tokens[row, place] + linear.bias
            x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
            x = x - x.mean()
            x = x / (x.square().mean() + 1e-12).sqrt() * norm.weight + norm.bias
            logits = torch.stack([word @ x for word in words]) + head.bias
            losses.append(logits.exp().sum().log() - logits[targets[row, place]])
            right += int(logits.argmax() == targets[row, place])
    return sum(losses), right


@pytest.mark.parametrize("padded", [False, True])
def test_against_loops(parts: tuple[BertEncoder, MaskedLanguageHead], padded: bool) -> None:
    encoder, head = parts
    text = torch.randint(0, VOCABULARY, (3, 7))
    padding = torch.arange(7) >= torch.tensor([[7], [4], [5]]) if padded else None
    targets = torch.full_like(text, -100)
    for row, place in ((0, 1), (0, 6), (1, 3), (2, 2)):
        targets[row, place] = torch.randint(0, VOCABULARY, ())
    output = masked_language_modeling(encoder, head, text, targets, 4, padding)
    expected, right = reference(encoder, head, text, targets, padding)
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-6, atol=1e-9)
    assert int(output.correct) == right
    # The word embedding learns as input and as output.
    parameters = [*encoder.parameters(), *head.parameters()]
    used = [p for name, p in encoder.named_parameters() if "token_type" not in name] + [*head.parameters()]
    found = torch.autograd.grad(output.loss_sum, parameters, allow_unused=True)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert all(gradient is not None for gradient in torch.autograd.grad(
        masked_language_modeling(encoder, head, text, targets, 4, padding).loss_sum, used
    ))  # fmt: skip


def test_nothing_to_predict(parts: tuple[BertEncoder, MaskedLanguageHead]) -> None:
    encoder, head = parts
    text = torch.randint(0, VOCABULARY, (2, 4))
    output = masked_language_modeling(encoder, head, text, torch.full_like(text, -100), 0)
    assert output.loss_sum.item() == 0 and output.correct.item() == 0
    output.loss_sum.backward()
    assert all(p.grad is None or not p.grad.any() for p in encoder.parameters())
