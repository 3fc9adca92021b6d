"""Tables of results."""

import pytest

from emkum.evaluation.report import format_table, retrieval_table

METRICS = {"i2t_r1": 11.64, "i2t_r5": 30.1, "i2t_r10": 40.6, "t2i_r1": 8.6, "t2i_r5": 25.1, "t2i_r10": 36.25}


def test_plain_table():
    rows = [{"name": "a", "x": 1.25, "n": 3}, {"name": "longer", "x": 100.0}, {"name": "none", "x": None, "n": 12}]
    assert format_table(rows, {"name": "", "x": "R@1", "n": "count"}).splitlines() == [
        "          R@1  count",
        "--------------------",
        "a         1.2      3",
        "longer  100.0      -",
        "none        -     12",
    ]


def test_markdown_table_escapes_bars():
    rows = [{"name": "a|b\nc", "x": 0.5}]
    assert format_table(rows, ["name", "x"], decimals=2, markdown=True).splitlines() == [
        "| name   |    x |",
        "| ------ | ---: |",
        "| a\\|b c | 0.50 |",
    ]


def test_table_without_rows_or_columns():
    assert format_table([], ["name"]).splitlines() == ["name", "----"]
    with pytest.raises(ValueError, match="at least one column"):
        format_table([], [])


def test_retrieval_table_puts_chance_first():
    lines = retrieval_table({"ITC": METRICS | {"mean_recall": 25.4}, "chance": METRICS, "A": METRICS}).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["chance", "ITC", "A"]
    assert lines[3].split() == ["ITC", "11.6", "30.1", "40.6", "8.6", "25.1", "36.2", "25.4"]
    assert lines[2].split()[-1] == "-"
