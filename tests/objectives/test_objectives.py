"""Every objective against a naive float64 reference written out here."""

import math

import pytest
import torch

from emkum.errors import UserError
from emkum.layers.feature_queue import EMPTY, FeatureQueue
from emkum.layers.temperature import LogitScale
from emkum.objectives import OBJECTIVES, build_objectives, needs_teacher, parse_objectives
from emkum.outputs import Batch, Encoded, StudentOutput, TeacherOutput


def make_student(images: int, captions: int, width: int, target: int, seed: int = 0) -> StudentOutput:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(images, width), (captions, width), (images, target), (captions, target)]
    image, text, image_prediction, text_prediction = (torch.randn(s, generator=generator) for s in shapes)
    return StudentOutput(
        Encoded(image[:, None]), Encoded(text[:, None]), image, text, image_prediction, text_prediction
    )


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a * b).sum() / (a.norm() * b.norm()))


def cross_entropy(logits: list[float], target: list[float]) -> float:
    total = math.log(sum(math.exp(logit) for logit in logits))
    return -sum(p * (logit - total) for logit, p in zip(logits, target, strict=True))


@pytest.mark.parametrize("ids", [[0, 1, 2], [0, 1, 0]], ids=["distinct images", "an image twice"])
@pytest.mark.parametrize("captions", [[0, 1, 2], [2, 0, 0, 1, 1, 2]], ids=["one caption", "two captions, shuffled"])
def test_itc_against_naive_reference(ids: list[int], captions: list[int]) -> None:
    student = make_student(3, len(captions), 7, 4)
    objective = build_objectives(["itc"], {}, None)["itc"].train()
    out = objective(student, None, Batch(torch.tensor(ids), torch.tensor(captions)))
    scale, caption_ids = 1 / 0.07, [ids[row] for row in captions]
    total = {}
    for way, queries, keys, query_ids, key_ids in (
        ("i2t", student.image_features, student.text_features, ids, caption_ids),
        ("t2i", student.text_features, student.image_features, caption_ids, ids),
    ):
        losses = []
        for query, own in zip(queries, query_ids, strict=True):
            positives = [float(other == own) for other in key_ids]
            target = [p / sum(positives) for p in positives]
            losses.append(cross_entropy([scale * cosine(query, key) for key in keys], target))
        total[way] = sum(losses) / len(losses)
    assert out.loss.item() == pytest.approx((total["i2t"] + total["t2i"]) / 2, rel=1e-5)


