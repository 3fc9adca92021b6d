"""From options to the student's encoders."""

import math
from dataclasses import dataclass, field
from typing import Any

import timm

from emkum.errors import UserError
from emkum.models.beit3_checkpoints import load_beit3_weights
from emkum.models.beit3_encoders import BEiT3ImageEncoder, BEiT3TextEncoder
from emkum.models.bert import BertEncoder
from emkum.models.bert_checkpoints import load_bert_weights
from emkum.models.cnn_encoder import CnnImageEncoder
from emkum.models.data2vec2 import Data2Vec2ImageEncoder, Data2Vec2TextEncoder
from emkum.models.data2vec2_audio import Data2Vec2AudioEncoder
from emkum.models.data2vec2_checkpoints import load_data2vec2_weights
from emkum.models.encoder import Encoder, LayerChoice
from emkum.models.timm_encoder import TimmImageEncoder

# Encoders of sounds.
NO_AUDIO = "none"
AUDIO_ENCODERS = (NO_AUDIO, "data2vec2")
LAYER_CHOICES = ("first", "every_second")
ATTENTIONS = ("fused", "stock")


@dataclass(frozen=True)
class Size:
    """Width, heads and layers of encoders that are not told by their weights, and of the shared encoder.

    `prenet_layers` of the Data2Vec 2 image encoder's layers belong to its modality-specific part. That changes
    parameter names alone; the released base image model has two. `conv_width` is of the audio encoder's convolutions
    over samples.
    """

    width: int
    heads: int
    layers: int
    prenet_layers: int = 0
    shared_layers: int = 1
    conv_width: int = 512


SIZES = {
    "tiny": Size(128, 2, 3, conv_width=32),
    "small": Size(192, 3, 4, conv_width=64),
    "base": Size(768, 12, 6, prenet_layers=2),
    "large": Size(768, 12, 12, prenet_layers=2, shared_layers=2),
}


@dataclass
class ImageEncoderConfig:
    encoder: str = field(
        default="data2vec2",
        metadata={
            "help": "data2vec2, beit3 (beit3:FILE is short for weights beside it), or timm:NAME for a timm Vision "
            "Transformer, BEiT or convolutional network"
        },
    )
    weights: str = field(
        default="", metadata={"help": "pretrained weights: a local file, or 'hub' (timm only); empty = random"}
    )
    size: int = field(default=224, metadata={"help": "side of the student's input in pixels"})
    patch_size: int = field(default=16, metadata={"help": "side of a patch in pixels (data2vec2, beit3)"})
    layers: int = field(default=0, metadata={"help": "blocks to keep; 0 = as --student-size says"})
    layer_choice: str = field(
        default="first", metadata={"help": "which blocks of the pretrained model: first, every_second (1st, 3rd ...)"}
    )
    dropout: float = field(default=0.0, metadata={"help": "dropout after attention and MLP (data2vec2, beit3)"})
    drop_path: float = field(default=0.0, metadata={"help": "stochastic depth rate of the last block"})

    def __post_init__(self) -> None:
        _take_weights_from_name(self, "image")


@dataclass
class TextEncoderConfig:
    encoder: str = field(
        default="data2vec2",
        metadata={"help": "data2vec2, bert or beit3 (beit3:FILE is short for weights beside it)"},
    )
    weights: str = field(
        default="",
        metadata={
            "help": "pretrained weights: released checkpoint of Data2Vec 2 text or BEiT-3, or BERT's folder, file or "
            "name on the hub; empty = random"
        },
    )
    layers: int = field(default=0, metadata={"help": "blocks to keep; 0 = as --student-size says"})
    layer_choice: str = field(
        default="first", metadata={"help": "which blocks of the pretrained model: first, every_second (1st, 3rd ...)"}
    )
    dropout: float = field(default=0.1, metadata={"help": "dropout after embeddings, attention and MLP"})
    attention_dropout: float = field(default=0.1, metadata={"help": "dropout of attention weights"})
    drop_path: float = field(default=0.0, metadata={"help": "stochastic depth rate of the last block"})
    max_positions: int = field(default=512, metadata={"help": "rows of the learned position table"})

    def __post_init__(self) -> None:
        _take_weights_from_name(self, "text")


