"""Tables of results, for the terminal and for Markdown."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

CHANCE = "chance"

# What the two directions of retrieval are called, images to captions first.
WAYS = ("i2t", "t2i")


def format_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str] | Sequence[str],
    decimals: int = 1,
    markdown: bool = False,
) -> str:
    """A table with one line a row.

    Args:
        rows: values by key; a missing key or None is shown as "-".
        columns: the keys to show, in order; a mapping gives each its heading.
        decimals: digits behind the point of floats. Integers and texts are shown as they are.
        markdown: a Markdown table; otherwise plain text in aligned columns.

    Returns:
        The table, without a newline at its end. Columns that hold numbers alone are aligned to the right.
    """
    headings = dict(columns) if isinstance(columns, Mapping) else {key: key for key in columns}
    if not headings:
        raise ValueError("a table needs at least one column")
    cells = [[_cell(row.get(key), decimals, markdown) for key in headings] for row in rows]
    head = [_cell(heading, decimals, markdown) for heading in headings.values()]
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    right = [_is_numeric([row.get(key) for row in rows]) for key in headings]
    return "\n".join(_markdown(head, cells, widths, right) if markdown else _plain(head, cells, widths, right))


def named_ways(metrics: Mapping[str, Any], ways: Sequence[str]) -> dict[str, Any]:
    """Figures of retrieval, whose names begin with one of WAYS, by the names of other directions."""
    names = dict(zip(WAYS, ways, strict=True))
    renamed = {}
    for key, value in metrics.items():
        way, mark, figure = key.partition("_")
        renamed[names.get(way, way) + mark + figure] = value
    return renamed


def html_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], decimals: int = 1) -> str:
    """The table of `format_table` as HTML; numbers have the class "number"."""
    kinds = [' class="number"' if _is_numeric([row.get(key) for row in rows]) else "" for key in columns]
    head = "".join(f"<th{kind}>{escape(text)}</th>" for kind, text in zip(kinds, columns.values(), strict=True))
    lines = [
        "".join(
            f"<td{kind}>{escape(_cell(row.get(key), decimals, False))}</td>"
            for kind, key in zip(kinds, columns, strict=True)
        )
        for row in rows
    ]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def retrieval_table(
    results: Mapping[str, Mapping[str, Any]], markdown: bool = False, ways: Sequence[str] = WAYS
) -> str:
    """Retrieval results by name, as `recall_metrics` returns them, in percent.

    Args:
        results: metrics by the name of a model; the entry "chance", where there is one, comes first.
        markdown: as for `format_table`.
        ways: what the directions are called.
    """
    recalls = {f"{way}_r{k}": f"{way} R@{k}" if k == 1 else f"R@{k}" for way in ways for k in (1, 5, 10)}
    columns = {"name": "", **recalls, "mean_recall": "mean"}
    names = sorted(results, key=lambda name: name != CHANCE)
    return format_table([{"name": name, **results[name]} for name in names], columns, markdown=markdown)


def rank_summary(metrics: Mapping[str, Any], ways: Sequence[str] = WAYS) -> str:
    """Two lines to stand below `retrieval_table`.

    Args:
        metrics: of `retrieval_metrics` and `average_median_rank`.
        ways: what the directions are called.
    """

    def both(figure: str) -> str:
        return ", ".join(f"{way} {metrics[f'{way}_{figure}']:.1f}" for way in ways)

    drawn = f"{metrics['average_median_rank_draws']} x {metrics['average_median_rank_images']:,} pairs"
    return (
        f"median rank: {both('median_rank')}; mean rank: {both('mean_rank')}\n"
        f"average median rank of {drawn}: {both('average_median_rank')}"
    )


def _cell(value: Any, decimals: int, markdown: bool) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.{decimals}f}"
    text = " ".join(str(value).split())
    return text.replace("|", "\\|") if markdown else text


def _is_numeric(values: Sequence[Any]) -> bool:
    present = [value for value in values if value is not None]
    return bool(present) and all(isinstance(value, int | float) for value in present)


def _pad(line: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    return [
        cell.rjust(width) if to_right else cell.ljust(width)
        for cell, width, to_right in zip(line, widths, right, strict=True)
    ]


def _plain(head: list[str], cells: list[list[str]], widths: list[int], right: list[bool]) -> list[str]:
    lines = ["  ".join(_pad(line, widths, right)).rstrip() for line in [head, *cells]]
    return [lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]]


def _markdown(head: list[str], cells: list[list[str]], widths: list[int], right: list[bool]) -> list[str]:
    widths = [max(width, 3) for width in widths]
    rule = ["-" * (width - 1) + (":" if to_right else "-") for width, to_right in zip(widths, right, strict=True)]
    lines = [_pad(head, widths, right), rule, *(_pad(line, widths, right) for line in cells)]
    return ["| " + " | ".join(line) + " |" for line in lines]
