"""Token-type embeddings that tell the shared encoder which modality it reads."""

import torch
from torch import Tensor, nn

IMAGE, TEXT, AUDIO = range(3)


class TokenTypes(nn.Module):
    """Adds one learned vector a modality to all its tokens, scaled per channel by LayerScale (Touvron et al. 2021).

    Args:
        width: channels D.
        layer_scale: initial scale, shared by all types; None = no scaling.
        count: types; the third one is sounds'.
    """

    def __init__(self, width: int, layer_scale: float | None = 1e-5, count: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width)
        nn.init.trunc_normal_(self.embedding.weight, std=0.02)
        self.scale = None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, tokens: Tensor, token_type: int) -> Tensor:
        """(B, N, D) plus the vector of `token_type` (IMAGE, TEXT or AUDIO)."""
        vector = self.embedding.weight[token_type]
        return tokens + (vector if self.scale is None else vector * self.scale)

    @torch.no_grad()
    def scale_statistics(self) -> dict[str, Tensor]:
        """Mean, standard deviation, minimum, maximum and mean absolute value of the LayerScale; nothing without one."""
        if self.scale is None:
            return {}
        low, high = self.scale.aminmax()
        return {
            "mean": self.scale.mean(),
            "std": self.scale.std(),
            "min": low,
            "max": high,
            "mean_abs": self.scale.abs().mean(),
        }