@dataclass
class AudioEncoderConfig:
    encoder: str = field(
        default=NO_AUDIO,
        metadata={"help": "third sense: data2vec2, for data with sounds; none = images and captions alone"},
    )
    weights: str = field(
        default="", metadata={"help": "pretrained weights: released checkpoint of Data2Vec 2 audio; empty = random"}
    )
    layers: int = field(default=0, metadata={"help": "blocks to keep; 0 = as --student-size says"})
    layer_choice: str = field(
        default="first", metadata={"help": "which blocks of the pretrained model: first, every_second (1st, 3rd ...)"}
    )
    conv_width: int = field(
        default=0, metadata={"help": "channels of the convolutions over samples; 0 = as --student-size says"}
    )
    dropout: float = field(default=0.1, metadata={"help": "dropout before the first block, after attention and MLP"})
    attention_dropout: float = field(default=0.1, metadata={"help": "dropout of attention weights"})
    drop_path: float = field(default=0.0, metadata={"help": "stochastic depth rate of the last block"})


def _take_weights_from_name(config: Any, modality: str) -> None:
    """Make beit3:FILE of an encoder's options beit3 with FILE as weights.

    Raises:
        UserError: there is no file, or other weights are given, too.
    """
    kind, colon, file = config.encoder.partition(":")
    if kind != "beit3" or not colon:
        return
    if not file or config.weights not in ("", file):
        raise UserError(
            f"--{modality}-encoder {config.encoder}: give beit3:FILE, or beit3 and the file by --{modality}-weights"
        )
    config.encoder, config.weights = kind, file


@dataclass(frozen=True)
class EncoderSetting:
    """What all encoders are built alike with.

    Attributes:
        size: widths and layers.
        own_positions: whether they have positions of their own.
        fused_attention: see `--student-attention`.
        pretrained: read pretrained weights.
        further: layers behind the kept ones that the shared encoder starts from.
    """

    size: Size
    own_positions: bool = True
    fused_attention: bool = True
    pretrained: bool = True
    further: int = 0


def build_image_encoder(config: ImageEncoderConfig, setting: EncoderSetting) -> Encoder:
    """The image encoder; the last `setting.further` of its blocks are those behind the kept ones.

    Raises:
        UserError: an option has a value that names nothing, or weights do not fit.
    """
    weights = config.weights if setting.pretrained else ""
    choice = _layer_choice("image", config, setting)
    rate = _rate_at_end(config.drop_path, choice)
    if config.encoder.startswith("timm:"):
        return _timm_encoder(config, setting, weights, choice, rate)
    if config.encoder not in ("data2vec2", "beit3"):
        raise UserError(f"--image-encoder {config.encoder!r} is unknown; choose data2vec2, beit3 or timm:NAME")
    if config.size < 1 or config.patch_size < 1 or config.size % config.patch_size:
        raise UserError(f"--image-size {config.size} is no multiple of --image-patch-size {config.patch_size}")
    layers, width, heads = choice.count + choice.further, setting.size.width, setting.size.heads
    shared = {
        "patch_size": config.patch_size,
        "dropout": config.dropout,
        "drop_path": rate,
        "own_positions": setting.own_positions,
        "fused_attention": setting.fused_attention,
    }
    if config.encoder == "beit3":
        beit3 = BEiT3ImageEncoder(width, layers, heads, 4 * width, config.size, **shared)
        if weights:
            load_beit3_weights(beit3, weights, choice)
        return beit3
    prenet_layers = min(setting.size.prenet_layers, choice.count)
    encoder = Data2Vec2ImageEncoder(
        embed_dim=width,
        depth=layers - prenet_layers,
        prenet_depth=prenet_layers,
        num_heads=heads,
        input_size=config.size,
        **shared,
    )
    if weights:
        load_data2vec2_weights(encoder, weights, choice)
    return encoder


def _timm_encoder(
    config: ImageEncoderConfig, setting: EncoderSetting, weights: str, choice: LayerChoice, rate: float
) -> Encoder:
    name = config.encoder.removeprefix("timm:")
    if not is_transformer(name):
        if config.drop_path or config.dropout:
            raise UserError(f"--image-drop-path and --image-dropout have no effect on {config.encoder}: leave them out")
        if config.layers:
            raise UserError(f"--image-layers {config.layers}: {config.encoder} has no blocks to choose from")
        return CnnImageEncoder(name, weights, config.size)
    if config.dropout:
        raise UserError(f"--image-dropout has no effect on {config.encoder}: leave it out, or give --image-drop-path")
    return TimmImageEncoder(
        name,
        weights,
        config.size,
        choice=choice,
        drop_path=rate,
        own_positions=setting.own_positions,
        fused_attention=setting.fused_attention,
    )


