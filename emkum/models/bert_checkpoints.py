"""Where the weights of a BERT come from (a folder, a file, or the hub), and how an encoder gets them."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from emkum.errors import UserError
from emkum.models.bert import BertEncoder
from emkum.models.encoder import LayerChoice, renumbered_layers
from emkum.weights import first_line, load_strictly, official_state, read_checkpoint

logger = logging.getLogger(__name__)

# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------

CONFIG, VOCABULARY = "config.json", "vocab.txt"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")

_WHAT_TO_DO = f"put {WEIGHTS[0]} or {WEIGHTS[1]}, with {CONFIG} and {VOCABULARY}, into a folder and give its path"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class BertFiles:
    """Files of one BERT; config and vocabulary are None where there are none."""

    weights: Path
    config: Path | None = None
    vocabulary: Path | None = None


def find_bert(source: str | Path) -> BertFiles:
    """The files of a folder, those beside a file of weights, or those of a name on the hub; in this order.

    Raises:
        UserError: none of the three; the message says which files to put where.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in WEIGHTS if (path / name).is_file()]
        if not found:
            raise UserError(f"folder {path} holds neither {WEIGHTS[0]} nor {WEIGHTS[1]}")
        path = found[0]
    if path.is_file():
        beside = (path.with_name(name) for name in (CONFIG, VOCABULARY))
        return BertFiles(path, *(file if file.is_file() else None for file in beside))
    if path.suffix in _WEIGHT_SUFFIXES or not _HUB_NAME.fullmatch(str(source)):
        raise UserError(f"no such file or folder: {source}; {_WHAT_TO_DO}")
    return _download(str(source))


def _download(name: str) -> BertFiles:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        config, vocabulary = (Path(hf_hub_download(name, file)) for file in (CONFIG, VOCABULARY))
        try:
            weights = hf_hub_download(name, WEIGHTS[0])
        except EntryNotFoundError:
            weights = hf_hub_download(name, WEIGHTS[1])
        return BertFiles(Path(weights), config, vocabulary)
    except ImportError:
        reason = "the package huggingface_hub is not installed"
    except Exception as error:  # the hub raises a dozen types
        reason = first_line(error)[:120]
    raise UserError(f"{name} is no file or folder here and could not be downloaded ({reason}); {_WHAT_TO_DO}")


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------

# What files have beside the encoder, by the first part of the name.
_HEADS = ("pooler", "cls", "classifier", "qa_outputs")
# Names that the first releases gave to parameters of LayerNorm.
_OLD_NAMES = {"gamma": "weight", "beta": "bias"}
_HIDDEN = "encoder.layer.0.intermediate.dense.weight"
_WORDS, _POSITIONS = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
_LAYERS = "encoder.layer."
# What an encoder of another kind would say of itself.
_SUPPORTED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
# Names of sizes in config.json, and of the arguments of BertEncoder.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "intermediate_size": "ffn_width",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "token_types",
}
# Width of a head in all released models.
_HEAD_WIDTH = 64
_NORM_EPS = 1e-12


@dataclass(frozen=True)
class _Released:
    """A checkpoint: its encoder's parameters by BertEncoder's names, and that one's arguments as far as they tell."""

    files: BertFiles
    config: Mapping[str, Any]
    state: Mapping[str, Tensor]
    arguments: Mapping[str, Any]


def bert_from_checkpoint(
    source: str | Path | BertFiles,
    choice: LayerChoice | None = None,
    allowed: str = "",
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
) -> BertEncoder:
    """Build the encoder that a checkpoint holds, and load it.

    Args:
        source: see `find_bert`, or what that gave. Sizes are told by the weights; config.json must agree with them, and
            tells the number of heads, which is a 64th of the width where there is no config.json.
        choice: which layers to keep; None = all.
        allowed: see `emkum.weights.load_strictly`.
        dropout, attention_dropout: see BertEncoder.

    Raises:
        UserError: a file cannot be had or read, is of another model, or has missing, unexpected or misshapen
            parameters; or there are fewer layers than are chosen.
    """
    released = _read(source)
    total = released.arguments["layers"]
    kept = (choice or LayerChoice()).indices(total, released.files.weights)
    encoder = BertEncoder(
        **{**released.arguments, "layers": len(kept)},
        heads=_heads(released),
        norm_eps=released.config.get("layer_norm_eps", _NORM_EPS),
        dropout=dropout,
        attention_dropout=attention_dropout,
    )
    state = renumbered_layers(released.state, _LAYERS, kept, total)
    load_strictly(encoder, state, released.files.weights, allowed, "BERT")
    return encoder


