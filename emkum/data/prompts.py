"""What the classes of a prepared set are called in captions: names and templates, from JSON or from the set alone.

A file of prompts is an object with

- `templates`: a list of captions with {} or {c} where the class's name belongs. Missing or null = DEFAULT_TEMPLATES.
- `classes` (or `classnames`, as CLIP's files have it): the names. Missing or null = the set's own. Either an object
  from a class of the set, by its `class_name` or another list of its `classes.json` such as `wnid`, to a name or a list
  of names; or a list of names, which is matched by name where it holds the name of each class of the set, and else must
  have as many entries, in the order of the set's labels.

Names are compared without regard to case, with "_" as a space.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from emkum.data.labels import read_class_names, read_classes, read_labels
from emkum.data.mixture import MixedSamples
from emkum.data.shards import ShardedSamples, open_split
from emkum.errors import UserError

DEFAULT_TEMPLATES = ("a photo of a {}.",)

_PLACES = ("{}", "{c}")
_NAMES = ("classes", "classnames")
_FORM = '{"classes": ["cat", "dog"], "templates": ["a photo of a {}."]}'


@dataclass(frozen=True)
class ClassPrompts:
    """How the classes of a set are put into words.

    Attributes:
        names: by label, one or more each.
        templates: with a place for the name.
    """

    names: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...]

    def texts(self, labels: Iterable[int]) -> tuple[list[str], list[int]]:
        """Each of the classes' names in each template, and for each of these texts its class."""
        found = [
            (fill(template, name), label)
            for label in labels
            for name, template in product(self.names[label], self.templates)
        ]
        return [text for text, _ in found], [label for _, label in found]


@dataclass(frozen=True)
class PromptedSet:
    """A split with labels, and the prompts of its classes.

    Attributes:
        samples: the images.
        labels: (n,) int64.
        class_names: of the set, by label.
        prompts: of the classes.
    """

    samples: ShardedSamples
    labels: np.ndarray
    class_names: list[str]
    prompts: ClassPrompts


def open_prompted_set(folder: str | Path, split: str, path: str | Path | None = None) -> PromptedSet:
    """Open what is to be classified. No image is read.

    Args:
        folder: what `emkum prepare` made of a set with classes.
        split: of it.
        path: a file of prompts, as for `read_prompts`.

    Raises:
        UserError: no such data or split, no classes or labels, or prompts that do not fit.
    """
    samples = open_split(folder, split, require_captions=False)
    class_names, prompts = read_class_names(folder), read_prompts(folder, path)
    labels = read_labels(MixedSamples([samples]), len(class_names))
    return PromptedSet(samples, labels, class_names, prompts)


def fill(template: str, name: str) -> str:
    """The template with the name in its places."""
    # Place by place: a name may have braces of its own.
    parts = [part.split(_PLACES[1]) for part in template.split(_PLACES[0])]
    return name.join(piece for part in parts for piece in part)


def read_prompts(folder: str | Path, path: str | Path | None = None) -> ClassPrompts:
    """The prompts of a prepared set.

    Args:
        folder: of the set.
        path: a file of prompts; None = the set's own names in DEFAULT_TEMPLATES.

    Raises:
        UserError: the set has no classes, or the file does not fit it or has another form.
    """
    table = read_classes(folder)
    if path is None:
        return ClassPrompts(_own_names(table), DEFAULT_TEMPLATES)
    content = _read_object(path)
    templates = content.get("templates")
    templates = DEFAULT_TEMPLATES if templates is None else _templates(templates, path)
    given = [content[key] for key in _NAMES if content.get(key) is not None]
    if len(given) > 1:
        raise UserError(f"{path} has both {' and '.join(_NAMES)}: keep one")
    if not given:
        return ClassPrompts(_own_names(table), templates)
    if isinstance(given[0], dict):
        names = _names_of_object(given[0], path)
        return ClassPrompts(_by_name(names, table, path, folder), templates)
    return ClassPrompts(_of_list(given[0], table, path, folder), templates)


