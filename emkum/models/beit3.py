"""BEiT-3's encoder (Wang et al. 2022, "Image as a Foreign Language: BEiT Pretraining for All Vision and Vision-Language
Tasks").

Image and text tokens attend to one another in every layer. All else each modality has to itself: whatever has
parameters is there twice, A for image tokens and B for text tokens. Parameters are named as in the released files.
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import isqrt

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from emkum.layers.precision import at_least_float32
from emkum.layers.shared_encoders import initialize_weights
from emkum.outputs import Encoded

# Both position tables begin with two rows that are not used, as fairseq's do.
FIRST_POSITION = 2


class Multiway(nn.Module):
    """One module for image tokens and another one for text tokens.

    Args:
        image, text: (B, N, D) to (B, N, E) both; None of a modality that is not read.
    """

    def __init__(self, image: nn.Module | None, text: nn.Module | None) -> None:
        super().__init__()
        self.A = image
        self.B = text

    def forward(self, x: Tensor, image_tokens: int) -> Tensor:
        """(B, N, D) to (B, N, E); the first `image_tokens` are image tokens, the others text tokens."""
        if image_tokens == 0:
            return self.B(x)
        if image_tokens == x.shape[1]:
            return self.A(x)
        return torch.cat([self.A(x[:, :image_tokens]), self.B(x[:, image_tokens:])], dim=1)


# From a function that makes a module to the module of each modality that is read.
Ways = Callable[[Callable[[], nn.Module]], Multiway]


def for_both(make: Callable[[], nn.Module]) -> Multiway:
    """A module for images and one for text."""
    return Multiway(make(), make())


def for_images(make: Callable[[], nn.Module]) -> Multiway:
    """A module for images alone."""
    return Multiway(make(), None)


def for_text(make: Callable[[], nn.Module]) -> Multiway:
    """A module for text alone."""
    return Multiway(None, make())


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, norm_eps: float, ways: Ways, dropout: float) -> None:
        super().__init__()
        self.num_heads = heads
        self.dropout = dropout
        # See `emkum.layers.attention`.
        self.fused_attn = True
        linear = partial(nn.Linear, width, width)
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (ways(linear) for _ in range(4))
        self.inner_attn_ln = ways(partial(nn.LayerNorm, width, eps=norm_eps))

    def forward(self, x: Tensor, image_tokens: int, visible: Tensor | None) -> Tensor:
        query, key, value = (
            projection(x, image_tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, heads, N, D / heads) each
        attend = F.scaled_dot_product_attention if self.fused_attn else _plain_attention
        attended = attend(query, key, value, visible, self.dropout if self.training else 0.0)
        return self.out_proj(self.inner_attn_ln(attended.transpose(1, 2).flatten(2), image_tokens), image_tokens)


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, dropout: float) -> Tensor:
    logits = at_least_float32(query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    return F.dropout(logits.softmax(-1), dropout).to(value.dtype) @ value


class _FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, norm_eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.ffn_layernorm = nn.LayerNorm(hidden, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ffn_layernorm(F.gelu(self.fc1(x))))


class MultiwayLayer(nn.Module):
    """Pre-norm, with a further norm inside attention and feed-forward part, each before its last projection.

    Args:
        width, heads, ffn_width, norm_eps: see BEiT3.
        ways: the modalities that are read.
        dropout: after attention and feed-forward part.
        attention_dropout: of the attention weights.
        drop_path: stochastic depth rate.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        ffn_width: int,
        norm_eps: float,
        ways: Ways = for_both,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, width, eps=norm_eps)
        self.self_attn = _Attention(width, heads, norm_eps, ways, attention_dropout)
        self.self_attn_layer_norm = ways(norm)
        self.ffn = ways(partial(_FeedForward, width, ffn_width, norm_eps))
        self.final_layer_norm = ways(norm)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, image_tokens: int, visible: Tensor | None) -> Tensor:
        """(B, N, D) to (B, N, D); `visible`, which broadcasts to (B, heads, N, N), is True where attention may look."""
        attended = self.self_attn(self.self_attn_layer_norm(x, image_tokens), image_tokens, visible)
        x = x + self.drop_path(self.dropout(attended))
        return x + self.drop_path(self.dropout(self.ffn(self.final_layer_norm(x, image_tokens), image_tokens)))


class VisionEmbedding(nn.Module):
    """Patches and the CLS token before them.

    Args:
        width: D.
        patch_size: side of a patch in pixels.
        mask_token: make a learned token that stands for masked patches.
    """

    def __init__(self, width: int, patch_size: int, mask_token: bool = True) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if mask_token else None
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, images: Tensor, masked: Tensor | None, mask_token: Tensor | None) -> Tensor:
        """(B, 1 + N, D); (D,) or (1, 1, D) `mask_token` stands where (B, N) `masked` is True."""
        patches = self.proj(images).flatten(2).transpose(1, 2)
        if masked is not None:
            patches = torch.where(masked[..., None], mask_token.to(patches.dtype), patches)
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)


class _Encoder(nn.Module):
    def __init__(
        self, width: int, layers: int, heads: int, ffn_width: int, positions: tuple[int, int], norm_eps: float
    ) -> None:
        super().__init__()
        self.embed_positions = Multiway(*(nn.Embedding(FIRST_POSITION + count, width) for count in positions))
        self.layers = nn.ModuleList(MultiwayLayer(width, heads, ffn_width, norm_eps) for _ in range(layers))
        self.layer_norm = for_both(partial(nn.LayerNorm, width, eps=norm_eps))


