"""Checkpoints of Data2Vec 2: released ones and those of pretraining here, into the encoders of `data2vec2`."""

import logging
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from emkum.errors import UserError
from emkum.models.data2vec2 import Data2Vec2Encoder, Data2Vec2ImageEncoder, Data2Vec2TextEncoder
from emkum.models.data2vec2_audio import KERNELS, Data2Vec2AudioEncoder
from emkum.models.encoder import LayerChoice
from emkum.weights import load_strictly, read_checkpoint

# Heads of the released models by width, for files that hold weights alone.
RELEASED_HEADS = {768: 12, 1024: 16, 1280: 16}
# Below `modality_encoders.IMAGE.` and so on; of audio, what its positions begin with.
POSITIONS = {
    "IMAGE": "fixed_positional_encoder.positions",
    "TEXT": "local_encoder.embed_positions.weight",
    "AUDIO": ("relative_positional_encoder.", "alibi_scale"),
}
_CONVOLUTION = "local_encoder.conv_layers.{}.0.weight"
_FRAME_POSITION = "relative_positional_encoder.{}.0.weight"
WORDS = "modality_encoders.TEXT.local_encoder.embed_tokens.weight"
# Parameters of a block, prenet or main, up to the name within the block.
_BLOCK = re.compile(r"(?:modality_encoders\.\w+\.context_encoder\.)?blocks\.\d+\.")

logger = logging.getLogger(__name__)


def load_data2vec2_weights(encoder: Data2Vec2Encoder, path: str | Path, choice: LayerChoice | None = None) -> None:
    """Load a checkpoint of Data2Vec 2 into an encoder that may have fewer blocks.

    Layers are counted over prenet and main blocks together, and may lie in either on either side. What pretraining
    alone needs (decoder, EMA copy, projections, other modalities) is left out; so are positions where the encoder has
    none, the fixed sine-cosine positions of another input size, for the encoder has computed its own, and rows of the
    word embedding beyond the encoder's vocabulary. An audio encoder's CLS token, which released models lack, keeps its
    own value.

    Args:
        encoder: receives the weights.
        path: a checkpoint of fairseq (`{"model": ..., "cfg": ...}`), or a `.safetensors` file of the same names.
        choice: the layers to take, as many as the encoder has; None = the first ones.

    Raises:
        UserError: the file cannot be read, is of another model or of another width or number of heads, has fewer layers
            or words, or has missing, unexpected or misshapen parameters.
        ValueError: the encoder has not as many blocks as are chosen.
    """
    state, options = _read(path, encoder.modality)
    _check_sizes(encoder, state, options, path)
    _load_state(encoder, state, path, choice or LayerChoice(encoder.num_layers))


def encoder_arguments_from_checkpoint(path: str | Path, modality: str) -> dict[str, Any]:
    """Arguments of Data2Vec2ImageEncoder ("IMAGE"), Data2Vec2TextEncoder ("TEXT") or Data2Vec2AudioEncoder ("AUDIO")
    that fit a checkpoint.

    Shapes tell all but heads and the norms' epsilon, which the stored configuration tells; where there is none, those
    of the released model of this width are taken.

    Raises:
        UserError: the file cannot be read, is of another model, or of a kind that the encoders cannot be.
    """
    state, options = _read(path, modality)
    return _arguments(state, options, modality, path)


def image_encoder_from_checkpoint(
    path: str | Path, input_size: int | None = None, choice: LayerChoice | None = None, allowed: str = ""
) -> Data2Vec2ImageEncoder:
    """Build the image encoder that a checkpoint holds, and load it.

    Args:
        path: see `load_data2vec2_weights`.
        input_size: side of the input in pixels; None = as in pretraining.
        choice: the layers to keep; None = all.
        allowed: see `emkum.weights.load_strictly`.

    Raises:
        UserError: see `load_data2vec2_weights`.
    """
    state, options = _read(path, "IMAGE")
    arguments = _arguments(state, options, "IMAGE", path)
    if input_size is not None:
        arguments["input_size"] = input_size
    choice = choice or LayerChoice()
    encoder = Data2Vec2ImageEncoder(**_of_chosen_layers(arguments, choice, path))
    _load_state(encoder, state, path, choice, allowed)
    return encoder


