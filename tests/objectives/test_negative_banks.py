"""Contrast with negatives beyond the batch against loops over lists; the bank itself."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from emkum.errors import UserError
from emkum.layers.feature_queue import EMPTY, FeatureQueue
from emkum.objectives import OBJECTIVES, Objective, build_objectives, objective_configs, required
from emkum.objectives.negative_banks import last_occurrences
from emkum.outputs import Batch, StudentOutput
from tests.objectives.cases import SETTING, converted, make_case, with_gradients

IMAGES, STEPS = 4, 6
# Smaller than all that is pushed, not a multiple of a batch; captions, twice as many, wrap first.
SIZE = 10
NAMES = ["bank_itc", "proximal_itc", "momentum_itc"]

# Whose row it is, the row, and what is added to its logits.
Past = list[tuple[int, Tensor, float]]


def build(name: str, **options: object) -> Objective:
    if name != "proximal_itc":
        options = {"size": SIZE} | options
    flat = {f"{name}_{option}": value for option, value in options.items()}
    return build_objectives([name], flat, SETTING)[name].double().train()


def case_of(step: int) -> tuple[StudentOutput, Batch]:
    """A batch of images some of which earlier batches had; the last image is the first again, with its own sample."""
    student, _, batch = make_case(IMAGES, seed=step)
    samples = (torch.arange(IMAGES) + 3 * step) % 7
    ids = 100 + samples
    ids[-1] = ids[0]
    if step == 3:
        samples[-1] = samples[0]
    return student, replace(batch, image_ids=ids, sample_ids=samples)


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def naive_way(
    queries: Tensor, query_ids: list[int], keys: Tensor, key_ids: list[int], past: Past, scale: Tensor
) -> Tensor:
    """Mean cross-entropy of one way; past rows of the same image are skipped."""
    losses = []
    for query, own in zip(queries, query_ids, strict=True):
        logits = [scale * (unit(query) @ unit(key)) for key in keys]
        others = [scale * (unit(query) @ row) + bias for owner, row, bias in past if owner != own]
        total = torch.log(sum(torch.exp(logit) for logit in logits + others))
        positives = [logit for logit, key_id in zip(logits, key_ids, strict=True) if key_id == own]
        losses.append(sum(total - logit for logit in positives) / len(positives))
    return sum(losses) / len(losses)


def ids_of(batch: Batch) -> tuple[list[int], list[int]]:
    return batch.image_ids.tolist(), [int(batch.image_ids[row]) for row in batch.caption_image]


class NaiveQueues:
    """First in, first out: lists of (id, unit row, step), which `keys` of a student are appended to."""

    def __init__(self, half_life: float = 0.0, of_average: bool = False) -> None:
        self.half_life, self.of_average = half_life, of_average
        self.images: list[tuple[int, Tensor, int]] = []
        self.texts: list[tuple[int, Tensor, int]] = []

    def _past(self, rows: list[tuple[int, Tensor, int]], step: int) -> Past:
        decay = math.log(2) / self.half_life if self.half_life > 0 else 0.0
        return [(owner, row, -decay * (step - written)) for owner, row, written in rows]

    def loss(self, student: StudentOutput, batch: Batch, scale: Tensor, step: int) -> Tensor:
        keys = student.average if self.of_average else student
        image_ids, text_ids = ids_of(batch)
        images, texts = student.image.features, student.text.features
        i2t = naive_way(images, image_ids, keys.text.features, text_ids, self._past(self.texts, step), scale)
        t2i = naive_way(texts, text_ids, keys.image.features, image_ids, self._past(self.images, step), scale)
        for rows, features, ids in (
            (self.images, keys.image.features, image_ids),
            (self.texts, keys.text.features, text_ids),
        ):
            rows += [(owner, unit(row).detach(), step) for owner, row in zip(ids, features, strict=True)]
            del rows[:-SIZE]
        return (i2t + t2i) / 2


class NaiveSamples:
    """The last rows of each sample by its number."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.seen: dict[int, tuple[int, Tensor, Tensor]] = {}

    def loss(
        self, student: StudentOutput, batch: Batch, scale: Tensor, step: int, rows: list[int] | None = None
    ) -> Tensor:
        images, texts = student.image.features, student.text.features
        image_ids, text_ids = ids_of(batch)
        rows = sorted(self.seen) if rows is None else [row for row in rows if row in self.seen]
        past = [self.seen[row] for row in rows]
        i2t = naive_way(images, image_ids, texts, text_ids, [(owner, text, 0.0) for owner, _, text in past], scale)
        t2i = naive_way(texts, text_ids, images, image_ids, [(owner, image, 0.0) for owner, image, _ in past], scale)
        samples, owners = batch.sample_ids.tolist(), batch.caption_image.tolist()
        image_term = text_term = 0.0
        for image, sample in zip(images, samples, strict=True):
            if sample in self.seen:
                image_term += ((unit(image) - self.seen[sample][1]) ** 2).sum() / len(images)
        for text, owner in zip(texts, owners, strict=True):
            if samples[owner] in self.seen:
                text_term += ((unit(text) - self.seen[samples[owner]][2]) ** 2).sum() / len(texts)
        for row, (image, sample) in enumerate(zip(images, samples, strict=True)):
            captions = [unit(text) for text, owner in zip(texts, owners, strict=True) if owner == row]
            text = unit(sum(captions) / len(captions))
            self.seen[sample] = (image_ids[row], unit(image).detach(), text.detach())
        return (i2t + t2i) / 2 + self.weight * (image_term + text_term) / 2


