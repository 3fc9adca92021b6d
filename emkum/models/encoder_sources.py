"""Encoders of one modality, out of any run of this project or any pretrained model.

A source is the folder or the checkpoint of a run, or KIND:REST with one of the kinds `timm`, `data2vec2`, `beit3` and
`bert`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import nn

from emkum.checkpoint import MODEL, find_checkpoint, load, model_name
from emkum.data.tokenizers import Tokenizer, load_tokenizer
from emkum.errors import UserError
from emkum.layers.token_types import IMAGE, TEXT
from emkum.models.beit3_checkpoints import WORDS, beit3_vocabulary, first_words, read_beit3, sizes_of_beit3
from emkum.models.beit3_encoders import BEiT3ImageEncoder
from emkum.models.bert_checkpoints import bert_from_checkpoint, find_bert
from emkum.models.builders import StudentConfig, size_of
from emkum.models.data2vec2_checkpoints import encoder_arguments_from_checkpoint
from emkum.models.encoder import Encoder, LayerChoice
from emkum.models.encoder_builders import (
    EncoderSetting,
    ImageEncoderConfig,
    TextEncoderConfig,
    build_image_encoder,
    build_text_encoder,
    is_transformer,
)
from emkum.models.encoder_changes import WithAdditions, copy_layers, resize_timm_encoder
from emkum.models.timm_encoder import TimmImageEncoder
from emkum.options import collect_parts
from emkum.weights import fingerprint, load_strictly, read_checkpoint

IMAGE_PARTS: dict[str, type] = {"student": StudentConfig, "image": ImageEncoderConfig}
TEXT_PARTS: dict[str, type] = {"student": StudentConfig, "text": TextEncoderConfig}
IMAGE_FORMS = "a run's folder or checkpoint, timm:NAME, data2vec2:FILE or beit3:FILE"
TEXT_FORMS = "a run's folder or checkpoint, data2vec2:FILE, beit3:FILE or bert:DIR_OR_NAME"

# Models of runs whose only encoder is their attribute `encoder`.
IMAGE_MODELS = ("image_student", "image_classifier", "dino_image")
TEXT_MODELS = ("masked_language_model", "text_student", "text_classifier")
DATA2VEC2_MODEL = "data2vec2_image"
# Where the encoder lies that counts: of DINO it is the average.
_PLACES = {"dino_image": "average.module.encoder."}
_KINDS = ("timm", "data2vec2", "beit3", "bert")
# Options that say what an encoder is made of, weights aside.
_SHARED = ("student_size", "student_width", "student_heads")
_ARCHITECTURE = {
    "image": (*_SHARED, "image_encoder", "image_size", "image_patch_size", "image_layers"),
    "text": (*_SHARED, "text_encoder", "text_layers", "text_max_positions"),
}


@dataclass
class LoadedEncoder:
    """An encoder with what belongs to it.

    Attributes:
        encoder: in eval mode, on the CPU.
        identity: plain data: source, architecture, hash of the weights.
        tokenizer: of a text encoder; None where none is known, and of images.
        max_tokens: the longest text that it reads; 0 of images.
        options: flat options (image_*, text_*, student_*) from which `image_encoder_from_options` or
            `text_encoder_from_options` builds an encoder that the weights fit strictly; empty where there are none,
            because a student adds something to the tokens of its encoders.
    """

    encoder: Encoder
    identity: dict[str, Any]
    tokenizer: Tokenizer | None
    max_tokens: int
    options: dict[str, Any]


def image_encoder_from_options(options: Any, pretrained: bool = True) -> Encoder:
    """Build an image encoder.

    Args:
        options: flat options with the prefixes of IMAGE_PARTS, a mapping or an object; what is absent has its default.
        pretrained: read the weights that they name.

    Raises:
        UserError: an option has a value that names nothing, or weights do not fit.
    """
    parts = collect_parts(IMAGE_PARTS, options)
    encoder = build_image_encoder(parts["image"], _setting(parts["student"], pretrained))
    encoder.checkpoint_activations = parts["student"].checkpoint_activations
    return encoder


def text_encoder_from_options(options: Any, vocab_size: int, pad_index: int, pretrained: bool = True) -> Encoder:
    """Build a text encoder.

    Args:
        options, pretrained: as for images, with the prefixes of TEXT_PARTS.
        vocab_size, pad_index: of the tokenizer.

    Raises:
        UserError: as for images.
    """
    parts = collect_parts(TEXT_PARTS, options)
    encoder = build_text_encoder(parts["text"], _setting(parts["student"], pretrained), vocab_size, pad_index)
    encoder.checkpoint_activations = parts["student"].checkpoint_activations
    return encoder


def _setting(config: StudentConfig, pretrained: bool) -> EncoderSetting:
    return EncoderSetting(size_of(config), fused_attention=config.attention == "fused", pretrained=pretrained)


def encoder_source_of_teacher(spec: str) -> str:
    """The source of the encoder that is a teacher.

    Raises:
        UserError: the teacher, given as KIND:REST, is of a kind that no encoder is.
    """
    if spec.partition(":")[0] not in (*_KINDS, "checkpoint"):
        raise UserError(
            f"--teacher {spec} has no layers that a student could start from: give --init-from SOURCE or none"
        )
    return spec


# ----------------------------------------------------------------------------------------------------------------------
# Images
# ----------------------------------------------------------------------------------------------------------------------


def load_image_encoder(source: str, weights: str = "", image_size: int = 0, layers: int = 0) -> LoadedEncoder:
    """An image encoder.

    Args:
        source: one of IMAGE_FORMS. Of an image-text student, the image encoder alone is taken.
        weights: of timm:NAME: a local file, `hub`, or empty for random ones.
        image_size: side of the input in pixels, to which positions are interpolated; 0 = as trained.
        layers: blocks to keep, the first ones; 0 = all.

    Raises:
        UserError: the source names nothing, cannot be read, has no image encoder or fewer blocks, or cannot have
            another input size.
    """
    kind, rest = _kind_of(source)
    if weights and kind != "timm":
        raise UserError(f"weights {weights} are for timm:NAME; {source} has its own")
    if kind == "bert":
        raise UserError(f"{source} reads text; give {IMAGE_FORMS}")
    if kind == "timm":
        encoder, options = _timm_encoder(rest, weights, image_size)
    elif kind == "data2vec2":
        encoder, options = _data2vec2_images(rest)
    elif kind == "beit3":
        encoder, options = _beit3_images(rest)
    else:
        encoder, options = _image_encoder_of_run(find_checkpoint(rest))
    if image_size not in (0, encoder.image_size):
        encoder = _resized(encoder, image_size, source, options)
    _keep_first(encoder, layers, source, options, "image_layers")
    return LoadedEncoder(encoder.eval(), _identity(source, encoder, options), None, 0, options)


def image_encoder_of_student(student: nn.Module, source: str) -> LoadedEncoder:
    """The image encoder of an image-text student that is in memory already; it is shared, not copied.

    Args:
        student: in eval mode. source: where it is from.
    """
    encoder = _with_additions(student, student.image_encoder, IMAGE)
    return LoadedEncoder(encoder.eval(), _identity(source, encoder, {}), None, 0, {})


def _timm_encoder(name: str, weights: str, image_size: int) -> tuple[Encoder, dict[str, Any]]:
    config = timm.models.get_pretrained_cfg(name)
    size = image_size or (224 if config is None else config.input_size[-1])
    options = {"image_encoder": f"timm:{name}", "image_size": size, "image_layers": 0}
    if not is_transformer(name):
        return image_encoder_from_options(options | {"image_weights": weights}), options
    encoder = TimmImageEncoder(name, weights, size)
    return encoder, options | {"image_layers": encoder.num_layers}


def _data2vec2_images(path: str | Path) -> tuple[Encoder, dict[str, Any]]:
    options = _data2vec2_options(path, "IMAGE")
    return image_encoder_from_options(options | {"image_weights": str(path)}), options


def _beit3_images(path: str | Path) -> tuple[Encoder, dict[str, Any]]:
    sizes = sizes_of_beit3(read_beit3(path), path)
    options = _beit3_options(sizes, "image") | {
        "image_size": sizes["image_size"],
        "image_patch_size": sizes["patch_size"],
    }
    return image_encoder_from_options(options | {"image_weights": str(path)}), options


def _beit3_options(sizes: Mapping[str, Any], modality: str) -> dict[str, Any]:
    """Options of either encoder in a checkpoint of BEiT-3 that has these sizes."""
    return {
        f"{modality}_encoder": "beit3",
        f"{modality}_layers": sizes["layers"],
        "student_width": sizes["width"],
        "student_heads": sizes["heads"],
    }


def _data2vec2_options(path: str | Path, modality: str) -> dict[str, Any]:
    """Options of the encoder in a checkpoint of Data2Vec 2."""
    arguments = encoder_arguments_from_checkpoint(path, modality)
    layers = arguments["prenet_depth"] + arguments["depth"]
    options = {"student_width": arguments["embed_dim"], "student_heads": arguments["num_heads"]}
    # Which blocks are the prenet's changes names alone, and goes by the size.
    options["student_size"] = "base"
    if modality == "TEXT":
        positions = arguments["max_positions"]
        return options | {"text_encoder": "data2vec2", "text_layers": layers, "text_max_positions": positions}
    sizes = {"image_size": arguments["input_size"], "image_patch_size": arguments["patch_size"]}
    return options | {"image_encoder": "data2vec2", "image_layers": layers} | sizes


def _image_encoder_of_run(path: Path) -> tuple[Encoder, dict[str, Any]]:
    state = read_checkpoint(path)
    name = model_name(state)
    if name == DATA2VEC2_MODEL:
        return _data2vec2_images(path)
    if name == MODEL:
        student = load(path).student
        return _of_student(student, student.image_encoder, IMAGE, state, "image")
    if name not in IMAGE_MODELS:
        raise _no_encoder(path, name, "image", IMAGE_FORMS)
    options = _architecture(state, "image")
    return _loaded(image_encoder_from_options(options, pretrained=False), state, path), options


def _resized(encoder: Encoder, image_size: int, source: str, options: dict[str, Any]) -> Encoder:
    if not options:
        raise UserError(f"{source}: its positions are for images of {encoder.image_size} pixels alone")
    options["image_size"] = image_size
    if isinstance(encoder, TimmImageEncoder):
        resize_timm_encoder(encoder, image_size, source)
        return encoder
    if isinstance(encoder, BEiT3ImageEncoder):
        encoder.resize(image_size, source)
        return encoder
    other = image_encoder_from_options(options, pretrained=False)
    copy_layers(other, encoder, source)
    return other


# ----------------------------------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------------------------------


def load_text_encoder(source: str, tokenizer: str = "", layers: int = 0) -> LoadedEncoder:
    """A text encoder.

    Args:
        source: one of TEXT_FORMS. Of an image-text student, the text encoder alone is taken.
        tokenizer: file or folder of the tokenizer; empty = the one of the run, or the one beside the weights.
        layers: blocks to keep, the first ones; 0 = all.

    Raises:
        UserError: the source names nothing, cannot be read, has no text encoder or fewer blocks, or does not go with
            the tokenizer.
    """
    kind, rest = _kind_of(source)
    if kind == "timm":
        raise UserError(f"{source} sees images; give {TEXT_FORMS}")
    given = load_tokenizer(tokenizer) if tokenizer else None
    if kind == "bert":
        encoder, options, found = _bert(rest, given)
    elif kind == "data2vec2":
        encoder, options, found = _data2vec2_text(rest, given)
    elif kind == "beit3":
        encoder, options, found = _beit3_text(rest, given)
    else:
        encoder, options, found = _text_encoder_of_run(find_checkpoint(rest), given)
    _keep_first(encoder, layers, source, options, "text_layers")
    return LoadedEncoder(encoder.eval(), _identity(source, encoder, options), found, encoder.max_positions, options)


_TextEncoder = tuple[Encoder, dict[str, Any], Tokenizer | None]


def _bert(source: str, tokenizer: Tokenizer | None) -> _TextEncoder:
    files = find_bert(source)
    if tokenizer is None and files.vocabulary is not None:
        tokenizer = load_tokenizer(files.vocabulary)
    model = bert_from_checkpoint(files)
    options = {
        "text_encoder": "bert",
        "student_width": model.width,
        "student_heads": model.num_heads,
        "text_layers": model.num_layers,
        "text_max_positions": model.max_positions,
        "text_weights": str(files.weights),
    }
    # Built anew: the options say less than a configuration may, and the vocabulary may have fewer words than the table.
    encoder = text_encoder_from_options(options, *_vocabulary(tokenizer, model.vocab_size))
    del options["text_weights"]
    return encoder, options, tokenizer


def _data2vec2_text(path: str, tokenizer: Tokenizer | None) -> _TextEncoder:
    rows = encoder_arguments_from_checkpoint(path, "TEXT")["vocab_size"]
    options = _data2vec2_options(path, "TEXT")
    encoder = text_encoder_from_options(options | {"text_weights": path}, *_vocabulary(tokenizer, rows))
    return encoder, options, tokenizer


def _beit3_text(path: str, tokenizer: Tokenizer | None) -> _TextEncoder:
    state = read_beit3(path)
    sizes = sizes_of_beit3(state, path)
    if tokenizer is None and beit3_vocabulary(path).is_file():
        tokenizer = load_tokenizer(beit3_vocabulary(path))
    rows = len(first_words(state[WORDS], None, path))
    options = _beit3_options(sizes, "text") | {"text_max_positions": sizes["max_positions"]}
    encoder = text_encoder_from_options(options | {"text_weights": path}, *_vocabulary(tokenizer, rows))
    return encoder, options, tokenizer


def _vocabulary(tokenizer: Tokenizer | None, rows: int) -> tuple[int, int]:
    """Ids of a tokenizer and the one of padding; without a tokenizer as many as there are rows, and fairseq's."""
    return (rows, 1) if tokenizer is None else (tokenizer.vocab_size, tokenizer.special.pad)


