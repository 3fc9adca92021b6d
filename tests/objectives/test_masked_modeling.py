"""Masked modeling of captions and images against naive references in float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from emkum.errors import UserError
from emkum.objectives import Objective, build_objectives, masked_modeling
from emkum.objectives.masked_modeling import IGNORE, even_weights, masked_places
from tests.objectives.cases import PATCHES, SETTING, converted, make_case, with_gradients

EXACT = {"rtol": 1e-6, "atol": 1e-9}


def build(name: str, **options: object) -> Objective:
    torch.manual_seed(3)
    flat = {f"{name}_{key}": value for key, value in options.items()}
    objective = build_objectives([name], flat, SETTING)[name].double().train()
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return objective


def layer_norm(x: Tensor, weight: Tensor | float = 1.0, bias: Tensor | float = 0.0, eps: float = 1e-6) -> Tensor:
    centered = x - x.mean()
    return centered / (centered.square().mean() + eps).sqrt() * weight + bias


def cross_entropy(logits: Tensor, target: int) -> Tensor:
    return logits.exp().sum().log() - logits[target]


def check_gradients(ours: Tensor, reference: Tensor, leaves: list[Tensor]) -> None:
    """Of two losses in the same leaves."""
    found = torch.autograd.grad(ours, leaves)
    wanted = torch.autograd.grad(reference, leaves)
    for one, other in zip(found, wanted, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, **EXACT)


# ----------------------------------------------------------------------------------------------------------------------
# Rows
# ----------------------------------------------------------------------------------------------------------------------


def test_masked_places_come_first_and_in_order() -> None:
    masked = torch.tensor([[False, True, False], [True, False, True]])
    assert masked_places(masked, None).tolist() == [1, 3, 5, 0, 2, 4]
    assert masked_places(masked, 3).tolist() == [1, 3, 5]
    assert masked_places(masked, 4).tolist() == [1, 3, 5, 0]
    assert masked_places(masked, 100).tolist() == [1, 3, 5, 0, 2, 4]


def test_weights_without_anything_to_count_are_zero() -> None:
    assert even_weights(torch.tensor([True, False, True]), torch.float64, gather=True).tolist() == [0.5, 0.0, 0.5]
    assert even_weights(torch.zeros(3, dtype=torch.bool), torch.float32, gather=False).tolist() == [0.0, 0.0, 0.0]


# ----------------------------------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------------------------------


def naive_mlm(objective: Objective, tokens: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    """Loss, and accuracy in percent."""
    (first, _, norm), output = objective.transform, objective.output
    losses, correct = [], []
    for row in range(len(targets)):
        for place in range(targets.shape[1]):
            target = int(targets[row, place])
            if target == IGNORE:
                continue
            hidden = first.weight @ tokens[row, place] + first.bias
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            logits = output.weight @ layer_norm(hidden, norm.weight, norm.bias) + output.bias
            losses.append(cross_entropy(logits, target))
            correct.append(float(logits.argmax() == target))
    return torch.stack(losses).mean(), 100 * sum(correct) / len(correct)


@pytest.mark.parametrize("surplus", [None, 0, 5, 1000], ids=["not known", "exact", "more", "more than there are"])
def test_mlm_against_naive_reference(surplus: int | None) -> None:
    student, teacher, batch = make_case()
    student, _ = with_gradients(student)
    count = int((batch.text_targets != IGNORE).sum())
    batch.num_text_targets = None if surplus is None else count + surplus
    objective = build("mlm")
    out = objective(student, teacher, batch)
    loss, accuracy = naive_mlm(objective, student.masked_text.tokens, batch.text_targets)
    torch.testing.assert_close(out.loss, loss, **EXACT)
    assert out.metrics["accuracy"].item() == pytest.approx(accuracy)
    assert 0 < count < batch.text_targets.numel()
    check_gradients(out.loss, loss, [student.masked_text.tokens, *objective.parameters()])


def test_mlm_in_float32() -> None:
    student, teacher, batch = make_case()
    objective = build("mlm")
    wanted, _ = naive_mlm(objective, student.masked_text.tokens, batch.text_targets)
    found = objective.float()(converted(student, Tensor.float), teacher, batch).loss
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_mlm_reads_the_masked_captions_alone_and_only_where_it_predicts() -> None:
    student, teacher, batch = make_case()
    student, leaves = with_gradients(student)
    objective = build("mlm")
    objective(student, teacher, batch).loss.backward()
    moved = {name for name, leaf in leaves.items() if leaf.grad is not None}
    assert moved == {"masked_text.tokens"}
    read = student.masked_text.tokens.grad.abs().sum(2) > 0
    assert torch.equal(read, batch.text_targets != IGNORE)


def test_mlm_knows_each_token_from_its_own_place() -> None:
    """A head that copies channels to ids is right where the channel of the true id stands out, and nowhere else."""
    student, teacher, batch = make_case()
    objective = build("mlm")
    ids = torch.arange(SETTING.width)
    chosen = batch.text_targets != IGNORE
    targets = torch.where(chosen, ids[torch.arange(chosen.numel()).view_as(chosen) % len(ids)], IGNORE)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.zero_()
        objective.transform[0].weight.copy_(10 * torch.eye(SETTING.width))
        objective.transform[2].weight.fill_(1.0)
        objective.output.weight[: SETTING.width].copy_(torch.eye(SETTING.width))
    tokens = torch.nn.functional.one_hot(targets.clamp(min=0), SETTING.width).double()
    student = replace(student, masked_text=replace(student.masked_text, tokens=tokens))
    batch.num_text_targets = int(chosen.sum()) + 2
    right = objective(student, teacher, replace(batch, text_targets=targets))
    assert right.metrics["accuracy"].item() == pytest.approx(100)
    one_off = torch.where(chosen, (targets + 1) % len(ids), IGNORE)
    wrong = objective(student, teacher, replace(batch, text_targets=one_off))
    assert wrong.metrics["accuracy"].item() == 0 and wrong.loss > right.loss


# ----------------------------------------------------------------------------------------------------------------------
# Image
# ----------------------------------------------------------------------------------------------------------------------


def naive_patches(objective: Objective, tokens: Tensor, mask: Tensor) -> dict[tuple[int, int], Tensor]:
    """What is predicted of each masked patch."""
    norm, linear = objective.head
    return {
        (row, place): linear.weight @ layer_norm(tokens[row, 1 + place], norm.weight, norm.bias) + linear.bias
        for row, place in mask.nonzero().tolist()
    }


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.norm() * b.norm())


@pytest.mark.parametrize("bound", [0, PATCHES - 1, PATCHES])
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_mim_regression_against_naive_reference(beta: float, bound: int) -> None:
    student, teacher, batch = make_case()
    student, _ = with_gradients(student)
    objective = build("mim", beta=beta)
    objective.num_masked = bound
    assert bound == 0 or int(batch.patch_mask.sum()) <= bound * len(batch.image_ids)
    out = objective(student, teacher, batch)
    losses, agreement = [], []
    for (row, place), prediction in naive_patches(objective, student.masked_image.tokens, batch.patch_mask).items():
        target = layer_norm(teacher.patches[row, place], eps=1e-5)
        errors = []
        for difference in prediction - target:
            if beta == 0:
                errors.append(difference**2)
            elif difference.abs() < beta:
                errors.append(difference**2 / (2 * beta))
            else:
                errors.append(difference.abs() - beta / 2)
        losses.append(torch.stack(errors).mean())
        agreement.append(float(cosine(prediction, target).detach()))
    loss = torch.stack(losses).mean()
    torch.testing.assert_close(out.loss, loss, **EXACT)
    assert out.metrics["agreement"].item() == pytest.approx(100 * sum(agreement) / len(agreement), rel=1e-6)
    check_gradients(out.loss, loss, [student.masked_image.tokens, *objective.parameters()])


@pytest.mark.parametrize("bound", [0, PATCHES - 1])
@pytest.mark.parametrize("chunk", [0, 7, 1000])
def test_mim_in_batch_against_naive_reference(chunk: int, bound: int) -> None:
    student, teacher, batch = make_case()
    student, _ = with_gradients(student)
    objective = build("mim", loss="in_batch", chunk=chunk, initial_scale=4.0)
    objective.num_masked = bound
    out = objective(student, teacher, batch)
    predicted = naive_patches(objective, student.masked_image.tokens, batch.patch_mask)
    scale, ids = objective.scale.log_scale.exp(), batch.image_ids.tolist()
    losses, correct, left_out = [], [], 0
    for (row, place), prediction in predicted.items():
        classes = [(row, place)]
        for other_row, other_place in predicted:
            copy = ids[other_row] == ids[row] and other_row != row
            left_out += copy
            if (other_row, other_place) != (row, place) and not copy:
                classes.append((other_row, other_place))
        logits = torch.stack([scale * cosine(prediction, teacher.patches[key]) for key in classes])
        losses.append(cross_entropy(logits, 0))
        correct.append(float(logits.argmax() == 0))
    assert left_out > 0, "the batch should hold an image twice"
    loss = torch.stack(losses).mean()
    torch.testing.assert_close(out.loss, loss, **EXACT)
    assert out.metrics["accuracy"].item() == pytest.approx(100 * sum(correct) / len(correct))
    assert out.metrics["scale"].item() == pytest.approx(float(scale.detach()))
    check_gradients(out.loss, loss, [student.masked_image.tokens, *objective.parameters()])


def test_copies_of_an_image_on_another_device_are_no_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all are copies of one image, a first device's change nothing for the second one."""
    student, teacher, batch = make_case()
    batch = replace(batch, image_ids=torch.zeros_like(batch.image_ids))
    objective = build("mim", loss="in_batch")
    first: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        first.append(tensor)
        return tensor

    monkeypatch.setattr(masked_modeling, "all_gather", record)
    alone = objective(student, teacher, batch).loss
    assert len(first) > 0
    monkeypatch.setattr(masked_modeling, "all_gather", lambda tensor: torch.cat([first.pop(0), tensor]))
    monkeypatch.setattr(masked_modeling, "row_offset", lambda rows: rows)
    monkeypatch.setattr(masked_modeling, "world_size", lambda: 2)
    torch.testing.assert_close(objective(student, teacher, batch).loss, alone, **EXACT)
    assert first == []