def text_encoder_from_checkpoint(
    path: str | Path, choice: LayerChoice | None = None, allowed: str = ""
) -> Data2Vec2TextEncoder:
    """Build the text encoder that a checkpoint holds, and load it. Arguments and errors as for images."""
    state, options = _read(path, "TEXT")
    arguments = _arguments(state, options, "TEXT", path)
    choice = choice or LayerChoice()
    encoder = Data2Vec2TextEncoder(**_of_chosen_layers(arguments, choice, path))
    _load_state(encoder, state, path, choice, allowed)
    return encoder


def audio_encoder_from_checkpoint(
    path: str | Path, choice: LayerChoice | None = None, allowed: str = ""
) -> Data2Vec2AudioEncoder:
    """Build the audio encoder that a checkpoint holds, and load it. Arguments and errors as for images."""
    state, options = _read(path, "AUDIO")
    arguments = _arguments(state, options, "AUDIO", path)
    choice = choice or LayerChoice()
    encoder = Data2Vec2AudioEncoder(**_of_chosen_layers(arguments, choice, path))
    _load_state(encoder, state, path, choice, allowed)
    return encoder


def encoder_from_checkpoint(
    path: str | Path, input_size: int | None = None, allowed: str = ""
) -> Data2Vec2ImageEncoder | Data2Vec2TextEncoder:
    """Build the encoder that a checkpoint holds, of images where it holds both; see `image_encoder_from_checkpoint`."""
    if "IMAGE" in _modalities(_parameters(read_checkpoint(path))):
        return image_encoder_from_checkpoint(path, input_size, allowed=allowed)
    return text_encoder_from_checkpoint(path, allowed=allowed)


def _parameters(checkpoint: Any) -> Mapping[str, Any]:
    content = checkpoint if isinstance(checkpoint, Mapping) else {}
    state = content.get("model", content)
    return state if isinstance(state, Mapping) else {}


def _modalities(state: Mapping[str, Any]) -> list[str]:
    return sorted({name.split(".")[1] for name in state if str(name).startswith("modality_encoders.")})


def _read(path: str | Path, modality: str) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Parameters, and the model's options where the file has them."""
    checkpoint = read_checkpoint(path)
    content = checkpoint if isinstance(checkpoint, Mapping) else {}
    state = _parameters(checkpoint)
    found = _modalities(state)
    if not found:
        raise UserError(f"{path} is not a Data2Vec 2 checkpoint: it has no parameters modality_encoders.*")
    if modality not in found:
        raise UserError(f"{path} has no {modality} encoder; it is a Data2Vec 2 checkpoint of {', '.join(found)}")
    options = content.get("cfg")
    options = options.get("model") if isinstance(options, Mapping) else None
    if isinstance(options, Namespace):
        options = vars(options)
    options = options if isinstance(options, Mapping) else {}
    _check_options(options, modality, path)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}, options


def _arguments(
    state: Mapping[str, Tensor], options: Mapping[str, Any], modality: str, path: str | Path
) -> dict[str, Any]:
    prefix = f"modality_encoders.{modality}."
    names = {
        "IMAGE": ["extra_tokens", "local_encoder.proj.weight", POSITIONS["IMAGE"]],
        "TEXT": ["local_encoder.embed_tokens.weight", POSITIONS["TEXT"]],
        "AUDIO": [_CONVOLUTION.format(0), _FRAME_POSITION.format(1)],
    }[modality]
    missing = [prefix + name for name in names if prefix + name not in state]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    prenet_depth, depth = _depths(state, modality)
    if prenet_depth + depth == 0:
        raise UserError(f"{path} lacks blocks.*")
    first = _block_prefixes(modality, prenet_depth, depth)[0] + "mlp.fc1.weight"
    if first not in state:
        raise UserError(f"{path} lacks {first}")
    hidden, width = state[first].shape
    arguments = {
        "embed_dim": width,
        "depth": depth,
        "prenet_depth": prenet_depth,
        "num_heads": _heads(options, width, path),
        "mlp_ratio": hidden / width,
    }
    # Our own pretraining keeps fairseq's epsilon, and has no option for it.
    if "norm_eps" in options:
        arguments["norm_eps"] = float(options["norm_eps"])
    if modality == "TEXT":
        rows, pad_index = len(state[prefix + names[1]]), 1
        return {**arguments, "vocab_size": len(state[prefix + names[0]]), "max_positions": rows - pad_index - 1}
    if modality == "AUDIO":
        return arguments | _audio_arguments(state, prefix, path)
    patch_size = state[prefix + names[1]].shape[-1]
    patches_a_side = round(state[prefix + names[2]].shape[1] ** 0.5)
    return {**arguments, "patch_size": patch_size, "input_size": patches_a_side * patch_size}