@pytest.mark.parametrize("whiten", [False, True])
def test_kd_mse_against_naive_reference(whiten: bool) -> None:
    captions = [1, 0, 1]
    student, teacher = make_student(2, 3, 4, 5), torch.randn(2, 5, generator=torch.Generator().manual_seed(9))
    out = build_objectives(["kd_mse"], {"kd_mse_whiten": whiten}, 5)["kd_mse"](
        student, TeacherOutput(teacher), Batch(torch.arange(2), torch.tensor(captions))
    )
    target = teacher.double()
    if whiten:
        centered = target - target.mean(1, keepdim=True)
        target = centered / (centered.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
    image = (student.image_prediction.double() - target).pow(2).mean()
    pairs = zip(student.text_prediction, captions, strict=True)
    text = torch.stack([(p.double() - target[row]).pow(2) for p, row in pairs]).mean()
    assert out.loss.item() == pytest.approx(float(image + text) / 2, rel=1e-5)
    assert out.metrics["text_loss"].item() == pytest.approx(float(text), rel=1e-5)


def test_kd_contrastive_with_bank_against_naive_reference() -> None:
    """Three batches into a bank of five rows: it wraps, empty rows do not count, nor do other crops of an image."""
    objective = build_objectives(["kd_contrastive"], {"kd_contrastive_bank_size": 5}, 4)["kd_contrastive"].train()
    captions = torch.tensor([0, 1, 1])
    bank: list[tuple[int, torch.Tensor]] = []
    for step, ids in enumerate(([0, 1], [2, 0], [3, 4], [1, 5])):
        student = make_student(2, 3, 4, 4, seed=step)
        teacher = torch.randn(2, 4, generator=torch.Generator().manual_seed(50 + step))
        out = objective(student, TeacherOutput(teacher), Batch(torch.tensor(ids), captions))
        halves = []
        for predictions, rows in ((student.image_prediction, [0, 1]), (student.text_prediction, captions.tolist())):
            losses = []
            for prediction, row in zip(predictions, rows, strict=True):
                classes = [teacher[row]]
                classes += [t for i, t in zip(ids, teacher, strict=True) if i != ids[row]]
                classes += [t for i, t in bank if i != ids[row]]
                logits = [cosine(prediction, target) / 0.07 for target in classes]
                losses.append(cross_entropy(logits, [1.0] + [0.0] * (len(classes) - 1)))
            halves.append(sum(losses) / len(losses))
        assert out.loss.item() == pytest.approx(sum(halves) / 2, rel=1e-5)
        bank = (bank + list(zip(ids, teacher, strict=True)))[-5:]


def test_captions_with_targets_of_their_own() -> None:
    """Two images and three captions; the first two, of the same image, do not stand against each other."""
    captions, ids = torch.tensor([0, 0, 1]), [7, 9]
    student = make_student(2, 3, 4, 4)
    images, texts = torch.randn(2, 4), torch.randn(3, 4)
    teacher, batch = TeacherOutput(images, texts), Batch(torch.tensor(ids), captions)
    out = build_objectives(["kd_contrastive"], {"kd_contrastive_bank_size": 4}, 4)["kd_contrastive"](
        student, teacher, batch
    )
    losses = []
    for i, prediction in enumerate(student.text_prediction):
        classes = [texts[i]] + [texts[j] for j in range(3) if captions[j] != captions[i]]
        logits = [cosine(prediction, target) / 0.07 for target in classes]
        losses.append(cross_entropy(logits, [1.0] + [0.0] * (len(classes) - 1)))
    assert out.metrics["text_loss"].item() == pytest.approx(sum(losses) / 3, rel=1e-5)
    plain = build_objectives(["kd_contrastive"], {}, 4)["kd_contrastive"](student, TeacherOutput(images), batch)
    assert out.metrics["image_loss"].item() == pytest.approx(plain.metrics["image_loss"].item(), rel=1e-6)
    out = build_objectives(["kd_mse"], {}, 4)["kd_mse"](student, teacher, batch)
    expected = (student.text_prediction.double() - texts.double()).square().mean()
    assert out.metrics["text_loss"].item() == pytest.approx(float(expected), rel=1e-5)


def test_bank_is_not_pushed_at_validation() -> None:
    objective = build_objectives(["kd_contrastive"], {"kd_contrastive_bank_size": 5}, 4)["kd_contrastive"].eval()
    objective(make_student(2, 2, 4, 4), TeacherOutput(torch.randn(2, 4)), Batch(torch.arange(2), torch.arange(2)))
    assert (objective.bank.ids == EMPTY).all()


def test_queue_wraps_around_and_survives_a_checkpoint() -> None:
    queue = FeatureQueue(4, 1)
    queue.push(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([0, 1, 2]))
    restored = FeatureQueue(4, 1)
    restored.load_state_dict(queue.state_dict())
    for bank in (queue, restored):
        bank.push(torch.tensor([[3.0], [4.0]]), torch.tensor([3, 4]))
        assert bank.ids.tolist() == [4, 1, 2, 3]
        assert bank.features.flatten().tolist() == [4.0, 1.0, 2.0, 3.0]
    queue.push(torch.arange(6.0)[:, None], torch.arange(6))
    assert sorted(queue.ids.tolist()) == [2, 3, 4, 5]


def test_scale_stays_in_its_range_and_can_come_back() -> None:
    scale = LogitScale(1000.0)
    assert scale().item() == pytest.approx(100.0, rel=1e-5)
    scale().backward()
    assert scale.log_scale.grad.item() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32(dtype: torch.dtype) -> None:
    student = make_student(8, 8, 16, 16)
    half = StudentOutput(
        *(Encoded(v.tokens.to(dtype)) if isinstance(v, Encoded) else v.to(dtype) for v in vars(student).values())
    )
    teacher, batch = TeacherOutput(torch.randn(8, 16)), Batch(torch.arange(8), torch.arange(8))
    for name in OBJECTIVES:
        objective = build_objectives([name], {}, 16)[name]
        full, low = objective(student, teacher, batch).loss, objective(half, teacher, batch).loss
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, full, rtol=1e-2, atol=1e-2)


def test_names_are_checked() -> None:
    assert parse_objectives("itc, kd_mse") == ["itc", "kd_mse"]
    assert needs_teacher(["itc", "kd_mse"]) and not needs_teacher(["itc"])
    for wrong in ("itc,nonsense", "", "itc,itc"):
        with pytest.raises(UserError, match="kd_contrastive"):
            parse_objectives(wrong)
