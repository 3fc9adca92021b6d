"""DINO with captions as views, against its published loop over pairs of views, in float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from emkum.errors import UserError
from emkum.objectives import Objective, Requirements, build_objectives, objective_configs, required
from emkum.objectives.self_distillation import PrototypeHead
from emkum.outputs import Batch, ModalityOutput, StudentOutput, TeacherOutput
from tests.objectives.cases import CAPTIONS, SETTING, converted, make_case, with_gradients

EXACT = {"rtol": 1e-6, "atol": 1e-9}
PROTOTYPES, STUDENT_TEMPERATURE, CENTER_DECAY = 13, 0.1, 0.9
SMALL = {"prototypes": PROTOTYPES, "hidden": 10, "bottleneck": 4}


def build(**options: object) -> Objective:
    torch.manual_seed(5)
    options = {f"dino_{key}": value for key, value in ({"crops": True} | SMALL | options).items()}
    objective = build_objectives(["dino"], options, SETTING)["dino"].double().train()
    with torch.no_grad():
        # A head that tells views apart, an average that has gone its own way and a center that is not zero.
        for parameter in objective.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        objective.center.copy_(0.1 * torch.randn(PROTOTYPES))
    return objective


def shuffled_case(seed: int = 0) -> tuple[StudentOutput, TeacherOutput, Batch]:
    """Captions in another order than their images'."""
    student, teacher, batch = make_case(seed=seed)
    order = torch.randperm(len(batch.caption_image), generator=torch.Generator().manual_seed(seed))

    def change(text: ModalityOutput) -> ModalityOutput:
        return converted(text, lambda tensor: tensor[order])

    average = replace(student.average, text=change(student.average.text))
    student = replace(student, text=change(student.text), average=average)
    return student, teacher, replace(batch, caption_image=batch.caption_image[order])


def naive_head(head: PrototypeHead, x: Tensor) -> Tensor:
    for number in (0, 2, 4):
        layer = head.layers[number]
        x = layer.weight @ x + layer.bias
        if number < 4:
            x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
    x = x / x.square().sum().sqrt()
    return torch.stack([(row / row.square().sum().sqrt() * x).sum() for row in head.prototypes])


def softmax(logits: Tensor) -> Tensor:
    exponentials = (logits - logits.max()).exp()
    return exponentials / exponentials.sum()


def views_of(output: StudentOutput, batch: Batch, crops: ModalityOutput | None) -> list[Tensor]:
    """(B, D) each: the image, its first caption, its second one, and its crops."""
    captions = [torch.nonzero(batch.caption_image == row).flatten() for row in range(len(batch.image_ids))]
    views = [output.image.tokens[:, 0]]
    views += [torch.stack([output.text.tokens[rows[number], 0] for rows in captions]) for number in range(CAPTIONS)]
    return views + ([] if crops is None else [view[:, 0] for view in crops.tokens.chunk(2)])


def naive_dino(objective: Objective, student: StudentOutput, batch: Batch, temperature: float) -> dict[str, Tensor]:
    """The loop of the paper's code: every view of the teacher against every other view of the student."""
    seen = views_of(student, batch, student.crops if objective.config.crops else None)
    student_views = [[naive_head(objective.head, x) / STUDENT_TEMPERATURE for x in view] for view in seen]
    teacher_views = []
    for view in views_of(student.average, batch, None):
        logits = [naive_head(objective.average_head.module, x) - objective.center for x in view]
        teacher_views.append([softmax(row / temperature).detach() for row in logits])
    terms: dict[str, list[Tensor]] = {"image": [], "text": []}
    for i, q in enumerate(teacher_views):
        for v, logits in enumerate(student_views):
            if v == i:
                continue
            losses = [-(p * softmax(row).log()).sum() for p, row in zip(q, logits, strict=True)]
            terms["text" if 0 < v <= CAPTIONS else "image"].append(torch.stack(losses).mean())
    means = {f"{name}_loss": torch.stack(found).mean() for name, found in terms.items()}
    return {"loss": torch.stack(terms["image"] + terms["text"]).mean()} | means


