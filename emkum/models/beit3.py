"""BEiT-3's encoder (Wang et al. 2022, "Image as a Foreign Language: BEiT Pretraining for All Vision and Vision-Language
Tasks"), and its checkpoints.

Image and text tokens attend to one another in every layer. All else each modality has to itself: whatever has
parameters is there twice, A for image tokens and B for text tokens. Parameters are named as in the released files.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.layers.shared_encoders import initialize_weights
from emkum.outputs import Encoded
from emkum.weights import load_strictly, official_state, read_checkpoint

# Both position tables begin with two rows that are not used, as fairseq's do.
FIRST_POSITION = 2
# Released text embeddings have more rows than the tokenizer has ids.
RELEASED_ROWS, RELEASED_IDS = 64_010, 64_002

logger = logging.getLogger(__name__)

# ----------------------------------------------------------------------------------------------------------------------
# Encoder
# ----------------------------------------------------------------------------------------------------------------------


class Multiway(nn.Module):
    """One module for image tokens and another one for text tokens.

    Args:
        image, text: (B, N, D) to (B, N, E) both.
    """

    def __init__(self, image: nn.Module, text: nn.Module) -> None:
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


def _for_both(make: Callable[[], nn.Module]) -> Multiway:
    return Multiway(make(), make())


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, norm_eps: float) -> None:
        super().__init__()
        self.num_heads = heads
        linear = partial(nn.Linear, width, width)
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (_for_both(linear) for _ in range(4))
        self.inner_attn_ln = _for_both(partial(nn.LayerNorm, width, eps=norm_eps))

    def forward(self, x: Tensor, image_tokens: int, visible: Tensor | None) -> Tensor:
        query, key, value = (
            projection(x, image_tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, heads, N, D / heads) each
        attended = F.scaled_dot_product_attention(query, key, value, visible).transpose(1, 2).flatten(2)
        return self.out_proj(self.inner_attn_ln(attended, image_tokens), image_tokens)


class _FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, norm_eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.ffn_layernorm = nn.LayerNorm(hidden, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ffn_layernorm(F.gelu(self.fc1(x))))


class _Layer(nn.Module):
    """Pre-norm, with a further norm inside attention and feed-forward part, each before its last projection."""

    def __init__(self, width: int, heads: int, ffn_width: int, norm_eps: float) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, width, eps=norm_eps)
        self.self_attn = _Attention(width, heads, norm_eps)
        self.self_attn_layer_norm = _for_both(norm)
        self.ffn = _for_both(partial(_FeedForward, width, ffn_width, norm_eps))
        self.final_layer_norm = _for_both(norm)

    def forward(self, x: Tensor, image_tokens: int, visible: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x, image_tokens), image_tokens, visible)
        return x + self.ffn(self.final_layer_norm(x, image_tokens), image_tokens)


class _VisionEmbedding(nn.Module):
    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, images: Tensor, masked: Tensor | None) -> Tensor:
        patches = self.proj(images).flatten(2).transpose(1, 2)
        if masked is not None:
            patches = torch.where(masked[..., None], self.mask_token.to(patches.dtype), patches)
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)


class _Encoder(nn.Module):
    def __init__(
        self, width: int, layers: int, heads: int, ffn_width: int, positions: tuple[int, int], norm_eps: float
    ) -> None:
        super().__init__()
        self.embed_positions = Multiway(*(nn.Embedding(FIRST_POSITION + count, width) for count in positions))
        self.layers = nn.ModuleList(_Layer(width, heads, ffn_width, norm_eps) for _ in range(layers))
        self.layer_norm = _for_both(partial(nn.LayerNorm, width, eps=norm_eps))


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
        self.vision_embed = _VisionEmbedding(width, patch_size)
        positions = (1 + (image_size // patch_size) ** 2, max_positions)
        self.encoder = _Encoder(width, layers, heads, ffn_width, positions, norm_eps)
        self.apply(_initialize)
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
        return self.vision_embed(images, masked) + self.encoder.embed_positions.A.weight[FIRST_POSITION:]

    def _embed_text(self, text: Tensor) -> Tensor:
        length = text.shape[1]
        if length > self.max_positions:
            raise ValueError(f"{length} tokens exceed the {self.max_positions} positions of the encoder")
        positions = self.encoder.embed_positions.B.weight[FIRST_POSITION : FIRST_POSITION + length]
        return self.text_embed(text) + positions


def _initialize(module: nn.Module) -> None:
    initialize_weights(module)
    if isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, _VisionEmbedding):
        nn.init.trunc_normal_(module.cls_token, std=0.02)
        nn.init.trunc_normal_(module.mask_token, std=0.02)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------

# What the released files have beside the encoder, by the first part of the name: pretraining, retrieval, captions,
# question answering and classification.
_HEADS = ("mlm_head", "mim_head", "language_head", "vision_head", "logit_scale", "pooler", "head", "fc_norm")
_IMAGE_POSITIONS, _TEXT_POSITIONS = "encoder.embed_positions.A.weight", "encoder.embed_positions.B.weight"
_TEXT, _PATCHES, _HIDDEN = "text_embed.weight", "vision_embed.proj.weight", "encoder.layers.0.ffn.A.fc1.weight"
# Parameters that tell the sizes, and their number of dimensions.
_TELLING = {_TEXT: 2, _PATCHES: 4, _HIDDEN: 2, _IMAGE_POSITIONS: 2, _TEXT_POSITIONS: 2}
# Width of a head in all released models.
_HEAD_WIDTH = 64


def beit3_from_checkpoint(
    path: str | Path,
    image_size: int | None = None,
    vocab_size: int | None = None,
    num_layers: int | None = None,
    allowed: str = "",
) -> BEiT3:
    """Build the encoder that a checkpoint holds, and load it.

    Args:
        path: a released or fine-tuned file, `{"model": parameters}`, or parameters alone in any format that
            `emkum.weights.read_checkpoint` reads. Heads for particular tasks are left out.
        image_size: side of the input in pixels, to which the positions are interpolated; None = as in the file.
        vocab_size: keep only the first so many rows of the text embedding; None = all, but of the released 64,010 the
            64,002 that have a piece in the vocabulary.
        num_layers: keep only the first so many layers; None = all.
        allowed: see `emkum.weights.load_strictly`. Files fine-tuned for classification or question answering lack the
            final norm: `encoder.layer_norm.*` gives them one without effect of weight and bias.

    Raises:
        UserError: the file cannot be read, is of another model, or has missing, unexpected or misshapen parameters; or
            one of the sizes does not go with it.
    """
    state = _encoder_parameters(path)
    arguments = _arguments(state, path)
    side = arguments["image_size"] if image_size is None else image_size
    if side < 1 or side % arguments["patch_size"]:
        raise UserError(f"image size {side} is no multiple of the patch size {arguments['patch_size']} of {path}")
    if side != arguments["image_size"]:
        state[_IMAGE_POSITIONS] = _interpolated(state[_IMAGE_POSITIONS], side // arguments["patch_size"])
        arguments["image_size"] = side
    state[_TEXT] = _trimmed(state[_TEXT], vocab_size, path)
    arguments["vocab_size"] = len(state[_TEXT])
    total = arguments["layers"]
    if num_layers is not None:
        if not 1 <= num_layers <= total:
            raise UserError(f"{path} has {total} layers; {num_layers} cannot be kept")
        arguments["layers"] = num_layers
    left_out = tuple(f"encoder.layers.{index}." for index in range(arguments["layers"], total))
    model = BEiT3(**arguments)
    used = {name: value for name, value in state.items() if not name.startswith(left_out)}
    load_strictly(model, used, path, allowed, "BEiT-3")
    return model


def _encoder_parameters(path: str | Path) -> dict[str, Tensor]:
    state, heads = {}, set()
    for name, value in official_state(read_checkpoint(path)).items():
        first = name.split(".")[0]
        if first in _HEADS:
            heads.add(first)
        else:
            state[name.removeprefix("beit3.")] = value
    if heads:
        logger.info("%s: left out %s, which the encoder does not have", path, ", ".join(sorted(heads)))
    return state


def _arguments(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    """Of the whole model in the file, but for the vocabulary."""
    wanting = [name for name, dims in _TELLING.items() if name not in state or state[name].ndim != dims]
    if wanting:
        raise UserError(f"{path} is no checkpoint of BEiT-3: it lacks {', '.join(wanting)} or has other shapes of it")
    hidden, width = state[_HIDDEN].shape
    if width % _HEAD_WIDTH:
        raise UserError(f"{path}: a width of {width} is no multiple of {_HEAD_WIDTH}, the width of BEiT-3's heads")
    patch_size = state[_PATCHES].shape[-1]
    patches = len(state[_IMAGE_POSITIONS]) - FIRST_POSITION - 1
    if patches < 1 or isqrt(patches) ** 2 != patches:
        raise UserError(f"{path}: {_IMAGE_POSITIONS} has {patches} rows for patches, which make no square")
    max_positions = len(state[_TEXT_POSITIONS]) - FIRST_POSITION
    if max_positions < 1:
        raise UserError(f"{path}: {_TEXT_POSITIONS} has {max_positions + FIRST_POSITION} rows, too few for any text")
    return {
        "width": width,
        "layers": len({name.split(".")[2] for name in state if name.startswith("encoder.layers.")}),
        "heads": width // _HEAD_WIDTH,
        "ffn_width": hidden,
        "image_size": isqrt(patches) * patch_size,
        "patch_size": patch_size,
        "max_positions": max_positions,
    }


def _interpolated(table: Tensor, side: int) -> Tensor:
    """Position rows for `side` x `side` patches; the unused ones and the CLS token's stay as they are."""
    others, patches = table[: FIRST_POSITION + 1].float(), table[FIRST_POSITION + 1 :].float()
    before = isqrt(len(patches))
    grid = patches.T.unflatten(1, (before, before))[None]
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([others, grid[0].flatten(1).T])


def _trimmed(table: Tensor, vocab_size: int | None, path: str | Path) -> Tensor:
    rows = len(table)
    if vocab_size is None:
        vocab_size = RELEASED_IDS if rows == RELEASED_ROWS else rows
    if not 1 <= vocab_size <= rows:
        raise UserError(f"{path} has a text embedding of {rows} rows; the vocabulary needs {vocab_size}")
    if vocab_size < rows:
        logger.info("%s: text embedding of %d rows trimmed to the %d of the vocabulary", path, rows, vocab_size)
    return table[:vocab_size]
