"""The Transformer blocks that both modalities share."""

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

_layer_norm = partial(nn.LayerNorm, eps=1e-6)


def additive_mask(padding_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, 1, N) mask to add to attention logits, from (B, N), True at padding."""
    mask = torch.zeros(padding_mask.shape, dtype=dtype, device=padding_mask.device)
    return mask.masked_fill_(padding_mask, torch.finfo(dtype).min)[:, None, None]


class SharedBlocks(nn.Module):
    """Pre-norm Transformer blocks and a final LayerNorm, run on one modality at a time.

    timm's ViT block, so that parameter names agree with the image encoders it can be initialized from.
    """

    def __init__(
        self, width: int, num_layers: int = 1, num_heads: int = 12, dropout: float = 0.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, num_heads, qkv_bias=True, proj_drop=dropout, drop_path=drop_path, norm_layer=_layer_norm)
            for _ in range(num_layers)
        )
        self.norm = _layer_norm(width)
        self.apply(initialize_weights)

    def forward(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, N, D) to (B, N, D); `padding_mask` (B, N) is True at padding."""
        mask = None if padding_mask is None else additive_mask(padding_mask, tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens, attn_mask=mask)
        return self.norm(tokens)


def initialize_weights(module: nn.Module) -> None:
    """BERT's and ViT's initialization: truncated normal of 0.02, zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
