"""The one bridge to fairseq's Data2Vec 2 (Baevski et al. 2022, "Efficient Self-supervised Learning with Contextualized
Target Representations"): its modules, and encoders built of them.

fairseq ships Data2Vec 2 as sources that do not import as they are. `data2vec2_module` loads them from their own place,
`fairseq.examples.data2vec`, with the few texts of REWRITES replaced on the way.
"""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.outputs import Encoded

PACKAGE = "fairseq.examples.data2vec"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# ----------------------------------------------------------------------------------------------------------------------
# Loading fairseq's sources
# ----------------------------------------------------------------------------------------------------------------------


def _absolute_imports(count: int) -> tuple[str, str, int]:
    return "from examples.data2vec.", f"from {PACKAGE}.", count


def _config_default(field: str, config: str) -> tuple[str, str, int]:
    """Python >= 3.11 refuses an instance of a dataclass as default of a field."""
    return f"    {field} = {config}()\n", f"    {field} = field(default_factory={config})\n", 1


# module below PACKAGE -> (text, replacement, occurrences)
REWRITES: dict[str, tuple[tuple[str, str, int], ...]] = {
    "models.data2vec2": (
        _absolute_imports(6),
        _config_default("audio: D2vAudioConfig", "D2vAudioConfig"),
        _config_default("image: D2vImageConfig", "D2vImageConfig"),
        _config_default("text: D2vTextConfig", "D2vTextConfig"),
        _config_default("modalities: D2vModalitiesConfig", "D2vModalitiesConfig"),
    ),
    "models.mae": (("dtype=np.float)", "dtype=np.float64)", 1),),
    "models.modalities.audio": (_absolute_imports(1),),
    "models.modalities.base": (
        _absolute_imports(1),
        ("from dataclasses import dataclass\n", "from dataclasses import dataclass, field\n", 1),
        _config_default("decoder: Optional[D2vDecoderConfig]", "D2vDecoderConfig"),
    ),
    "models.modalities.images": (_absolute_imports(2),),
    "models.modalities.text": (_absolute_imports(1),),
}


class _RewritingLoader(SourceFileLoader):
    """Compiles a source file after replacing texts. Never reads or writes bytecode caches: they hold the original."""

    def __init__(self, fullname: str, path: str, rewrites: tuple[tuple[str, str, int], ...]) -> None:
        super().__init__(fullname, path)
        self.rewrites = rewrites

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path).decode("utf-8")
        for text, replacement, count in self.rewrites:
            if source.count(text) != count:
                raise UserError(
                    f"{self.path} holds {text.strip()!r} {source.count(text)} times, not {count}: this version of "
                    "fairseq is not the one supported; install fairseq-fixed 0.12.3.1"
                )
            source = source.replace(text, replacement)
        return self.source_to_code(source.encode("utf-8"), self.path)


