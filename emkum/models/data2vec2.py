"""The one bridge to fairseq's Data2Vec 2 (Baevski et al. 2022, "Efficient Self-supervised Learning with Contextualized
Target Representations"): encoders built of its modules."""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.models.data2vec2_sources import data2vec2_module
from emkum.models.encoder import Encoder

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# ----------------------------------------------------------------------------------------------------------------------
# Attention
# ----------------------------------------------------------------------------------------------------------------------


class FusedAttention(nn.Module):
    """fairseq's `AltAttention` on PyTorch's fused kernels: same parameters, same result, no wait for the device.

    The stock module asks `padding_mask.any()`, for which the host waits for the GPU in each block.

    Args:
        stock: the module whose parameters are taken over. Cosine attention is not supported.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        if stock.cosine_attention:
            raise ValueError("FusedAttention has no cosine attention")
        self.num_heads: int = stock.num_heads
        self.scale: float = stock.scale
        self.qkv = stock.qkv
        self.attn_drop = stock.attn_drop
        self.proj = stock.proj
        self.proj_drop = stock.proj_drop

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, alibi_bias: Tensor | None = None) -> Tensor:
        """(B, N, D) to (B, N, D).

        Args:
            x: tokens.
            padding_mask: (B, N), True at padding, False at least once a row.
            alibi_bias: (1 or B, heads, N, N), added to the scaled products of queries and keys.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, D / heads) each
        mask = None if padding_mask is None else ~padding_mask[:, None, None].bool()
        if alibi_bias is not None:
            bias = alibi_bias.to(query.dtype)
            mask = bias.expand(len(x), -1, -1, -1) if mask is None else bias.masked_fill(~mask, float("-inf"))
        x = self._attend(query, key, value, mask)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.attn_drop.p if self.training else 0.0
        if query.dtype == torch.bfloat16 and query.device.type == "cpu":
            # The CPU kernel's backward pass is up to three times slower in bfloat16 than in float32.
            with torch.autocast("cpu", enabled=False):
                query, key, value = query.float(), key.float(), value.float()
                if mask is not None and mask.is_floating_point():
                    mask = mask.float()
                attended = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=self.scale)
            return attended.bfloat16()
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=self.scale)


# ----------------------------------------------------------------------------------------------------------------------
# Encoders
# ----------------------------------------------------------------------------------------------------------------------