def _audio_arguments(state: Mapping[str, Tensor], prefix: str, path: str | Path) -> dict[str, Any]:
    """What an audio encoder has beside blocks."""
    kernels = [state.get(prefix + _CONVOLUTION.format(layer)) for layer in range(len(KERNELS) + 1)]
    if [None if kernel is None else kernel.shape[-1] for kernel in kernels] != [*(k for k, _ in KERNELS), None]:
        raise UserError(
            f"{path}: Data2Vec 2 audio encoders with other convolutions than the released are not supported"
        )
    position = state[prefix + _FRAME_POSITION.format(1)]
    layers = 1
    while prefix + _FRAME_POSITION.format(layers + 1) in state:
        layers += 1
    return {
        "conv_width": len(kernels[0]),
        "position_width": position.shape[-1] * layers,
        "position_groups": len(position) // position.shape[1],
        "position_layers": layers,
        "position_biases": prefix + "alibi_scale" in state,
        "cls_token": prefix + "extra_tokens" in state,
    }


# Of an audio encoder, what no released model has.
_NOT_OF_AUDIO = ("learned_alibi", "learned_alibi_scale_per_layer", "conv_pos_pre_ln")


def _check_options(options: Mapping[str, Any], modality: str, path: str | Path) -> None:
    modalities = options.get("modalities")
    own = modalities.get(modality.lower()) if isinstance(modalities, Mapping) else None
    if options.get("layer_norm_first"):
        raise UserError(f"{path}: Data2Vec 2 encoders with layer_norm_first are not supported")
    own = own if isinstance(own, Mapping) else {}
    if modality == "AUDIO":
        for name in _NOT_OF_AUDIO:
            if own.get(name):
                raise UserError(f"{path}: Data2Vec 2 audio encoders with {name} are not supported")
    elif own.get("use_alibi_encoder"):
        raise UserError(f"{path}: Data2Vec 2 encoders with position biases (use_alibi_encoder) are not supported")


def _heads(options: Mapping[str, Any], width: int, path: str | Path) -> int:
    heads = _stored_heads(options) or RELEASED_HEADS.get(width)
    if heads is None:
        raise UserError(
            f"{path} does not say its number of attention heads, and no released model is {width} wide "
            f"({', '.join(map(str, RELEASED_HEADS))}); give the original checkpoint, which holds its options"
        )
    return heads


def _stored_heads(options: Mapping[str, Any]) -> int | None:
    stored = [int(options[name]) for name in ("num_heads", "d2v_num_heads") if name in options]
    return stored[0] if stored else None


def _check_sizes(
    encoder: Data2Vec2Encoder, state: Mapping[str, Tensor], options: Mapping[str, Any], path: str | Path
) -> None:
    """What would be a page of shapes, or fit by its shapes and compute something else, on one line."""
    names = (WORDS, "modality_encoders.IMAGE.extra_tokens", "modality_encoders.AUDIO.context_encoder.norm.weight")
    found = [state[name].shape[-1] for name in names if name.split(".")[1] == encoder.modality and name in state]
    width = found[0] if found else encoder.width
    if width != encoder.width:
        raise UserError(f"{path} is {width} wide, but the {encoder.modality} encoder {encoder.width}")
    heads = _stored_heads(options) or encoder.num_heads
    if heads != encoder.num_heads:
        raise UserError(f"{path} has {heads} attention heads, but the {encoder.modality} encoder {encoder.num_heads}")


def _of_chosen_layers(arguments: Mapping[str, Any], choice: LayerChoice, path: str | Path) -> dict[str, Any]:
    """Arguments of an encoder that has the chosen layers alone, those of the prenet in its prenet."""
    indices = choice.indices(arguments["prenet_depth"] + arguments["depth"], path)
    prenet_depth = sum(index < arguments["prenet_depth"] for index in indices)
    return {**arguments, "prenet_depth": prenet_depth, "depth": len(indices) - prenet_depth}


def _depths(state: Mapping[str, Tensor], modality: str) -> tuple[int, int]:
    """Prenet and main blocks of a checkpoint."""
    prefixes = {match[0] for match in map(_BLOCK.match, state) if match is not None}
    context = f"modality_encoders.{modality}.context_encoder."
    numbers = [
        [int(prefix.split(".")[-2]) for prefix in prefixes if prefix.startswith(start)]
        for start in (f"{context}blocks.", "blocks.")
    ]
    return 1 + max(numbers[0], default=-1), 1 + max(numbers[1], default=-1)


