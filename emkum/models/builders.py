"""From options to the student. Configs stop here: the parts themselves take plain arguments."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from emkum.errors import UserError
from emkum.layers.positions import SharedPositions
from emkum.layers.shared_encoders import NoSharedEncoder, SharedBlocks, SharedMlp, initialize_weights
from emkum.layers.token_types import TokenTypes
from emkum.models.encoder import Encoder
from emkum.models.encoder_builders import (
    ATTENTIONS,
    SIZES,
    AudioEncoderConfig,
    EncoderSetting,
    ImageEncoderConfig,
    Size,
    TextEncoderConfig,
    build_audio_encoder,
    build_image_encoder,
    build_text_encoder,
)
from emkum.models.student import Heads, ImageTextStudent
from emkum.options import collect_parts

SHARED_KINDS = ("blocks", "mlp", "none")
SHARED_NORMS = ("pre", "post")
SHARED_SOURCES = ("random", "text", "image")
POSITION_KINDS = ("mixed", "learned", "sincos")
PLACES = ("before", "after")
PROJECTIONS = ("auto", "linear", "mlp")
PREDICTION_HEADS = ("linear", "none")
CONTRAST_HEADS = ("none", "linear")


@dataclass
class StudentConfig:
    size: str = field(
        default="base",
        metadata={"help": f"width, heads and layers where no other option sets them: {', '.join(SIZES)}"},
    )
    width: int = field(default=0, metadata={"help": "width of encoders made here; 0 = as --student-size says"})
    heads: int = field(default=0, metadata={"help": "attention heads likewise; 0 = as --student-size says"})
    attention: str = field(
        default="fused",
        metadata={
            "help": "fused (scaled_dot_product_attention) or stock (the source libraries' own); of BERT always fused"
        },
    )
    checkpoint_activations: bool = field(
        default=False, metadata={"help": "recompute each block in the backward pass: less memory, more time"}
    )


@dataclass
class SharedEncoderConfig:
    kind: str = field(
        default="blocks",
        metadata={"help": "blocks (Transformer, over all tokens), mlp (SHRe's, on the CLS token) or none"},
    )
    layers: int = field(default=0, metadata={"help": "Transformer blocks; 0 = as --student-size says"})
    width: int = field(default=0, metadata={"help": "width of the shared encoder; 0 = the image encoder's"})
    heads: int = field(
        default=0, metadata={"help": "attention heads; 0 = the encoders' of that width, else width / 64"}
    )
    norm: str = field(default="pre", metadata={"help": "LayerNorm in the blocks: pre (as ViT) or post (as BERT)"})
    sub_norms: bool = field(
        default=False,
        metadata={"help": "LayerNorm before the last projection of attention and MLP, too, as BEiT-3 has them"},
    )
    init: str = field(
        default="random",
        metadata={"help": "random, or text / image: that pretrained model's layers behind the last one kept"},
    )
    dropout: float = field(default=0.0, metadata={"help": "dropout of attention output and MLP"})
    drop_path: float = field(default=0.0, metadata={"help": "stochastic depth rate"})


@dataclass
class TokenTypeConfig:
    place: str = field(
        default="after", metadata={"help": "where token types are added: before or after (the encoders), none"}
    )
    layer_scale: float = field(default=1e-5, metadata={"help": "initial LayerScale of the token types; 0 = none"})


@dataclass
class PositionConfig:
    kind: str = field(
        default="mixed",
        metadata={"help": "mixed (each encoder's own), or one table for both instead of these: learned or sincos"},
    )
    place: str = field(default="before", metadata={"help": "where that table is added: before or after (the encoders)"})
    scale: float = field(
        default=0.03,
        metadata={"help": "factor of the sine-cosine table, whose amplitude is 1; embeddings are as small"},
    )


@dataclass
class ProjectionConfig:
    kind: str = field(
        default="auto",
        metadata={
            "help": "from each encoder to the shared one: auto (linear where widths differ, else nothing), linear, mlp"
        },
    )


@dataclass
class HeadConfig:
    kd: str = field(
        default="linear",
        metadata={
            "help": "how the shared CLS token predicts a teacher's feature: linear (LayerNorm and a linear map) or "
            "none (is the prediction)"
        },
    )
    itc: str = field(
        default="none",
        metadata={
            "help": "what image-text contrast compares: none (the shared CLS token) or linear (a map a modality)"
        },
    )
    itc_width: int = field(default=0, metadata={"help": "channels of these maps; 0 = as the shared encoder"})


STUDENT_PARTS: dict[str, type] = {
    "student": StudentConfig,
    "image": ImageEncoderConfig,
    "text": TextEncoderConfig,
    "audio": AudioEncoderConfig,
    "shared": SharedEncoderConfig,
    "token_type": TokenTypeConfig,
    "position": PositionConfig,
    "projection": ProjectionConfig,
    "head": HeadConfig,
}


@dataclass(frozen=True)
class Targets:
    """What of a student depends on the objectives and the teacher.

    Attributes:
        prediction: channels of the teacher's feature to predict; 0 = the student's own; None = no prediction.
        logits: the teacher's classes; None = no logits.
        masked_images: whether images with masked patches are to be encoded.
        cls_attention: whether the shared encoder is to give the CLS token's attention.
    """

    prediction: int | None = None
    logits: int | None = None
    masked_images: bool = False
    cls_attention: bool = False


def build_student(
    options: Mapping[str, Any],
    vocab_size: int,
    targets: Targets | None = None,
    pretrained: bool = True,
    pad_index: int = 1,
) -> ImageTextStudent:
    """Build the student from flat options (see STUDENT_PARTS for their prefixes).

    Args:
        options: flat options, a mapping or an object with attributes.
        vocab_size: rows of the token embedding.
        targets: what is to be predicted; None = nothing.
        pretrained: read the encoders' pretrained weights; False where a checkpoint of the whole student follows.
        pad_index: id of padding; 1 in fairseq's dictionary.

    Raises:
        UserError: an option has a value that names nothing, or parts do not fit one another.
    """
    parts = collect_parts(STUDENT_PARTS, options)
    targets = targets or Targets()
    _assert_choices(parts)
    size = size_of(parts["student"])
    shared = parts["shared"]
    layers = shared.layers or size.shared_layers
    encoders, sources = _encoders(parts, size, layers, vocab_size, pretrained, pad_index)
    width = shared.width or encoders["image"].width
    for encoder in encoders.values():
        encoder.checkpoint_activations = parts["student"].checkpoint_activations
    heads = _heads(shared, width, size)
    if sources and (own := encoders[shared.init].num_heads) != heads:
        raise UserError(
            f"--shared-init {shared.init}: that model has {own} attention heads (--shared-heads), not {heads}"
        )
    shared_encoder = _shared_encoder(parts, width, layers, heads, targets.cls_attention)
    for block, state in zip(shared_encoder.blocks if sources else (), sources, strict=True):
        _copy_block(block, state, f"--shared-init {shared.init}")
    before, after = _additions(parts, list(encoders.values()), width)
    kind = parts["projection"].kind
    return ImageTextStudent(
        **{f"{name}_encoder": encoder for name, encoder in encoders.items()},
        **{f"{name}_projection": _projection(kind, encoder.width, width) for name, encoder in encoders.items()},
        shared_encoder=shared_encoder,
        heads=_build_heads(parts["head"], width, targets, len(encoders)),
        width=width,
        before=before,
        after=after,
        mask_token=targets.masked_images,
    )


def count_image_tokens(encoder: Encoder) -> int:
    """Tokens that an image encoder embeds an image into, the CLS token included."""
    parameter = next(encoder.parameters())
    image = torch.zeros(1, 3, encoder.image_size, encoder.image_size, dtype=parameter.dtype, device=parameter.device)
    training = encoder.training
    with torch.no_grad():
        tokens = encoder.eval().embed(image).shape[1]
    encoder.train(training)
    return tokens


def _assert_choices(parts: Mapping[str, Any]) -> None:
    choices = {
        "student_attention": ATTENTIONS,
        "shared_kind": SHARED_KINDS,
        "shared_norm": SHARED_NORMS,
        "shared_init": SHARED_SOURCES,
        "token_type_place": (*PLACES, "none"),
        "position_kind": POSITION_KINDS,
        "position_place": PLACES,
        "projection_kind": PROJECTIONS,
        "head_kd": PREDICTION_HEADS,
        "head_itc": CONTRAST_HEADS,
    }
    for option, allowed in choices.items():
        prefix, _, name = option.rpartition("_")
        value = getattr(parts[prefix], name)
        if value not in allowed:
            raise UserError(f"--{option.replace('_', '-')} {value!r} is unknown; choose from {', '.join(allowed)}")


def size_of(config: StudentConfig) -> Size:
    """Width, heads and layers that the options tell.

    Raises:
        UserError: there is no such size, or heads do not divide the width.
    """
    if config.size not in SIZES:
        raise UserError(f"--student-size {config.size!r} is unknown; choose from {', '.join(SIZES)}")
    named = SIZES[config.size]
    width, heads = config.width or named.width, config.heads or named.heads
    if width < 1 or heads < 1 or width % heads:
        raise UserError(f"--student-width {width} is no multiple of --student-heads {heads}")
    return replace(named, width=width, heads=heads)


def _encoders(
    parts: Mapping[str, Any], size: Size, shared_layers: int, vocab_size: int, pretrained: bool, pad_index: int
) -> tuple[dict[str, Encoder], list[Mapping[str, torch.Tensor]]]:
    """Encoders by modality, images' first, and the pretrained layers that the shared encoder starts from."""
    position, source = parts["position"], parts["shared"].init
    fused = parts["student"].attention == "fused"
    # One table for all stands instead of the encoders' own positions, wherever it is added.
    own = position.kind == "mixed"
    further = {"image": 0, "text": 0}
    if source != "random" and pretrained:
        if parts["shared"].kind != "blocks" or not parts[source].weights:
            raise UserError(f"--shared-init {source} needs --{source}-weights, and --shared-kind blocks")
        further[source] = shared_layers
    settings = {name: EncoderSetting(size, own, fused, pretrained, count) for name, count in further.items()}
    encoders = {
        "image": build_image_encoder(parts["image"], settings["image"]),
        "text": build_text_encoder(parts["text"], settings["text"], vocab_size, pad_index),
    }
    states: list[Mapping[str, torch.Tensor]] = []
    for name, count in further.items():
        if count > 0:
            kept = encoders[name].num_layers - count
            states = [encoders[name].block_state(kept + index) for index in range(count)]
            encoders[name].drop_last_blocks(count)
    # Behind the others, so that these draw the same random weights whether the student hears or not.
    audio = build_audio_encoder(parts["audio"], EncoderSetting(size, own, fused, pretrained))
    return encoders if audio is None else encoders | {"audio": audio}, states