def _text_encoder_of_run(path: Path, tokenizer: Tokenizer | None) -> _TextEncoder:
    state = read_checkpoint(path)
    name = model_name(state)
    if name == MODEL:
        model = load(path)
        found = _of_student(model.student, model.student.text_encoder, TEXT, state, "text")
        return *found, tokenizer or model.tokenizer
    if name not in TEXT_MODELS:
        raise _no_encoder(path, name, "text", TEXT_FORMS)
    if tokenizer is None:
        tokenizer = load_tokenizer(_tokenizer_of_run(path, state["cfg"]["task"]))
    options = _architecture(state, "text")
    encoder = text_encoder_from_options(options, tokenizer.vocab_size, tokenizer.special.pad, pretrained=False)
    return _loaded(encoder, state, path), options, tokenizer


def _tokenizer_of_run(checkpoint: Path, task_options: Mapping[str, Any]) -> Path:
    """The one beside the checkpoint, else the one that the run read."""
    beside = checkpoint.parent / "tokenizer"
    if beside.is_dir():
        return beside
    return Path(task_options.get("text_tokenizer") or (task_options.get("data") or "").split(os.pathsep)[0])


# ----------------------------------------------------------------------------------------------------------------------
# Both
# ----------------------------------------------------------------------------------------------------------------------