def _read_object(path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file of prompts: {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or not content.keys() & {"templates", *_NAMES}:
        raise UserError(f"{path} is no file of prompts: want {_FORM}")
    return content


def _templates(templates: Any, path: str | Path) -> tuple[str, ...]:
    if not isinstance(templates, list) or not templates or not all(isinstance(one, str) for one in templates):
        raise UserError(f"{path}: templates must be a list of one or more texts: want {_FORM}")
    for template in templates:
        if not any(place in template for place in _PLACES):
            raise UserError(f"{path}: template {template!r} has no place for the class's name: want {{}} in it")
    return tuple(templates)


def _own_names(table: Mapping[str, Sequence[Any]]) -> tuple[tuple[str, ...], ...]:
    return tuple((spoken(name),) for name in table["class_name"])


def spoken(class_name: str) -> str:
    """A class's name for a caption: the first of synonyms that commas separate, with spaces for "_"."""
    first = " ".join(class_name.replace("_", " ").partition(",")[0].split())
    return first or class_name


def _key(name: str) -> str:
    """What names are compared by."""
    return " ".join(name.replace("_", " ").casefold().split())


def _keys_of_labels(table: Mapping[str, Sequence[Any]]) -> list[set[str]]:
    """By label, all keys that belong to this class alone."""
    labels: dict[str, set[int]] = defaultdict(set)
    for column in [*table.values(), [spoken(name) for name in table["class_name"]]]:
        for label, value in enumerate(column):
            if isinstance(value, str):
                labels[_key(value)].add(label)
    keys: list[set[str]] = [set() for _ in table["class_name"]]
    for key, owners in labels.items():
        if len(owners) == 1:
            keys[min(owners)].add(key)
    return keys


def _names_of_object(names: dict[str, Any], path: str | Path) -> dict[str, tuple[str, ...]]:
    found = {}
    for key, value in names.items():
        several = [value] if isinstance(value, str) else value
        if not isinstance(several, list) or not several or not all(_is_name(name) for name in several):
            raise UserError(f"{path}: class {key!r} must have a name or a list of names, not {value!r}")
        found[_key(key)] = tuple(several)
    return found


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _by_name(
    names: Mapping[str, tuple[str, ...]], table: Mapping[str, Sequence[Any]], path: str | Path, folder: str | Path
) -> tuple[tuple[str, ...], ...]:
    """By label; classes of the file that the set does not have are left out."""
    found = [next((names[key] for key in sorted(keys & names.keys())), None) for keys in _keys_of_labels(table)]
    missing = [label for label, one in enumerate(found) if one is None]
    if missing:
        first = missing[0]
        called = " or ".join(
            dict.fromkeys(repr(column[first]) for column in table.values() if isinstance(column[first], str))
        )
        more = f" and {len(missing) - 1:,} more classes" if len(missing) > 1 else ""
        raise UserError(f"{path} names no class {called}{more} of {folder}, which has {len(found):,}")
    return tuple(found)


def _of_list(
    names: Any, table: Mapping[str, Sequence[Any]], path: str | Path, folder: str | Path
) -> tuple[tuple[str, ...], ...]:
    if not isinstance(names, list) or not all(_is_name(name) for name in names):
        raise UserError(f"{path}: classes must be a list of names, or an object from classes to names: want {_FORM}")
    keys = _keys_of_labels(table)
    found = {_key(name): (name,) for name in names}
    if all(own & found.keys() for own in keys):
        return _by_name(found, table, path, folder)
    if len(names) != len(keys):
        raise UserError(
            f"{path} lists {len(names):,} classes, {folder} has {len(keys):,}: want as many, in the order of its "
            "labels, or the name of each"
        )
    _assert_order(names, keys, path, folder)
    return tuple((name,) for name in names)


def _assert_order(names: Sequence[str], keys: Sequence[set[str]], path: str | Path, folder: str | Path) -> None:
    """Raise UserError where more of the names are those of other labels than of their own."""
    label_of = {key: label for label, own in enumerate(keys) for key in own}
    known = [(place, label_of[_key(name)]) for place, name in enumerate(names) if _key(name) in label_of]
    wrong = [(place, label) for place, label in known if place != label]
    if 2 * len(wrong) > len(known):
        place, label = wrong[0]
        raise UserError(
            f"{path} lists {names[place]!r} as class {place}, in {folder} it is class {label}: list the names in the "
            "order of its labels, or give an object from its classes to names"
        )