def _heads(config: SharedEncoderConfig, width: int, size: Size) -> int:
    heads = config.heads or (size.heads if size.width == width else max(1, width // 64))
    if width % heads:
        raise UserError(f"--shared-width {width} is no multiple of --shared-heads {heads}")
    return heads


def _shared_encoder(parts: Mapping[str, Any], width: int, layers: int, heads: int, attention: bool) -> nn.Module:
    config = parts["shared"]
    if attention and config.kind != "blocks":
        raise UserError("an objective chooses tokens by the shared encoder's attention: it needs --shared-kind blocks")
    if config.kind == "none":
        return NoSharedEncoder()
    if config.kind == "mlp":
        return SharedMlp(width, 4 * width)
    encoder = SharedBlocks(
        width,
        layers,
        heads,
        config.dropout,
        config.drop_path,
        norm_first=config.norm == "pre",
        checkpoint_activations=parts["student"].checkpoint_activations,
        keeps_attention=attention,
        sub_norms=config.sub_norms,
    )
    for block in encoder.blocks:
        block.attn.fused_attn = parts["student"].attention == "fused"
    return encoder


def _copy_block(block: nn.Module, state: Mapping[str, torch.Tensor], option: str) -> None:
    own = block.state_dict()
    differing = sorted(own.keys() ^ state.keys())
    differing += [name for name in own if name in state and state[name].shape != own[name].shape]
    if differing:
        hint = "; --shared-sub-norms is for layers of beit3, which need it" if ".norm." in differing[0] else ""
        raise UserError(
            f"{option}: that model's layers do not fit the shared block (they differ in {differing[0]}){hint}"
        )
    block.load_state_dict(state)


def _additions(
    parts: Mapping[str, Any], encoders: list[Encoder], width: int
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """What is added to tokens before the encoders, of which the images' is the first, and behind them."""
    position, token_type = parts["position"], parts["token_type"]
    makers: dict[str, tuple[str, Any]] = {}
    if position.kind != "mixed":
        rows = max(count_image_tokens(encoders[0]), parts["text"].max_positions)
        makers["positions"] = (
            position.place,
            partial(SharedPositions, rows, learned=position.kind == "learned", scale=position.scale),
        )
    if token_type.place != "none":
        scale = token_type.layer_scale if token_type.layer_scale > 0 else None
        makers["token_types"] = token_type.place, partial(TokenTypes, layer_scale=scale, count=len(encoders))
    made: dict[str, dict[str, nn.Module]] = {place: {} for place in PLACES}
    for name, (place, make) in makers.items():
        widths = list(dict.fromkeys(encoder.width for encoder in encoders))
        if place == "before" and len(widths) > 1:
            option = {"positions": "--position-place", "token_types": "--token-type-place"}[name]
            raise UserError(f"{option} before needs encoders of one width; they have {' and '.join(map(str, widths))}")
        made[place][name] = make(width=widths[0] if place == "before" else width)
    return made["before"], made["after"]


def _projection(kind: str, width_in: int, width_out: int) -> nn.Module:
    if kind == "auto" and width_in == width_out:
        return nn.Identity()
    linear = nn.Linear(width_in, width_out)
    projection = nn.Sequential(linear, nn.GELU(), nn.Linear(width_out, width_out)) if kind == "mlp" else linear
    projection.apply(initialize_weights)
    return projection


def _build_heads(config: HeadConfig, width: int, targets: Targets, modalities: int) -> Heads:
    contrast_width = config.itc_width or width
    if config.itc == "none" and contrast_width != width:
        raise UserError(f"--head-itc-width {config.itc_width} needs --head-itc linear")

    def contrast() -> nn.Module:
        return nn.Identity() if config.itc == "none" else _initialized(nn.Linear(width, contrast_width, bias=False))

    target = targets.prediction
    if config.kd == "none" and target not in (None, 0, width):
        raise UserError(
            f"--head-kd none needs a teacher as wide as the shared encoder; they have {target} and {width} channels"
        )
    prediction = None
    if target is not None:
        prediction = nn.Identity() if config.kd == "none" else _norm_and_linear(width, target or width)
    logits = None if targets.logits is None else _norm_and_linear(width, targets.logits)
    return Heads(tuple(contrast() for _ in range(modalities)), prediction, logits)


def _norm_and_linear(width: int, width_out: int) -> nn.Module:
    return _initialized(nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, width_out)))


def _initialized(module: nn.Module) -> nn.Module:
    return module.apply(initialize_weights)
