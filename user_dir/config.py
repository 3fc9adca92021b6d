"""Flat fairseq dataclasses out of the parts' own: each option is written once, in its part."""

from dataclasses import MISSING, field, make_dataclass
from typing import Optional

from fairseq.dataclass import FairseqDataclass

from emkum.options import flat_fields


def flat_dataclass(name: str, parts: dict[str, type], base: type = FairseqDataclass) -> type:
    """A fairseq dataclass with every option of the parts under its prefix, after those of `base`.

    Raises:
        ValueError: an option name is taken, or a flag would be a `bool` with default True (argparse turns that into a
            flag that sets False).
    """
    taken = set(base.__dataclass_fields__)
    entries = []
    for flat_name, item in flat_fields(parts):
        if flat_name in taken:
            raise ValueError(f"option {flat_name} of {name} is defined twice")
        if item.type is bool and item.default is not False:
            raise ValueError(f"option {flat_name} of {name} must default to False")
        if item.default is MISSING or "help" not in item.metadata:
            raise ValueError(f"option {flat_name} of {name} needs a default and a help text")
        # fairseq hands an empty string on as null, which only an optional field takes.
        kind, default = (Optional[str], None) if item.default == "" else (item.type, item.default)
        entries.append((flat_name, kind, field(default=default, metadata=dict(item.metadata))))
    made = make_dataclass(name, entries, bases=(base,))
    made.__module__ = __name__
    return made
