"""Queries drawn by a seed, and their picture."""

from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from emkum.evaluation.figure_style import RIGHT_MARK, WRONG_MARK
from emkum.evaluation.retrieval_figure import Example, choose_queries, retrieval_examples
from tests.figure_checks import assert_readable, shown_texts

CAPTIONS = ["costs $5 or $6_x ; a <b> & c .", "a very long caption " * 20, "short", "\u732b", "x" * 300]
OWNER = [0, 0, 1, 1, 0]


def draw(path: Path, images: dict[int, Image.Image] | None = None) -> list[Path]:
    images = images or {0: Image.new("RGB", (60, 40), 90), 1: Image.new("L", (30, 90), 90)}
    queries = [Example(1, [2, 0, 1], 1), Example(0, [3, 2], 4), Example(1, [0], None)]
    texts = [Example(0, [0, 1], 1), Example(1, [1], 2), Example(2, [1, 0], 1), Example(4, [1], 2)]
    return retrieval_examples(path, images, CAPTIONS, queries, texts, OWNER, {"i2t": "34.0 % of 2 queries right"})


def test_queries_are_half_failures() -> None:
    ranks = torch.tensor([0, 3, 0, 0, 7, 0, 2, 0, 0, 5])
    for count, right in ((4, 2), (5, 3), (1, 1), (2, 1)):
        chosen = choose_queries(ranks, count, seed=1)
        assert len(set(chosen)) == count and (ranks[chosen] == 0).tolist() == [True] * right + [False] * (count - right)
    assert choose_queries(ranks, 4, seed=1) == choose_queries(ranks, 4, seed=1)
    drawn = {row for seed in range(40) for row in choose_queries(ranks, 4, seed)}
    assert drawn == set(range(10))


def test_where_one_kind_is_short_the_other_fills_up() -> None:
    assert choose_queries(torch.tensor([0, 1, 1, 1, 1]), 4, seed=0)[0] == 0
    assert len(choose_queries(torch.tensor([0, 1, 1, 1, 1]), 4, seed=0)) == 4
    assert len(choose_queries(torch.zeros(9), 4, seed=0)) == 4
    assert choose_queries(torch.tensor([0, 1]), 8, seed=0) == [0, 1]
    assert set(choose_queries(torch.zeros(9), 9, seed=0, rows=torch.tensor([2, 5]))) == {2, 5}
    assert choose_queries(torch.zeros(0), 2, seed=0) == []


def test_the_picture_is_readable_and_marked(tmp_path: Path, drawn: list[Figure]) -> None:
    draw(tmp_path / "examples")
    assert_readable(drawn[0])
    texts = [text.get_text() for text in shown_texts(drawn[0])]
    # Of two directions a key each; of four rows of captions and six images, right ones.
    assert texts.count(RIGHT_MARK) == 1 + 2 and texts.count(WRONG_MARK) == 5 + 4
    assert texts.count("the right one: rank 4") == 1 and texts.count("the right one: rank 2") == 2
    assert "Image to text: 34.0 % of 2 queries right" in texts


def test_the_whole_image_is_shown(tmp_path: Path, drawn: list[Figure]) -> None:
    """Its four corners are where they belong, whatever its proportions."""
    image = Image.new("RGB", (300, 100))
    image.putpixel((299, 99), (255, 0, 0))
    draw(tmp_path / "examples", {0: image, 1: image})
    shown = [axes for axes in drawn[0].axes if axes.images]
    assert len(shown) == 3 + 6
    for axes in shown:
        height, width = axes.images[0].get_array().shape[:2]
        assert (width, height) == (224, 75)
        assert axes.get_xlim() == (-0.5, width - 0.5) and axes.get_ylim() == (height - 0.5, -0.5)
        assert axes.get_aspect() == 1


@pytest.mark.parametrize("name", ["examples", "examples.png", "examples.svg", "run-1.5"])
def test_both_kinds_are_written_and_nothing_else(tmp_path: Path, name: str) -> None:
    written = draw(tmp_path / "new" / name)
    stem = name.removesuffix(".png").removesuffix(".svg")
    assert [path.name for path in written] == [f"{stem}.png", f"{stem}.svg"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [f"{stem}.png", f"{stem}.svg"]
    with Image.open(written[0]) as picture:
        assert picture.width == 2070  # 6.9 inches of 300 pixels
    assert "<svg" in written[1].read_text(encoding="utf-8")


def test_an_interrupted_picture_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = draw(tmp_path / "examples")[0]
    before = target.read_bytes()

    def fail(self: Figure, path: Path, **kwargs: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw(tmp_path / "examples")
    assert target.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["examples.png", "examples.svg"]


def test_a_query_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one query"):
        retrieval_examples(tmp_path / "none", [], [], [], [], [])
