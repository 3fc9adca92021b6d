"""Image-text matching against loops over pairs, and how its negatives are drawn."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from emkum.errors import UserError
from emkum.objectives import Setting, build_objectives
from emkum.objectives.base import Objective
from emkum.objectives.matching import PairNoise, draw_rows, pair_noise
from emkum.outputs import Batch, ModalityOutput, StudentOutput
from tests.objectives.cases import SETTING, make_case, with_gradients

IMAGES = 6


def build(setting: Setting = SETTING, **options: object) -> Objective:
    torch.manual_seed(0)
    return build_objectives(["itm"], {f"itm_{key}": value for key, value in options.items()}, setting)["itm"].double()


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a * b).sum() / (a.norm() * b.norm()))


def best(scores: dict[int, float]) -> int:
    return max(scores, key=lambda row: scores[row])


def naive_pairs(
    student: StudentOutput, batch: Batch, noise: PairNoise, scale: float | None
) -> list[tuple[int, int, int]]:
    """(image, caption, matched) of all pairs."""
    ids, owners = batch.image_ids.tolist(), batch.caption_image.tolist()
    images, texts, pairs = student.image.features, student.text.features, []
    own = [
        best({t: noise.captions[t].item() for t, owner in enumerate(owners) if owner == image})
        for image in range(len(ids))
    ]
    pairs += [(image, own[image], 1) for image in range(len(ids))]
    for image in range(len(ids)):
        scores = {
            t: noise.to_texts[image, t].item() + (0 if scale is None else scale * cosine(images[image], texts[t]))
            for t, owner in enumerate(owners)
            if ids[owner] != ids[image]
        }
        pairs.append((image, best(scores), 0))
    for image in range(len(ids)):
        scores = {
            i: noise.to_images[image, i].item() + (0 if scale is None else scale * cosine(images[i], texts[own[image]]))
            for i in range(len(ids))
            if ids[i] != ids[image]
        }
        pairs.append((best(scores), own[image], 0))
    return pairs


def naive_logits(objective: Objective, image: Tensor, text: Tensor, activation: str) -> Tensor:
    maps = objective.classifier
    feature = maps.image.weight @ image + maps.image.bias + maps.text.weight @ text + maps.text.bias
    if activation == "gelu":
        feature = feature * 0.5 * (1 + torch.erf(feature / math.sqrt(2)))
    return maps.output.weight @ feature + maps.output.bias


def gradients_of(objective: Objective, leaves: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    objective.zero_grad()
    for leaf in leaves.values():
        leaf.grad = None
    loss.backward()
    found = {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
    return found | {name: p.grad.clone() for name, p in objective.named_parameters()}


@pytest.mark.parametrize("negatives", ["uniform", "hard"])
@pytest.mark.parametrize("activation", ["gelu", "none"])
def test_itm_against_naive_reference(negatives: str, activation: str) -> None:
    """Two captions an image and an image twice; the second batch draws anew."""
    objective = build(negatives=negatives, hard_scale=4.0, activation=activation).train()
    drawn = []
    for step in (1, 2):
        student, _, batch = make_case(IMAGES)
        student, leaves = with_gradients(student)
        out = objective(student, None, batch)
        noise = pair_noise(step, IMAGES, 2 * IMAGES)
        pairs = naive_pairs(student, batch, noise, 4.0 if negatives == "hard" else None)
        losses, right = [], []
        for image, text, label in pairs:
            logits = naive_logits(objective, student.image.tokens[image, 0], student.text.tokens[text, 0], activation)
            losses.append(-(logits.exp()[label] / logits.exp().sum()).log())
            right.append(float(logits.argmax() == label))
        want = sum(losses) / len(losses)
        torch.testing.assert_close(out.loss, want, rtol=1e-9, atol=0)
        assert out.metrics["accuracy"].item() == pytest.approx(100 * sum(right) / len(right))
        assert out.metrics["positive_accuracy"].item() == pytest.approx(100 * sum(right[:IMAGES]) / IMAGES)
        assert out.metrics["negative_accuracy"].item() == pytest.approx(100 * sum(right[IMAGES:]) / (2 * IMAGES))
        ours, theirs = gradients_of(objective, leaves, out.loss), gradients_of(objective, leaves, want)
        assert {"image.tokens", "text.tokens"} <= ours.keys()
        # Which negatives are hard is no matter of the loss: similarities get no gradient.
        assert "image.features" not in ours
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)
        drawn.append(pairs)
    assert drawn[0] != drawn[1]
    single = build(negatives=negatives, hard_scale=4.0, activation=activation).float().train()
    single.draws.fill_(1)
    text, image = (replace(part, tokens=part.tokens.detach().float()) for part in (student.text, student.image))
    loss = single(replace(student, text=text, image=image), None, batch).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), out.loss, rtol=1e-4, atol=1e-4)


def frequencies(logits: Tensor | None, allowed: Tensor, draws: int) -> Tensor:
    """Part of the draws that each key of a query gets, (Q, K)."""
    counts = torch.zeros(allowed.shape)
    rows = torch.arange(len(allowed))
    for draw in range(draws):
        noise = pair_noise(draw, len(allowed), allowed.shape[1]).to_texts
        counts[rows, draw_rows(logits, allowed, noise)] += 1
    return counts / draws


def test_negatives_are_drawn_from_the_softmax_of_what_is_allowed() -> None:
    torch.manual_seed(0)
    logits, draws = 1.5 * torch.randn(3, 5), 4000
    allowed = torch.tensor([[0, 1, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 0]]).bool()
    for given in (logits, None):
        found = frequencies(given, allowed, draws)
        scores = torch.zeros(3, 5) if given is None else given
        want = scores.masked_fill(~allowed, float("-inf")).softmax(1)
        assert (found[~allowed] == 0).all()
        # Chi-square of 2 to 3 degrees of freedom a query: 0.1 % lie above 16.3.
        expected = draws * want
        chi_square = ((draws * found - expected).square() / expected)[allowed]
        assert max(part.sum() for part in chi_square.split(allowed.sum(1).tolist())) < 16.3


def test_noise_of_a_rank_is_a_part_of_all_ranks_noise_and_of_the_right_distribution() -> None:
    noise = pair_noise(3, 40, 80)
    assert noise.captions.shape == (80,) and noise.to_texts.shape == (40, 80) and noise.to_images.shape == (40, 40)
    assert torch.equal(noise.to_texts, pair_noise(3, 40, 80).to_texts)
    assert not torch.equal(noise.to_texts, pair_noise(4, 40, 80).to_texts)
    # Mean and variance of the standard Gumbel distribution.
    assert noise.to_texts.mean().item() == pytest.approx(0.5772, abs=0.06)
    assert noise.to_texts.var().item() == pytest.approx(math.pi**2 / 6, rel=0.1)


@pytest.mark.parametrize("negatives", ["uniform", "hard"])
def test_without_any_other_image_there_are_positives_alone(negatives: str) -> None:
    student, _, batch = make_case(IMAGES)
    batch = replace(batch, image_ids=torch.full((IMAGES,), 5))
    objective = build(negatives=negatives).eval()
    out = objective(student, None, batch)
    own = pair_noise(0, IMAGES, 2 * IMAGES).captions.view(IMAGES, 2).argmax(1) + 2 * torch.arange(IMAGES)
    losses = []
    for image, text in enumerate(own.tolist()):
        logits = naive_logits(objective, student.image.tokens[image, 0], student.text.tokens[text, 0], "gelu")
        losses.append(-logits.log_softmax(0)[1])
    torch.testing.assert_close(out.loss, sum(losses) / IMAGES)
    assert out.metrics["negative_accuracy"] == 0
    torch.testing.assert_close(out.metrics["accuracy"], out.metrics["positive_accuracy"])


def test_draws_go_on_after_a_checkpoint_and_not_at_validation() -> None:
    student, _, batch = make_case(IMAGES)
    objective = build().train()
    for _ in range(3):
        objective(student, None, batch)
    state = {name: value.clone() for name, value in objective.state_dict().items()}
    assert state["draws"] == 3
    # One that has drawn before, whose count on the host is to give way.
    restored = build().train()
    restored(student, None, batch)
    restored.load_state_dict(state)
    at_validation = restored.eval()(student, None, batch).loss
    assert torch.equal(at_validation, restored(student, None, batch).loss)
    assert torch.equal(restored.train()(student, None, batch).loss, objective(student, None, batch).loss)
    assert restored.draws == 4


def test_always_not_matched_gives_two_thirds() -> None:
    student, _, batch = make_case(IMAGES)
    objective = build()
    torch.nn.init.zeros_(objective.classifier.output.weight)
    objective.classifier.output.bias.data = torch.tensor([1.0, -1.0]).double()
    metrics = objective(student, None, batch).metrics
    assert metrics["accuracy"].item() == pytest.approx(200 / 3)
    assert metrics["positive_accuracy"] == 0 and metrics["negative_accuracy"] == 100


@pytest.mark.parametrize("activation", ["gelu", "none"])
def test_a_sum_of_logits_cannot_tell_pairs_and_a_curved_one_can(activation: str) -> None:
    setting = Setting(width=16, contrast_width=16)
    objective = build(setting, activation=activation).float().train()
    codes = torch.randn(2, 6, 16)
    student = StudentOutput(*(ModalityOutput(code[:, None], features=code) for code in codes))
    batch = Batch(torch.arange(6), torch.arange(6))
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    accuracies = []
    for _ in range(400):
        out = objective(student, None, batch)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        accuracies.append(out.metrics["accuracy"])
    late = torch.stack(accuracies[-50:]).mean()
    assert late > 95 if activation == "gelu" else late < 70


@pytest.mark.parametrize(
    "options, message",
    [
        ({"negatives": "soft"}, "--itm-negatives 'soft' is unknown; choose from uniform, hard"),
        ({"activation": "relu"}, "--itm-activation 'relu' is unknown; choose from gelu, none"),
        ({"hard_scale": -1.0}, "--itm-hard-scale -1.0: choose 0 or more"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**options)
