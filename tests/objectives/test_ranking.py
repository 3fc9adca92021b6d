"""The ranking loss against loops."""

import pytest
import torch

from emkum.objectives import build_objectives
from emkum.objectives.ranking import ranking_loss
from emkum.outputs import Batch, ModalityOutput, StudentOutput
from tests.objectives.cases import SETTING


def student_of(images: torch.Tensor, texts: torch.Tensor) -> StudentOutput:
    return StudentOutput(
        ModalityOutput(images[:, None], features=images), ModalityOutput(texts[:, None], features=texts)
    )


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b) / (a.norm() * b.norm())


@pytest.mark.parametrize("margin", [0.2, 0.7])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [5, 1, 5, 3]], ids=["distinct images", "an image twice"])
@pytest.mark.parametrize("captions", [[0, 1, 2, 3], [2, 0, 0, 1, 3, 2, 2]], ids=["one caption", "several, shuffled"])
def test_against_loops(ids: list[int], captions: list[int], margin: float) -> None:
    torch.manual_seed(0)
    drawn = torch.randn(len(ids), 5, dtype=torch.float64), torch.randn(len(captions), 5, dtype=torch.float64)
    ours, (images, texts) = ([part.clone().requires_grad_() for part in drawn] for _ in range(2))
    sums = {"i2t_loss": 0.0, "t2i_loss": 0.0}
    for text, owner in zip(texts, captions, strict=True):
        pair = cosine(images[owner], text)
        for other, other_owner in zip(texts, captions, strict=True):
            if ids[other_owner] != ids[owner]:
                sums["i2t_loss"] += torch.relu(margin - pair + cosine(images[owner], other))
        for other, other_id in zip(images, ids, strict=True):
            if other_id != ids[owner]:
                sums["t2i_loss"] += torch.relu(margin - pair + cosine(text, other))
    want = sum(sums.values()) / (2 * len(captions))
    want.backward()
    objective = build_objectives(["ranking"], {"ranking_margin": margin}, SETTING)["ranking"].train()
    batch = Batch(torch.tensor(ids), torch.tensor(captions))
    out = objective(student_of(*ours), None, batch)
    out.loss.backward()
    torch.testing.assert_close(out.loss, want, rtol=1e-6, atol=1e-8)
    for name, total in sums.items():
        torch.testing.assert_close(out.metrics[name], total.detach() / len(captions), rtol=1e-6, atol=1e-8)
    for got, reference in zip(ours, (images, texts), strict=True):
        assert reference.grad.abs().sum() > 0.01
        torch.testing.assert_close(got.grad, reference.grad, rtol=1e-6, atol=1e-8)
    single = objective(student_of(*(part.float() for part in drawn)), None, batch)
    assert single.loss.dtype == torch.float32
    torch.testing.assert_close(single.loss.double(), want.detach(), rtol=1e-4, atol=1e-5)


def test_by_hand() -> None:
    """One query at cosine 0.8 of its own; others at 0.9, 0.6, -1, and one that is left out: 0.3 + 0 + 0."""
    query = torch.tensor([[3.0, 0.0]])
    own = torch.tensor([[0.8, 0.6]])
    others = torch.tensor([[0.9, (1 - 0.81) ** 0.5], [6.0, 8.0], [-1.0, 0.0], [1.0, 0.0]])
    negatives = torch.tensor([[True, True, True, False]])
    assert ranking_loss(query, own, others, negatives, 0.2).item() == pytest.approx(0.3, abs=1e-6)
    assert ranking_loss(query, own, others, negatives, 0.3).item() == pytest.approx(0.4 + 0.1, abs=1e-6)


def test_accuracies_and_the_default_margin() -> None:
    objective = build_objectives(["ranking"], {}, SETTING)["ranking"]
    images = torch.eye(3)
    texts = torch.eye(3)[[0, 1, 1]]
    out = objective(student_of(images, texts), None, Batch(torch.arange(3), torch.arange(3)))
    assert objective.margin == 0.2
    # Caption 2 looks like image 1. Pairs 0 and 1 are perfect; the third is at cosine 0 of all but one.
    assert out.metrics["t2i_accuracy"].item() == pytest.approx(200 / 3)
    assert out.metrics["t2i_loss"].item() == pytest.approx((0.2 + 1.2) / 3)
    assert out.metrics["i2t_loss"].item() == pytest.approx((0.2 + 2 * 0.2) / 3)