def _kind_of(source: str) -> tuple[str, str]:
    """Kind, empty for a run, and what follows it."""
    kind, colon, rest = source.partition(":")
    if colon and kind in _KINDS:
        return kind, rest
    return "", source.removeprefix("checkpoint:")


def _architecture(state: Mapping[str, Any], modality: str) -> dict[str, Any]:
    """Options of a run's encoder, with its own numbers in place of those that a named size stands for."""
    parts = collect_parts({"image": IMAGE_PARTS, "text": TEXT_PARTS}[modality], state["cfg"]["model"])
    options = {}
    for key in _ARCHITECTURE[modality]:
        prefix, _, name = key.partition("_")
        options[key] = getattr(parts[prefix], name)
    size, encoder = size_of(parts["student"]), parts[modality].encoder
    if not encoder.startswith("timm:"):
        options |= {"student_width": size.width, "student_heads": size.heads}
    if not encoder.startswith("timm:") or is_transformer(encoder.removeprefix("timm:")):
        options[f"{modality}_layers"] = parts[modality].layers or size.layers
    return options


def _loaded(encoder: Encoder, state: Mapping[str, Any], path: Path) -> Encoder:
    place = _PLACES.get(model_name(state), "encoder.")
    weights = {key.removeprefix(place): value for key, value in state["model"].items() if key.startswith(place)}
    load_strictly(encoder, weights, path, what="the encoder that its own options describe")
    return encoder