class BEiT3(nn.Module):
    """BEiT-3. The defaults are the released base model.

    Args:
        vocab_size: rows of the text embedding, special tokens included.
        width: D.
        layers: how many.
        heads: attention heads.
        ffn_width: hidden width of the feed-forward part.
        image_size: side of the input in pixels, a multiple of `patch_size`.
        patch_size: side of a patch in pixels.
        max_positions: longest text in tokens.
        norm_eps: of every LayerNorm.

    Attributes:
        width, image_size, patch_size, max_positions: as given. num_layers, num_heads: likewise. mean, std: what images
        are normalized with, per channel on a scale from 0 to 1.

    Raises:
        ValueError: `width` is no multiple of `heads`, or `image_size` none of `patch_size`.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        ffn_width: int = 3072,
        image_size: int = 224,
        patch_size: int = 16,
        max_positions: int = 1022,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if width % heads or image_size % patch_size:
            raise ValueError(f"width {width} / heads {heads} or image {image_size} / patch {patch_size} is not whole")
        self.text_embed = nn.Embedding(vocab_size, width)
        self.vision_embed = VisionEmbedding(width, patch_size)
        positions = (1 + (image_size // patch_size) ** 2, max_positions)
        self.encoder = _Encoder(width, layers, heads, ffn_width, positions, norm_eps)
        self.apply(initialize_beit3)
        self.width = width
        self.num_layers = layers
        self.num_heads = heads
        self.image_size = image_size
        self.patch_size = patch_size
        self.max_positions = max_positions
        self.mean = self.std = (0.5, 0.5, 0.5)

    def forward(
        self,
        images: Tensor | None = None,
        text: Tensor | None = None,
        padding_mask: Tensor | None = None,
        masked: Tensor | None = None,
    ) -> Encoded:
        """Images alone, texts alone, or pairs of both read together.

        Args:
            images: (B, 3, S, S), normalized.
            text: (B, L) int64, `<s>` first, which serves as CLS token.
            padding_mask: (B, L) bool, True at padding; None where nothing is padded.
            masked: (B, N) bool, True at patches that the mask token is to stand for; None = none.

        Returns:
            Tokens behind the final norm, and the mask of all of them: of images (B, 1 + N, D), the CLS token first,
            then patches row by row; of texts (B, L, D); of pairs (B, 1 + N + L, D), those of the image first. At
            padding the tokens mean nothing.

        Raises:
            ValueError: neither images nor text; images of another size; a text longer than `max_positions`.
        """
        x, image_tokens, padding_mask = self._embed(images, text, padding_mask, masked)
        for state in self._run(x, image_tokens, padding_mask):
            x = state
        return Encoded(self.norm(x, image_tokens), padding_mask)

    def hidden_states(
        self,
        images: Tensor | None = None,
        text: Tensor | None = None,
        padding_mask: Tensor | None = None,
        masked: Tensor | None = None,
    ) -> list[Tensor]:
        """Tokens behind every layer, before the final norm; arguments and shapes as of `forward`."""
        return list(self._run(*self._embed(images, text, padding_mask, masked)))

    def norm(self, x: Tensor, image_tokens: int) -> Tensor:
        """The final norm of a layer's (B, N, D) tokens, of which the first `image_tokens` are image tokens."""
        return self.encoder.layer_norm(x, image_tokens)

    def _run(self, x: Tensor, image_tokens: int, padding_mask: Tensor | None) -> Iterator[Tensor]:
        visible = None if padding_mask is None else ~padding_mask[:, None, None]
        for layer in self.encoder.layers:
            x = layer(x, image_tokens, visible)
            yield x

    def _embed(
        self, images: Tensor | None, text: Tensor | None, padding_mask: Tensor | None, masked: Tensor | None
    ) -> tuple[Tensor, int, Tensor | None]:
        """Tokens before the first layer, how many of them are image tokens, and the mask of all."""
        if images is None and text is None:
            raise ValueError("BEiT-3 reads images, text or both; there is neither")
        parts = []
        if images is not None:
            parts.append(self._embed_images(images, masked))
        image_tokens = parts[0].shape[1] if parts else 0
        if text is None:
            return parts[0], image_tokens, None
        parts.append(self._embed_text(text))
        mask = None if padding_mask is None else F.pad(padding_mask.bool(), (image_tokens, 0))
        return torch.cat(parts, dim=1), image_tokens, mask

    def _embed_images(self, images: Tensor, masked: Tensor | None) -> Tensor:
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"images are {tuple(images.shape[-2:])}; the encoder has positions for {self.image_size}")
        tokens = self.vision_embed(images, masked, self.vision_embed.mask_token)
        return tokens + self.encoder.embed_positions.A.weight[FIRST_POSITION:]

    def _embed_text(self, text: Tensor) -> Tensor:
        length = text.shape[1]
        if length > self.max_positions:
            raise ValueError(f"{length} tokens exceed the {self.max_positions} positions of the encoder")
        positions = self.encoder.embed_positions.B.weight[FIRST_POSITION : FIRST_POSITION + length]
        return self.text_embed(text) + positions


def initialize_beit3(module: nn.Module) -> None:
    """BERT's and ViT's initialization, of tables and tokens too."""
    initialize_weights(module)
    if isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, VisionEmbedding):
        for token in module.parameters(recurse=False):
            nn.init.trunc_normal_(token, std=0.02)


def interpolated_positions(table: Tensor, side: int) -> Tensor:
    """Position rows for `side` x `side` patches; the unused ones and the CLS token's stay as they are."""
    others, patches = table[: FIRST_POSITION + 1].float(), table[FIRST_POSITION + 1 :].float()
    before = isqrt(len(patches))
    grid = patches.T.unflatten(1, (before, before))[None]
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([others, grid[0].flatten(1).T])
