"""Linear probe: SGD against torch's own, logistic regression against scikit-learn's, and what the choice is made on."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from emkum.evaluation.classification import label_ranks, top_k_accuracy
from emkum.evaluation.linear_probe import (
    LogisticConfig,
    SgdConfig,
    channel_scaling,
    fit_logistic,
    head_ranks,
    held_out_rows,
    logistic_probe,
    sgd_probe,
    train_heads,
)

CLASSES, WIDTH = 4, 6
SGD = SgdConfig(learning_rates=(0.003, 0.05, 0.4), epochs=3, batch_size=16, seed=3)


def data(seed: int = 0, count: int = 90, classes: int = CLASSES) -> tuple[Tensor, np.ndarray]:
    """Overlapping clusters, float64, channels of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    centers = torch.randn(classes, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    rows = centers[labels] + 0.8 * torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    return rows * 10.0 ** torch.arange(-2, WIDTH - 2) + 5, labels.numpy()


def standardized(features: Tensor, rows: np.ndarray) -> Tensor:
    values = features.numpy()
    return torch.from_numpy((values - values[rows].mean(0)) / values[rows].std(0))


def reference_head(features: Tensor, labels: np.ndarray, rows: np.ndarray, rate: float) -> nn.Linear:
    """One head with torch's autograd, loss, optimizer and schedule."""
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
    total = SGD.epochs * math.ceil(len(rows) / SGD.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / total)) / 2)
    inputs = standardized(features, rows)
    for epoch in range(SGD.epochs):
        order = np.random.default_rng((SGD.seed, epoch)).permutation(rows)
        for batch in np.split(order, range(SGD.batch_size, len(rows), SGD.batch_size)):
            optimizer.zero_grad()
            F.cross_entropy(head(inputs[batch]), torch.from_numpy(labels[batch])).backward()
            optimizer.step()
            schedule.step()
    return head


