"""Models by a score and their sizes."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from emkum.evaluation.landscape_figure import Model, landscape_figure
from tests.figure_checks import assert_readable

CROWD = [Model(f"variant {n}", 60 + n / 3, 115, 3.26, "ours") for n in range(6)]
OTHERS = [
    Model("a model with a name that is much too long to stand beside a point", 80, 4000, 1800, "of others"),
    Model("costs $5_x \u732b", 30, 1.5, None, "of others"),
    Model("pairs alone", 75, None, 0.01, ""),
]


@pytest.mark.parametrize("models", [CROWD + OTHERS, CROWD[:1], OTHERS[1:2], CROWD + OTHERS[2:]])
def test_names_cover_nothing(tmp_path: Path, drawn: list[Figure], models: list[Model]) -> None:
    landscape_figure(tmp_path / "landscape", models, "COCO 5k, mean of R@1, 5, 10 over both directions (%)")
    assert_readable(drawn[0])
    for axes, size in zip(drawn[0].axes, ("parameters", "pairs"), strict=False):
        points = {tuple(point) for line in axes.lines for point in line.get_xydata().tolist()}
        expected = {(getattr(model, size), model.score) for model in models if getattr(model, size)}
        assert points == expected and len(axes.texts) == len([m for m in models if getattr(m, size)])
        # A tick with a number at least, so that the axis can be read.
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high]


def test_sizes_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="parameters or pairs"):
        landscape_figure(tmp_path / "landscape", [Model("a", 1.0)], "score")
