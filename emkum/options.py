"""Flat, prefixed options out of the parts' own config dataclasses, and back.

Each option is written once, as a field of its part's dataclass with `metadata={"help": ...}`. Command lines, recipes
and checkpoints hold them flat, as `PREFIX_NAME`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import Field, fields
from typing import Any


def flat_fields(parts: Mapping[str, type]) -> Iterator[tuple[str, Field]]:
    """Yield (flat name, dataclass field) for every option of the parts, given as prefix -> dataclass.

    Raises:
        ValueError: two options share a name.
    """
    seen: set[str] = set()
    for prefix, part in parts.items():
        for item in fields(part):
            name = f"{prefix}_{item.name}"
            if name in seen:
                raise ValueError(f"option {name} is defined twice")
            seen.add(name)
            yield name, item


def collect_parts(parts: Mapping[str, type], options: Any) -> dict[str, Any]:
    """Build each part's dataclass from flat options; an option that is absent keeps its default.

    Args:
        parts: prefix -> dataclass.
        options: a mapping, or an object with the options as attributes.
    """
    if not isinstance(options, Mapping):
        names = [name for name, _ in flat_fields(parts)]
        options = {name: getattr(options, name) for name in names if hasattr(options, name)}
    built = {}
    for prefix, part in parts.items():
        named = {item.name: f"{prefix}_{item.name}" for item in fields(part)}
        given = {name: options[flat] for name, flat in named.items() if flat in options}
        # None stands for an empty string, which fairseq's options cannot hold.
        built[prefix] = part(**{name: value for name, value in given.items() if value is not None})
    return built
