"""The report of `emkum reproduce`: one page, as Markdown and as one HTML file."""

import base64
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from emkum.commands.finetune import Scoring
from emkum.commands.reproduce_plan import RETRIEVAL, ZERO_SHOT, Catalog, Given, Variant
from emkum.commands.reproduce_runs import Result
from emkum.commands.study import PACKAGES
from emkum.evaluation.curves_figure import logged_keys, loss_curves, part_pairs
from emkum.evaluation.effects import compare, mean_and_deviation, same_direction
from emkum.evaluation.fraction_figure import fraction_curves
from emkum.evaluation.html_page import html_page
from emkum.evaluation.report import format_table, html_table
from emkum.files import replaced_file
from emkum.provenance import machine_in_words

# What is measured: key in a log -> name in a table.
FIGURES = {
    "mean_recall": "mean recall",
    "i2t_r1": "i2t R@1",
    "t2i_r1": "t2i R@1",
    "zero_shot_top1": "zero-shot top-1",
}
# Of the thesis's figures: key -> name, and what they are compared by here.
THESIS = {"coco": "COCO", "flickr30k": "Flickr30k", "imagenet": "IN-1K"}
_MEASURES = {RETRIEVAL: ("mean_recall", ("coco", "flickr30k")), ZERO_SHOT: ("zero_shot_top1", ("imagenet",))}
_PARTS = re.compile(r"_(i2t|t2i|image|text)_loss$")


@dataclass(frozen=True)
class Findings:
    """What there is to tell.

    Attributes:
        catalog: of rows. given: what the user asked for. variants: those chosen.
        whose: by the key of a variant, that of the one whose runs are its runs.
        results: of finished runs, by key of their variant and seed.
        scoring: of the runs. planned: number of runs. words: of the user.
    """

    catalog: Catalog
    given: Given
    variants: Sequence[Variant]
    whose: Mapping[str, str]
    results: Mapping[tuple[str, int], Result]
    scoring: Scoring
    planned: int
    words: Sequence[str]

    def of(self, key: str) -> list[Result]:
        """Results of a variant, in the order of their seeds."""
        owner = self.whose.get(key)
        return [self.results[each] for each in sorted(self.results) if each[0] == owner]

    def values(self, key: str, figure: str) -> list[float]:
        return [result.figures[figure] for result in self.of(key) if figure in result.figures]


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Table:
    rows: Sequence[Mapping[str, Any]]
    columns: Mapping[str, str]


@dataclass(frozen=True)
class Picture:
    """A figure; `path` is that of its PNG, and its SVG lies beside it."""

    path: Path
    about: str


Block = Heading | Table | Picture | str


