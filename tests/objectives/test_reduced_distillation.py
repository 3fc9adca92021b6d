"""Distillation in fewer dimensions against loops in float64, and the teacher's map against its recurrence."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from emkum.errors import UserError
from emkum.objectives.reduced_distillation import ReducedDistillation, ReducedDistillationConfig
from emkum.outputs import StudentOutput
from tests.objectives.cases import SETTING, make_case
from tests.objectives.naive import Case, assert_equals, cosine, cross_entropy, half, mean

WIDTH, DIM = SETTING.width, 3
EQUAL, WIDER = (replace(SETTING, target_width=WIDTH + more) for more in (0, 1))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def case_of(images: int = 4, seed: int = 0, own_targets: bool = False) -> Case:
    student, teacher, batch = make_case(images, seed)
    generator = torch.Generator().manual_seed(100 + seed)
    features, texts = (
        torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
        for count in (images, len(batch.caption_image))
    )
    batch = replace(batch, caption_image=batch.caption_image.flip(0))
    return student, replace(teacher, features=features, text_features=texts if own_targets else None), batch


def build(loss: str) -> ReducedDistillation:
    """Whose maps differ."""
    objective = ReducedDistillation(ReducedDistillationConfig(dim=DIM, decay=0.75, loss=loss), EQUAL)
    with torch.no_grad():
        objective.student_map.weight.normal_()
        objective.teacher_map.module.weight.normal_()
    return objective


def through(weight: Tensor, feature: Tensor) -> Tensor:
    return torch.stack([sum(w * x for w, x in zip(row, feature, strict=True)) for row in weight])


@pytest.mark.parametrize("own_targets", [False, True])
@pytest.mark.parametrize("loss", ["mse", "contrastive"])
def test_against_loops(loss: str, own_targets: bool) -> None:
    case, objective = case_of(own_targets=own_targets), build(loss)
    _, teacher, batch = case
    ids = batch.image_ids.tolist()
    owners = [ids[row] for row in batch.caption_image]

    def reference(student: StudentOutput) -> Tensor:
        fixed = objective.teacher_map.module.weight
        targets = [through(fixed, feature) for feature in teacher.features]
        if own_targets:
            text_targets, candidates = [through(fixed, f) for f in teacher.text_features], owners
        else:
            text_targets, candidates = [targets[row] for row in batch.caption_image], ids
        halves = []
        for tokens, own, own_ids, others, other_ids in (
            (student.image.tokens, targets, ids, targets, ids),
            (student.text.tokens, text_targets, owners, text_targets if own_targets else targets, candidates),
        ):
            losses = []
            for sample, target, own_id in zip(tokens, own, own_ids, strict=True):
                reduced = through(objective.student_map.weight, sample[0])
                if loss == "mse":
                    losses.append(mean([(a - b) ** 2 for a, b in zip(reduced, target, strict=True)]))
                else:
                    scale = objective.scale.log_scale.exp()
                    negatives = [t for t, i in zip(others, other_ids, strict=True) if i != own_id]
                    logits = [scale * cosine(reduced, t) for t in [target, *negatives]]
                    losses.append(cross_entropy(torch.stack(logits), 0))
            halves.append(losses)
        return half(*halves)

    out = assert_equals(objective, case, reference)
    figure = "agreement" if loss == "mse" else "accuracy"
    assert {"image_loss", "text_loss", f"image_{figure}", f"text_{figure}"} <= out.metrics.keys()


def test_teacher_map_follows_once_an_update() -> None:
    objective = build("mse").double().train()
    average = objective.teacher_map.module.weight.clone()
    for update in range(1, 5):
        for _ in range(3):  # batches of one update
            objective(*case_of(seed=update)).loss.backward()
            objective.begin_update(update - 1, 0.5)
        with torch.no_grad():
            objective.student_map.weight.normal_()
        objective.begin_update(update, 0.5)
        average = 0.75 * average + 0.25 * objective.student_map.weight
        torch.testing.assert_close(objective.teacher_map.module.weight, average, rtol=1e-9, atol=0)
    assert objective.teacher_map.module.weight.grad is None
    assert not any(name.startswith("teacher_map") for name, p in objective.named_parameters() if p.requires_grad)


def test_maps_survive_a_checkpoint() -> None:
    first, second = build("contrastive"), build("contrastive")
    first.begin_update(3, 0)
    second.load_state_dict(first.state_dict())
    for objective in (first, second):
        objective.begin_update(3, 0)
    case = case_of()
    assert first.double()(*case).loss == second.double()(*case).loss
    for objective in (first, second):
        objective.begin_update(4, 0)
    assert torch.equal(first.teacher_map.module.weight, second.teacher_map.module.weight)


def test_maps_start_equal() -> None:
    objective = ReducedDistillation(ReducedDistillationConfig(dim=DIM), EQUAL)
    assert torch.equal(objective.student_map.weight, objective.teacher_map.module.weight)
    assert objective.scale is None and objective.teacher_map.decay == 0.995


@pytest.mark.parametrize(
    ("options", "setting", "message"),
    [
        ({"dim": 3}, WIDER, f"the student has {WIDTH} channels, the teacher {WIDTH + 1}"),
        ({"dim": 7}, EQUAL, "--kd-reduced-dim 7: want 1 to 6"),
        ({"dim": 0}, EQUAL, "--kd-reduced-dim 0: want 1 to 6"),
        ({"dim": 3, "decay": 1.0}, EQUAL, "--kd-reduced-decay 1: want 0 to below 1"),
        ({"dim": 3, "loss": "l1"}, EQUAL, "--kd-reduced-loss 'l1' is unknown; choose from mse, contrastive"),
    ],
)
def test_mistakes(options: dict, setting: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ReducedDistillation(ReducedDistillationConfig(**options), setting)
