"""Distillation of a teacher's global feature, or of its class probabilities, against loops in float64."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emkum.errors import UserError
from emkum.layers.feature_queue import EMPTY
from emkum.objectives.knowledge_distillation import (
    ClassDistillation,
    ClassDistillationConfig,
    ContrastiveDistillation,
    ContrastiveDistillationConfig,
    PredictionHead,
    RegressionDistillation,
    RegressionDistillationConfig,
    kl_divergence,
)
from emkum.outputs import StudentOutput
from tests.objectives.cases import SETTING, make_case
from tests.objectives.naive import Case, assert_equals, cosine, cross_entropy, half, layer_norm, mean, softmax


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def with_text_targets(case: Case) -> Case:
    """The same where captions have targets of their own."""
    student, teacher, batch = case
    texts = torch.randn(len(batch.caption_image), SETTING.target_width, dtype=torch.float64)
    return student, replace(teacher, text_features=texts), batch


def shuffled(case: Case) -> Case:
    """The same where captions do not come in the order of their images."""
    student, teacher, batch = case
    return student, teacher, replace(batch, caption_image=batch.caption_image.flip(0))


# ----------------------------------------------------------------------------------------------------------------------
# KD-MSE
# ----------------------------------------------------------------------------------------------------------------------


def error(prediction: Tensor, target: Tensor, loss: str) -> Tensor:
    """Of one row, mean over channels."""
    if loss == "cosine":
        return 1 - cosine(prediction, target)
    errors = []
    for difference in prediction - target:
        distance = difference.abs()
        if loss == "smooth_l1":
            errors.append(distance**2 / 2 if distance < 1 else distance - 0.5)
        else:
            errors.append(distance**2)
    return mean(errors)


@pytest.mark.parametrize("own_targets", [False, True])
@pytest.mark.parametrize("image_only", [False, True])
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("loss", ["mse", "smooth_l1", "cosine"])
def test_kd_mse_against_loops(loss: str, whiten: bool, image_only: bool, own_targets: bool) -> None:
    case = shuffled(make_case(4))
    case = with_text_targets(case) if own_targets else case
    _, teacher, batch = case

    def change(target: Tensor) -> Tensor:
        return layer_norm(target) if whiten else target

    def reference(student: StudentOutput) -> Tensor:
        images = [error(p, change(t), loss) for p, t in zip(student.image.prediction, teacher.features, strict=True)]
        if image_only:
            return mean(images)
        targets = teacher.text_features if own_targets else [teacher.features[i] for i in batch.caption_image]
        texts = [error(p, change(t), loss) for p, t in zip(student.text.prediction, targets, strict=True)]
        return half(images, texts)

    config = RegressionDistillationConfig(whiten, loss, image_only)
    out = assert_equals(RegressionDistillation(config, SETTING), case, reference)
    names = {"image_loss", "image_agreement"} | (set() if image_only else {"text_loss", "text_agreement"})
    assert out.metrics.keys() == names
    assert not any(value.requires_grad for value in out.metrics.values())
    predictions = case[0].image.prediction
    agreement = mean([cosine(p, change(t)) for p, t in zip(predictions, teacher.features, strict=True)])
    assert out.metrics["image_agreement"].item() == pytest.approx(100 * agreement.item())


def test_unknown_regression_loss() -> None:
    with pytest.raises(UserError, match="--kd-mse-loss 'l3' is unknown; choose from mse, smooth_l1, cosine"):
        RegressionDistillation(RegressionDistillationConfig(loss="l3"), SETTING)


# ----------------------------------------------------------------------------------------------------------------------
# KD-KL
# ----------------------------------------------------------------------------------------------------------------------


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """D_KL(teacher || student) of one row as a sum over classes."""
    total = 0.0
    for p, q in zip(softmax(teacher / temperature), softmax(student / temperature), strict=True):
        total = total + p * (p.log() - q.log())
    return temperature**2 * total


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kd_kl_against_loops(temperature: float) -> None:
    case = shuffled(make_case(4))
    _, teacher, batch = case

    def reference(student: StudentOutput) -> Tensor:
        images = [divergence(s, t, temperature) for s, t in zip(student.image.logits, teacher.logits, strict=True)]
        pairs = zip(student.text.logits, batch.caption_image, strict=True)
        return half(images, [divergence(s, teacher.logits[row], temperature) for s, row in pairs])

    objective = ClassDistillation(ClassDistillationConfig(temperature), SETTING)
    out = assert_equals(objective, case, reference)
    assert out.metrics.keys() == {"image_loss", "text_loss", "image_agreement", "text_agreement"}


def test_direction_of_the_divergence_against_torch() -> None:
    student, teacher = 3 * torch.randn(2, 5, 7, dtype=torch.float64)
    inwards, outwards = (
        torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=first), torch.distributions.Categorical(logits=second)
        ).mean()
        for first, second in ((teacher, student), (student, teacher))
    )
    assert (inwards - outwards).abs() > 0.1
    torch.testing.assert_close(kl_divergence(student, teacher), inwards, rtol=1e-9, atol=0)


def test_divergence_of_equal_logits_is_zero_and_large_logits_are_fine() -> None:
    logits = torch.tensor([[0.0, 500.0, -500.0]])
    assert kl_divergence(logits, logits).item() == 0
    assert kl_divergence(logits, -logits).isfinite()


def test_agreement_of_classes_by_hand() -> None:
    student, teacher, batch = make_case(4)
    logits = F.one_hot(torch.tensor([0, 1, 2, 3]), SETTING.num_classes).double()
    captions = F.one_hot(torch.tensor([0, 0, 1, 1, 2, 3, 0, 1]), SETTING.num_classes).double()
    student = replace(
        student, image=replace(student.image, logits=logits.roll(1, 0)), text=replace(student.text, logits=captions)
    )
    objective = ClassDistillation(ClassDistillationConfig(), SETTING)
    out = objective(student, replace(teacher, logits=logits), batch)
    assert out.metrics["image_agreement"].item() == 0
    assert out.metrics["text_agreement"].item() == pytest.approx(100 * 5 / 8)


def test_temperature_must_be_positive() -> None:
    with pytest.raises(UserError, match="--kd-kl-temperature 0: want more than 0"):
        ClassDistillation(ClassDistillationConfig(0.0), SETTING)


# ----------------------------------------------------------------------------------------------------------------------
# KD-contrastive
# ----------------------------------------------------------------------------------------------------------------------


def row_loss(prediction: Tensor, own: Tensor, others: list[Tensor], log_scale: Tensor) -> Tensor:
    scale = log_scale.exp()
    return cross_entropy(torch.stack([scale * cosine(prediction, target) for target in [own, *others]]), 0)


def test_kd_contrastive_with_bank_against_loops() -> None:
    """Batches of 4 (the last image is the first again) into a bank of 10: it is filled in part, then wraps."""
    objective = ContrastiveDistillation(ContrastiveDistillationConfig(bank_size=10), SETTING).train()
    bank: list[tuple[int, Tensor]] = []
    for step in range(4):
        student, teacher, batch = case = shuffled(make_case(4, seed=step))
        batch.image_ids[1] += step
        ids = batch.image_ids.tolist()
        candidates = list(zip(ids, teacher.features, strict=True))

        def of_rows(predictions: Tensor, rows: list[int], candidates: list, ids: list, bank: list) -> list[Tensor]:
            losses = []
            for prediction, row in zip(predictions, rows, strict=True):
                others = [target for i, target in [*candidates, *bank] if i != ids[row]]
                losses.append(row_loss(prediction, candidates[row][1], others, objective.scale.log_scale))
            return losses

        def reference(
            student: StudentOutput, given: tuple = (candidates, ids, list(bank)), rows: list = batch.caption_image
        ) -> Tensor:
            images = of_rows(student.image.prediction, range(4), *given)
            return half(images, of_rows(student.text.prediction, rows.tolist(), *given))

        before = {name: value.clone() for name, value in objective.bank.state_dict().items()}
        # `assert_equals` runs it more than once: without pushing here, with pushing below.
        assert_equals(objective.eval(), case, reference)
        assert all(torch.equal(value, before[name]) for name, value in objective.bank.state_dict().items())
        out = objective.train()(student, teacher, batch)
        torch.testing.assert_close(out.loss, reference(student), rtol=1e-6, atol=1e-9)
        assert out.metrics["scale"].item() == pytest.approx(1 / 0.07)
        bank = [*bank, *candidates][-10:]
    filled = objective.bank.ids != EMPTY
    assert filled.all() and sorted(objective.bank.ids.tolist()) == sorted(i for i, _ in bank)


def test_captions_with_targets_of_their_own() -> None:
    """Captions of one image do not stand against each other, and the bank has no part in theirs."""
    case = with_text_targets(make_case(4))
    _, teacher, batch = case
    ids, captions = batch.image_ids.tolist(), batch.caption_ids.tolist()

    objective = ContrastiveDistillation(ContrastiveDistillationConfig(), SETTING)
    scale = objective.scale.log_scale

    def reference(student: StudentOutput) -> Tensor:
        images, texts = [], []
        for i, prediction in enumerate(student.image.prediction):
            others = [teacher.features[j] for j in range(4) if ids[j] != ids[i]]
            images.append(row_loss(prediction, teacher.features[i], others, scale))
        for i, prediction in enumerate(student.text.prediction):
            others = [teacher.text_features[j] for j in range(8) if captions[j] != captions[i]]
            texts.append(row_loss(prediction, teacher.text_features[i], others, scale))
        return half(images, texts)

    assert_equals(objective, case, reference)
    with_bank = ContrastiveDistillation(ContrastiveDistillationConfig(bank_size=6), SETTING).double()
    with_bank(*make_case(6, seed=9))
    plain, other = (part(*case).metrics["text_loss"] for part in (objective, with_bank))
    torch.testing.assert_close(other, plain, rtol=1e-6, atol=0)


def test_contrastive_accuracy_by_hand() -> None:
    student, teacher, batch = make_case(4)
    batch = replace(batch, image_ids=torch.arange(4))
    features = torch.eye(4, SETTING.target_width, dtype=torch.float64)
    image = replace(student.image, prediction=features[[0, 1, 3, 2]])
    text = replace(student.text, prediction=features[[0, 0, 1, 1, 2, 2, 3, 1]])
    objective = ContrastiveDistillation(ContrastiveDistillationConfig(), SETTING)
    out = objective(replace(student, image=image, text=text), replace(teacher, features=features), batch)
    assert out.metrics["image_accuracy"].item() == 50
    assert out.metrics["text_accuracy"].item() == pytest.approx(87.5)
    # Two of four rows are right at a similarity of 1 against 0.
    right, scale = math.log(1 + 3 * math.exp(-1 / 0.07)), 1 / 0.07
    assert out.metrics["image_loss"].item() == pytest.approx((2 * right + 2 * (right + scale)) / 4, rel=1e-5)


def test_bank_is_not_pushed_at_validation() -> None:
    objective = ContrastiveDistillation(ContrastiveDistillationConfig(bank_size=5), SETTING).eval()
    objective(*make_case())
    assert (objective.bank.ids == EMPTY).all()


def test_bank_and_scale_survive_a_checkpoint() -> None:
    first, second = (
        ContrastiveDistillation(ContrastiveDistillationConfig(bank_size=5), SETTING).double().train() for _ in range(2)
    )
    with torch.no_grad():
        first.scale.log_scale.add_(0.3)
    first(*make_case(4, seed=1))
    second.load_state_dict(first.state_dict())
    losses = [[part(*make_case(4, seed=step)).loss for step in range(3)] for part in (first, second)]
    assert losses[0] == losses[1]


# ----------------------------------------------------------------------------------------------------------------------
# Head
# ----------------------------------------------------------------------------------------------------------------------


def test_head_computes_in_the_type_of_its_parameters() -> None:
    head = PredictionHead(6, 3)
    assert head(torch.randn(2, 5, 6, dtype=torch.bfloat16)).dtype == torch.float32
    assert head.bfloat16()(torch.randn(2, 6)).dtype == torch.bfloat16
