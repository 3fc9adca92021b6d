"""`emkum model`: what a student consists of and what it costs, before it is trained or after."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emkum.commands.model_report import Report, report_lines, report_record
from emkum.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from emkum.models.builders import Targets
    from emkum.models.model_info import Part
    from emkum.objectives import Setting

RECIPES = (".yaml", ".yml")
# Where neither option nor recipe says: BERT's vocabulary, ImageNet's classes, and a batch.
VOCABULARY = 30_522
CLASSES = 1000
BATCH_SIZE = 64


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("model", help="look into a student")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    info = kinds.add_parser(
        "info",
        help="parts with their parameters, operations of a forward, memory of training",
        description="Print the parts of a student with their parameters, the operations of a forward, and an estimate "
        "of the memory that a training batch takes. Nothing is computed and no pretrained weights are read: it takes "
        "no data, little memory and a few seconds, whatever the size of the model. Of a checkpoint whose token types "
        "are under LayerScale, statistics of the scale are printed, too.",
        epilog="example: emkum model info examples/flickr8k.yaml student_size=base --batch-size 256",
    )
    info.add_argument("model", metavar="RECIPE_OR_CKPT", help="YAML file, checkpoint, or a run's folder")
    info.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the recipe's")
    info.add_argument("--tokens", type=int, metavar="N", help="of a caption (default: caption_max_tokens)")
    info.add_argument("--batch-size", type=int, metavar="N", help="images of a training batch (default: the recipe's)")
    info.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help=f"ids of the tokenizer (default: of the recipe's tokenizer or data, else {VOCABULARY:,})",
    )
    info.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    info.set_defaults(run=run_info)


def run_info(args: argparse.Namespace) -> None:
    for option in ("tokens", "batch_size", "vocab_size"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} {value}: want 1 or more")
    is_recipe = Path(args.model).suffix.lower() in RECIPES
    if args.overrides and not is_recipe:
        raise UserError(f"{args.overrides[0]!r}: options can be changed of a recipe ({' or '.join(RECIPES)}) alone")
    source = read_recipe_source(args.model, args.overrides) if is_recipe else read_checkpoint_source(args.model)
    report = examine(source, args.vocab_size, args.tokens, args.batch_size)
    print("\n".join(report_lines(report)))
    if args.json:
        from emkum.provenance import write_json

        try:
            write_json(args.json, report_record(report))
        except OSError as error:
            raise UserError(f"--json: cannot write {args.json}: {error.strerror}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Where options come from
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """What a student is built from.

    Attributes:
        name: of the file.
        options: flat ones, of model, task and training.
        tokenizers: places of the tokenizer, best first.
        state: parameters and buffers of a checkpoint by name; None of a recipe.
    """

    name: str
    options: Mapping[str, Any]
    tokenizers: list[Path]
    state: Mapping[str, Any] | None = None


def read_recipe_source(path: str, overrides: list[str]) -> Source:
    """A recipe with changed options, checked as for training.

    Raises:
        UserError: the recipe cannot be read, is of another model, or an option is unknown or has no value of its kind.
    """
    from emkum.checkpoint import MODEL
    from emkum.commands.train import USER_DIR
    from emkum.recipe import read_options, to_arguments

    options = {"user_dir": str(USER_DIR)} | read_options(path, overrides)
    if options.get("arch") != MODEL:
        raise UserError(f"{path} has arch {options.get('arch')!r}; what can be looked into is {MODEL}")
    to_arguments(options)
    return Source(path, typed(options), _tokenizers(options))


def read_checkpoint_source(path: str) -> Source:
    """A checkpoint's options and state.

    Raises:
        UserError: there is none, or it is of another model.
    """
    from emkum.checkpoint import MODEL, find_checkpoint, model_name
    from emkum.weights import read_checkpoint

    file = find_checkpoint(path)
    content = read_checkpoint(file)
    name = model_name(content)
    if name != MODEL:
        raise UserError(f"{file} is a checkpoint of {name or 'an unknown kind'}, not of {MODEL}")
    parts = (content["cfg"].get(part) or {} for part in ("dataset", "task", "model"))
    options = {key: value for part in parts for key, value in part.items()}
    return Source(str(file), options, [file.parent / "tokenizer", *_tokenizers(options)], content["model"])


def _tokenizers(options: Mapping[str, Any]) -> list[Path]:
    named = options.get("caption_tokenizer"), str(options.get("data") or "").split(os.pathsep)[0]
    return [Path(place) for place in named if place]


def typed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a recipe as those of the parts' options, as the command line would read them.

    Raises:
        UserError: a value is not of its option's kind.
    """
    from emkum.options import flat_fields

    kinds = {name: item.type for name, item in flat_fields(_option_parts())}
    kinds |= {"batch_size": int, "average_decay": float, "contrastive_chunk": int}
    return {
        name: _as(kinds[name], name, value) if name in kinds and value is not None else value
        for name, value in options.items()
    }


