"""Curves of what runs logged."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from emkum.evaluation.curves_figure import logged_keys, loss_curves, part_pairs
from tests.figure_checks import assert_readable

RUN = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": float("nan"), "mean_recall": 4.0}, {"step": 3, "loss": 2.0}]
PARTS = [
    {"step": n, "kd_image_loss": 3.0 / n, "kd_text_loss": 10.0 / n, "itc_i2t_loss": 1.0, "itc_t2i_loss": 2.0}
    for n in (1, 2)
]


def test_values_that_are_missing_or_not_finite_are_left_out(tmp_path: Path, drawn: list[Figure]) -> None:
    loss_curves(tmp_path / "curves.png", {"one": RUN, "_two": RUN[:1]}, ["loss", "mean_recall"])
    assert_readable(drawn[0])
    lines = [[line.get_xydata().tolist() for line in axes.lines] for axes in drawn[0].axes]
    assert lines == [[[[1, 3], [3, 2]], [[1, 3]]], [[[2, 4]], []]]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["one", "_two"]


def test_sides_stand_side_by_side_on_one_scale(tmp_path: Path, drawn: list[Figure]) -> None:
    histories = {"a run with a name that is much too long for one line of a legend, " * 3: PARTS, "b": PARTS[:1]}
    pairs = part_pairs(logged_keys(histories))
    assert pairs == [("kd_image_loss", "kd_text_loss"), ("itc_i2t_loss", "itc_t2i_loss")]
    loss_curves(tmp_path / "curves", histories, pairs)
    assert_readable(drawn[0])
    titles = [axes.get_title(loc="left") for axes in drawn[0].axes]
    assert titles == ["kd image loss", "kd text loss", "itc i2t loss", "itc t2i loss"]
    image, text, i2t, _ = drawn[0].axes
    assert image.get_ylim() == text.get_ylim() != i2t.get_ylim()
    assert image.get_ylim()[0] < 1.5 and image.get_ylim()[1] > 10


def test_a_side_without_the_other_is_no_pair() -> None:
    assert part_pairs(["kd_image_loss", "loss", "itc_t2i_loss", "text_loss"]) == []


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run has 'lose'; there are loss, mean_recall"):
        loss_curves(tmp_path / "curves.png", {"one": RUN}, ["lose"])
    with pytest.raises(ValueError, match="at least one key and one run"):
        loss_curves(tmp_path / "curves.png", {}, ["loss"])
