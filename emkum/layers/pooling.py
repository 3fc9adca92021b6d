"""One feature out of many tokens."""

from torch import Tensor


def masked_mean(tokens: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """(B, D), mean of (B, N, D) over the tokens that are no padding; `padding_mask` (B, N) is True at padding."""
    if padding_mask is None:
        return tokens.mean(1)
    hidden = padding_mask[..., None]
    return tokens.masked_fill(hidden, 0).sum(1) / (~hidden).sum(1).clamp(min=1)


def masked_maximum(tokens: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """(B, D), likewise the maximum of each channel."""
    if padding_mask is None:
        return tokens.amax(1)
    return tokens.masked_fill(padding_mask[..., None], float("-inf")).amax(1)
