"""Checkpoints of Data2Vec 2: released ones and those of pretraining here, into the encoders of `data2vec2`."""

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from emkum.errors import UserError
from emkum.models.data2vec2 import Data2Vec2ImageEncoder, Data2Vec2TextEncoder
from emkum.weights import load_strictly, read_checkpoint

# Heads of the released models by width, for files that hold weights alone.
RELEASED_HEADS = {768: 12, 1024: 16, 1280: 16}
POSITIONS = "modality_encoders.IMAGE.fixed_positional_encoder.positions"


def load_data2vec2_weights(encoder: Data2Vec2ImageEncoder | Data2Vec2TextEncoder, path: str | Path) -> None:
    """Load a checkpoint of Data2Vec 2 into an encoder that may have fewer blocks.

    What pretraining alone needs (decoder, EMA copy, projections, other modalities) and blocks after the encoder's last
    are left out; the fixed sine-cosine positions of another input size too, for the encoder has computed its own.

    Args:
        encoder: receives the weights.
        path: a checkpoint of fairseq (`{"model": ..., "cfg": ...}`), or a `.safetensors` file of the same names.

    Raises:
        UserError: the file cannot be read, is of another model, or has missing, unexpected or misshapen parameters.
    """
    state, _ = _read(path, encoder.modality)
    _load_state(encoder, state, path)


def encoder_arguments_from_checkpoint(path: str | Path, modality: str) -> dict[str, Any]:
    """Arguments of Data2Vec2ImageEncoder ("IMAGE") or Data2Vec2TextEncoder ("TEXT") that fit a checkpoint.

    Shapes tell all but heads and the norms' epsilon, which the stored configuration tells; where there is none, those
    of the released model of this width are taken.

    Raises:
        UserError: the file cannot be read, is of another model, or of a kind that the encoders cannot be.
    """
    state, options = _read(path, modality)
    return _arguments(state, options, modality, path)


def image_encoder_from_checkpoint(
    path: str | Path, input_size: int | None = None, num_layers: int | None = None, allowed: str = ""
) -> Data2Vec2ImageEncoder:
    """Build the image encoder that a checkpoint holds, and load it.

    Args:
        path: see `load_data2vec2_weights`.
        input_size: side of the input in pixels; None = as in pretraining.
        num_layers: keep only the first so many blocks; None = all.
        allowed: see `emkum.weights.load_strictly`.

    Raises:
        UserError: see `load_data2vec2_weights`; or there are fewer blocks than `num_layers`.
    """
    state, options = _read(path, "IMAGE")
    arguments = _arguments(state, options, "IMAGE", path)
    if input_size is not None:
        arguments["input_size"] = input_size
    _check_layers(arguments, num_layers, path)
    encoder = Data2Vec2ImageEncoder(**arguments, num_layers=num_layers)
    _load_state(encoder, state, path, allowed)
    return encoder


def text_encoder_from_checkpoint(
    path: str | Path, num_layers: int | None = None, allowed: str = ""
) -> Data2Vec2TextEncoder:
    """Build the text encoder that a checkpoint holds, and load it. Arguments and errors as for images."""
    state, options = _read(path, "TEXT")
    arguments = _arguments(state, options, "TEXT", path)
    _check_layers(arguments, num_layers, path)
    encoder = Data2Vec2TextEncoder(**arguments, num_layers=num_layers)
    _load_state(encoder, state, path, allowed)
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
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, options if isinstance(options, Mapping) else {}


def _arguments(
    state: Mapping[str, Tensor], options: Mapping[str, Any], modality: str, path: str | Path
) -> dict[str, Any]:
    _check_options(options, modality, path)
    prefix = f"modality_encoders.{modality}."
    names = {
        "IMAGE": ["extra_tokens", "local_encoder.proj.weight", "fixed_positional_encoder.positions"],
        "TEXT": ["local_encoder.embed_tokens.weight", "local_encoder.embed_positions.weight"],
    }[modality]
    missing = [prefix + name for name in names if prefix + name not in state]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    prenet_depth = _count_blocks(state, f"{prefix}context_encoder.blocks.")
    depth = _count_blocks(state, "blocks.")
    if prenet_depth + depth == 0:
        raise UserError(f"{path} lacks blocks.*")
    first = "blocks.0." if prenet_depth == 0 else f"{prefix}context_encoder.blocks.0."
    hidden, width = state[first + "mlp.fc1.weight"].shape
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
    patch_size = state[prefix + names[1]].shape[-1]
    patches_a_side = round(state[prefix + names[2]].shape[1] ** 0.5)
    return {**arguments, "patch_size": patch_size, "input_size": patches_a_side * patch_size}


def _check_options(options: Mapping[str, Any], modality: str, path: str | Path) -> None:
    modalities = options.get("modalities")
    own = modalities.get(modality.lower()) if isinstance(modalities, Mapping) else None
    if options.get("layer_norm_first"):
        raise UserError(f"{path}: Data2Vec 2 encoders with layer_norm_first are not supported")
    if isinstance(own, Mapping) and own.get("use_alibi_encoder"):
        raise UserError(f"{path}: Data2Vec 2 encoders with position biases (use_alibi_encoder) are not supported")


def _heads(options: Mapping[str, Any], width: int, path: str | Path) -> int:
    for name in ("num_heads", "d2v_num_heads"):
        if name in options:
            return int(options[name])
    if width not in RELEASED_HEADS:
        raise UserError(
            f"{path} does not say its number of attention heads, and no released model is {width} wide "
            f"({', '.join(map(str, RELEASED_HEADS))}); give the original checkpoint, which holds its options"
        )
    return RELEASED_HEADS[width]


def _count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max((_block_index(name, prefix) for name in state), default=-1)


def _block_index(name: str, prefix: str) -> int:
    """N of `PREFIX N.rest`, -1 for other names."""
    match = re.match(re.escape(prefix) + r"(\d+)\.", name)
    return -1 if match is None else int(match[1])


def _check_layers(arguments: Mapping[str, Any], num_layers: int | None, path: str | Path) -> None:
    total = arguments["prenet_depth"] + arguments["depth"]
    if num_layers is not None and not 1 <= num_layers <= total:
        raise UserError(f"{path} has {total} blocks; {num_layers} cannot be kept")


def _load_state(
    encoder: Data2Vec2ImageEncoder | Data2Vec2TextEncoder,
    state: Mapping[str, Tensor],
    path: str | Path,
    allowed: str = "",
) -> None:
    own = encoder.state_dict()
    used = {name: value for name, value in state.items() if not _is_left_out(name, encoder)}
    if POSITIONS in own and POSITIONS in used and used[POSITIONS].shape != own[POSITIONS].shape:
        used[POSITIONS] = own[POSITIONS]
    load_strictly(encoder, used, path, allowed, f"the {encoder.modality} encoder")


def _is_left_out(name: str, encoder: Data2Vec2ImageEncoder | Data2Vec2TextEncoder) -> bool:
    """Whether pretraining alone needs a parameter, or it lies after the encoder's last block."""
    prefix = f"modality_encoders.{encoder.modality}."
    other_modality = name.startswith("modality_encoders.") and not name.startswith(prefix)
    if other_modality or name.startswith(("_ema", "shared_decoder.", "recon_proj.", f"{prefix}decoder.")):
        return True
    if _block_index(name, "blocks.") >= len(encoder.blocks):
        return True
    # Prenet blocks may only be cut off where no main block follows.
    prenet_depth = encoder.num_layers - len(encoder.blocks)
    context_prefix = f"{prefix}context_encoder.blocks."
    return len(encoder.blocks) == 0 and _block_index(name, context_prefix) >= prenet_depth