def write_report(out: Path, findings: Findings) -> list[Path]:
    """Write report.md and report.html, and the figures beside them."""
    blocks = list(_blocks(out, findings))
    title = f"The study's rows on {findings.given.setup.title}"
    files = {"report.md": _markdown(title, blocks, out), "report.html": _html(title, blocks)}
    for name, text in files.items():
        with replaced_file(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [out / name for name in files]


def _blocks(out: Path, findings: Findings) -> Iterator[Block]:
    yield from _about(findings)
    if not findings.results:
        yield "No run is finished yet."
        return
    yield from _figures(findings)
    yield from _effects(findings)
    yield from _data(out, findings)
    yield from _curves(out, findings)
    yield from _cost(findings)


# ----------------------------------------------------------------------------------------------------------------------
# Words and tables
# ----------------------------------------------------------------------------------------------------------------------


def _name(variant: Variant) -> str:
    return f"{variant.row} {variant.title}" + (f": {variant.preset}" if variant.preset else "")


def _about(findings: Findings) -> Iterator[Block]:
    given, scoring = findings.given, findings.scoring
    # A page does not tell where things lie on the machine.
    words = [f"{word.partition('=')[0]}=PATH" if "/" in word else word for word in findings.words]
    updates = sorted({int(result.record["options"]["max_update"]) for result in findings.results.values()})
    chosen = (
        f"at the last update on the split {scoring.scored}"
        if scoring.chosen_by is None
        else f"on the split {scoring.scored}, at the validation with the best mean recall on {scoring.chosen_by}"
    )
    yield (
        f"{len(findings.results)} of {findings.planned} runs are finished, with the recipes' preset "
        f"{given.setup.preset}"
        + (f" and {shlex.join(words)}" if words else "")
        + (f", of {', '.join(map(str, updates))} updates each" if updates else "")
        + f". Figures are percentages, {chosen}; mean recall is over R@1, 5 and 10 both ways. ± is the standard "
        "deviation over seeds. The thesis's figures are of base models, 3.26 million pairs and other test sets: what "
        "can be compared with them is the direction of effects, not the figures."
    )
    for kind, thesis in findings.catalog.teachers.items():
        rows = list(dict.fromkeys(variant.row for variant in findings.variants if variant.teacher == kind))
        if rows:
            here = given.options.get("teacher") and "the teacher that was given" or given.setup.teachers[kind]
            yield f"Teacher of {_rows(rows)}. In the thesis: {thesis}. Here: {here}."
    without = list(dict.fromkeys(variant.row for variant in findings.variants if variant.teacher is None))
    if without:
        yield f"Without a teacher: {_rows(without)}."
    names = {variant.key: variant for variant in findings.variants}
    for owner in dict.fromkeys(findings.whose.values()):
        sharing = [names[key] for key, other in findings.whose.items() if other == owner]
        if len(sharing) > 1:
            yield f"The same options, and so the same runs: {'; '.join(map(_name, sharing))}."


def _rows(numbers: Sequence[str]) -> str:
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"


def _with_spread(values: Sequence[float]) -> str | None:
    if not values:
        return None
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def _figures(findings: Findings) -> Iterator[Block]:
    yield Heading("Figures")
    rows, there = [], []
    for variant in findings.variants:
        row: dict[str, Any] = {"name": _name(variant), "seeds": len(findings.of(variant.key))}
        for key in FIGURES:
            values = findings.values(variant.key, key)
            there += [key] if values else []
            row[key] = _with_spread(values)
        rows.append(row | {key: f"{value:g}" for key, value in variant.thesis.items()})
    columns = {"name": "row", "seeds": "seeds"} | {key: name for key, name in FIGURES.items() if key in there}
    yield Table(rows, columns | {key: f"thesis: {name}" for key, name in THESIS.items()})


def _effects(findings: Findings) -> Iterator[Block]:
    yield Heading("Effects")
    chosen = {variant.key: variant for variant in findings.variants}
    rows, alone = [], []
    for variant in findings.variants:
        for other in variant.against:
            if other not in chosen:
                alone.append(f"{variant.key} against {other}")
                continue
            for measure, (figure, thesis) in _MEASURES.items():
                rows += _effect(findings, variant, chosen[other], measure, figure, thesis)
    if rows:
        yield (
            "A difference of means over seeds, in points, with its 95 % interval by Welch's t test, which takes the "
            "two groups of runs as independent. Within noise: the difference is smaller than half the interval, so "
            "that these runs do not tell its sign. Unknown: fewer than two seeds. Nothing is corrected for the number "
            "of comparisons: of twenty without any effect, one is expected outside its interval."
        )
        columns = {"name": "row", "against": "against", "figure": "figure", "difference": "difference"}
        columns |= {"margin": "±", "finding": "finding", "thesis": "the thesis's", "told": "its figures"}
        yield Table(rows, columns | {"same": "same direction"})
    if alone:
        yield f"Not compared, since only one side was chosen: {'; '.join(alone)}."


def _effect(
    findings: Findings, variant: Variant, other: Variant, measure: str, figure: str, thesis: Sequence[str]
) -> Iterator[dict[str, Any]]:
    values, others = findings.values(variant.key, figure), findings.values(other.key, figure)
    if not values or not others:
        return
    row: dict[str, Any] = {"name": _name(variant), "against": _name(other), "figure": FIGURES[figure]}
    both = [key for key in thesis if key in variant.thesis and key in other.thesis]
    row["told"] = ", ".join(f"{THESIS[key]} {variant.thesis[key] - other.thesis[key]:+.1f}" for key in both) or None
    expected = variant.expected.get(measure)
    row["thesis"] = expected
    if findings.whose[variant.key] == findings.whose[other.key]:
        yield row | {"finding": "the same runs", "same": "not told"}
        return
    effect = compare(values, others)
    margin = None if effect.margin is None else f"{effect.margin:.2f}"
    row |= {"difference": f"{effect.difference:+.2f}", "margin": margin, "finding": effect.finding}
    yield row | {"same": same_direction(effect.finding, expected)}


def _cost(findings: Findings) -> Iterator[Block]:
    yield Heading("Cost")
    rows, seen = [], set()
    for variant in findings.variants:
        owner, results = findings.whose[variant.key], findings.of(variant.key)
        if owner in seen or not results:
            continue
        seen.add(owner)
        rows.append({"name": _name(variant), "parameters": _millions(results)} | _spent(results))
    columns = {"name": "row", "parameters": "parameters, M", "seconds": "seconds a run", "pairs": "pairs/s"}
    yield Table(rows, columns | {"memory": "peak MiB", "cpu": "CPU, kJ a run", "gpu": "GPU, kJ a run"})
    records = [result.record for result in findings.results.values()]
    machines = dict.fromkeys(machine_in_words(record["machine"], PACKAGES) for record in records)
    total = sum(result.record["seconds"] or 0 for result in findings.results.values())
    yield (
        f"On {' and on '.join(machines)}. All runs took {total / 60:.1f} minutes together; preparing is not among it. "
        "Seconds are by the clock, start and validations included, over all parts of a run that was stopped; pairs of "
        "image and caption a second, without them. Peak is the resident memory of the largest process. Energy is the "
        "whole machine's, by RAPL counters and nvidia-smi, other work included."
    )


def _millions(results: Sequence[Result]) -> str | None:
    numbers = {result.parameters for result in results if result.parameters is not None}
    return ", ".join(f"{number / 1e6:.2f}" for number in sorted(numbers)) or None


def _spent(results: Sequence[Result]) -> dict[str, Any]:
    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    joules = {name: mean([result.record["joules"].get(name) for result in results]) for name in ("cpu", "gpu")}
    energy = {name: "not readable" if value is None else f"{value / 1e3:.1f}" for name, value in joules.items()}
    memory = mean([result.record["memory"] for result in results])
    seconds = mean([result.record["seconds"] for result in results])
    return {
        "seconds": None if seconds is None else round(seconds),
        "pairs": mean([result.pairs for result in results]),
        "memory": None if memory is None else round(memory),
    } | energy


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------


def _data(out: Path, findings: Findings) -> Iterator[Block]:
    """Figures over the part of the data, of rows whose variants differ in it."""
    for row in dict.fromkeys(variant.row for variant in findings.variants):
        panels: dict[str, dict[float, list[float]]] = {}
        for variant in findings.variants:
            for result in findings.of(variant.key) if variant.row == row else ():
                part = float(result.record["options"].get("data_fraction", 1.0))
                for key in ("mean_recall", "zero_shot_top1"):
                    if key in result.figures:
                        panels.setdefault(f"{FIGURES[key]}, %", {}).setdefault(part, []).append(result.figures[key])
        if panels and len(next(iter(panels.values()))) > 1:
            yield Heading(f"Row {row}: parts of the data")
            path, _ = fraction_curves(out / "figures" / f"row{row}_data", panels)
            yield Picture(path, "Each run, the mean over seeds and its standard deviation; equal numbers of updates.")


def _curves(out: Path, findings: Findings) -> Iterator[Block]:
    """What each row's runs and those it is compared with have learned, over updates."""
    yield Heading("Curves")
    yield "Means over seeds. Losses are those of training, the image's part on the left and the text's on the right."
    for row in dict.fromkeys(variant.row for variant in findings.variants):
        own = [variant for variant in findings.variants if variant.row == row]
        keys = dict.fromkeys([*(other for variant in own for other in variant.against), *(each.key for each in own)])
        histories = {}
        for key in keys:
            history = mean_history([_history(result, findings.scoring) for result in findings.of(key)])
            if history:
                histories[key] = history
        shown = _shown(histories)
        if not shown:
            continue
        path, _ = loss_curves(out / "figures" / f"row{row}", histories, shown)
        yield Picture(path, f"Row {row}, {own[0].title}")


def _history(result: Result, scoring: Scoring) -> list[dict[str, float]]:
    """Losses while training, and recall at validations."""
    losses = [
        {key: value for key, value in record.items() if key == "step" or _PARTS.search(key)}
        for record in result.histories.get("train_inner", [])
    ]
    scored = result.histories[scoring.scored]
    return losses + [{"step": record["step"], "mean_recall": record["mean_recall"]} for record in scored]


def mean_history(histories: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """Records of several runs, averaged at each update that all of them have."""
    found: dict[str, dict[float, list[float]]] = {}
    for history in histories:
        for record in history:
            for key, value in record.items():
                if key != "step":
                    found.setdefault(key, {}).setdefault(record["step"], []).append(value)
    return [
        {"step": step, key: sum(values) / len(values)}
        for key, by_step in found.items()
        for step, values in sorted(by_step.items())
        if len(values) == len(histories)
    ]


def _shown(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str | tuple[str, str]]:
    """Losses whose image and text parts are both there, side by side, and the recall."""
    there = logged_keys(histories)
    return [*part_pairs(there), *(key for key in ("mean_recall",) if key in there)]


# ----------------------------------------------------------------------------------------------------------------------
# Pages
# ----------------------------------------------------------------------------------------------------------------------


def _markdown(title: str, blocks: Sequence[Block], out: Path) -> str:
    parts = [f"# {title}"]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"## {block.text}")
        elif isinstance(block, Table):
            parts.append(format_table(block.rows, block.columns, markdown=True))
        elif isinstance(block, Picture):
            parts.append(f"![{block.about}]({block.path.relative_to(out).as_posix()})\n\n{block.about}")
        else:
            parts.append(block)
    return "\n\n".join(parts) + "\n"


def _html(title: str, blocks: Sequence[Block]) -> str:
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"<h2>{escape(block.text)}</h2>")
        elif isinstance(block, Table):
            parts.append(f'<div class="wide">{html_table(block.rows, block.columns)}</div>')
        elif isinstance(block, Picture):
            # Within an image, the names inside of one figure do not meet those of another.
            content = base64.b64encode(block.path.with_suffix(".svg").read_bytes()).decode("ascii")
            image = f'<img alt="{escape(block.about)}" src="data:image/svg+xml;base64,{content}">'
            parts.append(f"<figure>{image}<figcaption>{escape(block.about)}</figcaption></figure>")
        else:
            parts.append(f"<p>{escape(block)}</p>")
    return html_page(title, parts)