def _option_parts() -> dict[str, type]:
    from emkum.data.image_text import CaptionConfig
    from emkum.data.sounds import SoundConfig
    from emkum.models.builders import STUDENT_PARTS
    from emkum.models.parameter_groups import FreezeConfig
    from emkum.objectives import OBJECTIVE_PARTS

    task = {"caption": CaptionConfig, "sound": SoundConfig}
    return {**STUDENT_PARTS, **OBJECTIVE_PARTS, "freeze": FreezeConfig, **task}


def _as(kind: type, name: str, value: Any) -> Any:
    # YAML reads 1e-5, without a point, as text.
    try:
        if kind is not bool and not isinstance(value, bool):
            return kind(value)
    except (TypeError, ValueError):
        pass
    if kind is bool and isinstance(value, bool):
        return value
    raise UserError(f"recipe key {name!r} is {value!r}, which is no {kind.__name__}")


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------


def examine(source: Source, vocab_size: int | None, tokens: int | None, batch_size: int | None) -> Report:
    """Build what a source describes, without memory, and look at it.

    Args:
        source: of options, and of a checkpoint's state.
        vocab_size, tokens, batch_size: None = as the source says.

    Raises:
        UserError: the options make no student, or a checkpoint does not fit its own options.
    """
    from emkum.data.sounds import SAMPLE_RATE
    from emkum.models.model_info import InputSizes, estimate_memory, student_flops

    options, notes = source.options, []
    model = build(source, vocab_size, notes)
    captions = _option(options, "caption", "per_image")
    sizes = InputSizes(
        _option(options, "image", "size"),
        tokens or _option(options, "caption", "max_tokens"),
        captions or 1,
        0 if model["student"].audio_encoder is None else round(SAMPLE_RATE * _option(options, "sound", "max_seconds")),
    )
    assert_length(model["student"], sizes.tokens)
    if not captions:
        notes.append("caption_per_image is 0 (all of an image): memory counts one caption an image")
    if batch_size is None:
        batch_size = options.get("batch_size")
    if batch_size is None:
        batch_size = BATCH_SIZE
        notes.append(f"the recipe has no batch_size; memory counts {BATCH_SIZE} images (change it by --batch-size)")
    # Of a batch that is encoded piece by piece, the activations of a piece are kept.
    at_once = min(batch_size, options.get("contrastive_chunk") or batch_size)
    if at_once < batch_size:
        notes.append(f"activations are those of {at_once} images, which contrastive_chunk encodes at a time")
    memory = estimate_memory(model, model["student"], sizes, at_once)
    notes.append(
        "memory leaves out the teacher, the losses and passes over masked images, masked captions and crops; half "
        "precision and autocast need less"
    )
    return Report(
        source.name,
        tell_parts(model),
        sizes,
        student_flops(model["student"].eval(), sizes),
        batch_size,
        memory,
        None if source.state is None else scale_of_token_types(source.state),
        notes,
    )


def tell_parts(model: "nn.ModuleDict") -> "Part":
    """The student taken apart, objectives by name, and the moving average as a whole."""
    from emkum.models.model_info import Part, part_tree

    levels = {"student": 2, "objectives": 1, "audio_objectives": 1, "moving_average": 0}
    parts = [part_tree(child, name.replace("_", " "), levels[name]) for name, child in model.items()]
    sums = (sum(getattr(part, key) for part in parts) for key in ("parameters", "trainable"))
    return Part("total", *sums, parts=tuple(part for part in parts if part.parameters))


def build(source: Source, vocab_size: int | None, notes: list[str]) -> "nn.ModuleDict":
    """The student, its objectives, and its moving average where one is kept, on the meta device.

    Args:
        source: as of `examine`.
        vocab_size: None = as the source says.
        notes: receives what was assumed.
    """
    from torch import nn

    from emkum.layers.ema import EmaCopy
    from emkum.models.builders import build_student
    from emkum.models.model_info import without_memory
    from emkum.models.parameter_groups import FreezeConfig, freeze
    from emkum.objectives import build_objectives, heard_objectives, parse_objectives
    from emkum.options import collect_parts

    options = source.options
    names = parse_objectives(options.get("objectives") or "itc")
    vocab_size, pad = _vocabulary(source, vocab_size, notes)
    targets = _targets(names, source, notes)
    with without_memory():
        student = build_student(options, vocab_size, targets, pretrained=False, pad_index=pad)
        if source.state is not None:
            assert_fits(student, source.state, source.name)
        freeze(student, collect_parts({"freeze": FreezeConfig}, options)["freeze"])
        groups = {"objectives": names}
        if student.audio_encoder is not None:
            groups["audio_objectives"] = heard_objectives(names)
        model = nn.ModuleDict({"student": student, **{group: nn.ModuleDict() for group in groups}})
        for group, name in ((group, name) for group, chosen in groups.items() for name in chosen):
            try:
                setting = _setting(student, targets, vocab_size)
                model[group].update(build_objectives([name], options, setting))
            except UserError as error:
                notes.append(f"left out: {error.message}")
        decay = options.get("average_decay") or 0.0
        if decay > 0:
            model["moving_average"] = EmaCopy(student, decay)
    return model


