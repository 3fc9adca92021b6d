"""Checkpoints of BEiT-3: into the whole model, or into an encoder of one modality."""

import logging
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from emkum.errors import UserError
from emkum.models.beit3 import FIRST_POSITION, BEiT3, interpolated_positions
from emkum.models.beit3_encoders import BEiT3Encoder, BEiT3ImageEncoder, BEiT3TextEncoder
from emkum.models.encoder import LayerChoice, renumbered_layers
from emkum.weights import load_strictly, official_state, read_checkpoint

# Released text embeddings have more rows than the tokenizer has ids.
RELEASED_ROWS, RELEASED_IDS = 64_010, 64_002

logger = logging.getLogger(__name__)

# ----------------------------------------------------------------------------------------------------------------------
# The whole model
# ----------------------------------------------------------------------------------------------------------------------

# What the released files have beside the encoder, by the first part of the name: pretraining, retrieval, captions,
# question answering and classification.
_HEADS = ("mlm_head", "mim_head", "language_head", "vision_head", "logit_scale", "pooler", "head", "fc_norm")
IMAGE_POSITIONS, TEXT_POSITIONS = "encoder.embed_positions.A.weight", "encoder.embed_positions.B.weight"
WORDS, _PATCHES, _HIDDEN = "text_embed.weight", "vision_embed.proj.weight", "encoder.layers.0.ffn.A.fc1.weight"
# Parameters that tell the sizes, and their number of dimensions.
_TELLING = {WORDS: 2, _PATCHES: 4, _HIDDEN: 2, IMAGE_POSITIONS: 2, TEXT_POSITIONS: 2}
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
    state = read_beit3(path)
    arguments = sizes_of_beit3(state, path)
    side = arguments["image_size"] if image_size is None else image_size
    if side < 1 or side % arguments["patch_size"]:
        raise UserError(f"image size {side} is no multiple of the patch size {arguments['patch_size']} of {path}")
    if side != arguments["image_size"]:
        state[IMAGE_POSITIONS] = interpolated_positions(state[IMAGE_POSITIONS], side // arguments["patch_size"])
        arguments["image_size"] = side
    state[WORDS] = first_words(state[WORDS], vocab_size, path)
    arguments["vocab_size"] = len(state[WORDS])
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


def beit3_vocabulary(path: str | Path) -> Path:
    """Where the vocabulary of a checkpoint is looked for: `beit3.spm` beside it."""
    return Path(path).with_name("beit3.spm")


def read_beit3(path: str | Path) -> dict[str, Tensor]:
    """Parameters of the encoder in a file, without heads for particular tasks; errors as of `read_checkpoint`."""
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


def sizes_of_beit3(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    """Arguments of BEiT3 for the whole model in a file, but for the vocabulary.

    Raises:
        UserError: these are parameters of another model.
    """
    wanting = [name for name, dims in _TELLING.items() if name not in state or state[name].ndim != dims]
    if wanting:
        raise UserError(f"{path} is no checkpoint of BEiT-3: it lacks {', '.join(wanting)} or has other shapes of it")
    hidden, width = state[_HIDDEN].shape
    if width % _HEAD_WIDTH:
        raise UserError(f"{path}: a width of {width} is no multiple of {_HEAD_WIDTH}, the width of BEiT-3's heads")
    patch_size = state[_PATCHES].shape[-1]
    patches = len(state[IMAGE_POSITIONS]) - FIRST_POSITION - 1
    if patches < 1 or isqrt(patches) ** 2 != patches:
        raise UserError(f"{path}: {IMAGE_POSITIONS} has {patches} rows for patches, which make no square")
    max_positions = len(state[TEXT_POSITIONS]) - FIRST_POSITION
    if max_positions < 1:
        raise UserError(f"{path}: {TEXT_POSITIONS} has {max_positions + FIRST_POSITION} rows, too few for any text")
    return {
        "width": width,
        "layers": len({name.split(".")[2] for name in state if name.startswith("encoder.layers.")}),
        "heads": width // _HEAD_WIDTH,
        "ffn_width": hidden,
        "image_size": isqrt(patches) * patch_size,
        "patch_size": patch_size,
        "max_positions": max_positions,
    }


def first_words(table: Tensor, vocab_size: int | None, path: str | Path) -> Tensor:
    """The first rows of a text embedding; None = all, but of the released 64,010 the 64,002 with a piece.

    Raises:
        UserError: it has fewer.
    """
    rows = len(table)
    if vocab_size is None:
        vocab_size = RELEASED_IDS if rows == RELEASED_ROWS else rows
    if not 1 <= vocab_size <= rows:
        raise UserError(f"{path} has a text embedding of {rows} rows; the vocabulary needs {vocab_size}")
    if vocab_size < rows:
        logger.info("%s: text embedding of %d rows trimmed to the %d of the vocabulary", path, rows, vocab_size)
    return table[:vocab_size]


# ----------------------------------------------------------------------------------------------------------------------
# One modality
# ----------------------------------------------------------------------------------------------------------------------

_LAYERS = "encoder.layers."
# What there is of a modality in a file: not the other one's part of each layer nor its embedding, and neither the norm
# behind the last layer nor the token of pretraining.
_LEFT_OUT = {
    BEiT3ImageEncoder: (".B.", "text_embed.", "encoder.layer_norm.", "vision_embed.mask_token"),
    BEiT3TextEncoder: (".A.", "vision_embed.", "encoder.layer_norm."),
}


def load_beit3_weights(encoder: BEiT3Encoder, path: str | Path, choice: LayerChoice | None = None) -> None:
    """Load one modality of a checkpoint into an encoder that may have fewer layers.

    Positions of patches are interpolated to the encoder's input; rows of words and of positions of text beyond the
    encoder's are left out.

    Args:
        encoder: receives the weights.
        path: see `beit3_from_checkpoint`; files without final norm are as good.
        choice: the layers to take, as many as the encoder has; None = the first ones.

    Raises:
        UserError: the file cannot be read, is of another model or of other sizes, has fewer layers, words or positions,
            or has missing, unexpected or misshapen parameters.
    """
    state = read_beit3(path)
    sizes = sizes_of_beit3(state, path)
    _assert_same_sizes(encoder, sizes, path)
    kept = (choice or LayerChoice(encoder.num_layers)).indices(sizes["layers"], path)
    if len(kept) != encoder.num_layers:
        raise UserError(f"{len(kept)} layers of {path} are chosen for an encoder of {encoder.num_layers}")
    left_out = _LEFT_OUT[type(encoder)]
    state = {name: value for name, value in state.items() if not any(part in name for part in left_out)}
    state = renumbered_layers(state, _LAYERS, kept, sizes["layers"])
    if isinstance(encoder, BEiT3TextEncoder):
        state[WORDS] = first_words(state[WORDS], encoder.vocab_size, path)
    _fit_positions(encoder, state)
    load_strictly(encoder, state, path, what="BEiT-3's layers")


def _assert_same_sizes(encoder: BEiT3Encoder, sizes: Mapping[str, Any], path: str | Path) -> None:
    """What would be a page of shapes, or fit by its shapes and compute something else, on one line."""
    pairs = {
        "width": (sizes["width"], encoder.width),
        "number of attention heads": (sizes["heads"], encoder.num_heads),
        "feed-forward width": (sizes["ffn_width"], encoder.ffn_width),
    }
    if isinstance(encoder, BEiT3ImageEncoder):
        pairs["patch size"] = sizes["patch_size"], encoder.patch_size
    for what, (theirs, own) in pairs.items():
        if theirs != own:
            raise UserError(f"{path} does not fit the {encoder.modality} encoder: its {what} is {theirs}, not {own}")
    if (
        isinstance(encoder, BEiT3TextEncoder)
        and encoder.has_positions
        and encoder.max_positions > sizes["max_positions"]
    ):
        raise UserError(
            f"{path} has positions for {sizes['max_positions']} tokens of text, not for {encoder.max_positions} "
            "(--text-max-positions)"
        )


def _fit_positions(encoder: BEiT3Encoder, state: dict[str, Tensor]) -> None:
    """Make a file's rows of positions those of the encoder, in place."""
    if isinstance(encoder, BEiT3TextEncoder):
        state[TEXT_POSITIONS] = state[TEXT_POSITIONS][: FIRST_POSITION + encoder.max_positions]
    else:
        side = encoder.image_size // encoder.patch_size
        if len(state[IMAGE_POSITIONS]) != FIRST_POSITION + 1 + side * side:
            state[IMAGE_POSITIONS] = interpolated_positions(state[IMAGE_POSITIONS], side)
    if not encoder.has_positions:
        state.pop(IMAGE_POSITIONS, None)
        state.pop(TEXT_POSITIONS, None)
