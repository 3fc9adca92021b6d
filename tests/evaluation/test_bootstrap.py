"""Intervals by the bootstrap against loops, against scipy with the same draws, and against what is known."""

import numpy as np
import pytest
import scipy.stats
import torch

from emkum.evaluation import bootstrap
from emkum.evaluation.bootstrap import accuracy_estimates, percentile_interval, recall_estimates, resampled_ratios
from emkum.evaluation.classification import top_k_accuracy
from emkum.evaluation.pair_scores import cosine_scores
from emkum.evaluation.ranks import NEVER, Ranks, find_ranks
from emkum.evaluation.retrieval import retrieval_metrics

# Captions of five images: one, three, none, two and one of them, not in the order of the images.
OWNER = torch.tensor([1, 0, 1, 3, 4, 1, 3])
RANKS = Ranks(torch.tensor([0, 4, NEVER, 12, 5]), torch.tensor([0, 7, 2, NEVER, 1, 30, 0]))


def naive_recalls(images: list[int], ks: tuple[int, ...]) -> list[float]:
    """Mean recall, then recalls both ways, over images that are drawn one after the other with their captions."""
    queries = {"i2t": [], "t2i": []}
    for image in images:
        own = [row for row, owner in enumerate(OWNER.tolist()) if owner == image]
        if own:
            queries["i2t"].append(RANKS.images[image].item())
        queries["t2i"] += [RANKS.captions[row].item() for row in own]
    recalls = [100 * sum(rank < k for rank in ranks) / len(ranks) for ranks in queries.values() for k in ks]
    return [sum(recalls) / len(recalls), *recalls]


def test_recalls_equal_a_loop_over_drawn_images() -> None:
    resamples, ks = 300, (1, 5)
    found = recall_estimates(RANKS, OWNER, ks, resamples, seed=3)
    rng = np.random.default_rng(3)
    draws = [rng.integers(0, 5, 5).tolist() for _ in range(resamples)]
    # One of them has the image without captions alone: it tells nothing.
    rows = [naive_recalls(draw, ks) for draw in draws if set(draw) != {2}]
    low, high = np.quantile(rows, [0.025, 0.975], axis=0)
    assert list(found) == ["mean_recall", "i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5"]
    np.testing.assert_allclose([each.value for each in found.values()], naive_recalls(list(range(5)), ks))
    np.testing.assert_allclose([each.low for each in found.values()], low)
    np.testing.assert_allclose([each.high for each in found.values()], high)


def test_values_are_those_of_the_commands() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(n, 4, generator=generator) for n in (12, 30))
    owner = torch.arange(30) % 12
    score = cosine_scores(*(torch.nn.functional.normalize(each, dim=1) for each in (images, texts)))
    expected = retrieval_metrics(score, owner, 12)
    found = recall_estimates(find_ranks(score, owner, 12), owner, resamples=10)
    assert {name: each.value for name, each in found.items()} == pytest.approx({name: expected[name] for name in found})
    ranks = torch.tensor([0, 3, 7, 0, 5, 1])
    found = accuracy_estimates(ranks, resamples=10)
    assert {name: each.value for name, each in found.items()} == pytest.approx(top_k_accuracy(ranks))


def test_equal_to_scipy_with_the_same_draws() -> None:
    rng = np.random.default_rng(0)
    found_of = rng.integers(0, 4, 40).astype(float)
    all_of = found_of + rng.integers(1, 3, 40)

    def ratio(numerator: np.ndarray, denominator: np.ndarray, axis: int) -> np.ndarray:
        return numerator.sum(axis) / denominator.sum(axis)

    theirs = scipy.stats.bootstrap(
        (found_of, all_of), ratio, paired=True, vectorized=True, n_resamples=400, method="percentile", rng=7
    )
    resampled = resampled_ratios(found_of[:, None], all_of[:, None], 400, seed=7)
    np.testing.assert_allclose(np.sort(resampled[:, 0]), np.sort(theirs.bootstrap_distribution))
    low, high = percentile_interval(resampled)
    np.testing.assert_allclose([low[0], high[0]], theirs.confidence_interval)


def test_draws_do_not_depend_on_how_many_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hits = (np.arange(21) % 3 == 0).astype(float)[:, None]
    whole = resampled_ratios(hits, np.ones_like(hits), 50, seed=1)
    monkeypatch.setattr(bootstrap, "_DRAWS", 21 * 7)
    np.testing.assert_array_equal(resampled_ratios(hits, np.ones_like(hits), 50, seed=1), whole)
    assert not np.array_equal(resampled_ratios(hits, np.ones_like(hits), 50, seed=2), whole)


def test_intervals_of_a_binomial_cover_its_probability() -> None:
    rng, images, probability = np.random.default_rng(0), 400, 0.3
    covered, widths = [], []
    for seed in range(200):
        ranks = torch.from_numpy((rng.random(images) >= probability).astype(np.int64))
        found = accuracy_estimates(ranks, (1,), resamples=300, seed=seed)["top_1"]
        covered.append(found.low <= 100 * probability <= found.high)
        widths.append(found.high - found.low)
    # Of 200 intervals at 95 %, the number that covers has a standard deviation of 1.5 points.
    assert 0.90 <= np.mean(covered) <= 0.99
    normal = 2 * 1.96 * 100 * (probability * (1 - probability) / images) ** 0.5
    assert np.mean(widths) == pytest.approx(normal, rel=0.05)


def test_captions_stay_with_their_image() -> None:
    # Ten captions of each image are found, or none: as few independent queries as there are images.
    owner = torch.arange(40).repeat_interleave(10)
    lucky = torch.arange(40) % 2 == 0
    ranks = Ranks(torch.where(lucky, 0, 99), torch.where(lucky[owner], 0, 99))
    found = recall_estimates(ranks, owner, (1,))
    assert found["t2i_r1"] == pytest.approx(found["i2t_r1"])
    assert found["t2i_r1"].high - found["t2i_r1"].low > 25


def test_nothing_to_draw_from() -> None:
    with pytest.raises(ValueError, match="N > 0"):
        resampled_ratios(np.empty((0, 1)), np.empty((0, 1)))
