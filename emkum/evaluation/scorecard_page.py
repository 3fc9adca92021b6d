"""A scorecard as Markdown and as one HTML file that needs nothing else: no script, no font, no picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from emkum.evaluation.html_page import html_page
from emkum.evaluation.report import format_table
from emkum.provenance import machine_in_words


@dataclass(frozen=True)
class Figure:
    """One figure of a line.

    Attributes:
        name: in words. value: in `unit`.
        low, high: ends of its interval; None = it has none.
        chance: what says nothing reaches; None = not known.
        unit: "%", or empty.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    unit: str = "%"


# A finding's level -> how it is called on a page.
LEVELS = {"leak": "LEAK", "note": "note", "unknown": "unknown", "clean": "clean"}
_FAILED = "failed"


def plain_table(card: Mapping[str, Any]) -> str:
    """The first table for a terminal; `card` as for `markdown_page`."""
    return format_table(_summary(card), _COLUMNS)


def markdown_page(card: Mapping[str, Any]) -> str:
    """The page in Markdown.

    Args:
        card: title, about, checkpoint, suite; bootstrap with resamples, level and seed; machine as of
            `describe_machine`; lines, each with name, data, protocol, error (None = it has figures), figures (fields of
            `Figure`) and findings (level and text).
    """
    parts = [f"# {card['title']}", card["about"], f"Model: `{card['checkpoint']}`. Suite: `{card['suite']}`."]
    parts += [format_table(_summary(card), _COLUMNS, markdown=True), _legend(card)]
    for line in card["lines"]:
        parts += [f"## {line['name']}"]
        if line["error"]:
            parts += [f"Failed: {line['error']}"]
            continue
        parts += [f"{line['data']}. {_sentence(line['protocol'])}"]
        parts += [format_table([_row(each) for each in line["figures"]], _FIGURES, markdown=True)]
        parts += ["\n".join(f"- **{LEVELS[each['level']]}**: {each['text']}" for each in line["findings"])]
    return "\n\n".join(part for part in [*parts, _made_with(card)] if part) + "\n"


_COLUMNS = {"name": "Line", "data": "Scored on", "figure": "Figure", "value": "%", "interval": "95 % interval"}
_COLUMNS |= {"chance": "Chance", "leakage": "Leakage"}
_FIGURES = {"name": "Figure", "value": "Value", "interval": "95 % interval", "chance": "Chance"}