@pytest.mark.parametrize("crops", [True, False])
@pytest.mark.parametrize(("updates", "temperature"), [(0, 0.04), (5, 0.055), (10, 0.07), (99, 0.07)])
def test_dino_against_the_published_loop(updates: int, temperature: float, crops: bool) -> None:
    student, teacher, batch = shuffled_case()
    student, _ = with_gradients(student)
    objective = build(crops=crops, warmup_updates=10)
    objective.begin_update(updates, 0.5)
    out = objective(student, teacher, batch)
    wanted = naive_dino(objective, student, batch, temperature)
    torch.testing.assert_close(out.loss, wanted["loss"], **EXACT)
    for part in ("image_loss", "text_loss"):
        torch.testing.assert_close(out.metrics[part], wanted[part].detach(), **EXACT)
    leaves = [student.image.tokens, student.text.tokens, *([student.crops.tokens] if crops else [])]
    leaves += objective.head.parameters()
    found, reference = (torch.autograd.grad(loss, leaves) for loss in (out.loss, wanted["loss"]))
    for one, other in zip(found, reference, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, **EXACT)


def naive_accuracies(
    objective: Objective, student: StudentOutput, batch: Batch, temperature: float
) -> dict[str, float]:
    """Each of the student's views against all that the average sees of the other modality, one KL divergence each."""
    owners = {"image": batch.image_ids.tolist(), "text": batch.image_ids[batch.caption_image].tolist()}
    targets: dict[str, list[Tensor]] = {}
    for name in owners:
        features = getattr(student.average, name).tokens[:, 0]
        logits = [naive_head(objective.average_head.module, x) - objective.center for x in features]
        targets[name] = [softmax(row / temperature).detach() for row in logits]
    views = {"image": [*student.image.tokens[:, 0]], "text": [*student.text.tokens[:, 0]]}
    view_owners = dict(owners)
    if objective.config.crops:
        views["image"] += [*student.crops.tokens[:, 0]]
        view_owners["image"] = 3 * owners["image"]
    figures = {}
    for name, other in (("image", "text"), ("text", "image")):
        right = []
        for view, owner in zip(views[name], view_owners[name], strict=True):
            p = softmax(naive_head(objective.head, view).detach() / STUDENT_TEMPERATURE)
            divergences = [(q * (q.log() - p.log())).sum().item() for q in targets[other]]
            if owner in owners[other]:
                right.append(owners[other][divergences.index(min(divergences))] == owner)
        figures[f"{name}_accuracy"] = 100 * sum(right) / len(right)
    return figures


def views_alike(student: StudentOutput, batch: Batch) -> StudentOutput:
    """All views of one image have something in common, also where the batch holds the image twice."""
    generator = torch.Generator().manual_seed(3)
    common = 9 * torch.randn(len(batch.image_ids), 1, SETTING.width, generator=generator, dtype=torch.float64)
    common = common[batch.image_ids]
    image = replace(student.image, tokens=student.image.tokens + common)
    text = replace(student.text, tokens=student.text.tokens + common[batch.caption_image])
    crops = replace(student.crops, tokens=student.crops.tokens + common.repeat(2, 1, 1))
    average = student.average
    average = StudentOutput(
        replace(average.image, tokens=average.image.tokens + common),
        replace(average.text, tokens=average.text.tokens + common[batch.caption_image]),
    )
    return replace(student, image=image, text=text, crops=crops, average=average)


