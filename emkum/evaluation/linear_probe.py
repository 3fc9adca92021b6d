"""Linear classifiers of features that stay as they are.

What a classifier is trained with (SGD's learning rate, the strength of logistic regression's regularization) is chosen
on a held-out part of the training set; then one is trained with that on all of it. The test set takes no part.

Channels are standardized by the training set's means and standard deviations, as by the parameter-free batch norm
before the classifier of He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", appendix A.1: one range of
learning rates then serves encoders of any scale.

n rows of features, D channels, C classes, H heads.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from emkum.evaluation.arrays import Array, take
from emkum.evaluation.classification import label_ranks, top_k_accuracy

# A channel whose standard deviation is below this part of its root mean square is constant: what is left are roundings,
# which are not to be blown up.
_CONSTANT = 1e-5

# Rows that are read at once where nothing depends on it.
_BLOCK = 1024


@dataclass(frozen=True)
class SgdConfig:
    """How heads are trained: SGD with momentum, the learning rate falling to 0 by a half cosine, no weight decay.

    Attributes:
        learning_rates: that are tried, in ascending order.
        epochs: over the training set.
        batch_size: rows of an update; the last batch of an epoch may have fewer.
        seed: of the order of rows.
        momentum: of SGD.
    """

    learning_rates: tuple[float, ...]
    epochs: int
    batch_size: int
    seed: int = 1
    momentum: float = 0.9


@dataclass(frozen=True)
class LogisticConfig:
    """How scikit-learn's logistic regression is fitted (by L-BFGS, in float64).

    Attributes:
        strengths: values of C, the inverse strength of L2 regularization, in ascending order.
        max_iterations: of L-BFGS.
    """

    strengths: tuple[float, ...]
    max_iterations: int


@dataclass(frozen=True)
class Scaling:
    """Standardization of channels.

    Attributes:
        mean: (D,). factor: (D,), one over the standard deviation; 0 for constant channels.
    """

    mean: Tensor
    factor: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """(n, D) standardized."""
        return (rows - self.mean) * self.factor

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Scaling":
        """The same on a device and in a precision."""
        return Scaling(self.mean.to(device, dtype), self.factor.to(device, dtype))


@dataclass(frozen=True)
class Heads:
    """H linear classifiers of standardized features.

    Attributes:
        weight: (H, C, D). bias: (H, C).
        scaling: what comes before them.
    """

    weight: Tensor
    bias: Tensor
    scaling: Scaling

    def logits(self, rows: Tensor) -> Tensor:
        """(n, H, C) of features (n, D) as they were before standardization."""
        heads, classes, width = self.weight.shape
        logits = F.linear(self.scaling(rows), self.weight.reshape(heads * classes, width), self.bias.flatten())
        return logits.view(len(rows), heads, classes)


@dataclass(frozen=True)
class Probe:
    """A classifier and how it was found.

    Attributes:
        head: the one, H = 1, trained on the whole training set.
        held_out: setting (learning rate, or C) -> top-1 accuracy on the held-out part, in percent.
        chosen: the setting that did best; of equally good ones the least.
        converged: whether the fit ended by itself; always of SGD.
    """

    head: Heads
    held_out: dict[float, float]
    chosen: float
    converged: bool = True


class Fit(NamedTuple):
    """What `_choose` is given: heads for some settings, trained on some rows, and whether all of them converged."""

    heads: Heads
    converged: bool


def held_out_rows(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """(n,) bool, True for the rows that are held out: of each class about this fraction, and never all of it.

    Args:
        labels: (n,) integers, not negative.
        fraction: more than 0, less than 1.
        seed: of the draw.

    Raises:
        ValueError: no class has two rows.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    ordered = labels[order]
    size = np.bincount(ordered)[ordered]
    turn = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    # Where in its class a row stands, from 0 to 1; among equals the draw decides, so that no class is favored.
    candidates = np.lexsort((rng.random(len(ordered)), (turn + 0.5) / size))
    candidates = candidates[(turn < size - 1)[candidates]]
    if len(candidates) == 0:
        raise ValueError("no class has two rows")
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[order[candidates[: max(1, round(fraction * len(labels)))]]] = True
    return held_out