def _summary(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a line: its first figure, and the worst that is known of leakage."""
    rows = []
    for line in card["lines"]:
        if line["error"]:
            rows.append({"name": line["name"], "leakage": f"{_FAILED}: {line['error']}"})
            continue
        row, (level, told) = _row(line["figures"][0]), _worst(line)
        leakage = f"{LEVELS[level]}: {told}" if level else None
        rows.append(row | {"name": line["name"], "data": line["data"], "figure": row["name"], "leakage": leakage})
    return rows


def _row(figure: Mapping[str, Any]) -> dict[str, Any]:
    return {name: figure[name] for name in ("name", "value", "chance")} | {"interval": _interval(figure)}


def _interval(figure: Mapping[str, Any]) -> str | None:
    return None if figure["low"] is None else f"{figure['low']:.1f} to {figure['high']:.1f}"


def _worst(line: Mapping[str, Any]) -> tuple[str, str]:
    """Level of a line's first finding, which is its worst, and all of them in few words."""
    found = line["findings"]
    if not found:
        return "", ""
    # What is clean is of no interest beside what is not.
    told = [each["brief"] for each in found if each["level"] != "clean"] or [found[0]["brief"]]
    return found[0]["level"], "; ".join(dict.fromkeys(told))


def _legend(card: Mapping[str, Any]) -> str:
    bootstrap = card["bootstrap"]
    return (
        f"Intervals: {100 * bootstrap['level']:g} %, percentile bootstrap, {bootstrap['resamples']:,} resamples over "
        f"images (seed {bootstrap['seed']}): an image comes with its captions, and what queries are compared with "
        "(candidates, captions of classes, training images) stays fixed. They tell how figures would move with other "
        "images to ask about, not with other seeds of training. Ties count against the model everywhere. Leakage, as "
        "far as records tell it: LEAK, this very split was in training; note, something else to know; unknown, what "
        "cannot be told; clean, nothing found. The same photo in another size or encoding is not found."
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _made_with(card: Mapping[str, Any]) -> str:
    return f"Made on {machine_in_words(card['machine'], ('emkum', 'torch', 'timm'))}."


# ----------------------------------------------------------------------------------------------------------------------
# HTML
# ----------------------------------------------------------------------------------------------------------------------

_STYLE = """
:root { --bar: #3987e5; --band: #9ec5f4; --leak: #b42318; --note: #8a5a00; --unknown: #59636e; --clean: #1a7f37; }
@media (prefers-color-scheme: dark) {
  :root { --bar: #6da7ec; --band: #1f4f8a; --leak: #ff7b72; --note: #d9a441; --unknown: #9198a1; --clean: #56d364; } }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 1rem 1.1rem;
  margin: 1rem 0; }
section h2 { margin: 0 0 .25rem; }
ul { margin: .5rem 0 0; padding-left: 1.1rem; font-size: .9rem; } li { margin: .2rem 0; }
.level { font-weight: 600; white-space: nowrap; }
.leak, .failed { color: var(--leak); } .note { color: var(--note); } .unknown { color: var(--unknown); }
.clean { color: var(--clean); }
.track { position: relative; min-width: 8rem; height: .9rem; margin-top: .3rem; border-bottom: 1px solid var(--rule); }
.track i { position: absolute; top: 0; bottom: 0; }
.band { background: var(--band); border-radius: 2px; min-width: 2px; }
.point { width: 3px; margin-left: -1.5px; background: var(--bar); }
.chance { border-left: 1px dashed var(--soft); }
@media (max-width: 40rem) { .bar { display: none; } }
"""


def scorecard_html(card: Mapping[str, Any]) -> str:
    """The page in HTML; arguments as of `markdown_page`."""
    about = f"<p>{escape(card['about'])}</p>" if card["about"] else ""
    model = f"Model <code>{escape(card['checkpoint'])}</code>, suite <code>{escape(card['suite'])}</code>"
    parts = [about, f"<p>{model}</p>", _html_summary(card), f'<p class="soft">{_legend(card)}</p>']
    parts += [_html_line(line) for line in card["lines"]]
    return html_page(card["title"], [*parts, f'<p class="soft">{escape(_made_with(card))}</p>'], _STYLE)


def _html_summary(card: Mapping[str, Any]) -> str:
    rows = []
    for line in card["lines"]:
        name = f"<td>{escape(line['name'])}</td>"
        if line["error"]:
            rows.append(f'{name}<td colspan="6">{_level(_FAILED, _FAILED)}: {escape(line["error"])}</td>')
            continue
        figure, (level, told) = line["figures"][0], _worst(line)
        leakage = f"{_level(level, LEVELS[level])}: {escape(told)}" if level else "-"
        cells = [f"<td>{escape(line['data'])}</td>", f"<td>{escape(figure['name'])}</td>", *_numbers(figure)]
        rows.append(f"{name}{''.join(cells)}<td>{leakage}</td>")
    table = _html_table(["Line", "Scored on", "Figure", "#%", "#95 % interval", "#Chance", "Leakage"], rows)
    return f'<div class="wide">{table}</div>'


def _html_line(line: Mapping[str, Any]) -> str:
    title = f"<h2>{escape(line['name'])}</h2>"
    if line["error"]:
        return f"<section>{title}<p>{_level(_FAILED, _FAILED)}: {escape(line['error'])}</p></section>"
    about = f'<p>{escape(line["data"])}</p><p class="soft">{escape(_sentence(line["protocol"]))}</p>'
    rows = [
        f'<td>{escape(figure["name"])}</td>{"".join(_numbers(figure))}<td class="bar">{_bar(figure)}</td>'
        for figure in line["figures"]
    ]
    table = _html_table(["Figure", "#Value", "#95 % interval", "#Chance", "|0 to 100 %"], rows)
    found = [
        f"<li>{_level(each['level'], LEVELS[each['level']])}: {escape(each['text'])}</li>" for each in line["findings"]
    ]
    return f"<section>{title}{about}{table}<ul>{''.join(found)}</ul></section>"


def _html_table(heads: Sequence[str], rows: Sequence[str]) -> str:
    """Rows of cells; a heading with # before it is that of numbers, with | that of bars."""
    kinds = {"#": ' class="number"', "|": ' class="bar"'}
    cells = [f"<th{kinds.get(head[0], '')}>{head.lstrip('#|')}</th>" for head in heads]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{''.join(cells)}</tr></thead><tbody>{body}</tbody></table>"


def _numbers(figure: Mapping[str, Any]) -> list[str]:
    chance = "-" if figure["chance"] is None else f"{figure['chance']:.1f}"
    values = [f"{figure['value']:.1f}", _interval(figure) or "-", chance]
    return [f'<td class="number">{value}</td>' for value in values]


def _level(name: str, text: str) -> str:
    return f'<span class="level {name}">{text}</span>'


def _bar(figure: Mapping[str, Any]) -> str:
    """The value, its interval and chance on a line from 0 to 100 %; nothing for what is no percentage."""
    if figure["unit"] != "%":
        return ""
    parts = []
    if figure["low"] is not None:
        left, width = figure["low"], figure["high"] - figure["low"]
        parts.append(f'<i class="band" style="left:{left:.2f}%;width:{width:.2f}%"></i>')
    if figure["chance"] is not None:
        parts.append(f'<i class="chance" style="left:{figure["chance"]:.2f}%"></i>')
    parts.append(f'<i class="point" style="left:{figure["value"]:.2f}%"></i>')
    return f'<div class="track">{"".join(parts)}</div>'
