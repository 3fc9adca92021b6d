"""Masked language modeling of a text encoder by itself (BERT, Devlin et al. 2019)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from emkum.layers.precision import at_least_float32
from emkum.layers.shared_encoders import initialize_weights
from emkum.models.encoder import Encoder
from emkum.objectives.masked_modeling import IGNORE, masked_places


@dataclass
class MaskedLanguageOutput:
    """Scalars over the tokens to predict: the sum of their cross-entropies, and how many are predicted right."""

    loss_sum: Tensor
    correct: Tensor


class MaskedLanguageHead(nn.Module):
    """BERT's head: Linear, GELU, LayerNorm, then similarity to every word's embedding, and a bias a word.

    Args:
        width: D.
        vocab_size: V.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-12))
        self.transform.apply(initialize_weights)
        self.bias = nn.Parameter(self.transform[0].bias.new_zeros(vocab_size))

    def forward(self, tokens: Tensor, words: Tensor) -> Tensor:
        """(M, V) logits of (M, D) tokens, for the words of a (V, D) embedding."""
        return F.linear(self.transform(tokens), words, self.bias)


def masked_language_modeling(
    encoder: Encoder,
    head: MaskedLanguageHead,
    text: Tensor,
    targets: Tensor,
    num_targets: int,
    padding_mask: Tensor | None = None,
) -> MaskedLanguageOutput:
    """Cross-entropy of the true ids at the masked tokens; the head runs on these alone.

    Args:
        encoder: with the word embedding as its one embedding parameter.
        head: of its width.
        text: (B, L) ids with some masked.
        targets: (B, L), the true id where it is to be predicted, else IGNORE.
        num_targets: how many are to be predicted, so that the host need not wait for the device to count them.
        padding_mask: (B, L), True at padding; None where nothing is padded.
    """
    (words,) = encoder.embedding_parameters()
    places = masked_places(targets != IGNORE, num_targets)
    tokens = encoder(text, padding_mask).tokens.flatten(0, 1).index_select(0, places)
    logits = at_least_float32(head(tokens, words))
    truth = targets.flatten()[places]
    return MaskedLanguageOutput(
        F.cross_entropy(logits, truth, reduction="sum"), (logits.detach().argmax(1) == truth).sum()
    )