class Data2Vec2Encoder(Encoder):
    """What all modalities share: prenet blocks inside the modality encoder, then main blocks, all post-norm."""

    modality: str

    def _assemble(
        self, modality_encoder: nn.Module, blocks: list[nn.Module], drop_path: float, fused_attention: bool
    ) -> None:
        from fairseq.modules.transformer_sentence_encoder import init_bert_params

        self.modality_encoders = nn.ModuleDict({self.modality: modality_encoder})
        self.blocks = nn.ModuleList(blocks)
        self.apply(init_bert_params)
        if fused_attention:
            for block in self.all_blocks():
                block.attn = FusedAttention(block.attn)
        self.num_layers = len(self.all_blocks())
        for block, rate in zip(self.all_blocks(), np.linspace(0, drop_path, self.num_layers), strict=True):
            block.drop_path = DropPath(float(rate)) if rate > 0 else nn.Identity()

    @property
    def prenet_depth(self) -> int:
        """Blocks that lie in the modality encoder, before the main ones."""
        return len(self._context.blocks)

    @property
    def _context(self) -> nn.Module:
        return self.modality_encoders[self.modality].context_encoder

    def all_blocks(self) -> list[nn.Module]:
        """Prenet and main blocks in their order."""
        return [*self._context.blocks, *self.blocks]

    def hidden_states(
        self, inputs: Tensor, padding_mask: Tensor | None = None, end_of_block: bool = False
    ) -> list[Tensor]:
        """(B, N, D) of every block.

        Args:
            inputs, padding_mask: as of `forward`.
            end_of_block: False = output of the block's MLP before residual and norm, which the released image and text
                models predict and fairseq calls `layer_results`; True = output of the block.
        """
        states = self._outputs_and_targets(self.embed(inputs), self.token_padding(padding_mask))
        return [output if end_of_block else target for output, target in states]

    def block_state(self, index: int) -> dict[str, Tensor]:
        """Parameters of a block, detached; fairseq's names are timm's. Norms come after attention and MLP here."""
        return self.all_blocks()[index].state_dict()

    def drop_last_blocks(self, count: int) -> None:
        """Take the last blocks off; those that stay keep their stochastic depth."""
        self.num_layers -= count
        self.blocks = self.blocks[: max(0, self.num_layers - self.prenet_depth)]
        self._context.blocks = self._context.blocks[: self.num_layers]

    def _run(self, tokens: Tensor, padding_mask: Tensor | None) -> Iterator[Tensor]:
        return (output for output, _ in self._outputs_and_targets(tokens, padding_mask))

    def _outputs_and_targets(self, tokens: Tensor, padding_mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each block's output and its MLP's output, (B, N, D) both."""
        tokens = self._before_blocks(tokens, padding_mask)
        bias = self._position_bias(tokens, padding_mask)
        if bias is not None:
            padding_mask = None
        for block in self.all_blocks():
            tokens, target = self._call(block, tokens, padding_mask, bias)
            yield tokens, target

    def _position_bias(self, tokens: Tensor, padding_mask: Tensor | None) -> Tensor | None:
        """(1 or B, heads, N, N), what is added to attention's products, -inf at padding; None = nothing.

        It is made once for all blocks, for it may be larger than what they keep.
        """
        return None

    def _before_blocks(self, tokens: Tensor, padding_mask: Tensor | None) -> Tensor:
        context = self._context
        return context.dropout(tokens if context.norm is None else context.norm(tokens))


class Data2Vec2ImageEncoder(Data2Vec2Encoder):
    """Data2Vec 2's image encoder, without masking and decoder. The defaults are the released base model.

    Args:
        embed_dim: width D.
        depth: main blocks, as fairseq counts them.
        prenet_depth: blocks before them that belong to the modality encoder.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        input_size: side of the input in pixels, a multiple of `patch_size`.
        patch_size: side of a patch in pixels.
        dropout: after attention and after the MLP.
        attention_dropout: of the attention weights.
        drop_path: stochastic depth rate of the last block, growing linearly from 0.
        norm_eps: of every LayerNorm.
        fused_attention: use FusedAttention instead of fairseq's own module.
        own_positions: add fixed sine-cosine positions to the patches.

    Attributes:
        width: D. num_layers: prenet and main blocks. num_heads, image_size: as given. mean, std: what images are
        normalized with, per channel on a scale from 0 to 1 (ImageNet's, as the released models were trained).

    Raises:
        UserError: the heads do not divide the width.
    """

    modality = "IMAGE"

    def __init__(
        self,
        embed_dim: int = 768,
        depth: int = 10,
        prenet_depth: int = 2,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        input_size: int = 224,
        patch_size: int = 16,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        fused_attention: bool = True,
        own_positions: bool = True,
    ) -> None:
        super().__init__()
        images = data2vec2_module("models.modalities.images")
        norm_layer = partial(nn.LayerNorm, eps=norm_eps)
        make_block = block_factory(embed_dim, num_heads, mlp_ratio, dropout, attention_dropout, norm_layer)
        config = images.D2vImageConfig(
            input_size=input_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            prenet_depth=prenet_depth,
            fixed_positions=own_positions,
            num_extra_tokens=1,
            init_extra_token_zero=False,
            num_alibi_heads=num_heads,
            model_depth=depth,
            decoder=None,
        )
        encoder = images.ImageEncoder(config, embed_dim, make_block, norm_layer, False, {}, None)
        self._assemble(encoder, [make_block() for _ in range(depth)], drop_path, fused_attention)
        self.width = embed_dim
        self.num_heads = num_heads
        self.image_size = input_size
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD

    def embed(self, inputs: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """(B, 1 + N, D) of normalized (B, 3, S, S) images, the CLS token first, then patches row by row.

        Args:
            inputs: the images.
            masked: (B, N) bool, True at patches whose features `mask_token` replaces before positions are added.
            mask_token: (D,).
        """
        encoder = self.modality_encoders[self.modality]
        x = encoder.local_features(inputs)
        if masked is not None:
            x = torch.where(masked[..., None], mask_token.to(x.dtype), x)
        if encoder.fixed_positional_encoder is not None:
            x = x + encoder.fixed_positional_encoder(x, None)
        return torch.cat([encoder.extra_tokens.expand(len(x), -1, -1), x], dim=1)

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Those of the patch embedding's convolution."""
        return list(self.modality_encoders[self.modality].local_encoder.parameters())


class Data2Vec2TextEncoder(Data2Vec2Encoder):
    """Data2Vec 2's text encoder, without masking and decoder. The defaults are the released base model.

    Args:
        vocab_size: rows of the token embedding, special tokens included.
        embed_dim: width D.
        depth: main blocks, as fairseq counts them.
        prenet_depth: blocks before them that belong to the modality encoder.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        max_positions: longest input in tokens.
        pad_index: id of the padding token; positions are counted over the other tokens.
        dropout: after embedding, attention and MLP.
        attention_dropout: of the attention weights.
        drop_path: stochastic depth rate of the last block, growing linearly from 0.
        norm_eps: of every LayerNorm but the embedding's, which has 1e-5.
        fused_attention: use FusedAttention instead of fairseq's own module.
        own_positions: add learned positions to the words.

    Attributes:
        width: D. num_layers: prenet and main blocks. num_heads, vocab_size, max_positions: as given.

    Raises:
        UserError: the heads do not divide the width.
    """

    modality = "TEXT"

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int = 768,
        depth: int = 12,
        prenet_depth: int = 0,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        max_positions: int = 512,
        pad_index: int = 1,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        fused_attention: bool = True,
        own_positions: bool = True,
    ) -> None:
        super().__init__()
        text = data2vec2_module("models.modalities.text")
        norm_layer = partial(nn.LayerNorm, eps=norm_eps)
        make_block = block_factory(embed_dim, num_heads, mlp_ratio, dropout, attention_dropout, norm_layer)
        config = text.D2vTextConfig(
            max_source_positions=max_positions,
            no_token_positional_embeddings=not own_positions,
            dropout=dropout,
            prenet_depth=prenet_depth,
            num_alibi_heads=num_heads,
            model_depth=depth,
            decoder=None,
        )
        encoder = text.TextEncoder(
            config, embed_dim, make_block, norm_layer, False, {}, _task_with_vocabulary(vocab_size, pad_index)
        )
        self._assemble(encoder, [make_block() for _ in range(depth)], drop_path, fused_attention)
        self.width = embed_dim
        self.num_heads = num_heads
        self.vocab_size = vocab_size
        self.max_positions = max_positions

    def embed(self, inputs: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """(T, L, D) of token ids: word embedding plus position, not normed yet, so that `encode` norms what is added.

        Args:
            inputs: (T, L) int64, `<s>` first, which serves as CLS token; `pad_index` at padding.
            masked, mask_token: None; only patches of images are replaced.

        Raises:
            ValueError: L exceeds `max_positions`, or `masked` is given.
        """
        if masked is not None:
            raise ValueError("a text encoder replaces no tokens; mask token ids instead")
        if inputs.shape[1] > self.max_positions:
            raise ValueError(f"{inputs.shape[1]} tokens exceed the {self.max_positions} positions of the text encoder")
        local = self.modality_encoders[self.modality].local_encoder
        x = local.embed_scale * local.embed_tokens(inputs)
        return x if local.embed_positions is None else x + local.embed_positions(inputs)

    def embedding_parameters(self) -> list[nn.Parameter]:
        """The word embedding."""
        return [self.modality_encoders[self.modality].local_encoder.embed_tokens.weight]

    def _before_blocks(self, tokens: Tensor, padding_mask: Tensor | None) -> Tensor:
        local = self.modality_encoders[self.modality].local_encoder
        return super()._before_blocks(local.dropout_module(local.layernorm_embedding(tokens)), padding_mask)


def block_factory(
    dim: int,
    num_heads: int,
    mlp_ratio: float,
    dropout: float,
    attention_dropout: float,
    norm_layer: Callable[[int], nn.Module],
) -> Callable[..., nn.Module]:
    """What makes fairseq's post-norm block, from a stochastic depth rate.

    Raises:
        UserError: the heads do not divide the width.
    """
    if dim % num_heads:
        raise UserError(f"{num_heads} attention heads do not divide a width of {dim}")
    block = data2vec2_module("models.modalities.modules").AltBlock

    def make_block(drop_path: float = 0.0) -> nn.Module:
        return block(
            dim,
            num_heads,
            mlp_ratio,
            qkv_bias=True,
            drop=dropout,
            attn_drop=attention_dropout,
            post_mlp_drop=dropout,
            drop_path=drop_path,
            norm_layer=norm_layer,
            # With True, AltBlock loses the residual around its MLP.
            layer_norm_first=False,
            ffn_targets=True,
        )

    return make_block


class _Vocabulary:
    """As much of fairseq's Dictionary as the text encoder asks for."""

    def __init__(self, size: int, pad_index: int) -> None:
        self._size, self._pad_index = size, pad_index

    def __len__(self) -> int:
        return self._size

    def pad(self) -> int:
        return self._pad_index


def _task_with_vocabulary(size: int, pad_index: int) -> SimpleNamespace:
    return SimpleNamespace(source_dictionary=_Vocabulary(size, pad_index))
