"""What `emkum model info` tells, for the terminal and as plain data."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from textwrap import fill
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emkum.models.model_info import InputSizes, MemoryEstimate, Part

LINE_WIDTH = 110


@dataclass
class Report:
    """What is told of a student.

    Attributes:
        source: file that it is built from.
        parts: its parts, with the objectives' beside them.
        sizes: of its input.
        flops: operations of one forward, by kind of input.
        batch_size: images of a training batch.
        memory: that this takes.
        scale: statistics of the LayerScale of a checkpoint's token types; None where there is none.
        notes: what was assumed or left out.
    """

    source: str
    parts: "Part"
    sizes: "InputSizes"
    flops: dict[str, int]
    batch_size: int
    memory: "MemoryEstimate"
    scale: dict[str, float] | None = None
    notes: list[str] = field(default_factory=list)


def report_lines(report: Report) -> Iterator[str]:
    """What `examine` found, for the terminal."""
    yield f"{report.source}\n"
    yield from part_lines(report.parts)
    yield "\noperations of a forward (a multiplication and an addition count as two)"
    side, tokens = report.sizes.image_size, report.sizes.tokens
    inputs = {"image": f"image of {side} x {side} pixels", "caption": f"caption of {tokens} tokens"}
    inputs["sound"] = f"sound of {report.sizes.samples:,} samples"
    yield from _aligned({inputs[kind]: f"{count / 1e9:,.3f} GFLOPs" for kind, count in report.flops.items()})
    each = "1 caption" if report.sizes.captions == 1 else f"{report.sizes.captions} captions"
    each = f"{each} of {tokens} tokens" + (" and a sound" if report.sizes.samples else "")
    yield f"\nmemory of training, an estimate: float32, {report.batch_size:,} images with {each} each"
    names = _MEMORY | {"total": "sum"}
    yield from _aligned({label: f"{getattr(report.memory, name) / 1e6:,.1f} MB" for name, label in names.items()})
    if report.scale is not None:
        yield "\nLayerScale of the token types"
        for prefix, label in (("", "values"), ("absolute_", "absolute")):
            figures = (f"{name} {report.scale[prefix + name]:.3e}" for name in ("mean", "std", "min", "max"))
            yield f"  {label:<10}{'  '.join(figures)}"
    yield ""
    yield from (fill(f"note: {note}", LINE_WIDTH, subsequent_indent="      ") for note in report.notes)


# Fields of MemoryEstimate in words.
_MEMORY = {
    "weights": "weights",
    "buffers": "buffers (banks, fixed tables)",
    "gradients": "gradients",
    "moments": "Adam's two moments",
    "activations": "activations kept for the backward pass",
}


# Names of parts that say little out of their context.
_WORDS = {"before": "added before the encoders", "after": "added behind the encoders"}


def part_lines(whole: "Part") -> Iterator[str]:
    """A tree of parts, one a line, and their sum."""
    rows = [("part", "parameters", "trainable", "frozen", "made as")]
    rows += [row for part in whole.parts for row in _rows(part, 0)]
    rows += _rows(replace(whole, parts=()), 0)
    name, *numbers, kind = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ["  ".join([f"{row[0]:<{name}}", *map(str.rjust, row[1:4], numbers), row[4]]).rstrip() for row in rows]
    rule = "-" * (name + sum(numbers) + kind + 8)
    yield from (lines[0], rule, *lines[1:-1], rule, lines[-1])


def _rows(part: "Part", level: int) -> Iterator[tuple[str, ...]]:
    numbers = (f"{number:,}" if number else "-" for number in (part.parameters, part.trainable, part.frozen))
    yield "  " * level + _WORDS.get(part.name, part.name), *numbers, part.kind
    for inner in part.parts:
        yield from _rows(inner, level + 1)


def _aligned(lines: Mapping[str, str]) -> Iterator[str]:
    left, right = max(map(len, lines)), max(map(len, lines.values()))
    return (f"  {name:<{left}}  {value:>{right}}" for name, value in lines.items())


def report_record(report: Report) -> dict[str, Any]:
    """What `examine` found, as plain data; sizes of memory are in bytes."""
    from emkum.provenance import package_versions

    return {
        "source": report.source,
        "parts": asdict(report.parts),
        "input": asdict(report.sizes),
        "flops": report.flops,
        "memory_estimate": asdict(report.memory) | {"total": report.memory.total, "batch_size": report.batch_size},
        "token_type_scale": report.scale,
        "notes": report.notes,
        "versions": package_versions(),
    }