@pytest.mark.parametrize("loss", ["regression", "in_batch"])
def test_mim_in_float32(loss: str) -> None:
    student, teacher, batch = make_case()
    objective = build("mim", loss=loss)
    wanted = objective(student, teacher, batch).loss
    objective = objective.float()
    found = objective(converted(student, Tensor.float), converted(teacher, Tensor.float), batch).loss
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["regression", "in_batch"])
def test_mim_reads_the_masked_patches_alone(loss: str) -> None:
    student, teacher, batch = make_case()
    student, leaves = with_gradients(student)
    build("mim", loss=loss)(student, teacher, batch).loss.backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == {"masked_image.tokens"}
    read = student.masked_image.tokens.grad.abs().sum(2) > 0
    assert not read[:, 0].any(), "the CLS token is no patch"
    assert torch.equal(read[:, 1:], batch.patch_mask)


@pytest.mark.parametrize("loss", ["regression", "in_batch"])
def test_nothing_masked_is_a_loss_of_zero(loss: str) -> None:
    student, teacher, batch = make_case()
    student, _ = with_gradients(student)
    batch = replace(
        batch,
        patch_mask=torch.zeros_like(batch.patch_mask),
        text_targets=torch.full_like(batch.text_targets, IGNORE),
    )
    for objective in (build("mim", loss=loss), build("mlm")):
        out = objective(student, teacher, batch)
        out.loss.backward()
        assert out.loss == 0
        assert all((parameter.grad == 0).all() for parameter in objective.parameters())


def test_nothing_depends_on_the_number_of_masked_places_on_the_host() -> None:
    """What would make the host wait for a device is an error for tensors without values."""
    student, teacher, batch = make_case()
    objectives = build("mlm"), build("mim"), build("mim", loss="in_batch", chunk=5)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(value: object) -> object:
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        batch = replace(batch, **{name: fake(value) for name, value in vars(batch).items()})
        student, teacher = converted(student, fake), converted(teacher, fake)
        with pytest.raises(DynamicOutputShapeException):
            _ = teacher.patches[batch.patch_mask]
        for objective in objectives:
            assert objective(student, teacher, batch).loss.shape == ()


def test_options_of_mim_are_checked() -> None:
    with pytest.raises(UserError, match="--mim-loss 'l2' is unknown; choose from regression, in_batch"):
        build("mim", loss="l2")
    with pytest.raises(UserError, match="--mim-beta -1"):
        build("mim", beta=-1.0)
    with pytest.raises(UserError, match="--mim-chunk -2"):
        build("mim", chunk=-2)