REFERENCES: list[tuple[str, dict[str, object], Callable]] = [
    ("bank_itc", {}, NaiveQueues),
    ("bank_itc", {"half_life": 1.5}, lambda: NaiveQueues(half_life=1.5)),
    ("momentum_itc", {}, lambda: NaiveQueues(of_average=True)),
    ("proximal_itc", {}, lambda: NaiveSamples(30.0)),
    ("proximal_itc", {"proximal_weight": 0.0}, lambda: NaiveSamples(0.0)),
]


@pytest.mark.parametrize(("name", "options", "reference"), REFERENCES)
def test_against_loops(name: str, options: dict[str, object], reference: Callable) -> None:
    """An empty bank, a partly filled one, and one that has wrapped; rows are pushed before the backward runs."""
    objective, naive, single = build(name, **options), reference(), build(name, **options).float()
    for step in range(STEPS):
        objective.begin_update(step, 0.99)
        student, batch = case_of(step)
        (ours, leaves), (theirs, their_leaves) = with_gradients(student), with_gradients(student)
        log_scale = objective.scale.log_scale
        objective.zero_grad()
        their_log_scale = log_scale.detach().clone().requires_grad_()
        want = naive.loss(theirs, batch, their_log_scale.exp(), step)
        want.backward()
        loss = objective(ours, None, batch).loss
        loss.backward()
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(log_scale.grad, their_log_scale.grad, rtol=1e-6, atol=1e-8)
        for leaf in ("image.features", "text.features"):
            assert their_leaves[leaf].grad.abs().sum() > 0.01
            torch.testing.assert_close(leaves[leaf].grad, their_leaves[leaf].grad, rtol=1e-6, atol=1e-8)
        low = single(converted(student, Tensor.float), None, batch).loss
        assert low.dtype == torch.float32
        torch.testing.assert_close(low.double(), want.detach(), rtol=1e-4, atol=1e-5)


