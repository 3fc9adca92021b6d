"""The official metrics of GLUE's nine tasks (Wang et al. 2019), and the files that its server scores.

Metrics are in percent. The score of a set is the mean of its task's metrics, as on the benchmark's leaderboard; a
task's score is the mean over its validation sets, of which MNLI alone has two, matched and mismatched.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Scoring:
    """How a task is scored.

    Attributes:
        metrics: names in METRICS.
        tests: split of each test set -> name of the file that the server wants.
        valid: validation splits; on the first a checkpoint is chosen.
    """

    metrics: tuple[str, ...]
    tests: Mapping[str, str]
    valid: tuple[str, ...] = ("valid",)


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Percentage of rows whose prediction is their label; both are (n,) classes."""
    return 100.0 * float(np.mean(predictions == labels))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1, in percent; 0 where none of it is found.

    Both are (n,) classes; whatever is not 1 is not of the class.
    """
    predicted, right = predictions == 1, labels == 1
    found = int(np.sum(predicted & right))
    return 100.0 * 2 * found / (int(predicted.sum()) + int(right.sum())) if found else 0.0


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Correlation of two divisions into class 1 and the rest (Matthews 1975), in percent; both are (n,) classes.

    0 where either has all rows on one side: nothing correlates with that.
    """
    predicted, right = predictions == 1, labels == 1
    # Counts as Python's integers: the product of four outgrows 64 bits from some ten thousand rows on.
    both, neither = int(np.sum(predicted & right)), int(np.sum(~predicted & ~right))
    wrong, missed = int(np.sum(predicted & ~right)), int(np.sum(~predicted & right))
    product = (both + wrong) * (both + missed) * (neither + wrong) * (neither + missed)
    return 100.0 * (both * neither - wrong * missed) / math.sqrt(product) if product else 0.0


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Linear correlation of two (n,) real arrays, in percent; 0 where either is constant or not finite."""
    x, y = (np.asarray(values, dtype=np.float64) for values in (predictions, labels))
    # Told by the values: what rounding leaves of a constant array's deviations would correlate with something.
    if not (np.isfinite(x).all() and np.isfinite(y).all()) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return 100.0 * float(np.dot(x, y) / (np.linalg.norm(x) * np.linalg.norm(y)))


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Linear correlation of the ranks of two (n,) real arrays, in percent; 0 where either is constant or not finite."""
    if not (np.isfinite(predictions).all() and np.isfinite(labels).all()):
        return 0.0
    return pearson(mean_ranks(predictions), mean_ranks(labels))


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """(n,) float64, the rank of each of (n,) values, from 1 up; equal values have the mean of the ranks they take."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}
SCORE = "score"

TASKS: dict[str, Scoring] = {
    "CoLA": Scoring(("matthews",), {"test": "CoLA.tsv"}),
    "SST-2": Scoring(("accuracy",), {"test": "SST-2.tsv"}),
    "MRPC": Scoring(("f1", "accuracy"), {"test": "MRPC.tsv"}),
    "STS-B": Scoring(("pearson", "spearman"), {"test": "STS-B.tsv"}),
    "QQP": Scoring(("f1", "accuracy"), {"test": "QQP.tsv"}),
    "MNLI": Scoring(
        ("accuracy",), {"test": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"}, valid=("valid", "valid_mismatched")
    ),
    "QNLI": Scoring(("accuracy",), {"test": "QNLI.tsv"}),
    "RTE": Scoring(("accuracy",), {"test": "RTE.tsv"}),
    "WNLI": Scoring(("accuracy",), {"test": "WNLI.tsv"}),
}


def is_regression(task: str) -> bool:
    """Whether a task's labels are scores instead of classes."""
    return "pearson" in TASKS[task].metrics


def glue_metrics(task: str, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of one set by name, and their mean as SCORE, in percent.

    Args:
        task: one of TASKS.
        predictions: (n,) classes, of which any other number is none; or scores on any scale.
        labels: (n,) classes or scores.

    Raises:
        ValueError: there are no rows, or there is not one prediction for each.
    """
    if predictions.shape != labels.shape or labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"want a prediction for each label, not {predictions.shape} for {labels.shape}")
    found = {name: METRICS[name](predictions, labels) for name in TASKS[task].metrics}
    return found | {SCORE: mean(found.values())}


def constant_score(task: str, train_labels: np.ndarray, valid_labels: Sequence[np.ndarray]) -> float:
    """The task's score of saying the training data's most frequent label always.

    Args:
        task: one of TASKS.
        train_labels: (n,).
        valid_labels: those of each validation set.
    """
    values, counts = np.unique(train_labels, return_counts=True)
    constant = values[counts.argmax()]
    return mean(glue_metrics(task, np.full_like(labels, constant), labels)[SCORE] for labels in valid_labels)


def summarize(scores: Mapping[str, Mapping[int, float]]) -> list[dict[str, Any]]:
    """Scores of all runs to the rows of a table.

    Args:
        scores: task -> seed -> score; the same seeds of each task.

    Returns:
        A row a task with "task", "seed N" for each seed, "best" and "median" over the seeds, and "spread", the best
        less the worst; and a row "mean", with the means over the tasks and the spread of the seeds' means.
    """
    rows = [{"task": task} | _over_seeds(by_seed) for task, by_seed in scores.items()]
    seeds = next(iter(scores.values()))
    last = _over_seeds({seed: mean(by_seed[seed] for by_seed in scores.values()) for seed in seeds})
    means = {kind: mean(row[kind] for row in rows) for kind in ("best", "median")}
    return [*rows, {"task": "mean"} | last | means]


def _over_seeds(by_seed: Mapping[int, float]) -> dict[str, float]:
    values = by_seed.values()
    row = {f"seed {seed}": score for seed, score in by_seed.items()}
    return row | {"best": max(values), "median": median(values), "spread": max(values) - min(values)}


def submission(index: np.ndarray, predictions: np.ndarray, names: Sequence[str]) -> str:
    """The content of a file for the benchmark's server: a header, then index, tab and prediction of each row.

    Args:
        index: (n,) integers, the number of each row in the test file.
        predictions: (n,) classes, or scores.
        names: how the server spells each class; empty = scores, which are cut to 0 ... 5.

    Raises:
        ValueError: a prediction is none of the classes, or not finite.
    """
    if not np.isfinite(predictions).all() or (names and not np.isin(predictions, np.arange(len(names))).all()):
        raise ValueError("a prediction is no class or no number")
    scores = [f"{value:.3f}" for value in np.clip(predictions, 0.0, 5.0)] if not names else []
    words = [names[int(value)] for value in predictions] if names else scores
    rows = sorted(zip(index.tolist(), words, strict=True))
    return "".join(f"{number}\t{word}\n" for number, word in [("index", "prediction"), *rows])
