"""kNN against a plain loop and against scikit-learn, ties by hand, and blocks that leave the result alone."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from emkum.evaluation.knn import class_votes, knn_metrics, nearest_neighbors

CLASSES, TEMPERATURE = 6, 0.07


def data(seed: int = 0, rows: int = 60, queries: int = 25, width: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory, its labels, queries, theirs: clusters that overlap, float64."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, width, generator=generator, dtype=torch.float64)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        noise = torch.randn(count, width, generator=generator, dtype=torch.float64)
        return 3 * centers[labels] + 2 * noise, labels

    return *draw(rows), *draw(queries)


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / math.sqrt(sum(a * a for a in one)) / math.sqrt(sum(b * b for b in other))


def naive_votes(query: Tensor, memory: Tensor, labels: Tensor, k: int) -> tuple[list[int], list[float]]:
    """Rows of the neighbors and, for each class, its votes relative to that of the nearest neighbor."""
    similarity = [cosine(query.tolist(), row.tolist()) for row in memory]
    nearest = sorted(range(len(memory)), key=lambda row: (-round(similarity[row], 9), row))[:k]
    votes = [0.0] * CLASSES
    for row in nearest:
        votes[int(labels[row])] += math.exp(similarity[row] / TEMPERATURE)
    return nearest, [vote / math.exp(similarity[nearest[0]] / TEMPERATURE) for vote in votes]


def naive_accuracy(memory: Tensor, labels: Tensor, queries: Tensor, right: Tensor, k: int) -> dict[str, float]:
    hits = {1: 0, 5: 0}
    for query, label in zip(queries, right.tolist(), strict=True):
        _, votes = naive_votes(query, memory, labels, k)
        ahead = sum(votes[c] >= votes[label] - 1e-9 for c in range(CLASSES) if c != label)
        for top in hits:
            hits[top] += ahead < top
    return {f"k{k}_top_{top}": 100 * count / len(queries) for top, count in hits.items()}


def test_neighbors_and_votes_equal_a_loop() -> None:
    memory, labels, queries, _ = data()
    # Rows that tie: the earlier one is nearer.
    memory[40:50] = 2 * memory[10:20]
    found = nearest_neighbors(queries, memory, 12, block=7)
    votes = class_votes(found, labels, 9, TEMPERATURE, CLASSES)
    ties = 0
    for number, query in enumerate(queries):
        nearest, _ = naive_votes(query, memory, labels, 12)
        assert found.row[number].tolist() == nearest
        expected = [cosine(query.tolist(), memory[row].tolist()) for row in nearest]
        assert found.cosine[number].tolist() == pytest.approx(expected, abs=2e-9)
        ties += sum(row + 30 in nearest for row in nearest if 10 <= row < 20)
        _, of_classes = naive_votes(query, memory, labels, 9)
        assert (votes[number].double() / 2**40).tolist() == pytest.approx(of_classes, rel=1e-6, abs=1e-9)
    assert ties > 5, "no tie was met"


@pytest.mark.parametrize("k", [1, 4, 17, 60])
def test_accuracy_equals_a_loop(k: int) -> None:
    memory, labels, queries, right = data(seed=1)
    memory[30:45] = memory[:15]
    expected = naive_accuracy(memory, labels, queries, right, k)
    assert 0 < expected[f"k{k}_top_1"] < 100
    found = knn_metrics(memory, labels, queries, right, CLASSES, [k], TEMPERATURE)
    assert found == pytest.approx(expected)


def test_accuracy_equals_that_of_scikit_learn() -> None:
    memory, labels, queries, right = data(seed=2, rows=300, queries=200)
    reference = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d) / TEMPERATURE), metric="cosine")
    reference.fit(memory.numpy(), labels.numpy())
    expected = 100 * reference.score(queries.numpy(), right.numpy())
    found = knn_metrics(memory.float(), labels, queries.float(), right, CLASSES, [5, 20], TEMPERATURE)
    assert found["k20_top_1"] == pytest.approx(expected) and set(found) == {
        f"k{k}_top_{top}" for k in (5, 20) for top in (1, 5)
    }


def test_blocks_and_files_leave_the_result_alone(tmp_path) -> None:
    memory, labels, queries, right = data(seed=3)
    memory = memory.half()
    # Exact ties of different classes at every border of every k.
    memory[1::2] = memory[::2]
    np.save(tmp_path / "memory.npy", memory.numpy())
    mapped = np.load(tmp_path / "memory.npy", mmap_mode="r")
    whole = knn_metrics(memory, labels, queries, right, CLASSES, [1, 3, 10], TEMPERATURE)
    for query_block, memory_block in ((1, 1), (4, 7), (25, 59), (100, 100)):
        blocks = {"query_block": query_block, "memory_block": memory_block}
        done = []
        found = knn_metrics(
            mapped, labels.numpy(), queries.numpy(), right.numpy(), CLASSES, [1, 3, 10], TEMPERATURE,
            **blocks, report=done.append,
        )  # fmt: skip
        assert found == whole and sum(done) == len(queries)


def test_ties_by_hand() -> None:
    memory = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 2, 1, 3])
    # Of the two rows that point as the query does, the first votes alone for k = 1; for k = 2 both classes tie.
    query = torch.tensor([[4.0, 0.0]])
    assert nearest_neighbors(query, memory, 5).row.tolist() == [[0, 2, 1, 3, 4]]
    right = torch.tensor([0])
    assert knn_metrics(memory, labels, query, right, 4, [1, 2]) == pytest.approx(
        {"k1_top_1": 100.0, "k1_top_5": 100.0, "k2_top_1": 0.0, "k2_top_5": 100.0}
    )
    # Halfway between all of them, and zeros, whose cosine with anything is 0: two votes for class 1 against one each.
    for features in ([[1.0, 1.0]], [[0.0, 0.0]]):
        found = knn_metrics(memory, labels, torch.tensor(features), torch.tensor([1]), 4, [4])
        assert found["k4_top_1"] == 100.0


def test_a_collapsed_model_is_never_right() -> None:
    memory, queries = torch.ones(40, 3) / 3, torch.ones(8, 3) / 7
    labels, right = torch.arange(40) % 4, torch.arange(8) % 4
    found = knn_metrics(memory, labels, queries, right, 4, [4, 20])
    assert found["k4_top_1"] == found["k20_top_1"] == 0.0


def test_low_temperatures_do_not_overflow() -> None:
    memory, labels, queries, right = data(seed=4)
    nearest = knn_metrics(memory, labels, queries, right, CLASSES, [1], TEMPERATURE)["k1_top_1"]
    cold = knn_metrics(memory, labels, queries, right, CLASSES, [30], 1e-6)["k30_top_1"]
    assert cold == nearest > 0


def test_mistakes() -> None:
    memory, labels, queries, right = data()
    for changes, message in (
        ({"ks": [61]}, "61 neighbors out of 60"),
        ({"ks": [0]}, "0 neighbors"),
        ({"temperature": 0.0}, "temperature"),
        ({"num_classes": CLASSES - 1}, "labels must be in"),
        ({"queries": queries[:0], "query_labels": right[:0]}, "needs queries"),
        ({"memory_labels": labels[1:]}, "a label for each row"),
    ):
        arguments = {"memory": memory, "memory_labels": labels, "queries": queries, "query_labels": right}
        with pytest.raises(ValueError, match=message):
            knn_metrics(**arguments | {"num_classes": CLASSES, "ks": [3]} | changes)