def _vocabulary(source: Source, vocab_size: int | None, notes: list[str]) -> tuple[int, int]:
    """Number of ids, and the one of padding."""
    if vocab_size is not None:
        return vocab_size, 1
    # A run's own tokenizer may have been left behind; what a recipe names must be there.
    places = source.tokenizers if source.state is None else [place for place in source.tokenizers if place.exists()]
    if places:
        from emkum.data.tokenizers import load_tokenizer

        tokenizer = load_tokenizer(places[0])
        return tokenizer.vocab_size, tokenizer.special.pad
    notes.append(f"no tokenizer is given: {VOCABULARY:,} ids, as BERT's has (change it by --vocab-size or data=DIR)")
    return VOCABULARY, 1


def _targets(names: list[str], source: Source, notes: list[str]) -> "Targets":
    """What is predicted: told by a checkpoint; of a recipe's teacher, which is not loaded, assumed."""
    from emkum.models.builders import Targets
    from emkum.objectives import objective_configs, required

    needs = required(objective_configs(names, source.options))
    if source.state is not None:
        heads = {name: source.state.get(f"student.heads.{name}.1.weight") for name in ("prediction", "logits")}
        widths = {name: None if weight is None else len(weight) for name, weight in heads.items()}
        # A prediction without parameters is as wide as the student.
        prediction = widths["prediction"] or (0 if needs.prediction else None)
        return Targets(prediction, widths["logits"], "student.mask_token" in source.state)
    if needs.prediction:
        notes.append("the teacher is not loaded: its feature is taken to be as wide as the student's")
    if needs.logits:
        notes.append(f"the teacher is not loaded: it is taken to have {CLASSES:,} classes")
    return Targets(0 if needs.prediction else None, CLASSES if needs.logits else None, needs.masked_image)


def _setting(student: Any, targets: "Targets", vocab_size: int) -> "Setting":
    from emkum.objectives import Setting

    width = targets.prediction or student.width
    return Setting(
        width=student.width,
        contrast_width=student.contrast_width,
        vocab_size=vocab_size,
        target_width=width,
        num_classes=targets.logits or CLASSES,
        patch_width=width,
    )


def _option(options: Mapping[str, Any], prefix: str, name: str) -> Any:
    from emkum.options import collect_parts

    parts = _option_parts()
    return getattr(collect_parts({prefix: parts[prefix]}, options)[prefix], name)


def assert_length(student: Any, tokens: int) -> None:
    """Raise UserError where captions are longer than the text encoder reads."""
    most = getattr(student.text_encoder, "max_positions", tokens)
    if tokens > most:
        raise UserError(
            f"captions of {tokens} tokens (--tokens, else caption_max_tokens) exceed the {most} positions of the text "
            "encoder"
        )


def assert_fits(student: "nn.Module", state: Mapping[str, Any], path: str) -> None:
    """Compare a student's parameters and buffers with those of a checkpoint.

    Raises:
        UserError: names or shapes differ.
    """
    prefix = "student."
    theirs = {k.removeprefix(prefix): tuple(v.shape) for k, v in state.items() if k.startswith(prefix)}
    own = {name: tuple(value.shape) for name, value in student.state_dict().items()}
    differing = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
    if differing:
        name = differing[0]
        raise UserError(
            f"{path} does not fit its own options: {len(differing)} of its parameters differ, the first is {name}, "
            f"{theirs.get(name, 'missing')} instead of {own.get(name, 'none')}"
        )


def scale_of_token_types(state: Mapping[str, Any]) -> dict[str, float] | None:
    """Statistics of the LayerScale of a checkpoint's token types; None where there is none."""
    from emkum.models.model_info import describe_values

    found = [
        value for name, value in state.items() if name.startswith("student.") and name.endswith("token_types.scale")
    ]
    return describe_values(found[0]) if found else None
