"""What makes classes out of an image encoder's tokens."""

from torch import Tensor, nn

from emkum.layers.pooling import masked_mean
from emkum.layers.shared_encoders import initialize_weights
from emkum.outputs import Encoded


class PatchMeanHead(nn.Module):
    """LayerNorm and a linear map of the mean over the patches, as Data2Vec 2 (Baevski et al. 2022) is fine-tuned.

    Args:
        width: channels D of the tokens.
        num_classes: C.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, num_classes)
        self.apply(initialize_weights)

    def forward(self, encoded: Encoded) -> Tensor:
        """(B, C) logits of (B, 1 + N, D) tokens, of which the first, the CLS token, is left out."""
        return self.linear(self.norm(masked_mean(encoded.tokens[:, 1:])))
