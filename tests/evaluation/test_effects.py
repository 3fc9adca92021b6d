"""What seeds say of a difference."""

import pytest
from scipy import stats

from emkum.evaluation.effects import NOISE, UNKNOWN, Effect, compare, mean_and_deviation, same_direction


def test_the_interval_is_that_of_welchs_test() -> None:
    values, others = [30.0, 31.0, 35.0], [20.0, 26.0, 21.0, 22.5]
    effect = compare(values, others)
    low, high = stats.ttest_ind(values, others, equal_var=False).confidence_interval(0.95)
    assert effect.difference == pytest.approx(32 - 22.375)
    assert (effect.difference - effect.margin, effect.difference + effect.margin) == pytest.approx((low, high))
    assert effect.finding == "better" and compare(others, values).finding == "worse"


def test_a_difference_within_its_interval_is_noise() -> None:
    values, others = [30.0, 34.0], [29.0, 32.0]
    assert compare(values, others).difference == 1.5 and compare(values, others).finding == NOISE
    assert Effect(2.0, 2.0).finding == NOISE and Effect(2.0, 1.9).finding == "better"


def test_one_seed_tells_nothing() -> None:
    assert compare([50.0], [1.0, 2.0, 3.0]) == Effect(48.0, None)
    assert Effect(48.0, None).finding == UNKNOWN
    assert mean_and_deviation([3.0]) == (3.0, None)
    assert mean_and_deviation([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))


def test_equal_values_have_no_interval() -> None:
    assert compare([1.0, 1.0], [1.0, 1.0]).finding == NOISE
    assert compare([2.0, 2.0], [1.0, 1.0]) == Effect(1.0, 0.0)


@pytest.mark.parametrize(
    ("finding", "expected", "said"),
    [
        ("better", "better", "yes"),
        ("worse", "better", "no"),
        ("within noise", "better", "noise"),
        ("within noise", "same", "yes"),
        ("worse", "same", "no"),
        ("unknown", "same", "unknown"),
        ("unknown", "worse", "unknown"),
        ("better", None, "not told"),
    ],
)
def test_directions(finding: str, expected: str | None, said: str) -> None:
    assert same_direction(finding, expected) == said
