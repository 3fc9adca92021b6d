"""Loops that references are written in, and the comparison of an objective with one."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from emkum.objectives import Objective
from emkum.outputs import Batch, ObjectiveOutput, StudentOutput, TeacherOutput
from tests.objectives.cases import converted, with_gradients

Case = tuple[StudentOutput, TeacherOutput, Batch]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def softmax(logits: Tensor) -> Tensor:
    powers = logits.exp()
    return powers / powers.sum()


def cross_entropy(logits: Tensor, target: int) -> Tensor:
    return -softmax(logits)[target].log()


def layer_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    centered = x - x.sum() / len(x)
    return centered / ((centered * centered).sum() / len(x) + eps).sqrt()


def mean(values: list[Tensor]) -> Tensor:
    return sum(values) / len(values)


def half(images: list[Tensor], texts: list[Tensor]) -> Tensor:
    """Half the mean over images plus half the mean over captions."""
    return mean(images) / 2 + mean(texts) / 2


def assert_equals(objective: Objective, case: Case, reference: Callable[[StudentOutput], Tensor]) -> ObjectiveOutput:
    """Compare loss, input gradients and parameter gradients in float64, and the loss in float32.

    Args:
        objective: is left in float64.
        case: in float64.
        reference: from the student's outputs to the same loss.
    """
    student, teacher, batch = case
    objective.double()
    parameters = {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}
    found = []
    for compute in (lambda outputs: objective(outputs, teacher, batch).loss, reference):
        outputs, leaves = with_gradients(student)
        loss = compute(outputs)
        sources = {**leaves, **parameters}
        gradients = torch.autograd.grad(loss, list(sources.values()), allow_unused=True)
        found.append((loss, dict(zip(sources, gradients, strict=True))))
    (loss, ours), (expected, wanted) = found
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    assert sum(gradient is not None for gradient in wanted.values()) > 0
    for name, gradient in wanted.items():
        if gradient is None:
            assert ours[name] is None, name
        else:
            torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    single = converted(student, Tensor.float), converted(teacher, Tensor.float)
    low = copy.deepcopy(objective).float()(*single, batch).loss
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), expected, rtol=1e-4, atol=1e-5)
    return objective(student, teacher, batch)
