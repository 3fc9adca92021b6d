"""Encoders that both modalities share, run on one modality at a time."""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emkum.layers.precision import at_least_float32
from emkum.outputs import Encoded


def additive_mask(padding_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, 1, N) mask to add to attention logits, from (B, N), True at padding."""
    mask = torch.zeros(padding_mask.shape, dtype=dtype, device=padding_mask.device)
    return mask.masked_fill_(padding_mask, torch.finfo(dtype).min)[:, None, None]


class _FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float, sub_norm: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-6) if sub_norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and what the first token is before the activation."""
        hidden = self.fc1(x)
        # A copy: a view would keep all tokens' hidden values in memory.
        return self.dropout(self.fc2(self.norm(F.gelu(hidden)))), hidden[:, 0].clone()


class SharedBlock(nn.Module):
    """A Transformer block with the parameter names of timm's ViT block, which pretrained layers can be copied into.

    Args:
        width: channels D.
        num_heads: attention heads.
        dropout: of attention output and feed-forward part.
        drop_path: stochastic depth rate.
        norm_first: LayerNorm before attention and feed-forward part (ViT), or behind their residuals (BERT,
            Data2Vec 2).
        sub_norms: LayerNorm before the last projection of attention and feed-forward part, too (BEiT-3).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_first: bool = True,
        sub_norms: bool = False,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.norm1 = norm(width)
        self.attn = Attention(width, num_heads, qkv_bias=True, scale_norm=sub_norms, proj_drop=dropout, norm_layer=norm)
        self.norm2 = norm(width)
        self.mlp = _FeedForward(width, 4 * width, dropout, sub_norms)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, N, D) to (B, N, D), and the hidden values (B, 4 D) of the first token in the feed-forward part.

        Args:
            x: (B, N, D).
            mask: added to attention logits, see `additive_mask`.
        """
        if self.norm_first:
            x = x + self.drop_path(self.attn(self.norm1(x), attn_mask=mask))
            output, hidden = self.mlp(self.norm2(x))
            return x + self.drop_path(output), hidden
        x = self.norm1(x + self.drop_path(self.attn(x, attn_mask=mask)))
        output, hidden = self.mlp(x)
        return self.norm2(x + self.drop_path(output)), hidden


@torch.no_grad()
def cls_attention(block: SharedBlock, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """(B, N), how much the first token attends to each token of a block's input, mean over heads."""
    attention, x = block.attn, block.norm1(x) if block.norm_first else x
    width = x.shape[-1]
    weight, bias = attention.qkv.weight, attention.qkv.bias
    query = F.linear(x[:, :1], weight[:width], bias[:width]).unflatten(-1, (attention.num_heads, -1))
    key = F.linear(x, weight[width : 2 * width], bias[width : 2 * width]).unflatten(-1, (attention.num_heads, -1))
    # b images or captions, h heads, n tokens, d channels a head
    logits = torch.einsum("bhd,bnhd->bhn", query[:, 0], key) * attention.scale
    if padding_mask is not None:
        logits = logits.masked_fill(padding_mask[:, None], float("-inf"))
    return at_least_float32(logits).softmax(-1).mean(1)


class SharedBlocks(nn.Module):
    """Transformer blocks over all tokens; pre-norm blocks are followed by a final LayerNorm.

    Args:
        width: channels D.
        num_layers: blocks.
        num_heads, dropout, norm_first, sub_norms: see SharedBlock.
        drop_path: stochastic depth rate, of every block.
        checkpoint_activations: recompute each block in the backward pass instead of keeping what it computed.
        keeps_attention: give the CLS token's attention in the last block, too.

    Raises:
        ValueError: `width` is no multiple of `num_heads`, or there is no block.
    """

    def __init__(
        self,
        width: int,
        num_layers: int = 1,
        num_heads: int = 12,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_first: bool = True,
        checkpoint_activations: bool = False,
        keeps_attention: bool = False,
        sub_norms: bool = False,
    ) -> None:
        super().__init__()
        if width % num_heads or num_layers < 1:
            raise ValueError(f"{num_layers} blocks of width {width} with {num_heads} heads cannot be made")
        self.blocks = nn.ModuleList(
            SharedBlock(width, num_heads, dropout, drop_path, norm_first, sub_norms) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6) if norm_first else nn.Identity()
        self.checkpoint_activations = checkpoint_activations
        self.keeps_attention = keeps_attention
        self.apply(initialize_weights)

    def forward(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Encoded:
        """(B, N, D) to (B, N, D); `padding_mask` (B, N) is True at padding. `hidden` is that of the last block."""
        mask = None if padding_mask is None else additive_mask(padding_mask, tokens.dtype)
        attention = None
        for block in self.blocks:
            if self.keeps_attention and block is self.blocks[-1]:
                attention = cls_attention(block, tokens, padding_mask)
            if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                tokens, hidden = checkpoint(block, tokens, mask, use_reentrant=False)
            else:
                tokens, hidden = block(tokens, mask)
        return Encoded(self.norm(tokens), padding_mask, hidden, attention)


class SharedMlp(nn.Module):
    """SHRe's shared network on the CLS token alone: Linear, GELU, LayerNorm, Linear (Aytar et al. 2017, "See, Hear, and
    Read"). Its third linear is the head that predicts the teacher's logits.

    Args:
        width: channels D.
        hidden: channels between the two linear maps.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-6)
        self.fc2 = nn.Linear(hidden, width)
        self.apply(initialize_weights)

    def forward(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Encoded:
        """(B, N, D) to the CLS token alone, (B, 1, D)."""
        hidden = self.fc1(tokens[:, 0])
        return Encoded(self.fc2(self.norm(F.gelu(hidden)))[:, None], None, hidden)


class NoSharedEncoder(nn.Module):
    """Leaves tokens as the encoders give them, as in CLIP."""

    def forward(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Encoded:
        """(B, N, D) as they are."""
        return Encoded(tokens, padding_mask)


def initialize_weights(module: nn.Module) -> None:
    """BERT's and ViT's initialization: truncated normal of 0.02, zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
