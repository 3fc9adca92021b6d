"""GLUE's metrics equal those of scikit-learn and SciPy; hand-computed where these have none."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from emkum.evaluation.glue import (
    METRICS,
    TASKS,
    constant_score,
    glue_metrics,
    mean_ranks,
    submission,
    summarize,
)
from emkum.prepare.glue import TASKS as PREPARED


def draws(seed: int, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Predictions that are right in two of three rows, and labels of unequal frequency."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(20, 3000))
    labels = rng.choice(classes, count, p=rng.dirichlet(np.full(classes, 4.0)))
    predictions = np.where(rng.random(count) < 0.67, labels, rng.integers(0, classes, count))
    return predictions, labels


@pytest.mark.parametrize("seed", range(8))
def test_metrics_of_two_classes_equal_scikit_learns(seed: int) -> None:
    predictions, labels = draws(seed)
    assert METRICS["accuracy"](predictions, labels) == pytest.approx(100 * metrics.accuracy_score(labels, predictions))
    assert METRICS["f1"](predictions, labels) == pytest.approx(100 * metrics.f1_score(labels, predictions))
    expected = 100 * metrics.matthews_corrcoef(labels, predictions)
    assert METRICS["matthews"](predictions, labels) == pytest.approx(expected)
    # Both are not the same number.
    assert METRICS["f1"](predictions, labels) != METRICS["f1"](1 - predictions, 1 - labels)


@pytest.mark.parametrize("seed", range(4))
def test_accuracy_of_three_classes(seed: int) -> None:
    predictions, labels = draws(seed, 3)
    assert METRICS["accuracy"](predictions, labels) == pytest.approx(100 * metrics.accuracy_score(labels, predictions))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("grid", [0, 5])
def test_correlations_equal_scipys(seed: int, grid: int) -> None:
    """With a grid many values of both are equal."""
    rng = np.random.default_rng(seed)
    labels = rng.uniform(0, 5, 400)
    predictions = labels**2 + rng.normal(0, 4, 400) - 1000
    if grid:
        labels, predictions = (np.round(values / 5 * grid) for values in (labels, predictions))
    expected = 100 * stats.pearsonr(predictions, labels).statistic
    assert METRICS["pearson"](predictions, labels) == pytest.approx(expected, abs=1e-9)
    expected = 100 * stats.spearmanr(predictions, labels).statistic
    assert METRICS["spearman"](predictions, labels) == pytest.approx(expected, abs=1e-9)
    np.testing.assert_array_equal(mean_ranks(predictions), stats.rankdata(predictions))


def test_ranks_by_hand() -> None:
    np.testing.assert_array_equal(mean_ranks(np.array([3.0, -1.0, 3.0, 7.0, 3.0])), [3.0, 1.0, 3.0, 5.0, 3.0])


def test_large_sets_do_not_overflow() -> None:
    labels = np.arange(400_000) % 2
    predictions = np.where(np.arange(400_000) % 5 == 0, 1 - labels, labels)
    assert METRICS["matthews"](predictions, labels) == pytest.approx(60.0, abs=1e-6)


def test_who_says_one_thing_always_scores_nothing() -> None:
    labels = np.array([1, 0, 1, 1])
    for constant in (0, 1):
        assert METRICS["matthews"](np.full(4, constant), labels) == 0
    assert METRICS["f1"](np.zeros(4, dtype=int), labels) == 0
    # Three times 0.1 leaves roundings of its mean.
    for name in ("pearson", "spearman"):
        assert METRICS[name](np.full(3, 0.1), np.array([1.0, 2.0, 4.0])) == 0


def test_what_is_not_finite_counts_against_the_model() -> None:
    labels = np.array([1.0, 2.0, 4.0])
    for name in ("pearson", "spearman"):
        assert METRICS[name](np.array([1.0, np.nan, 4.0]), labels) == 0
        assert METRICS[name](np.array([1.0, 2.0, np.inf]), labels) == 0
    found = glue_metrics("MRPC", np.array([-1, 1, -1]), np.array([1, 1, 0]))
    assert found["accuracy"] == pytest.approx(100 / 3) and found["f1"] == pytest.approx(200 / 3)


def test_every_task_has_its_official_metrics() -> None:
    official = {
        "CoLA": ["matthews"], "SST-2": ["accuracy"], "MRPC": ["accuracy", "f1"], "STS-B": ["pearson", "spearman"],
        "QQP": ["accuracy", "f1"], "MNLI": ["accuracy"], "QNLI": ["accuracy"], "RTE": ["accuracy"],
        "WNLI": ["accuracy"],
    }  # fmt: skip
    assert {task: sorted(scoring.metrics) for task, scoring in TASKS.items()} == official
    assert {task.name for task in PREPARED} == set(TASKS)
    # The splits are those that are prepared.
    for task in PREPARED:
        scoring = TASKS[task.name]
        assert {*scoring.valid, *scoring.tests, "train"} == set(task.files)


def test_the_score_is_the_mean_of_the_metrics() -> None:
    predictions, labels = draws(5)
    found = glue_metrics("QQP", predictions, labels)
    assert found["score"] == pytest.approx((found["accuracy"] + found["f1"]) / 2) and found["accuracy"] != found["f1"]
    with pytest.raises(ValueError, match="want a prediction for each label"):
        glue_metrics("QQP", predictions[1:], labels)
    with pytest.raises(ValueError, match="want a prediction for each label"):
        glue_metrics("QQP", predictions[:0], labels[:0])


def test_the_most_frequent_label() -> None:
    train = np.array([2, 2, 0, 1, 2])
    assert constant_score("MNLI", train, [np.array([2, 0, 1, 2]), np.array([0, 2])]) == pytest.approx(50.0)
    assert constant_score("MNLI", train, [np.array([2, 0, 1, 2]), np.array([0, 0])]) == pytest.approx(25.0)
    assert constant_score("CoLA", np.array([1, 1, 0]), [np.array([1, 0])]) == 0


def test_rows_of_the_table() -> None:
    cola, rte = {1: 10.0, 2: 40.0, 7: 20.0}, {1: 60.0, 2: 50.0, 7: 70.0}
    first, second, last = summarize({"CoLA": cola, "RTE": rte})
    assert first == {
        "task": "CoLA", "seed 1": 10, "seed 2": 40, "seed 7": 20, "best": 40, "median": 20, "spread": 30,
    }  # fmt: skip
    assert (second["best"], second["median"], second["spread"]) == (70, 60, 20)
    # The means of the best and of the medians; the spread of the seeds' means 35, 45, 45.
    assert last == {
        "task": "mean", "seed 1": 35, "seed 2": 45, "seed 7": 45, "best": 55, "median": 40, "spread": 10,
    }  # fmt: skip


def test_files_for_the_server() -> None:
    text = submission(np.array([2, 0, 1]), np.array([0.0, 1.0, 0.0]), ["entailment", "not_entailment"])
    assert text == "index\tprediction\n0\tnot_entailment\n1\tentailment\n2\tentailment\n"
    assert submission(np.array([0]), np.array([1]), ["0", "1"]) == "index\tprediction\n0\t1\n"
    text = submission(np.arange(3), np.array([-0.2, 3.14159, 5.3]), [])
    assert text == "index\tprediction\n0\t0.000\n1\t3.142\n2\t5.000\n"
    for wrong in (np.array([0.0, -1.0]), np.array([0.0, 2.0]), np.array([0.0, np.nan])):
        with pytest.raises(ValueError, match="no class"):
            submission(np.arange(2), wrong, ["0", "1"])
