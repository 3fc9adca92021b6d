"""Usage of codes, and its picture."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from emkum.evaluation.clusters_figure import cluster_figure, code_usage, draw_members
from tests.figure_checks import assert_readable

CODES = np.array([3, 3, 1, 3, 1, 5, 5, 3])


def test_usage_by_hand() -> None:
    usage = code_usage(CODES, 7)
    assert usage.counts.tolist() == [0, 2, 0, 4, 0, 2, 0]
    assert usage.order.tolist() == [3, 1, 5, 0, 2, 4, 6]
    assert usage.used == 3
    # Entropy of 1/4, 1/2, 1/4 is 1.5 bits.
    assert usage.perplexity == pytest.approx(2**1.5)
    assert code_usage(np.arange(8), 8).perplexity == pytest.approx(8)
    assert code_usage(np.zeros(3, int), 8).perplexity == pytest.approx(1)


def test_members_are_of_their_code_and_drawn_by_the_seed() -> None:
    codes = np.random.default_rng(0).integers(0, 4, 200)
    members = draw_members(codes, [2, 0], 6, seed=1)
    assert list(members) == [2, 0]
    for code, rows in members.items():
        assert len(set(rows)) == 6 and rows == sorted(rows) and (codes[rows] == code).all()
    assert draw_members(codes, [2, 0], 6, seed=1) == members != draw_members(codes, [2, 0], 6, seed=2)
    assert draw_members(CODES, [1], 6, seed=1) == {1: [2, 4]}


@pytest.mark.parametrize(("count", "columns"), [(7, 8), (1024, 3), (2, 1)])
def test_the_picture_is_readable(tmp_path: Path, drawn: list[Figure], count: int, columns: int) -> None:
    codes = np.arange(30) ** 2 % min(count, 7)
    usage = code_usage(codes, count)
    members = draw_members(codes, usage.order[: min(3, usage.used)], columns, seed=0)
    images = {row: Image.new("RGB", (40, 30 + row), (row, 0, 0)) for rows in members.values() for row in rows}
    cluster_figure(tmp_path / "clusters", usage, members, images, columns)
    assert_readable(drawn[0])
    bars = drawn[0].axes[0].patches
    assert [bar.get_height() for bar in bars] == usage.counts[usage.order].tolist()
    assert len([axes for axes in drawn[0].axes if axes.images]) == sum(map(len, members.values()))