def load_bert_weights(
    encoder: BertEncoder, source: str | Path | BertFiles, choice: LayerChoice | None = None, allowed: str = ""
) -> None:
    """Load a checkpoint into an encoder that was built without it.

    Rows of words and positions that the checkpoint has beyond the encoder's are left out.

    Args:
        encoder: receives the parameters.
        source: see `find_bert`, or what that gave.
        choice: the layers of the checkpoint that become the encoder's; None = the first ones.
        allowed: see `emkum.weights.load_strictly`.

    Raises:
        UserError: as of `bert_from_checkpoint`; or the encoder has other sizes, another epsilon or another number of
            layers, or more words or positions than the checkpoint.
    """
    released = _read(source)
    weights, total = released.files.weights, released.arguments["layers"]
    _assert_same_sizes(encoder, released)
    kept = (choice or LayerChoice(encoder.num_layers)).indices(total, weights)
    if len(kept) != encoder.num_layers:
        raise UserError(f"{len(kept)} layers of {weights} are chosen for a text encoder of {encoder.num_layers}")
    state = renumbered_layers(released.state, _LAYERS, kept, total)
    state[_WORDS] = _first_rows(state[_WORDS], encoder.vocab_size, "vocabulary", weights)
    if encoder.embeddings.position_embeddings is None:
        del state[_POSITIONS]
    else:
        state[_POSITIONS] = _first_rows(state[_POSITIONS], encoder.max_positions, "table of positions", weights)
    load_strictly(encoder, state, weights, allowed, "BERT")


def _read(source: str | Path | BertFiles) -> _Released:
    files = source if isinstance(source, BertFiles) else find_bert(source)
    config = {} if files.config is None else _read_config(files.config)
    state = _encoder_parameters(files.weights)
    arguments = _arguments(state, files.weights)
    _assert_agreement(arguments, config, files)
    return _Released(files, config, state, arguments)


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object")
    for name, value in _SUPPORTED.items():
        if config.get(name, value) != value:
            raise UserError(f"{path}: {name} is {config[name]!r}; of BERT's kind only {value!r} is supported")
    return config


def _encoder_parameters(path: Path) -> dict[str, Tensor]:
    state, heads = {}, set()
    for name, value in official_state(read_checkpoint(path)).items():
        name = name.removeprefix("bert.")
        first, last = name.split(".")[0], name.split(".")[-1]
        if first in _HEADS:
            heads.add(first)
        # Older files hold the numbers of the positions too.
        elif name != "embeddings.position_ids":
            state[name.removesuffix(last) + _OLD_NAMES.get(last, last)] = value
    if heads:
        logger.info("%s: left out %s, which the encoder does not have", path, ", ".join(sorted(heads)))
    return state


def _arguments(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Of the whole encoder in the file, but for heads and epsilon."""
    tables = [f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")]
    wanting = [name for name in (*tables, _HIDDEN) if name not in state or state[name].ndim != 2]
    if wanting:
        raise UserError(f"{path} is no checkpoint of BERT: it lacks {', '.join(wanting)} or has other shapes of it")
    words, positions, types = (len(state[name]) for name in tables)
    if types < 2:
        # RoBERTa has the same parameters and counts its positions in another way.
        raise UserError(f"{path} is no checkpoint of BERT: it has one token type, as RoBERTa's have")
    hidden, width = state[_HIDDEN].shape
    return {
        "vocab_size": words,
        "width": width,
        "layers": len({name.split(".")[2] for name in state if name.startswith(_LAYERS)}),
        "ffn_width": hidden,
        "max_positions": positions,
        "token_types": types,
    }


def _assert_agreement(arguments: Mapping[str, Any], config: Mapping[str, Any], files: BertFiles) -> None:
    for name, own in _SIZES.items():
        if config.get(name, arguments[own]) != arguments[own]:
            raise UserError(
                f"{files.weights} does not go with {files.config}: {name} is {arguments[own]}, not {config[name]}"
            )


def _heads(released: _Released) -> int:
    files, width = released.files, released.arguments["width"]
    told = released.config.get("num_attention_heads")
    if told is None:
        if width % _HEAD_WIDTH:
            raise UserError(f"{files.weights}: {CONFIG} beside it must tell the number of heads in a width of {width}")
        return width // _HEAD_WIDTH
    if not isinstance(told, int) or told < 1 or width % told:
        raise UserError(f"{files.config}: num_attention_heads {told!r} does not go with a width of {width}")
    return told


def _assert_same_sizes(encoder: BertEncoder, released: _Released) -> None:
    files, config = released.files, released.config
    pairs = {
        "width": (files.weights, released.arguments["width"], encoder.width),
        "feed-forward width": (files.weights, released.arguments["ffn_width"], encoder.ffn_width),
        "number of segments": (files.weights, released.arguments["token_types"], encoder.token_types),
        # Weights alone tell neither; the encoder's epsilon is not changed, as no checkpoint of training would hold it.
        "num_attention_heads": (files.config, config.get("num_attention_heads", encoder.num_heads), encoder.num_heads),
        "layer_norm_eps": (files.config, config.get("layer_norm_eps", encoder.norm_eps), encoder.norm_eps),
    }
    for what, (path, theirs, own) in pairs.items():
        if theirs != own:
            raise UserError(f"{path} does not fit the text encoder: {what} is {theirs}, not {own}")


def _first_rows(table: Tensor, rows: int, what: str, path: Path) -> Tensor:
    if len(table) < rows:
        raise UserError(f"{path} has embeddings of {len(table):,} rows for a {what} of {rows:,}")
    if len(table) > rows:
        logger.info("%s: the first %s of %s rows are used for a %s of that size", path, rows, len(table), what)
    return table[:rows]