def _block_prefixes(modality: str, prenet_depth: int, depth: int) -> list[str]:
    """What precedes the parameters' names of each block, prenet blocks first."""
    context = f"modality_encoders.{modality}.context_encoder."
    return [f"{context}blocks.{i}." for i in range(prenet_depth)] + [f"blocks.{i}." for i in range(depth)]


def _load_state(
    encoder: Data2Vec2Encoder, state: Mapping[str, Tensor], path: str | Path, choice: LayerChoice, allowed: str = ""
) -> None:
    own = encoder.state_dict()
    used = _with_chosen_blocks(encoder, _of_encoder(state, encoder.modality), path, choice)
    if encoder.modality == "AUDIO":
        used = _fitted_to_audio(used, own)
        load_strictly(encoder, used, path, allowed, f"the {encoder.modality} encoder")
        return
    positions = f"modality_encoders.{encoder.modality}.{POSITIONS[encoder.modality]}"
    if positions not in own:
        used.pop(positions, None)
    elif encoder.modality == "IMAGE" and positions in used and used[positions].shape != own[positions].shape:
        used[positions] = own[positions]
    if encoder.modality == "TEXT" and WORDS in used:
        used[WORDS] = _words(used[WORDS], encoder.vocab_size, path)
    load_strictly(encoder, used, path, allowed, f"the {encoder.modality} encoder")


def _fitted_to_audio(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without positions that the encoder has not, with its own CLS token where there is none, and with a factor of
    distance for each head, as fairseq itself broadcasts it."""
    prefix = "modality_encoders.AUDIO."
    starts = tuple(prefix + name for name in POSITIONS["AUDIO"])
    fitted = {name: value for name, value in state.items() if name in own or not name.startswith(starts)}
    token, factors = prefix + "extra_tokens", prefix + "alibi_scale"
    if token in own:
        fitted.setdefault(token, own[token])
    if factors in own and factors in fitted and fitted[factors].shape[-3] in (1, own[factors].shape[2]):
        fitted[factors] = fitted[factors].expand_as(own[factors])
    return fitted


def _of_encoder(state: Mapping[str, Tensor], modality: str) -> dict[str, Tensor]:
    """A checkpoint without other modalities and what pretraining alone needs."""
    own = f"modality_encoders.{modality}."
    pretraining_alone = ("_ema", "shared_decoder.", "recon_proj.", f"{own}decoder.")
    return {
        name: value
        for name, value in state.items()
        if not name.startswith(pretraining_alone)
        and (name.startswith(own) or not name.startswith("modality_encoders."))
    }


def _with_chosen_blocks(
    encoder: Data2Vec2Encoder, state: Mapping[str, Tensor], path: str | Path, choice: LayerChoice
) -> dict[str, Tensor]:
    """The chosen blocks under the names of the encoder's own, and what belongs to no block."""
    depths = _depths(state, encoder.modality)
    indices = choice.indices(sum(depths), path)
    if len(indices) != encoder.num_layers:
        raise ValueError(f"{len(indices)} layers are chosen for an encoder that has {encoder.num_layers}")
    theirs = _block_prefixes(encoder.modality, *depths)
    ours = _block_prefixes(encoder.modality, encoder.prenet_depth, len(encoder.blocks))
    renamed = {theirs[index]: prefix for index, prefix in zip(indices, ours, strict=True)}
    chosen = {}
    for name, value in state.items():
        match = _BLOCK.match(name)
        if match is None:
            chosen[name] = value
        elif match[0] in renamed:
            chosen[renamed[match[0]] + name[match.end() :]] = value
    return chosen


def _words(embedding: Tensor, vocab_size: int, path: str | Path) -> Tensor:
    """The first `vocab_size` rows (V, D) of a word embedding that may have more."""
    rows = len(embedding)
    if rows < vocab_size:
        raise UserError(
            f"{path} has embeddings of {rows:,} words, but the vocabulary has {vocab_size:,}; "
            "give the vocabulary that it was trained with"
        )
    if rows > vocab_size:
        logger.info("%s has embeddings of %d words; the first %d, the vocabulary's, are kept", path, rows, vocab_size)
    return embedding[:vocab_size]
