"""Token types, shared blocks and the choice of attention kernel."""

import pytest
import torch

from emkum.layers.attention import choose_attention_kernel
from emkum.layers.shared_encoders import SharedBlocks, additive_mask
from emkum.layers.token_types import IMAGE, TEXT, TokenTypes


def test_token_types_add_their_own_vector_scaled() -> None:
    types = TokenTypes(4, layer_scale=0.5)
    tokens = torch.randn(2, 3, 4)
    for kind in (IMAGE, TEXT):
        torch.testing.assert_close(types(tokens, kind) - tokens, 0.5 * types.embedding.weight[kind].expand(2, 3, 4))
    assert not torch.equal(types(tokens, IMAGE), types(tokens, TEXT))
    assert TokenTypes(4, layer_scale=None).scale is None


def test_parameters_of_token_types_at_base_width() -> None:
    sizes = {name: p.numel() for name, p in TokenTypes(768).named_parameters()}
    assert sizes == {"embedding.weight": 1536, "scale": 768}


def test_additive_mask_is_finite_in_every_type() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        mask = additive_mask(torch.tensor([[False, True]]), dtype)
        assert mask.shape == (1, 1, 1, 2) and torch.isfinite(mask).all()
        assert mask[0, 0, 0, 0] == 0 and mask[0, 0, 0, 1] < -1e4


@pytest.mark.parametrize("fused", [True, False])
def test_shared_blocks_ignore_padding(fused: bool) -> None:
    torch.manual_seed(0)
    blocks = SharedBlocks(8, num_layers=2, num_heads=2).eval()
    dtype = torch.float32 if fused else torch.bfloat16
    choose_attention_kernel(blocks, torch.device("cpu"), dtype)
    assert all(block.attn.fused_attn is fused for block in blocks.blocks)
    tokens = torch.randn(2, 5, 8)
    mask = torch.tensor([[False, False, False, True, True]]).expand(2, 5)
    other = tokens.clone()
    other[:, 3:] = 7.0
    alone = blocks(tokens[:, :3]).tokens
    for padded in (tokens, other):
        torch.testing.assert_close(blocks(padded, mask).tokens[:, :3], alone, rtol=1e-5, atol=1e-5)
