"""Tables, pictures and the training log they are drawn from."""

import pytest
from PIL import Image

from emkum.evaluation.figures import loss_curves, retrieval_examples
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


def draw_examples(path):
    images = {row: Image.new(mode, size, 90) for row, mode, size in [(0, "RGB", (60, 40)), (1, "L", (30, 90))]}
    captions = ["costs $5 or $6_x ; a <b> & c .", "a very long caption " * 20, "short", "\u732b"]
    return retrieval_examples(path, images, captions, {1: [2, 0, 1]}, {0: [0, 1], 2: [1, 0]}, [0, 0, 1, 1])


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
@pytest.mark.parametrize("name", ["examples", "examples.png", "examples.svg", "run-1.5"])
def test_retrieval_examples_writes_both_kinds_and_nothing_else(tmp_path, name):
    written = draw_examples(tmp_path / "new" / name)
    stem = name.removesuffix(".png").removesuffix(".svg")
    assert [path.name for path in written] == [f"{stem}.png", f"{stem}.svg"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [f"{stem}.png", f"{stem}.svg"]
    with Image.open(written[0]) as picture:
        assert picture.width == 1440
    assert "<svg" in written[1].read_text(encoding="utf-8")


def test_an_interrupted_picture_leaves_the_old_one(tmp_path, monkeypatch):
    target = draw_examples(tmp_path / "examples")[0]
    before = target.read_bytes()

    def fail(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_examples(tmp_path / "examples")
    assert target.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["examples.png", "examples.svg"]


def test_retrieval_examples_needs_a_query(tmp_path):
    with pytest.raises(ValueError, match="at least one query"):
        retrieval_examples(tmp_path / "none", [], [], {}, {}, [])


def test_loss_curves(tmp_path):
    run = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": float("nan"), "mean_recall": 4.0}, {"step": 3, "loss": 2.0}]
    written = loss_curves(tmp_path / "curves.png", {"one": run, "two": run[:1]}, ["loss", "mean_recall"])
    assert all(path.stat().st_size > 1000 for path in written)
    with pytest.raises(ValueError, match="no run has 'lose'; there are loss, mean_recall"):
        loss_curves(tmp_path / "curves.png", {"one": run}, ["lose"])
    with pytest.raises(ValueError, match="at least one key and one run"):
        loss_curves(tmp_path / "curves.png", {}, ["loss"])