def test_heads_equal_torch_one_by_one() -> None:
    features, labels = data()
    rows = np.flatnonzero(np.arange(len(labels)) % 7 != 0)
    heads = train_heads(features, labels, rows, CLASSES, SGD)
    inputs = standardized(features, rows)
    for number, rate in enumerate(SGD.learning_rates):
        reference = reference_head(features, labels, rows, rate)
        torch.testing.assert_close(heads.weight[number], reference.weight.detach(), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(heads.bias[number], reference.bias.detach(), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(heads.logits(features)[:, number], reference(inputs).detach(), rtol=1e-7, atol=1e-9)
    ranks = head_ranks(heads, features, labels)
    for number in range(3):
        assert torch.equal(ranks[number], label_ranks(heads.logits(features)[:, number], torch.from_numpy(labels)))


def test_files_of_float32_give_nearly_the_same(tmp_path) -> None:
    features, labels = data()
    np.save(tmp_path / "features.npy", features.float().numpy())
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    rows = np.arange(len(labels))
    done = []
    heads = train_heads(mapped, labels, rows, CLASSES, SGD, report=done.append)
    exact = train_heads(features, labels, rows, CLASSES, SGD)
    assert heads.weight.dtype == torch.float32 and sum(done) == SGD.epochs
    torch.testing.assert_close(heads.weight.double(), exact.weight, rtol=1e-3, atol=1e-4)
    assert not mapped.flags.writeable


def test_a_head_that_diverges_leaves_the_others_alone() -> None:
    features, labels = data()
    features, rows = features.float(), np.arange(len(labels))
    both = train_heads(features, labels, rows, CLASSES, SgdConfig((0.05, 3e38), 3, 16))
    alone = train_heads(features, labels, rows, CLASSES, SgdConfig((0.05,), 3, 16))
    assert not both.weight[1].isfinite().all()
    torch.testing.assert_close(both.weight[0], alone.weight[0])
    held_out = held_out_rows(labels, 0.2, 1)
    probe = sgd_probe(features, labels, CLASSES, SgdConfig((0.05, 3e38), 3, 16), held_out)
    assert probe.chosen == 0.05 and probe.held_out[3e38] == 0.0 and probe.held_out[0.05] > 60


def test_scaling_equals_numpy_and_stops_constant_channels() -> None:
    features, _ = data(count=2500)
    features[:, 2] = 1e4 + 1e-3 * torch.randn(2500, generator=torch.Generator().manual_seed(1))
    rows = np.arange(1, 2500, 2)
    scaling = channel_scaling(features, rows)
    expected = features.numpy()[rows]
    np.testing.assert_allclose(scaling.mean.numpy(), expected.mean(0), rtol=1e-12)
    others = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(1 / scaling.factor.numpy()[others], expected.std(0)[others], rtol=1e-10)
    assert scaling.factor[2] == 0 and scaling(features).isfinite().all()


def test_held_out_rows() -> None:
    labels = np.repeat([0, 1, 2, 3], [100, 40, 2, 1])
    labels = labels[np.random.default_rng(0).permutation(len(labels))]
    held_out = held_out_rows(labels, 0.1, seed=1)
    counts = np.bincount(labels[held_out], minlength=4)
    assert held_out.sum() == 14 and abs(counts[0] - 10) <= 1 and abs(counts[1] - 4) <= 1 and counts[3] == 0
    assert np.array_equal(held_out, held_out_rows(labels, 0.1, seed=1))
    assert not np.array_equal(held_out, held_out_rows(labels, 0.1, seed=2))
    # However much is asked for, each class keeps something to learn from.
    most = held_out_rows(labels, 0.99, seed=1)
    assert np.bincount(labels[~most]).tolist() == [1, 1, 1, 1]
    # However little, something is held out.
    assert held_out_rows(labels, 0.001, seed=1).sum() == 1
    with pytest.raises(ValueError, match="no class has two rows"):
        held_out_rows(np.arange(5), 0.5, 1)


def test_no_class_is_favored_by_the_draw() -> None:
    labels = np.repeat(np.arange(10), 10)
    drawn = {int(label) for seed in range(20) for label in labels[held_out_rows(labels, 0.03, seed)]}
    assert len(drawn) > 7


def test_sgd_probe_chooses_on_the_held_out_part_and_trains_on_all() -> None:
    features, labels = data(count=120)
    held_out = held_out_rows(labels, 0.25, 1)
    done = []
    probe = sgd_probe(features, labels, CLASSES, SGD, held_out, report=done.append)
    heads = train_heads(features, labels, np.flatnonzero(~held_out), CLASSES, SGD)
    ranks = head_ranks(heads, features, labels, np.flatnonzero(held_out))
    expected = {rate: top_k_accuracy(ranks[i], (1,))["top_1"] for i, rate in enumerate(SGD.learning_rates)}
    assert probe.held_out == pytest.approx(expected) and len(set(expected.values())) > 1
    best = max(expected.values())
    assert probe.chosen == min(rate for rate, value in expected.items() if value == best)
    on_all = SgdConfig((probe.chosen,), SGD.epochs, SGD.batch_size, SGD.seed)
    final = train_heads(features, labels, np.arange(len(labels)), CLASSES, on_all)
    assert torch.equal(probe.head.weight, final.weight) and torch.equal(probe.head.bias, final.bias)
    assert sum(done) == 2 * SGD.epochs and probe.converged


@pytest.mark.parametrize("classes", [2, CLASSES])
def test_logistic_probe_equals_scikit_learn(classes: int) -> None:
    features, labels = data(count=120, classes=classes)
    test, _ = data(seed=1, count=50, classes=classes)
    strengths = (1e-4, 0.01, 1.0)
    held_out = held_out_rows(labels, 0.25, 1)
    probe = logistic_probe(features, labels, classes, LogisticConfig(strengths, 500), held_out)
    fitted = np.flatnonzero(~held_out)
    scaled = standardized(features, fitted).numpy()
    for strength in strengths:
        reference = LogisticRegression(C=strength, max_iter=500).fit(scaled[fitted], labels[fitted])
        expected = 100 * reference.score(scaled[held_out], labels[held_out])
        assert probe.held_out[strength] == pytest.approx(expected)
    rows = np.arange(len(labels))
    reference = LogisticRegression(C=probe.chosen, max_iter=500).fit(standardized(features, rows).numpy(), labels)
    values = features.numpy()
    scaled_test = (test.numpy() - values.mean(0)) / values.std(0)
    probabilities = probe.head.logits(test)[:, 0].softmax(-1).numpy()
    np.testing.assert_allclose(probabilities, reference.predict_proba(scaled_test), rtol=1e-6, atol=1e-9)
    assert probe.converged


def test_a_class_without_rows_is_never_predicted() -> None:
    features, labels = data()
    rows = np.flatnonzero(labels != 1)
    fit = fit_logistic(features, labels, rows, CLASSES, LogisticConfig((1.0,), 500))
    assert fit.converged and (fit.heads.logits(features)[:, 0].argmax(-1) != 1).all()
    ranks = head_ranks(fit.heads, features, labels)[0]
    assert (ranks[torch.from_numpy(labels == 1)] == CLASSES - 1).all()


def test_a_fit_that_stops_early_says_so_without_a_warning() -> None:
    features, labels = data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = fit_logistic(features, labels, np.arange(len(labels)), CLASSES, LogisticConfig((1.0,), 2))
    assert not fit.converged
