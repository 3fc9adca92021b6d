"""The shared encoders against their definitions, written out."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor

from emkum.layers.shared_encoders import NoSharedEncoder, SharedBlock, SharedBlocks, SharedMlp, additive_mask

WIDTH, HEADS = 8, 2


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module.double().eval()


def attention(block: SharedBlock, x: Tensor) -> Tensor:
    query, key, value = block.attn.qkv(x).chunk(3, dim=-1)
    heads = []
    for part in range(HEADS):
        own = slice(part * WIDTH // HEADS, (part + 1) * WIDTH // HEADS)
        weights = (query[..., own] @ key[..., own].transpose(1, 2) / (WIDTH / HEADS) ** 0.5).softmax(-1)
        heads.append(weights @ value[..., own])
    return block.attn.proj(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("norm_first", [True, False])
def test_block_against_its_definition(norm_first: bool) -> None:
    block = randomized(SharedBlock(WIDTH, HEADS, norm_first=norm_first))
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    if norm_first:
        middle = x + attention(block, block.norm1(x))
        hidden = block.mlp.fc1(block.norm2(middle))
        expected = middle + block.mlp.fc2(F.gelu(hidden))
    else:
        middle = block.norm1(x + attention(block, x))
        hidden = block.mlp.fc1(middle)
        expected = block.norm2(middle + block.mlp.fc2(F.gelu(hidden)))
    output, cls_hidden = block(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(cls_hidden, hidden[:, 0])


def test_pre_norm_block_is_timms() -> None:
    ours = randomized(SharedBlock(WIDTH, HEADS))
    theirs = Block(WIDTH, HEADS, qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6)).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(ours(x)[0], theirs.eval()(x))


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("fused", [True, False])
def test_padding_changes_nothing(norm: str, fused: bool) -> None:
    blocks = randomized(SharedBlocks(WIDTH, 2, HEADS, norm_first=norm == "pre"))
    for block in blocks.blocks:
        block.attn.fused_attn = fused
    tokens = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    encoded = blocks(tokens, mask)
    alone = blocks(tokens[1:, :3])
    torch.testing.assert_close(encoded.tokens[1, :3], alone.tokens[0])
    torch.testing.assert_close(encoded.hidden[1], alone.hidden[0])


def test_attention_of_the_cls_token_where_asked_for() -> None:
    blocks = randomized(SharedBlocks(WIDTH, 2, HEADS))
    tokens = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert blocks(tokens, mask).cls_attention is None
    blocks.keeps_attention = True
    found = blocks(tokens, mask).cls_attention
    first, last = blocks.blocks
    y = last.norm1(first(tokens, additive_mask(mask, torch.float64))[0])
    query, key, _ = last.attn.qkv(y).chunk(3, dim=-1)
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for part in range(HEADS):
        own = slice(part * WIDTH // HEADS, (part + 1) * WIDTH // HEADS)
        logits = (query[:, :1, own] @ key[..., own].transpose(1, 2))[:, 0] / (WIDTH / HEADS) ** 0.5
        expected += logits.masked_fill(mask, float("-inf")).softmax(-1) / HEADS
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(1)
        blocks = SharedBlocks(WIDTH, 2, HEADS, dropout=0.3, drop_path=0.3, checkpoint_activations=recompute).train()
        x = torch.randn(3, 4, WIDTH, requires_grad=True)
        torch.manual_seed(2)
        blocks(x).tokens.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in blocks.parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_mlp_is_shres() -> None:
    mlp = randomized(SharedMlp(WIDTH, 4 * WIDTH))
    tokens = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    hidden = mlp.fc1(tokens[:, 0])
    expected = mlp.fc2(mlp.norm(F.gelu(hidden)))
    encoded = mlp(tokens, torch.zeros(3, 5, dtype=torch.bool))
    assert encoded.tokens.shape == (3, 1, WIDTH) and encoded.padding_mask is None
    torch.testing.assert_close(encoded.cls, expected)
    torch.testing.assert_close(encoded.hidden, hidden)


def test_no_shared_encoder_changes_nothing() -> None:
    tokens, mask = torch.randn(2, 3, 4), torch.tensor([[False, False, True]] * 2)
    encoded = NoSharedEncoder()(tokens, mask)
    assert torch.equal(encoded.tokens, tokens) and torch.equal(encoded.padding_mask, mask) and encoded.hidden is None


def test_width_must_go_with_heads() -> None:
    with pytest.raises(ValueError, match="width 8 with 3 heads"):
        SharedBlocks(8, 1, 3)
