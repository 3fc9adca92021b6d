"""BERT (Devlin et al. 2019) as text encoder, and where its weights come from: a folder, a file, or the hub.

Parameters are named as in transformers' BertModel. What follows the last layer there (the pooler, and heads for
particular tasks) is left out.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.layers.shared_blocks import initialize_weights
from emkum.outputs import Encoded
from emkum.weights import first_line, load_strictly, official_state, read_checkpoint

logger = logging.getLogger(__name__)

# ----------------------------------------------------------------------------------------------------------------------
# Encoder
# ----------------------------------------------------------------------------------------------------------------------


class _Embeddings(nn.Module):
    def __init__(self, rows: tuple[int, int, int], width: int, dropout: float, norm_eps: float) -> None:
        super().__init__()
        words, positions, types = rows
        self.word_embeddings = nn.Embedding(words, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(types, width)
        self.LayerNorm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        # All of a text is its first segment.
        x = self.word_embeddings(tokens) + self.token_type_embeddings.weight[0]
        x = x + self.position_embeddings.weight[: tokens.shape[1]]
        return self.dropout(self.LayerNorm(x))


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )  # (B, heads, N, D / heads) each
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, visible, dropout).transpose(1, 2).flatten(2)


class _Output(nn.Module):
    """Projection of what a part of the layer computed, residual, norm."""

    def __init__(self, width_in: int, width: int, dropout: float, norm_eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, width)
        self.LayerNorm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class _Layer(nn.Module):
    def __init__(
        self, width: int, heads: int, ffn_width: int, dropout: float, attention_dropout: float, norm_eps: float
    ) -> None:
        super().__init__()
        attention, output = _SelfAttention(width, heads, attention_dropout), _Output(width, width, dropout, norm_eps)
        self.attention = nn.ModuleDict({"self": attention, "output": output})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, ffn_width)})
        self.output = _Output(ffn_width, width, dropout, norm_eps)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, visible), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class BertEncoder(nn.Module):
    """BERT without pooler and heads. The defaults are the released base models.

    Args:
        vocab_size: rows of the word embedding, special tokens included.
        width: D.
        layers: how many.
        heads: attention heads.
        ffn_width: hidden width of the feed-forward part.
        max_positions: longest input in tokens.
        token_types: rows of the embedding of segments, of which the first alone is used.
        dropout: after embedding, attention and feed-forward part.
        attention_dropout: of the attention weights.
        norm_eps: of every LayerNorm.

    Attributes:
        width, max_positions: as given. num_layers, num_heads: likewise.

    Raises:
        ValueError: `width` is no multiple of `heads`.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        ffn_width: int = 3072,
        max_positions: int = 512,
        token_types: int = 2,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        norm_eps: float = 1e-12,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.embeddings = _Embeddings((vocab_size, max_positions, token_types), width, dropout, norm_eps)
        kept = (_Layer(width, heads, ffn_width, dropout, attention_dropout, norm_eps) for _ in range(layers))
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(kept)})
        self.apply(_initialize)
        self.width = width
        self.num_layers = layers
        self.num_heads = heads
        self.max_positions = max_positions

    def forward(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Encoded:
        """Token ids to contextual tokens.

        Args:
            tokens: (T, L) int64, `[CLS]` first.
            padding_mask: (T, L) bool, True at padding; None where nothing is padded.

        Returns:
            Tokens (T, L, D) and the mask. At padding the tokens mean nothing.

        Raises:
            ValueError: L exceeds `max_positions`.
        """
        x = self._embed(tokens)
        for state in self._run(x, padding_mask):
            x = state
        return Encoded(x, padding_mask)

    def hidden_states(self, tokens: Tensor, padding_mask: Tensor | None = None) -> list[Tensor]:
        """(T, L, D) behind every layer; arguments as of `forward`."""
        return list(self._run(self._embed(tokens), padding_mask))

    def _embed(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.max_positions:
            raise ValueError(f"{tokens.shape[1]} tokens exceed the {self.max_positions} positions of the text encoder")
        return self.embeddings(tokens)

    def _run(self, x: Tensor, padding_mask: Tensor | None) -> Iterator[Tensor]:
        visible = None if padding_mask is None else ~padding_mask[:, None, None].bool()
        for layer in self.encoder["layer"]:
            x = layer(x, visible)
            yield x


def _initialize(module: nn.Module) -> None:
    initialize_weights(module)
    if isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)


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


def bert_from_checkpoint(
    source: str | Path | BertFiles,
    num_layers: int | None = None,
    allowed: str = "",
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
) -> BertEncoder:
    """Build the encoder that a checkpoint holds, and load it.

    Args:
        source: see `find_bert`, or what that gave. Sizes are told by the weights; config.json must agree with them, and
            tells the number of heads, which is a 64th of the width where there is no config.json.
        num_layers: keep only the first so many layers; None = all.
        allowed: see `emkum.weights.load_strictly`.
        dropout, attention_dropout: see BertEncoder.

    Raises:
        UserError: a file cannot be had or read, is of another model, or has missing, unexpected or misshapen
            parameters; or there are fewer layers than `num_layers`.
    """
    files = source if isinstance(source, BertFiles) else find_bert(source)
    config = {} if files.config is None else _read_config(files.config)
    state = _encoder_parameters(files.weights)
    arguments = _arguments(state, files.weights)
    _assert_agreement(arguments, config, files)
    arguments["heads"] = _heads(config, arguments["width"], files)
    arguments["norm_eps"] = config.get("layer_norm_eps", 1e-12)
    total = arguments["layers"]
    if num_layers is not None:
        if not 1 <= num_layers <= total:
            raise UserError(f"{files.weights} has {total} layers; {num_layers} cannot be kept")
        arguments["layers"] = num_layers
    left_out = tuple(f"encoder.layer.{index}." for index in range(arguments["layers"], total))
    encoder = BertEncoder(**arguments, dropout=dropout, attention_dropout=attention_dropout)
    used = {name: value for name, value in state.items() if not name.startswith(left_out)}
    load_strictly(encoder, used, files.weights, allowed, "BERT")
    return encoder


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
        "layers": len({name.split(".")[2] for name in state if name.startswith("encoder.layer.")}),
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


def _heads(config: Mapping[str, Any], width: int, files: BertFiles) -> int:
    told = config.get("num_attention_heads")
    if told is None:
        if width % _HEAD_WIDTH:
            raise UserError(f"{files.weights}: {CONFIG} beside it must tell the number of heads in a width of {width}")
        return width // _HEAD_WIDTH
    if not isinstance(told, int) or told < 1 or width % told:
        raise UserError(f"{files.config}: num_attention_heads {told!r} does not go with a width of {width}")
    return told