@pytest.mark.parametrize("crops", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_accuracies_against_a_loop(seed: int, crops: bool) -> None:
    student, teacher, batch = shuffled_case(seed)
    objective = build(crops=crops)
    objective.average_head.module.load_state_dict(objective.head.state_dict())
    for case in (student, views_alike(student, batch)):
        found = objective(case, teacher, batch).metrics
        wanted = naive_accuracies(objective, case, batch, 0.04)
        assert {name: found[name].item() for name in wanted} == pytest.approx(wanted, rel=1e-6)
    # By chance one or two of 8 are right.
    assert min(wanted.values()) > 50


def test_dino_in_float32() -> None:
    student, teacher, batch = shuffled_case()
    objective = build()
    wanted = naive_dino(objective, student, batch, 0.04)["loss"]
    found = objective.float()(converted(student, Tensor.float), teacher, batch).loss
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_the_head_is_weight_normalized() -> None:
    head = build().head
    plain = torch.nn.Linear(4, PROTOTYPES, bias=False).double()
    with torch.no_grad():
        plain.weight.copy_(head.prototypes)
    weight_norm = torch.nn.utils.parametrizations.weight_norm(plain)
    weight_norm.parametrizations.weight.original0.data.fill_(1.0)
    x = torch.randn(6, SETTING.width, dtype=torch.float64)
    hidden = torch.nn.functional.normalize(head.layers(x), dim=-1)
    torch.testing.assert_close(head(x), weight_norm(hidden), **EXACT)


def test_images_may_differ_in_their_number_of_captions() -> None:
    """Two images, of which the second has one caption and the first none: its only view is itself."""
    student, teacher, _ = make_case(2)
    rows = slice(0, 1)
    text = converted(student.text, lambda tensor: tensor[rows])
    average = replace(student.average, text=converted(student.average.text, lambda tensor: tensor[rows]))
    student, _ = with_gradients(replace(student, text=text, average=average))
    objective = build(crops=False)
    batch = Batch(torch.arange(2), torch.tensor([1]))
    out = objective(student, teacher, batch)
    target = {}
    for name in ("image", "text"):
        features = getattr(student.average, name).tokens[-1, 0]
        target[name] = softmax((naive_head(objective.average_head.module, features) - objective.center) / 0.04)
    losses = [
        -(target[other] * softmax(naive_head(objective.head, view) / STUDENT_TEMPERATURE).log()).sum()
        for other, view in (("text", student.image.tokens[1, 0]), ("image", student.text.tokens[0, 0]))
    ]
    torch.testing.assert_close(out.loss, sum(losses) / 2, **EXACT)
    # An image without captions cannot be right, and is not counted; the caption has two images to choose from.
    assert out.metrics["image_accuracy"] == 100
    assert out.metrics["text_accuracy"].item() == naive_accuracies(objective, student, batch, 0.04)["text_accuracy"]
    out.loss.backward()
    assert (student.image.tokens.grad[0] == 0).all()


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_center_moves_once_an_update(micro_batches: int) -> None:
    objective = build()
    center = objective.center.clone()
    for update in range(3):
        objective.begin_update(update, 0.7)
        before, rows = center.clone(), []
        for part in range(micro_batches):
            student, teacher, batch = shuffled_case(seed=10 * update + part)
            objective(student, teacher, batch)
            torch.testing.assert_close(objective.center, before, **EXACT)
            average = student.average
            for x in [*average.image.tokens[:, 0], *average.text.tokens[:, 0]]:
                rows.append(naive_head(objective.average_head.module, x).detach())
        objective.eval()(student, teacher, batch)
        objective.train()
        center = CENTER_DECAY * center + (1 - CENTER_DECAY) * torch.stack(rows).mean(0)
    for _ in range(2):
        objective.begin_update(3, 0.7)
        torch.testing.assert_close(objective.center, center, **EXACT)
    assert (center - before).abs().max() > 1e-3


def test_the_average_head_follows_once_an_update() -> None:
    objective = build()
    expected = [parameter.clone() for parameter in objective.average_head.module.parameters()]
    for update, decay, moves in ((0, 0.5, False), (1, 0.75, True), (1, 0.75, False), (2, 1.0, True), (3, 0.25, True)):
        objective.begin_update(update, decay)
        if moves:
            live = list(objective.head.parameters())
            expected = [decay * old + (1 - decay) * new for old, new in zip(expected, live, strict=True)]
        for own, wanted in zip(objective.average_head.module.parameters(), expected, strict=True):
            torch.testing.assert_close(own, wanted, **EXACT)
    assert not any(parameter.requires_grad for parameter in objective.average_head.parameters())


def test_features_that_are_not_finite_do_not_stay() -> None:
    student, teacher, batch = shuffled_case()
    objective = build()
    student.average.image.tokens[0, 0, 0] = float("nan")
    objective(student, teacher, batch)
    objective.begin_update(1, 0.9)
    assert objective.center.isfinite().all()
    student, teacher, batch = shuffled_case(1)
    assert objective(student, teacher, batch).loss.isfinite()


def test_prototypes_are_frozen_at_first() -> None:
    student, teacher, batch = shuffled_case()
    losses, frozen = [], []
    for updates in (0, 1, 2):
        objective = build(frozen_updates=2, warmup_updates=0)
        objective.begin_update(updates, 1.0)
        loss = objective(student, teacher, batch).loss
        loss.backward()
        losses.append(loss.detach())
        frozen.append(bool((objective.head.prototypes.grad == 0).all()))
        assert all((layer.weight.grad != 0).any() for layer in objective.head.layers[::2])
    assert frozen == [True, True, False]
    assert losses[0] == losses[1] == losses[2]
    never = build()
    never(student, teacher, batch).loss.backward()
    assert (never.head.prototypes.grad != 0).any()


def run_updates(objective: Objective, updates: range) -> None:
    """Two batches an update, then a step of the head that the update's number determines."""
    for update in updates:
        objective.begin_update(update, 0.8)
        for part in range(2):
            objective(*shuffled_case(seed=2 * update + part))
        generator = torch.Generator().manual_seed(update)
        with torch.no_grad():
            for parameter in objective.head.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def test_a_run_goes_on_from_a_checkpoint() -> None:
    options = {"frozen_updates": 3, "warmup_updates": 8}
    whole, begun, restored = (build(**options) for _ in range(3))
    run_updates(whole, range(5))
    run_updates(begun, range(3))
    assert not begun.pending.eq(0).all()
    # As fairseq does: the number of updates comes before the weights.
    restored.begin_update(3, 0.8)
    restored.load_state_dict(begun.state_dict())
    run_updates(restored, range(3, 5))
    state = whole.state_dict()
    assert {"center", "pending", "teacher_temperature", "average_head.module.prototypes"} <= state.keys()
    assert all(torch.equal(value, state[name]) for name, value in restored.state_dict().items())
    # And a process that only validates has all that the loss depends on.
    fresh = build(**options)
    fresh.load_state_dict(state)
    losses = [objective.eval()(*shuffled_case(seed=9)).loss for objective in (whole, fresh)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("strength", [0.0, 1e-9])
def test_accuracy_of_views_that_are_all_alike_is_chance(strength: float) -> None:
    """One prototype for all, which is all that agreement would ask for, says nothing about whose a view is."""
    student, teacher, batch = shuffled_case()
    objective = build()
    objective.average_head.module.load_state_dict(objective.head.state_dict())
    objective.center.zero_()
    generator = torch.Generator().manual_seed(1)

    def flat(tensor: Tensor) -> Tensor:
        return 1 + strength * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    out = objective(converted(student, flat), teacher, batch)
    # All are nearest to the same one, and the image that the batch holds twice is 2 of 8.
    assert out.metrics["image_accuracy"] <= 25 and out.metrics["text_accuracy"] <= 25
    assert out.metrics["teacher_entropy"] < math.log(PROTOTYPES) - 0.1
    objective.center.copy_(objective.average_head.module(torch.ones(1, SETTING.width, dtype=torch.float64))[0])
    entropy = objective(converted(student, torch.ones_like), teacher, batch).metrics["teacher_entropy"]
    assert entropy.item() == pytest.approx(math.log(PROTOTYPES), rel=1e-6)


def test_losses_tell_images_from_captions() -> None:
    objective = build()
    objective.average_head.module.load_state_dict(objective.head.state_dict())
    objective.center.zero_()
    student, teacher, batch = shuffled_case()
    student = converted(student, torch.ones_like)
    with torch.no_grad():
        for layer in objective.head.layers[::2]:
            layer.bias.zero_()
        wrong = objective(replace(student, text=replace(student.text, tokens=-student.text.tokens)), teacher, batch)
    assert wrong.metrics["text_loss"] > wrong.metrics["image_loss"]


def test_validation_may_do_without_crops() -> None:
    student, teacher, batch = shuffled_case()
    without = build(crops=False)
    wanted = without.eval()(student, teacher, batch).loss
    objective = build()
    assert objective.eval()(replace(student, crops=None), teacher, batch).loss == wanted
    assert (objective.pending == 0).all()


def test_what_it_needs_depends_on_its_options() -> None:
    for crops in (False, True):
        configs = objective_configs(["dino"], {"dino_crops": crops})
        assert required(configs) == Requirements(average=True, crops=crops)


def test_options_are_checked() -> None:
    for option, value in (("temperature", 0.0), ("teacher_temperature", -1.0), ("first_teacher_temperature", 0.0)):
        with pytest.raises(UserError, match=f"--dino-{option.replace('_', '-')} {value}: want a number above 0"):
            build(**{option: value})
    with pytest.raises(UserError, match="--dino-center-decay 1.5"):
        build(center_decay=1.5)


def test_nothing_in_a_step_waits_for_the_device() -> None:
    """What would make the host wait for a device is an error for tensors without values."""
    student, teacher, batch = shuffled_case()
    objective = build()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        student = converted(student, mode.from_tensor)
        ids = mode.from_tensor(batch.image_ids), mode.from_tensor(batch.caption_image)
        # The first call asks for the number of updates that a checkpoint may have brought.
        objective.average_head._updates = 0
        for update in (1, 2):
            objective.begin_update(update, 0.9)
            assert objective(student, teacher, Batch(*ids)).loss.shape == ()