def channel_scaling(features: Array, rows: np.ndarray) -> Scaling:
    """Means and standard deviations of channels, in float64 on the CPU.

    Args:
        features: (n, D).
        rows: (m,) ascending, those that count; at least one.
    """
    blocks = [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]
    mean = sum(take(features, block, "cpu", torch.float64).sum(0) for block in blocks) / len(rows)
    squares = sum((take(features, block, "cpu", torch.float64) - mean).square().sum(0) for block in blocks)
    std = (squares / len(rows)).sqrt()
    return Scaling(mean, torch.where(std > _CONSTANT * (mean.square() + std.square()).sqrt(), 1 / std, 0.0))


def train_heads(
    features: Array,
    labels: np.ndarray,
    rows: np.ndarray,
    num_classes: int,
    config: SgdConfig,
    device: torch.device | str = "cpu",
    report: Callable[[int], Any] = lambda count: None,
) -> Heads:
    """One head for each learning rate, all side by side: they see the same batches, in one matrix product an update.

    Args:
        features: (n, D) finite; float64 stays, anything else is computed in float32.
        labels: (n,) int64 in 0..C-1.
        rows: (m,) ascending, the rows to train on.
        num_classes: C.
        config: learning rates of the H heads and how they are trained. A head that diverges has parameters that are
            not finite, and leaves the others alone.
        device: where to train.
        report: called after each epoch, with 1.
    """
    dtype = torch.float64 if features.dtype in (torch.float64, np.float64) else torch.float32
    count, width = len(config.learning_rates), features.shape[1]
    scaling = channel_scaling(features, rows).to(device, dtype)
    weight = torch.zeros(count * num_classes, width, dtype=dtype, device=device)
    bias = torch.zeros(count * num_classes, dtype=dtype, device=device)
    velocities = torch.zeros_like(weight), torch.zeros_like(bias)
    rates = torch.tensor(config.learning_rates, dtype=dtype, device=device).repeat_interleave(num_classes)
    batches = -(-len(rows) // config.batch_size)
    for epoch in range(config.epochs):
        order = np.random.default_rng((config.seed, epoch)).permutation(rows)
        for number in range(batches):
            batch = np.sort(order[number * config.batch_size : (number + 1) * config.batch_size])
            inputs = scaling(take(features, batch, device, dtype))
            right = torch.from_numpy(labels[batch]).to(device)
            gradient = _logit_gradient(F.linear(inputs, weight, bias).view(len(batch), count, num_classes), right)
            velocities[0].mul_(config.momentum).addmm_(gradient.T, inputs)
            velocities[1].mul_(config.momentum).add_(gradient.sum(0))
            progress = (epoch * batches + number) / (config.epochs * batches)
            factor = 0.5 * (1 + math.cos(math.pi * progress))
            weight.addcmul_(velocities[0], rates[:, None], value=-factor)
            bias.addcmul_(velocities[1], rates, value=-factor)
        report(1)
    return Heads(weight.view(count, num_classes, width), bias.view(count, num_classes), scaling)


def _logit_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, H * C) gradient of the mean cross-entropy over the batch, of each head by itself.

    Args:
        logits: (B, H, C).
        labels: (B,) int64.
    """
    probabilities = logits.softmax(dim=-1)
    probabilities -= F.one_hot(labels, logits.shape[-1]).to(logits.dtype)[:, None]
    return probabilities.flatten(1) / len(logits)


def fit_logistic(
    features: Array, labels: np.ndarray, rows: np.ndarray, num_classes: int, config: LogisticConfig
) -> Fit:
    """scikit-learn's logistic regression for each strength.

    Args:
        features: (n, D) finite; the chosen rows are held in float64.
        labels: (n,) int64 in 0..C-1.
        rows: (m,) ascending, the rows to fit, of at least two classes.
        num_classes: C. A class that no row has is never predicted: its bias is minus infinity.
        config: strengths of the H heads.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    scaling = channel_scaling(features, rows)
    inputs = scaling(take(features, rows, "cpu", torch.float64)).numpy()
    weight = torch.zeros(len(config.strengths), num_classes, inputs.shape[1], dtype=torch.float64)
    bias = torch.full(weight.shape[:2], -torch.inf, dtype=torch.float64)
    converged = True
    for number, strength in enumerate(config.strengths):
        model = LogisticRegression(C=strength, max_iter=config.max_iterations)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(inputs, labels[rows])
        coefficients, intercepts = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
        if len(model.classes_) == 2:
            # One logit alone, that of the second class; the first one's is 0.
            coefficients = torch.cat([torch.zeros_like(coefficients), coefficients])
            intercepts = torch.cat([torch.zeros_like(intercepts), intercepts])
        weight[number, model.classes_], bias[number, model.classes_] = coefficients, intercepts
        converged = converged and int(model.n_iter_.max()) < config.max_iterations
    return Fit(Heads(weight, bias, scaling), converged)


