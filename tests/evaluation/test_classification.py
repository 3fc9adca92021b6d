"""Top-k accuracy by hand and by its definition; feature statistics against naive ones, and the faults they show."""

import numpy as np
import pytest
import torch

from emkum.evaluation.classification import FeatureStatistics, label_ranks, top_k_accuracy

NAN = float("nan")


def test_ranks_by_hand() -> None:
    logits = torch.tensor(
        [
            [3.0, 1.0, 2.0],  # right: first
            [3.0, 1.0, 2.0],  # second
            [1.0, 2.0, 3.0],  # last
            [2.0, 2.0, 1.0],  # ties with one wrong class
            [1.0, 1.0, 1.0],  # ties with all
        ]
    )
    ranks = label_ranks(logits, torch.tensor([0, 2, 0, 0, 1]))
    assert ranks.tolist() == [0, 1, 2, 1, 2]
    accuracy = top_k_accuracy(ranks, ks=(1, 2, 3))
    assert accuracy == pytest.approx({"top_1": 20.0, "top_2": 60.0, "top_3": 100.0})


def test_what_differs_by_less_than_a_tie_counts_against_the_model() -> None:
    logits, labels = torch.tensor([[0.5, 0.25, 0.0], [0.5, 0.375, 0.0], [0.25, 0.5, 0.0]]), torch.zeros(3).long()
    assert label_ranks(logits, labels, tie=0.125).tolist() == [0, 1, 1]
    assert label_ranks(logits, labels).tolist() == [0, 0, 1]


def test_accuracy_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    # Few values, so that there are many ties.
    logits, labels = rng.integers(0, 6, (200, 12)), rng.integers(0, 12, 200)
    hits = {1: 0, 5: 0}
    for row, label in zip(logits, labels, strict=True):
        better = sum(row[c] >= row[label] for c in range(12) if c != label)
        for k in hits:
            hits[k] += better < k
    assert 0 < hits[1] < hits[5] < 200
    ranks = label_ranks(torch.from_numpy(logits).float(), torch.from_numpy(labels))
    assert top_k_accuracy(ranks) == pytest.approx({"top_1": hits[1] / 2, "top_5": hits[5] / 2})


def test_without_ties_it_is_what_topk_says() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(100, 30, generator=generator), torch.randint(0, 30, (100,), generator=generator)
    for k in (1, 5):
        expected = 100 * (logits.topk(k).indices == labels[:, None]).any(1).double().mean().item()
        assert top_k_accuracy(label_ranks(logits, labels), (k,))[f"top_{k}"] == pytest.approx(expected)


def test_nan_counts_against_the_model() -> None:
    # A wrong class that is NaN is ahead; a right one that is NaN misses even the top 5 of three classes.
    ranks = label_ranks(torch.tensor([[2.0, NAN, 1.0], [NAN, 1.0, 2.0], [NAN] * 3]), torch.tensor([0, 0, 1]))
    assert ranks[0] == 1
    assert top_k_accuracy(ranks) == pytest.approx({"top_1": 0.0, "top_5": 100 / 3})