def test_drawn_rows_of_samples() -> None:
    objective, other, naive = build("proximal_itc", negatives=9), build("proximal_itc", negatives=9), NaiveSamples(30.0)
    drawn = []
    for step in range(STEPS):
        # Two batches an update.
        if step % 2 == 0:
            objective.begin_update(step // 2, 0.0)
            other.begin_update(step // 2, 0.0)
        rows = objective._draw_rows().tolist()
        drawn.append(rows)
        assert other._draw_rows().tolist() == rows and len(rows) == 9
        assert 0 <= min(rows) and max(rows) < SETTING.num_images
        student, batch = case_of(step)
        want = naive.loss(student, batch, objective.scale().detach(), step, rows)
        torch.testing.assert_close(objective(student, None, batch).loss, want, rtol=1e-6, atol=1e-8)
        other(student, None, batch)
    assert len({tuple(rows) for rows in drawn}) == STEPS
    objective.begin_update(1, 0.0)
    assert objective._draw_rows().tolist() == drawn[2], "an update is drawn for anew after a checkpoint"


def test_an_older_row_weighs_less() -> None:
    student, batch = case_of(0)
    later = [replace(batch, image_ids=batch.image_ids + 50 * step) for step in range(3)]
    losses = {}
    for half_life in (0.0, 4.0, 1e-3):
        objective = build("bank_itc", half_life=half_life)
        losses[half_life] = [objective(student, None, batch).loss.item() for batch in later]
    in_batch = losses[0.0][0]
    # The same features again under other ids: every negative counts twice, or in part.
    assert in_batch < losses[4.0][1] < losses[0.0][1]
    assert losses[1e-3][1:] == pytest.approx([in_batch] * 2)


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_a_checkpoint(name: str) -> None:
    options = {"half_life": 2.0} if name == "bank_itc" else {"negatives": 9} if name == "proximal_itc" else {}
    objective, restored = build(name, **options), build(name, **options)
    fresh = {key: value.clone() for key, value in objective.state_dict().items()}
    for step in range(3):
        objective.begin_update(step, 0.9)
        objective(case_of(step)[0], None, case_of(step)[1])
    assert {key for key, value in objective.state_dict().items() if not torch.equal(value, fresh[key])} == set(
        fresh
    ) - {"scale.log_scale"}
    restored.load_state_dict(objective.state_dict())
    student, batch = case_of(3)
    losses = []
    for one in (objective, restored):
        one.begin_update(3, 0.9)
        losses.append(one(student, None, batch).loss)
    assert torch.equal(*losses)
    for key, value in objective.state_dict().items():
        assert torch.equal(value, restored.state_dict()[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_kept_at_validation(name: str) -> None:
    objective = build(name)
    objective(case_of(0)[0], None, case_of(0)[1])
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    student, batch = case_of(1)
    # Numbers of validation samples are not known, and say nothing about the bank.
    out = objective.eval()(student, None, replace(batch, sample_ids=None))
    assert out.loss.isfinite() and "image_drift" not in out.metrics
    assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_features_that_are_not_finite_pass(name: str) -> None:
    objective = build(name)
    student, batch = case_of(0)
    for part in (student, student.average):
        part.image.features[1, 2] = math.nan
        part.text.features[0] = math.inf
    assert not objective(student, None, batch).loss.isfinite()
    student, batch = case_of(1)
    student, leaves = with_gradients(student)
    loss = objective(student, None, batch).loss
    loss.backward()
    assert loss.isfinite() and leaves["image.features"].grad.isfinite().all()


def test_metrics() -> None:
    student, batch = case_of(0)
    for name in NAMES:
        objective = build(name)
        first, second = (objective(student, None, batch).metrics for _ in range(2))
        expected = {"i2t_loss", "t2i_loss", "i2t_accuracy", "t2i_accuracy", "scale"}
        assert set(first) - {"image_drift", "text_drift"} == expected
        assert not any(value.requires_grad for value in first.values())
        if name == "proximal_itc":
            assert first["image_drift"] == 0 and second["image_drift"].item() == pytest.approx(0.0, abs=1e-12)
            # Captions are compared with the mean of those of their image.
            assert first["text_drift"] == 0 and second["text_drift"] > 0.1


def test_past_rows_count_in_the_accuracy() -> None:
    """A row of another image in the bank that is nearer than the query's own key makes the query wrong."""
    objective = build("bank_itc").float()
    student, batch = case_of(0)
    alike = converted(student, Tensor.float)
    alike.image.features[:] = torch.eye(4, SETTING.contrast_width)
    alike.text.features[:] = torch.eye(4, SETTING.contrast_width)[batch.caption_image] + 0.1
    batch = replace(batch, image_ids=torch.arange(4))
    first = objective(alike, None, batch).metrics
    assert first["i2t_accuracy"] == 100 and first["t2i_accuracy"] == 100
    objective.texts.push(torch.eye(4, SETTING.contrast_width)[:1], torch.tensor([77]))
    second = objective(alike, None, batch).metrics
    assert second["i2t_accuracy"] == 75 and second["t2i_accuracy"] == 100


def test_options_are_checked() -> None:
    for name in ("bank_itc", "momentum_itc"):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')}-size 0: want at least one row"):
            build(name, size=0)
    with pytest.raises(UserError, match="--bank-itc-half-life -1"):
        build("bank_itc", half_life=-1.0)
    with pytest.raises(UserError, match="--proximal-itc-negatives -1"):
        build("proximal_itc", negatives=-1)
    with pytest.raises(UserError, match="proximal_itc keeps a row for each training image"):
        build_objectives(["proximal_itc"], {}, replace(SETTING, num_images=0))
    student, batch = case_of(0)
    with pytest.raises(UserError, match="proximal_itc needs training data whose samples are numbered"):
        build("proximal_itc")(student, None, replace(batch, sample_ids=None))
    needs = {name: required(objective_configs([name], {})) for name in NAMES}
    assert [needs[name].average for name in NAMES] == [False, False, True]
    assert not any(need.teacher for need in needs.values())
    defaults = {name: OBJECTIVES[name][0]() for name in NAMES}
    assert defaults["bank_itc"].size == defaults["momentum_itc"].size == 65536
    assert defaults["proximal_itc"].proximal_weight == 30


def test_last_occurrences() -> None:
    assert last_occurrences(torch.tensor([5, 2, 5, 9, 2, 5])).tolist() == [5, 4, 5, 3, 4, 5]


def test_queue_wraps_around_and_survives_a_checkpoint() -> None:
    queue = FeatureQueue(4, 1)
    assert queue.push(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([0, 1, 2])).tolist() == [0, 1, 2]
    assert queue.ids.tolist() == [0, 1, 2, EMPTY]
    restored = FeatureQueue(4, 1)
    restored.load_state_dict(queue.state_dict())
    for bank in (queue, restored):
        assert bank.push(torch.tensor([[3.0], [4.0]]), torch.tensor([3, 4])).tolist() == [3, 0]
        assert bank.ids.tolist() == [4, 1, 2, 3]
        assert bank.features.flatten().tolist() == [4.0, 1.0, 2.0, 3.0]
    queue.push(torch.arange(6.0)[:, None], torch.arange(6))
    assert sorted(queue.ids.tolist()) == [2, 3, 4, 5]


def test_queue_keeps_nothing_that_is_not_finite() -> None:
    queue = FeatureQueue(3, 2)
    queue.push(torch.tensor([[math.nan, 1.0], [math.inf, -math.inf]]), torch.tensor([4, 5]))
    assert queue.features.tolist() == [[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    half = FeatureQueue(1, 1).half()
    half.push(torch.tensor([[1e6]]), torch.tensor([0]))
    assert half.features.item() == 0, "too large for the bank's own type"
