"""From options to parts. Configs stop here: the parts themselves take plain arguments."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from emkum.errors import UserError
from emkum.layers.shared_blocks import SharedBlocks, initialize_weights
from emkum.layers.token_types import TokenTypes
from emkum.models.data2vec2 import Data2Vec2ImageEncoder, Data2Vec2TextEncoder
from emkum.models.data2vec2_checkpoints import load_data2vec2_weights
from emkum.models.student import ImageTextStudent
from emkum.models.timm_encoder import TimmImageEncoder
from emkum.options import collect_parts


@dataclass(frozen=True)
class Size:
    """Width, heads and layers of the Data2Vec 2 encoders.

    `prenet_layers` of the image encoder's layers belong to its modality-specific part. That changes parameter names
    alone; the released base image model has two.
    """

    width: int
    heads: int
    layers: int
    prenet_layers: int = 0


SIZES = {"tiny": Size(128, 2, 3), "small": Size(192, 3, 4), "base": Size(768, 12, 6, prenet_layers=2)}


@dataclass
class StudentConfig:
    size: str = field(
        default="base",
        metadata={"help": f"width, heads and layers where no other option sets them: {', '.join(SIZES)}"},
    )


@dataclass
class ImageEncoderConfig:
    encoder: str = field(
        default="data2vec2",
        metadata={"help": "data2vec2, or timm:NAME for the first blocks of a timm Vision Transformer"},
    )
    weights: str = field(
        default="", metadata={"help": "pretrained weights: a local file, or 'hub' (timm only); empty = random"}
    )
    size: int = field(default=224, metadata={"help": "side of the student's input in pixels"})
    patch_size: int = field(default=16, metadata={"help": "side of a patch in pixels (data2vec2 without weights)"})
    layers: int = field(default=0, metadata={"help": "blocks to keep, from the first on; 0 = as --student-size says"})
    drop_path: float = field(default=0.0, metadata={"help": "stochastic depth rate of the last block"})


@dataclass
class TextEncoderConfig:
    weights: str = field(default="", metadata={"help": "released Data2Vec 2 text checkpoint; empty = random"})
    layers: int = field(default=0, metadata={"help": "blocks to keep, from the first on; 0 = as --student-size says"})
    dropout: float = field(default=0.1, metadata={"help": "dropout after embeddings, attention and MLP"})
    attention_dropout: float = field(default=0.1, metadata={"help": "dropout of attention weights"})
    drop_path: float = field(default=0.0, metadata={"help": "stochastic depth rate of the last block"})
    max_positions: int = field(default=512, metadata={"help": "rows of the learned position table"})


@dataclass
class SharedEncoderConfig:
    layers: int = field(default=1, metadata={"help": "shared pre-norm Transformer blocks"})
    dropout: float = field(default=0.0, metadata={"help": "dropout of attention output and MLP"})
    drop_path: float = field(default=0.0, metadata={"help": "stochastic depth rate"})


@dataclass
class TokenTypeConfig:
    place: str = field(default="after", metadata={"help": "where token types are added: after (the encoders), none"})
    layer_scale: float = field(default=1e-5, metadata={"help": "initial LayerScale of the token types; 0 = none"})


STUDENT_PARTS: dict[str, type] = {
    "student": StudentConfig,
    "image": ImageEncoderConfig,
    "text": TextEncoderConfig,
    "shared": SharedEncoderConfig,
    "token_type": TokenTypeConfig,
}

TIMM_PREFIX = "timm:"


def build_student(
    options: Mapping[str, Any],
    vocab_size: int,
    target_width: int | None,
    pretrained: bool = True,
    pad_index: int = 1,
) -> ImageTextStudent:
    """Build the student from flat options (see STUDENT_PARTS for their prefixes).

    Args:
        options: flat options, a mapping or an object with attributes.
        vocab_size: rows of the token embedding.
        target_width: width of the teacher's target; 0 = the student's own; None = no distillation head.
        pretrained: read the encoders' pretrained weights; False where a checkpoint of the whole student follows.
        pad_index: id of padding; 1 in fairseq's dictionary.

    Raises:
        UserError: an option has a value that names nothing.
    """
    parts = collect_parts(STUDENT_PARTS, options)
    size = _choose("--student-size", parts["student"].size, SIZES)
    image_encoder = _build_image_encoder(parts["image"], size, pretrained)
    text_encoder = _build_text_encoder(parts["text"], size, vocab_size, pad_index, pretrained)
    width = image_encoder.width
    heads = size.heads if size.width == width else max(1, width // 64)
    shared = parts["shared"]
    place = _choose("--token-type-place", parts["token_type"].place, {"after": "after", "none": None})
    layer_scale = parts["token_type"].layer_scale
    return ImageTextStudent(
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        shared_encoder=SharedBlocks(width, shared.layers, heads, shared.dropout, shared.drop_path),
        image_projection=nn.Identity(),
        text_projection=_projection(text_encoder.width, width),
        token_types=None if place is None else TokenTypes(width, layer_scale if layer_scale > 0 else None),
        distillation_head=None if target_width is None else _distillation_head(width, target_width or width),
    )


def _choose(option: str, value: str, choices: Mapping[str, Any]) -> Any:
    if value not in choices:
        raise UserError(f"{option} {value!r} is unknown; choose from {', '.join(choices)}")
    return choices[value]


def _projection(width_in: int, width_out: int) -> nn.Module:
    if width_in == width_out:
        return nn.Identity()
    linear = nn.Linear(width_in, width_out)
    initialize_weights(linear)
    return linear


def _distillation_head(width: int, target_width: int) -> nn.Module:
    head = nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, target_width))
    head.apply(initialize_weights)
    return head


def _build_image_encoder(config: ImageEncoderConfig, size: Size, pretrained: bool) -> nn.Module:
    layers = config.layers or size.layers
    weights = config.weights if pretrained else ""
    if config.encoder.startswith(TIMM_PREFIX):
        name = config.encoder.removeprefix(TIMM_PREFIX)
        return TimmImageEncoder(name, weights, config.size, layers, config.drop_path)
    if config.encoder != "data2vec2":
        raise UserError(f"--image-encoder {config.encoder!r} is unknown; choose data2vec2 or timm:NAME")
    prenet_layers = min(size.prenet_layers, layers)
    encoder = Data2Vec2ImageEncoder(
        embed_dim=size.width,
        depth=layers - prenet_layers,
        prenet_depth=prenet_layers,
        num_heads=size.heads,
        input_size=config.size,
        patch_size=config.patch_size,
        drop_path=config.drop_path,
    )
    if weights:
        load_data2vec2_weights(encoder, weights)
    return encoder


def _build_text_encoder(
    config: TextEncoderConfig, size: Size, vocab_size: int, pad_index: int, pretrained: bool
) -> nn.Module:
    encoder = Data2Vec2TextEncoder(
        vocab_size=vocab_size,
        embed_dim=size.width,
        depth=config.layers or size.layers,
        num_heads=size.heads,
        max_positions=config.max_positions,
        pad_index=pad_index,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        drop_path=config.drop_path,
    )
    if config.weights and pretrained:
        load_data2vec2_weights(encoder, config.weights)
    return encoder