def build_text_encoder(config: TextEncoderConfig, setting: EncoderSetting, vocab_size: int, pad_index: int) -> Encoder:
    """The text encoder; the last `setting.further` of its blocks are those behind the kept ones.

    Raises:
        UserError: as of `build_image_encoder`.
    """
    choice = _layer_choice("text", config, setting)
    sizes = {"num_heads": setting.size.heads, "depth": choice.count + choice.further, "embed_dim": setting.size.width}
    shared = {
        "vocab_size": vocab_size,
        "max_positions": config.max_positions,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "drop_path": _rate_at_end(config.drop_path, choice),
        "own_positions": setting.own_positions,
    }
    weights = config.weights if setting.pretrained else ""
    if config.encoder == "data2vec2":
        encoder = Data2Vec2TextEncoder(**sizes, **shared, pad_index=pad_index, fused_attention=setting.fused_attention)
        if weights:
            load_data2vec2_weights(encoder, weights, choice)
        return encoder
    if config.encoder not in ("bert", "beit3"):
        raise UserError(f"--text-encoder {config.encoder!r} is unknown; choose data2vec2, bert or beit3")
    width, heads, layers = sizes["embed_dim"], sizes["num_heads"], sizes["depth"]
    shared |= {"width": width, "heads": heads, "layers": layers, "ffn_width": 4 * width}
    if config.encoder == "beit3":
        beit3 = BEiT3TextEncoder(**shared, fused_attention=setting.fused_attention)
        if weights:
            load_beit3_weights(beit3, weights, choice)
        return beit3
    bert = BertEncoder(**shared)
    if weights:
        load_bert_weights(bert, weights, choice)
    return bert


# Of the convolutions that make an audio encoder's positions, as released; fewer where these do not divide a width.
_POSITION_GROUPS = 16


def build_audio_encoder(config: AudioEncoderConfig, setting: EncoderSetting) -> Encoder | None:
    """The audio encoder; None where there is none.

    Raises:
        UserError: as of `build_image_encoder`.
    """
    if config.encoder not in AUDIO_ENCODERS:
        raise UserError(f"--audio-encoder {config.encoder!r} is unknown; choose from {', '.join(AUDIO_ENCODERS)}")
    if config.encoder == NO_AUDIO:
        return None
    choice = _layer_choice("audio", config, setting)
    if config.conv_width < 0:
        raise UserError(f"--audio-conv-width {config.conv_width}: want 1 or more, or 0 for that of --student-size")
    encoder = Data2Vec2AudioEncoder(
        embed_dim=setting.size.width,
        depth=choice.count,
        num_heads=setting.size.heads,
        conv_width=config.conv_width or setting.size.conv_width,
        position_groups=math.gcd(_POSITION_GROUPS, setting.size.width),
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        drop_path=_rate_at_end(config.drop_path, choice),
        own_positions=setting.own_positions,
        fused_attention=setting.fused_attention,
    )
    if config.weights and setting.pretrained:
        load_data2vec2_weights(encoder, config.weights, choice)
    return encoder


def _layer_choice(
    option: str, config: ImageEncoderConfig | TextEncoderConfig | AudioEncoderConfig, setting: EncoderSetting
) -> LayerChoice:
    if config.layer_choice not in LAYER_CHOICES:
        raise UserError(
            f"--{option}-layer-choice {config.layer_choice!r} is unknown; choose from {', '.join(LAYER_CHOICES)}"
        )
    if config.layers < 0:
        raise UserError(f"--{option}-layers {config.layers}: want 1 or more, or 0 for those of --student-size")
    count = config.layers or setting.size.layers
    # Without pretrained weights there is nothing to choose from.
    chooses = bool(config.weights) and setting.pretrained
    return LayerChoice(count, chooses and config.layer_choice == "every_second", setting.further)


def _rate_at_end(rate: float, choice: LayerChoice) -> float:
    """Of all blocks, so that it is `rate` at the last one that is kept."""
    kept = choice.count - 1
    return rate * (kept + choice.further) / kept if kept > 0 else rate


# timm's modules whose models TimmImageEncoder can take apart.
_TRANSFORMERS = ("vision_transformer", "deit", "beit")


def is_transformer(name: str) -> bool:
    """Whether timm builds a model of this name as plain Vision Transformer or BEiT, as far as its registry tells."""
    base = name.split(".")[0]
    # A name that timm does not know gets the error with close ones from either encoder.
    return not timm.is_model(base) or timm.model_entrypoint(base).__module__.rpartition(".")[2] in _TRANSFORMERS
