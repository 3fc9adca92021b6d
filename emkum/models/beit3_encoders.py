"""BEiT-3's layers as encoders of one modality: what the model makes of images alone, or of texts alone.

Of its multiway layers each encoder has one modality's part, under the names of the released files.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.models.beit3 import (
    FIRST_POSITION,
    MultiwayLayer,
    VisionEmbedding,
    Ways,
    for_images,
    for_text,
    initialize_beit3,
    interpolated_positions,
)
from emkum.models.encoder import Encoder


class BEiT3Encoder(Encoder):
    """What both modalities share: positions and multiway layers, without the final norm.

    Args:
        ways: the modality.
        positions: of the longest input; 0 = none, and any length is read.
        width, layers, heads, ffn_width, norm_eps: see BEiT3.
        dropout: after embedding, attention and feed-forward part.
        attention_dropout: of the attention weights.
        drop_path: stochastic depth rate of the last layer, growing linearly from 0.
        fused_attention: use PyTorch's fused attention kernels instead of plain matrix products.

    Attributes:
        modality: "image" or "text". width, ffn_width: as given. num_layers, num_heads: likewise. has_positions: whether
        it has any.

    Raises:
        ValueError: `width` is no multiple of `heads`.
    """

    modality: str

    def __init__(
        self,
        ways: Ways,
        positions: int,
        width: int,
        layers: int,
        heads: int,
        ffn_width: int,
        dropout: float,
        attention_dropout: float,
        drop_path: float,
        norm_eps: float,
        fused_attention: bool,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        parts: dict[str, nn.Module] = {}
        if positions:
            parts["embed_positions"] = ways(partial(nn.Embedding, FIRST_POSITION + positions, width))
        parts["layers"] = nn.ModuleList(
            MultiwayLayer(width, heads, ffn_width, norm_eps, ways, dropout, attention_dropout, float(rate))
            for rate in np.linspace(0, drop_path, layers)
        )
        for layer in parts["layers"]:
            layer.self_attn.fused_attn = fused_attention
        self.encoder = nn.ModuleDict(parts)
        self.dropout = nn.Dropout(dropout)
        self.has_positions = positions > 0
        self.width = width
        self.num_layers = layers
        self.num_heads = heads
        self.ffn_width = ffn_width

    def hidden_states(self, inputs: Tensor, padding_mask: Tensor | None = None) -> list[Tensor]:
        """(B, N, D) behind every layer; arguments as of `forward`."""
        return list(self._run(self.embed(inputs), padding_mask))

    def all_blocks(self) -> list[nn.Module]:
        """The layers in their order."""
        return list(self.encoder["layers"])

    def block_state(self, index: int) -> dict[str, Tensor]:
        """See Encoder; with the norms before the last projections, `attn.norm` and `mlp.norm`."""
        layer, way = self.encoder["layers"][index], self._way
        attention, feed_forward = layer.self_attn, getattr(layer.ffn, way)
        parts = {
            "norm1": getattr(layer.self_attn_layer_norm, way),
            "attn.norm": getattr(attention.inner_attn_ln, way),
            "attn.proj": getattr(attention.out_proj, way),
            "norm2": getattr(layer.final_layer_norm, way),
            "mlp.fc1": feed_forward.fc1,
            "mlp.norm": feed_forward.ffn_layernorm,
            "mlp.fc2": feed_forward.fc2,
        }
        three = [getattr(projection, way) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
        state = {}
        for kind in ("weight", "bias"):
            state |= {f"{name}.{kind}": getattr(part, kind).detach() for name, part in parts.items()}
            state[f"attn.qkv.{kind}"] = torch.cat([getattr(projection, kind).detach() for projection in three])
        return state

    def drop_last_blocks(self, count: int) -> None:
        """Take the last layers off; those that are left keep their rates of stochastic depth."""
        self.num_layers -= count
        self.encoder["layers"] = self.encoder["layers"][: self.num_layers]

    @property
    def _way(self) -> str:
        """What its modules are called in each Multiway."""
        return "A" if self.modality == "image" else "B"

    def _table(self) -> nn.Embedding:
        return getattr(self.encoder["embed_positions"], self._way)

    def _run(self, tokens: Tensor, padding_mask: Tensor | None) -> Iterator[Tensor]:
        """What each layer gives."""
        visible = None if padding_mask is None else ~padding_mask[:, None, None].bool()
        x = self.dropout(tokens)
        image_tokens = x.shape[1] if self.modality == "image" else 0
        for layer in self.encoder["layers"]:
            x = self._call(layer, x, image_tokens, visible)
            yield x


class BEiT3ImageEncoder(BEiT3Encoder):
    """BEiT-3 on images alone. The defaults are the released base model.

    Args:
        width, layers, heads, ffn_width, norm_eps: see BEiT3.
        image_size: side of the input in pixels, a multiple of `patch_size`.
        patch_size: side of a patch in pixels.
        dropout, attention_dropout, drop_path, fused_attention: see BEiT3Encoder.
        own_positions: False = without the table of positions.

    Attributes:
        image_size, patch_size: as given. mean, std: what images are normalized with, per channel on a scale from 0 to
        1.

    Raises:
        ValueError: `width` is no multiple of `heads`, or `image_size` none of `patch_size`.
    """

    modality = "image"

    def __init__(
        self,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        ffn_width: int = 3072,
        image_size: int = 224,
        patch_size: int = 16,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        fused_attention: bool = True,
        own_positions: bool = True,
    ) -> None:
        if image_size % patch_size:
            raise ValueError(f"images of {image_size} pixels are no multiple of patches of {patch_size}")
        positions = 1 + (image_size // patch_size) ** 2 if own_positions else 0
        rates = (dropout, attention_dropout, drop_path)
        super().__init__(for_images, positions, width, layers, heads, ffn_width, *rates, norm_eps, fused_attention)
        self.vision_embed = VisionEmbedding(width, patch_size, mask_token=False)
        self.apply(initialize_beit3)
        self.image_size = image_size
        self.patch_size = patch_size
        self.mean = self.std = (0.5, 0.5, 0.5)

    def embed(self, inputs: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """(B, 1 + N, D) of normalized (B, 3, S, S) images, the CLS token first, then patches row by row; see Encoder.

        Raises:
            ValueError: images of another size than `image_size`.
        """
        if inputs.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"images of {tuple(inputs.shape[-2:])} pixels, not {self.image_size} by {self.image_size}")
        tokens = self.vision_embed(inputs, masked, mask_token)
        return tokens + self._table().weight[FIRST_POSITION:] if self.has_positions else tokens

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Those of the patch embedding's convolution."""
        return list(self.vision_embed.proj.parameters())

    def resize(self, image_size: int, name: str) -> None:
        """Interpolate the positions for another input size.

        Args:
            image_size: side of the input in pixels.
            name: where the encoder comes from, for messages.

        Raises:
            UserError: the patches do not divide it.
        """
        if image_size < 1 or image_size % self.patch_size:
            raise UserError(
                f"images of {image_size} pixels are no multiple of the {self.patch_size}-pixel patches of {name}"
            )
        if self.has_positions:
            table = interpolated_positions(self._table().weight.detach(), image_size // self.patch_size)
            self.encoder["embed_positions"].A = nn.Embedding.from_pretrained(table, freeze=False)
        self.image_size = image_size


class BEiT3TextEncoder(BEiT3Encoder):
    """BEiT-3 on texts alone. The defaults are the released base model.

    Args:
        vocab_size: rows of the text embedding, special tokens included.
        width, layers, heads, ffn_width, norm_eps: see BEiT3.
        max_positions: longest text in tokens.
        dropout, attention_dropout, drop_path, fused_attention: see BEiT3Encoder.
        own_positions: False = no table of positions; then any length is read.

    Attributes:
        vocab_size, max_positions: as given.

    Raises:
        ValueError: `width` is no multiple of `heads`.
    """

    modality = "text"

    def __init__(
        self,
        vocab_size: int,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        ffn_width: int = 3072,
        max_positions: int = 1022,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        fused_attention: bool = True,
        own_positions: bool = True,
    ) -> None:
        positions = max_positions if own_positions else 0
        rates = (dropout, attention_dropout, drop_path)
        super().__init__(for_text, positions, width, layers, heads, ffn_width, *rates, norm_eps, fused_attention)
        self.text_embed = nn.Embedding(vocab_size, width)
        self.apply(initialize_beit3)
        self.vocab_size = vocab_size
        self.max_positions = max_positions

    def embed(self, inputs: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """(B, L, D), words and positions of (B, L) token ids, `<s>` first, which serves as CLS token.

        Raises:
            ValueError: L exceeds `max_positions`, or `masked` is given.
        """
        if masked is not None:
            raise ValueError("a text is masked by its token ids")
        if not self.has_positions:
            return self.text_embed(inputs)
        length = inputs.shape[1]
        if length > self.max_positions:
            raise ValueError(f"{length} tokens exceed the {self.max_positions} positions of the text encoder")
        return self.text_embed(inputs) + self._table().weight[FIRST_POSITION : FIRST_POSITION + length]

    def embedding_parameters(self) -> list[nn.Parameter]:
        """The table of words."""
        return [self.text_embed.weight]