def head_ranks(heads: Heads, features: Array, labels: np.ndarray, rows: np.ndarray | None = None) -> Tensor:
    """(H, m) int64, for each head and row how many wrong classes are at least as likely as the right one.

    Args:
        heads: computed where they are, in their precision.
        features: (n, D). labels: (n,).
        rows: (m,) ascending, those that count; None = all.
    """
    rows = np.arange(len(labels)) if rows is None else rows
    ranks = []
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        logits = heads.logits(take(features, block, heads.weight.device, heads.weight.dtype))
        right = torch.from_numpy(labels[block]).to(logits.device)
        ranks.append(torch.stack([label_ranks(of_head, right) for of_head in logits.unbind(1)]).cpu())
    return torch.cat(ranks, dim=1)


def sgd_probe(
    features: Array,
    labels: np.ndarray,
    num_classes: int,
    config: SgdConfig,
    held_out: np.ndarray,
    device: torch.device | str = "cpu",
    report: Callable[[int], Any] = lambda count: None,
) -> Probe:
    """Choose the learning rate on the held-out rows, then train with it on all.

    Args:
        features, labels, num_classes, config, device: see `train_heads`.
        held_out: (n,) bool, as `held_out_rows` gives it.
        report: called after each of 2 * epochs epochs, with 1.
    """

    def fit(rows: np.ndarray, rates: tuple[float, ...]) -> Fit:
        chosen = SgdConfig(rates, config.epochs, config.batch_size, config.seed, config.momentum)
        return Fit(train_heads(features, labels, rows, num_classes, chosen, device, report), True)

    return _choose(features, labels, held_out, config.learning_rates, fit)


def logistic_probe(
    features: Array, labels: np.ndarray, num_classes: int, config: LogisticConfig, held_out: np.ndarray
) -> Probe:
    """Choose C on the held-out rows, then fit with it on all; arguments as of `fit_logistic` and `sgd_probe`."""

    def fit(rows: np.ndarray, strengths: tuple[float, ...]) -> Fit:
        return fit_logistic(features, labels, rows, num_classes, LogisticConfig(strengths, config.max_iterations))

    return _choose(features, labels, held_out, config.strengths, fit)


def _choose(
    features: Array,
    labels: np.ndarray,
    held_out: np.ndarray,
    settings: Sequence[float],
    fit: Callable[[np.ndarray, tuple[float, ...]], Fit],
) -> Probe:
    """Fit all settings without the held-out rows, and the best of them with all rows."""
    candidates = fit(np.flatnonzero(~held_out), tuple(settings))
    ranks = head_ranks(candidates.heads, features, labels, np.flatnonzero(held_out))
    accuracy = [top_k_accuracy(of_head, (1,))["top_1"] for of_head in ranks]
    chosen = settings[int(np.argmax(accuracy))]
    final = fit(np.arange(len(labels)), (chosen,))
    return Probe(final.heads, dict(zip(settings, accuracy, strict=True)), chosen, final.converged)