def _of_student(
    student: nn.Module, encoder: Encoder, token_type: int, state: Mapping[str, Any], modality: str
) -> tuple[Encoder, dict[str, Any]]:
    """An image-text student's encoder with what the student adds before it."""
    encoder = _with_additions(student, encoder, token_type)
    mixed = state["cfg"]["model"].get("position_kind", "mixed") == "mixed"
    return encoder, _architecture(state, modality) if mixed and not isinstance(encoder, WithAdditions) else {}


def _with_additions(student: nn.Module, encoder: Encoder, token_type: int) -> Encoder:
    return WithAdditions(encoder, student.before, token_type) if len(student.before) > 0 else encoder


def _keep_first(encoder: Encoder, layers: int, source: str, options: dict[str, Any], option: str) -> None:
    if layers == 0:
        return
    kept = len(LayerChoice(layers).indices(encoder.num_layers, source))
    if kept < encoder.num_layers:
        encoder.drop_last_blocks(encoder.num_layers - kept)
    if options:
        options[option] = kept


def _identity(source: str, encoder: Encoder, options: dict[str, Any]) -> dict[str, Any]:
    return {"source": source, **options, "weights_sha256": fingerprint(encoder)}


def _no_encoder(path: Path, name: str | None, modality: str, forms: str) -> UserError:
    what = f"{modality} encoder".strip()
    return UserError(f"{path} is a checkpoint of {name or 'an unknown kind'}, which has no {what} to use; give {forms}")
