"""Recipes: short YAML deltas that become one fairseq command line."""

import argparse
import difflib
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from emkum.errors import UserError

# Options that fairseq's parser gets from the command line's other choices; they must be known first.
_CHOICES = ("user_dir", "task", "arch", "criterion", "optimizer", "lr_scheduler")
# The word that chooses among a recipe's presets.
PRESET = "preset"


def read_recipe(path: str | Path, chosen: str | None = None) -> dict[str, Any]:
    """Read a recipe and what it builds on.

    A recipe maps option names (fairseq's and this project's flags, `-` or `_`) to values. `base:` names another recipe,
    relative to this one, whose values it changes; null removes one. `presets:` maps names to further values, for those
    who ask for them by name; a recipe changes its base's preset of the same name as it changes its values, and what a
    preset says counts before what recipes say.

    Args:
        path: of the recipe.
        chosen: names of presets, separated by commas; the last one counts most.

    Raises:
        UserError: a file is missing, is no YAML mapping, bases form a circle, or there is no such preset.
    """
    options, presets = _merged(Path(path), ())
    for name in str(chosen).split(",") if chosen is not None else ():
        if name not in presets:
            raise UserError(f"preset {name!r}: {path} has {', '.join(presets) or 'none'}")
        options |= presets[name]
    return {key: value for key, value in options.items() if value is not None}


def read_options(path: str | Path, words: list[str]) -> dict[str, Any]:
    """A recipe with `key=value` words that change it; the word `preset=NAME,NAME` chooses presets.

    Raises:
        UserError: as `read_recipe` and `parse_overrides` do.
    """
    overrides = parse_overrides(words)
    return read_recipe(path, overrides.pop(PRESET, None)) | overrides


def read_mapping(path: Path, kind: str) -> dict[Any, Any]:
    """The content of a YAML file, called a `kind` in messages.

    Raises:
        UserError: it cannot be read, or is no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{kind} {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{kind} {path} is no valid YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{kind} {path} must map names to values")
    return content


def _merged(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Options of a recipe and its bases, and its presets."""
    if path.resolve() in above:
        raise UserError(f"{path}: base recipes form a circle")
    own = _with_underscores(read_mapping(path, "recipe"))
    base, own_presets = own.pop("base", None), own.pop("presets", None) or {}
    if not isinstance(own_presets, dict) or not all(isinstance(values, dict) for values in own_presets.values()):
        raise UserError(f"recipe {path}: presets must map each preset's name to options")
    options, presets = _merged(path.parent / base, (*above, path.resolve())) if base else ({}, {})
    for name, values in own_presets.items():
        presets[str(name)] = presets.get(str(name), {}) | _with_underscores(values)
    return options | own, presets


def _with_underscores(options: dict[Any, Any]) -> dict[str, Any]:
    return {str(key).replace("-", "_"): value for key, value in options.items()}


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """`key=value` words to options; values are read as YAML.

    Raises:
        UserError: a word has no `=`, or its value is no YAML.
    """
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"override {pair!r} must read key=value")
        try:
            options[key.lstrip("-").replace("-", "_")] = yaml.safe_load(value) if value else ""
        except yaml.YAMLError as error:
            raise UserError(f"override {pair!r} is no valid YAML: {' '.join(str(error).split())}") from None
    return options


def to_arguments(options: dict[str, Any]) -> list[str]:
    """Options to the arguments of `fairseq-train`, each checked against fairseq's own parser; None leaves one out.

    Raises:
        UserError: there is no model, or an option is unknown; the message names the closest known ones.
    """
    if options.get("arch") is None:
        raise UserError("the recipe has no arch, so it trains nothing; a suite of figures is for `emkum evaluate all`")
    actions = _training_actions(options)
    arguments = []
    for key, value in options.items():
        action = actions.get(key)
        if action is None:
            near = difflib.get_close_matches(key, actions, n=3, cutoff=0.6)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"unknown recipe key {key!r}{hint}")
        if value is not None:
            arguments += _argument(key, value, action)
    return arguments


def _argument(key: str, value: Any, action: argparse.Action) -> list[str]:
    if not action.option_strings:
        return [str(value)]
    flag = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"recipe key {key!r} is a switch: give true or false, not {value!r}")
        # `const` is what giving the flag means: True for most, False for those that switch something off.
        return [flag] if value is action.const else []
    if isinstance(value, list):
        value = ",".join(map(str, value))
    return [f"{flag}={value}"]


def _training_actions(options: dict[str, Any]) -> dict[str, argparse.Action]:
    """Every option that fairseq's training parser has, given the recipe's choices of task, model and so on."""
    return _actions_of(tuple((key, str(options[key])) for key in _CHOICES if options.get(key) is not None))


# A parser takes half a second to make.
@cache
def _actions_of(choices: tuple[tuple[str, str], ...]) -> dict[str, argparse.Action]:
    from fairseq import options as fairseq_options
    from fairseq.utils import import_user_module

    chosen = dict(choices)
    try:
        # What it registers is among the choices only after the import.
        import_user_module(argparse.Namespace(user_dir=chosen.get("user_dir")))
    except FileNotFoundError:
        raise UserError(f"recipe key 'user_dir' is {chosen['user_dir']!r}, which does not exist") from None
    parser = fairseq_options.get_training_parser()
    for action in parser._actions:
        if action.dest in chosen and action.choices is not None and chosen[action.dest] not in action.choices:
            names = sorted(action.choices)
            near = difflib.get_close_matches(str(chosen[action.dest]), names, n=3, cutoff=0.6)
            raise UserError(
                f"recipe key {action.dest!r} is {chosen[action.dest]!r}; "
                + (f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(names)}")
            )
    words = [f"--{key.replace('_', '-')}={value}" for key, value in chosen.items()]
    fairseq_options.parse_args_and_arch(parser, input_args=[*words, "."], parse_known=True)
    return {action.dest: action for action in parser._actions if action.dest != "help"}