def test_shapes_and_labels_are_checked() -> None:
    logits = torch.zeros(2, 3)
    for labels in (torch.tensor([0]), torch.tensor([0, 3]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match="labels"):
            label_ranks(logits, labels)
    with pytest.raises(ValueError, match="needs images"):
        top_k_accuracy(torch.zeros(0, dtype=torch.int64))


def naive(rows: np.ndarray) -> dict[str, float]:
    """The definitions, one row and one pair at a time."""
    norms = [np.sqrt(sum(v * v for v in row)) for row in rows]
    means = [np.mean(channel) for channel in rows.T]
    stds = [np.sqrt(np.mean([(v - np.mean(channel)) ** 2 for v in channel])) for channel in rows.T]
    cosines = [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for i, a in enumerate(rows) for b in rows[:i]]
    return {
        "count": len(rows),
        "bad_values": 0,
        "norm_mean": np.mean(norms),
        "norm_std": np.sqrt(np.mean([(norm - np.mean(norms)) ** 2 for norm in norms])),
        "channel_mean": np.mean(np.abs(means)),
        "channel_std": np.mean(stds),
        "constant_channels": 100 * np.mean([std < 1e-4 for std in stds]),
        "mean_cosine": np.mean(cosines),
    }


def some_rows(count: int = 40, channels: int = 8) -> np.ndarray:
    rows = np.random.default_rng(0).normal(2.0, 1.0, (count, channels))
    rows[:, 3] = 1.5
    return rows


def figures_of(*batches: np.ndarray | torch.Tensor) -> dict[str, float | int | None]:
    statistics = FeatureStatistics()
    for batch in batches:
        statistics.add(torch.as_tensor(batch))
    return statistics.figures()


@pytest.mark.parametrize("cuts", [[], [1], [7, 8, 30]])
def test_statistics_equal_naive_ones_however_they_are_batched(cuts: list[int]) -> None:
    rows = some_rows()
    figures = figures_of(*np.split(rows, cuts))
    assert figures == pytest.approx(naive(rows), rel=1e-12)
    assert figures["constant_channels"] == 12.5
    assert type(figures["count"]) is int and all(type(value) in (int, float) for value in figures.values())


def test_many_rows_are_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = some_rows()
    monkeypatch.setattr("emkum.evaluation.classification._CHUNK", 9)
    assert figures_of(rows) == pytest.approx(naive(rows), rel=1e-12)


def test_a_large_mean_does_not_hide_the_deviation() -> None:
    rows = some_rows() + 1e6
    figures = figures_of(rows[:11], rows[11:])
    assert figures["channel_std"] == pytest.approx(naive(rows)["channel_std"], rel=1e-6)


def test_rows_that_are_not_finite_are_counted_and_left_out() -> None:
    rows = some_rows(5)
    bad = some_rows(3)
    bad[0, 2] = NAN
    bad[2] = np.inf
    figures = figures_of(rows[:2], bad[[0, 2]], rows[2:])
    assert figures["bad_values"] == 1 + 8
    assert figures == pytest.approx(naive(rows) | {"bad_values": 9})
    only = figures_of(bad[[0]])
    assert only["bad_values"] == 1 and only["count"] == 0
    assert {value for name, value in only.items() if name not in ("count", "bad_values")} == {None}


def test_equal_features_are_constant_up_to_rounding() -> None:
    row = torch.from_numpy(some_rows(1)).float()
    noise = 1 + 1e-6 * torch.randn(10, row.shape[1], generator=torch.Generator().manual_seed(0))
    figures = figures_of(row * noise)
    assert figures["constant_channels"] == 100 and figures["mean_cosine"] == pytest.approx(1)
    # Zeros are constant too; they have no direction.
    figures = figures_of(torch.zeros(4, 3))
    assert figures["constant_channels"] == 100 and figures["norm_mean"] == 0 and figures["mean_cosine"] is None


def test_opposite_and_orthogonal_rows() -> None:
    assert figures_of(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]))["mean_cosine"] == pytest.approx(-1)
    assert figures_of(torch.eye(4))["mean_cosine"] == pytest.approx(0)
    # A row of zeros takes no part: the other two are parallel.
    assert figures_of(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 0.0]]))["mean_cosine"] == pytest.approx(1)


def test_one_row_has_no_spread() -> None:
    figures = figures_of(torch.tensor([[3.0, -4.0]]))
    assert (figures["count"], figures["norm_mean"], figures["channel_mean"]) == (1, 5.0, 3.5)
    assert all(figures[name] is None for name in ("norm_std", "channel_std", "constant_channels", "mean_cosine"))


def test_half_precision_is_summed_in_double() -> None:
    rows = (100 * some_rows(64, 256)).astype(np.float16)
    figures = figures_of(rows)
    assert figures["norm_mean"] == pytest.approx(np.linalg.norm(rows.astype(np.float64), axis=1).mean(), rel=1e-9)
