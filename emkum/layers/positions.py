"""Position embeddings that all modalities share."""

import torch
from torch import Tensor, nn


def sincos_table(rows: int, width: int) -> Tensor:
    """(rows, width) fixed positions (Vaswani et al. 2017, section 3.5): sines, then cosines, of falling frequencies.

    Raises:
        ValueError: `width` is odd.
    """
    if width % 2:
        raise ValueError(f"sine-cosine positions need an even width, not {width}")
    frequencies = 10_000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


class SharedPositions(nn.Module):
    """Adds row n of one table to token n, whichever modality it is of: the CLS tokens share row 0.

    Args:
        rows: longest sequence of either modality.
        width: channels D.
        learned: a table that is learned, initialized as ViT's; otherwise fixed sines and cosines.
        scale: factor of the latter. Beside embeddings that are as small as BERT's and ViT's, sines of amplitude 1
            would drown everything else.
    """

    def __init__(self, rows: int, width: int, learned: bool, scale: float = 0.03) -> None:
        super().__init__()
        if learned:
            self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(rows, width), std=0.02))
        else:
            self.register_buffer("positions", scale * sincos_table(rows, width), persistent=False)

    def forward(self, tokens: Tensor, token_type: int) -> Tensor:
        """(B, N, D) with positions; the type makes no difference.

        Raises:
            ValueError: more tokens than rows.
        """
        if tokens.shape[1] > len(self.positions):
            raise ValueError(f"{tokens.shape[1]} tokens exceed the {len(self.positions)} shared positions")
        return tokens + self.positions[: tokens.shape[1]].to(tokens.dtype)