class _RewritingFinder:
    """Finds the modules of REWRITES, and no other, where the ordinary path finder finds them."""

    @staticmethod
    def find_spec(fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        rewrites = REWRITES.get(fullname.removeprefix(f"{PACKAGE}."))
        if rewrites is None or not fullname.startswith(f"{PACKAGE}."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            spec.loader = _RewritingLoader(fullname, spec.origin, rewrites)
        return spec


@contextmanager
def _rewriting_imports() -> Iterator[None]:
    sys.meta_path.insert(0, _RewritingFinder)
    try:
        with warnings.catch_warnings():
            # fairseq imports timm's layers by their old name.
            warnings.filterwarnings("ignore", "Importing from timm.models.layers is deprecated", FutureWarning)
            yield
    finally:
        sys.meta_path.remove(_RewritingFinder)


def data2vec2_module(name: str) -> ModuleType:
    """Import a module of fairseq's Data2Vec 2, such as `models.modalities.images`.

    Modules stay in `sys.modules` under their own names, so a second call gives the same classes, and fairseq models
    (`mae`, and `data2vec_multi` with `models.data2vec2`) are registered once.

    Raises:
        UserError: the installed fairseq has no Data2Vec 2, or another version of it.
    """
    fullname = f"{PACKAGE}.{name}"
    if fullname in sys.modules:
        return sys.modules[fullname]
    try:
        with _rewriting_imports():
            return importlib.import_module(fullname)
    except ModuleNotFoundError as error:
        if error.name is not None and fullname.startswith(error.name):
            raise UserError(f"the installed fairseq has no {fullname}: install fairseq-fixed 0.12.3.1") from None
        raise


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
        """(B, N, D) to (B, N, D); `padding_mask` (B, N) is True at padding, False at least once a row."""
        if alibi_bias is not None:
            raise ValueError("FusedAttention has no position biases; build the encoder with fused_attention=False")
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, D / heads) each
        visible = None if padding_mask is None else ~padding_mask[:, None, None].bool()
        x = self._attend(query, key, value, visible)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        dropout = self.attn_drop.p if self.training else 0.0
        if query.dtype == torch.bfloat16 and query.device.type == "cpu":
            # The CPU kernel's backward pass is up to three times slower in bfloat16 than in float32.
            with torch.autocast("cpu", enabled=False):
                query, key, value = query.float(), key.float(), value.float()
                attended = F.scaled_dot_product_attention(query, key, value, visible, dropout, scale=self.scale)
            return attended.bfloat16()
        return F.scaled_dot_product_attention(query, key, value, visible, dropout, scale=self.scale)


# ----------------------------------------------------------------------------------------------------------------------
# Encoders
# ----------------------------------------------------------------------------------------------------------------------


class _Data2Vec2Encoder(nn.Module):
    """What both modalities share: prenet blocks inside the modality encoder, then main blocks, all post-norm."""

    modality: str

    def _assemble(self, modality_encoder: nn.Module, blocks: list[nn.Module], fused_attention: bool) -> None:
        from fairseq.modules.transformer_sentence_encoder import init_bert_params

        self.modality_encoders = nn.ModuleDict({self.modality: modality_encoder})
        self.blocks = nn.ModuleList(blocks)
        self.apply(init_bert_params)
        if fused_attention:
            for block in self.all_blocks():
                block.attn = FusedAttention(block.attn)

    def all_blocks(self) -> list[nn.Module]:
        """Prenet and main blocks in their order."""
        return [*self.modality_encoders[self.modality].context_encoder.blocks, *self.blocks]

    def _run(self, x: Tensor, padding_mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each block's output and its MLP's output, (B, N, D) both."""
        context = self.modality_encoders[self.modality].context_encoder
        x = context.dropout(x if context.norm is None else context.norm(x))
        for block in self.all_blocks():
            x, target = block(x, padding_mask)
            yield x, target

    def _last(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        for output, _ in self._run(x, padding_mask):
            x = output
        return x


class Data2Vec2ImageEncoder(_Data2Vec2Encoder):
    """Data2Vec 2's image encoder, without masking and decoder. The defaults are the released base model.

    Args:
        embed_dim: width D.
        depth: main blocks, as fairseq counts them.
        prenet_depth: blocks before them that belong to the modality encoder.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        input_size: side of the input in pixels, a multiple of `patch_size`.
        patch_size: side of a patch in pixels.
        num_layers: keep only the first so many of prenet and main blocks; None = all.
        dropout: after attention and after the MLP.
        attention_dropout: of the attention weights.
        drop_path: stochastic depth rate of the last kept block, growing linearly from 0.
        norm_eps: of every LayerNorm.
        fused_attention: use FusedAttention instead of fairseq's own module.

    Attributes:
        width: D. num_layers: kept blocks. num_heads, image_size: as given. mean, std: what images are normalized
        with, per channel on a scale from 0 to 1 (ImageNet's, as the released models were trained).

    Raises:
        ValueError: `num_layers` outside 1 .. prenet_depth + depth.
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
        num_layers: int | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        fused_attention: bool = True,
    ) -> None:
        super().__init__()
        images = data2vec2_module("models.modalities.images")
        prenet_depth, depth = _kept_blocks(prenet_depth, depth, num_layers)
        rates = np.linspace(0, drop_path, prenet_depth + depth)
        norm_layer = partial(nn.LayerNorm, eps=norm_eps)
        make_block = _block_factory(embed_dim, num_heads, mlp_ratio, dropout, attention_dropout, norm_layer)
        config = images.D2vImageConfig(
            input_size=input_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            prenet_depth=prenet_depth,
            end_drop_path_rate=float(rates[prenet_depth - 1]) if prenet_depth else 0.0,
            num_extra_tokens=1,
            init_extra_token_zero=False,
            num_alibi_heads=num_heads,
            model_depth=depth,
            decoder=None,
        )
        encoder = images.ImageEncoder(config, embed_dim, make_block, norm_layer, False, {}, None)
        self._assemble(encoder, [make_block(rate) for rate in rates[prenet_depth:]], fused_attention)
        self.width = embed_dim
        self.num_layers = prenet_depth + depth
        self.num_heads = num_heads
        self.image_size = input_size
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD

    def forward(self, images: Tensor) -> Encoded:
        """(B, 3, S, S) normalized images to tokens (B, 1 + N, D), the CLS token first, then patches row by row."""
        return Encoded(self._last(self._embed(images), None))

    def hidden_states(self, images: Tensor, end_of_block: bool = False) -> list[Tensor]:
        """(B, 1 + N, D) of every kept block, the CLS token first.

        Args:
            images: (B, 3, S, S), normalized.
            end_of_block: False = output of the block's MLP before residual and norm, which the released image and text
                models predict and fairseq calls `layer_results`; True = output of the block.
        """
        return [output if end_of_block else target for output, target in self._run(self._embed(images), None)]

    def _embed(self, images: Tensor) -> Tensor:
        encoder = self.modality_encoders[self.modality]
        x = encoder.local_features(images)
        x = x + encoder.fixed_positional_encoder(x, None)
        return torch.cat([encoder.extra_tokens.expand(len(x), -1, -1), x], dim=1)


class Data2Vec2TextEncoder(_Data2Vec2Encoder):
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
        num_layers: keep only the first so many of prenet and main blocks; None = all.
        dropout: after embedding, attention and MLP.
        attention_dropout: of the attention weights.
        drop_path: stochastic depth rate of the last kept block, growing linearly from 0.
        norm_eps: of every LayerNorm but the embedding's, which has 1e-5.
        fused_attention: use FusedAttention instead of fairseq's own module.

    Attributes:
        width: D. num_layers: kept blocks. num_heads, max_positions: as given.

    Raises:
        ValueError: `num_layers` outside 1 .. prenet_depth + depth.
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
        num_layers: int | None = None,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        fused_attention: bool = True,
    ) -> None:
        super().__init__()
        text = data2vec2_module("models.modalities.text")
        prenet_depth, depth = _kept_blocks(prenet_depth, depth, num_layers)
        rates = np.linspace(0, drop_path, prenet_depth + depth)
        norm_layer = partial(nn.LayerNorm, eps=norm_eps)
        make_block = _block_factory(embed_dim, num_heads, mlp_ratio, dropout, attention_dropout, norm_layer)
        config = text.D2vTextConfig(
            max_source_positions=max_positions,
            dropout=dropout,
            prenet_depth=prenet_depth,
            end_drop_path_rate=float(rates[prenet_depth - 1]) if prenet_depth else 0.0,
            num_alibi_heads=num_heads,
            model_depth=depth,
            decoder=None,
        )
        encoder = text.TextEncoder(
            config, embed_dim, make_block, norm_layer, False, {}, _task_with_vocabulary(vocab_size, pad_index)
        )
        self._assemble(encoder, [make_block(rate) for rate in rates[prenet_depth:]], fused_attention)
        self.width = embed_dim
        self.num_layers = prenet_depth + depth
        self.num_heads = num_heads
        self.max_positions = max_positions

    def forward(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Encoded:
        """Token ids to contextual tokens.

        Args:
            tokens: (T, L) int64, `<s>` first, which serves as CLS token; `pad_index` at padding.
            padding_mask: (T, L) bool, True at padding; None where nothing is padded.

        Returns:
            Tokens (T, L, D) and the mask. At padding the tokens mean nothing.

        Raises:
            ValueError: L exceeds `max_positions`.
        """
        return Encoded(self._last(self._embed(tokens), padding_mask), padding_mask)

    def hidden_states(
        self, tokens: Tensor, padding_mask: Tensor | None = None, end_of_block: bool = False
    ) -> list[Tensor]:
        """(T, L, D) of every kept block; arguments as of `forward`, `end_of_block` as of the image encoder's."""
        blocks = self._run(self._embed(tokens), padding_mask)
        return [output if end_of_block else target for output, target in blocks]

    def _embed(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.max_positions:
            raise ValueError(f"{tokens.shape[1]} tokens exceed the {self.max_positions} positions of the text encoder")
        return self.modality_encoders[self.modality].local_features(tokens)


def _kept_blocks(prenet_depth: int, depth: int, num_layers: int | None) -> tuple[int, int]:
    total = prenet_depth + depth
    if num_layers is None:
        num_layers = total
    if not 1 <= num_layers <= total:
        raise ValueError(f"num_layers is {num_layers}; the encoder has {total} blocks")
    prenet_depth = min(prenet_depth, num_layers)
    return prenet_depth, num_layers - prenet_depth


def _block_factory(
    dim: int,
    num_heads: int,
    mlp_ratio: float,
    dropout: float,
    attention_dropout: float,
    norm_layer: Callable[[int], nn.Module],
) -> Callable[[float], nn.Module]:
    block = data2vec2_module("models.modalities.modules").AltBlock

    def make_block(drop_path: float) -> nn.Module:
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
