"""Which parameters learn slower, are not decayed or do not learn at all, as attributes that the optimizer reads."""

import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from emkum.errors import UserError
from emkum.models.encoder import Encoder

logger = logging.getLogger(__name__)


@dataclass
class LearningRateConfig:
    image_encoder: float = field(
        default=1.0, metadata={"help": "factor of the learning rate for the image encoder (METER, Dou et al. 2022)"}
    )
    text_encoder: float = field(default=1.0, metadata={"help": "factor of the learning rate for the text encoder"})
    audio_encoder: float = field(default=1.0, metadata={"help": "factor of the learning rate for the audio encoder"})
    layer_decay: float = field(
        default=1.0,
        metadata={
            "help": "decay d of the learning rate towards the input: an encoder's layer l of L learns at lr * "
            "d^(L + 1 - l), its embeddings being layer 0; 1 = off"
        },
    )


@dataclass
class FreezeConfig:
    embeddings: bool = field(
        default=False,
        metadata={"help": "patch and word embeddings, and convolutions over samples of sounds, do not learn"},
    )
    image_all_but: int = field(
        default=-1,
        metadata={"help": "of the image encoder only the last so many blocks learn; 0 = none, -1 = all of it"},
    )
    text_all_but: int = field(
        default=-1,
        metadata={"help": "of the text encoder only the last so many blocks learn; 0 = none, -1 = all of it"},
    )
    audio_all_but: int = field(
        default=-1,
        metadata={"help": "of the audio encoder only the last so many blocks learn; 0 = none, -1 = all of it"},
    )


_MODALITIES = ("image", "text", "audio")

# Parts of a parameter's own name where it is a table or a token, which decay would only shrink. The weight of a layer
# is called `weight`, so that a patch embedding's kernel, for one, is not among them.
_NO_DECAY = ("embed", "position", "table", "token", "log_scale")


def freeze(student: nn.Module, config: FreezeConfig) -> None:
    """Switch `requires_grad` off where the options say so, and log how many parameters do not learn.

    Dropout in what is frozen stays as it is.

    Args:
        student: has `image_encoder`, `text_encoder` or `audio_encoder`, any of which may be None.
        config: what to freeze.

    Raises:
        UserError: an encoder has fewer blocks than are to learn, or there is no such encoder.
    """
    for modality, encoder in _encoders(student).items():
        learning_blocks = getattr(config, f"{modality}_all_but")
        if learning_blocks != -1:
            _freeze_all_but(encoder, modality, learning_blocks)
        if config.embeddings and encoder is not None:
            _freeze(encoder.embedding_parameters())
    frozen: Counter[str] = Counter()
    for path, parameter in student.named_parameters():
        if not parameter.requires_grad:
            frozen[_part_name(student, path)] += parameter.numel()
    listing = ", ".join(f"{name} {count:,}" for name, count in frozen.items())
    logger.info("frozen parameters: %s%s", f"{frozen.total():,}", f" ({listing})" if listing else "")


def _freeze_all_but(encoder: Encoder | None, modality: str, count: int) -> None:
    option = f"--freeze-{modality}-all-but {count}"
    if encoder is None:
        raise UserError(f"{option}: the student has no {modality} encoder")
    blocks = encoder.all_blocks()
    if not 0 <= count <= len(blocks):
        raise UserError(
            f"{option}: want 0 to {len(blocks)}, which the {modality} encoder has, or -1 (all of it learns)"
        )
    learning = {id(p) for block in blocks[len(blocks) - count :] for p in block.parameters()}
    _freeze(p for p in encoder.parameters() if id(p) not in learning)


def _freeze(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)


def assign_overrides(module: nn.Module, student: nn.Module, config: LearningRateConfig) -> None:
    """Set `optim_overrides` on every parameter: its factor of the learning rate, whether it is decayed, and what it
    belongs to in words.

    Encoders learn at their own fraction of the learning rate, times the decay of their layer. Of an encoder, all that
    is in no block is layer 0. Biases, norms, other 1-D parameters, CLS tokens, positions, embeddings and token types
    are not decayed.

    Args:
        module: all that is trained, the student and the objectives' parameters.
        student: the student inside it; has what `freeze` asks for.
        config: factors of the learning rate.

    Raises:
        UserError: a factor is out of its range.
    """
    _check(config)
    rates = {}
    parts = {id(p): _part_name(student, path) for path, p in student.named_parameters()}
    for modality, encoder in _encoders(student).items():
        if encoder is not None:
            factor = getattr(config, f"{modality}_encoder")
            rates |= {key: factor * rate for key, rate in _layer_rates(encoder, config.layer_decay).items()}
            if config.layer_decay != 1:
                parts |= {key: f"{parts[key]} {layer}" for key, layer in _layer_names(encoder).items()}
    tables = {id(table.weight) for table in module.modules() if isinstance(table, nn.Embedding)}
    for path, parameter in module.named_parameters():
        key, name = id(parameter), path.rpartition(".")[2]
        is_table = key in tables or any(part in name for part in _NO_DECAY)
        parameter.optim_overrides = {
            "optimizer": {
                "lr_scale": rates.get(key, 1.0),
                "weight_decay_scale": 0.0 if parameter.ndim < 2 or is_table else 1.0,
            },
            "part": parts.get(key) or _part_name(module, path),
        }


def _part_name(module: nn.Module, path: str) -> str:
    """In words, the child of `module` that a parameter is in; of a child that holds parts by name, which part."""
    names = path.split(".")
    depth = 2 if isinstance(getattr(module, names[0]), nn.ModuleDict) else 1
    return " ".join(names[:depth]).replace("_", " ")


def _encoders(student: nn.Module) -> dict[str, Encoder | None]:
    return {modality: getattr(student, f"{modality}_encoder", None) for modality in _MODALITIES}


def _layer_of(encoder: Encoder) -> dict[int, int]:
    """Layer of every parameter by its id: blocks count from 1 on, all else is layer 0."""
    layers = {id(p): 0 for p in encoder.parameters()}
    for number, block in enumerate(encoder.all_blocks(), start=1):
        layers.update((id(p), number) for p in block.parameters())
    return layers


def _layer_rates(encoder: Encoder, decay: float) -> dict[int, float]:
    above = len(encoder.all_blocks()) + 1
    return {key: decay ** (above - layer) for key, layer in _layer_of(encoder).items()}


def _layer_names(encoder: Encoder) -> dict[int, str]:
    return {key: f"layer {layer}" if layer else "embeddings" for key, layer in _layer_of(encoder).items()}


def _check(config: LearningRateConfig) -> None:
    for modality in _MODALITIES:
        factor = getattr(config, f"{modality}_encoder")
        if not (factor >= 0 and math.isfinite(factor)):
            raise UserError(f"--lr-scale-{modality}-encoder {factor}: want 0 (does not learn) or more")
    if not 0 < config.layer_decay <= 1:
        raise UserError(f"--lr-scale-layer-decay {config.layer_decay}: want more than 0, and at most 1 (off)")
