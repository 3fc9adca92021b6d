"""Faults that training code is prone to and that a loss on one process does not show."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from emkum.distributed import all_gather, all_gather_with_gradient, rank, row_offset, world_size
from emkum.layers.ema import EmaCopy
from emkum.layers.temperature import LogitScale
from emkum.models.builders import build_student
from emkum.models.codebook import START_ROWS_PER_CODE, Codebook
from emkum.models.parameter_groups import LearningRateConfig, assign_overrides
from emkum.models.quantizer import draw_mask
from emkum.objectives import OBJECTIVES, Objective, build_objectives
from emkum.objectives.weights import WeightConfig, weight_at
from emkum.outputs import TeacherOutput
from tests.objectives.cases import SETTING, after_updates, make_case, part_of

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

IMAGES, WORLD, STEPS = 8, 2, 3
# Options that bring every state and everything that is gathered into play.
OPTIONS: dict[str, object] = {
    "kd_contrastive_bank_size": 12,
    "bank_itc_size": 12,
    "bank_itc_half_life": 3.0,
    "momentum_itc_size": 12,
    "proximal_itc_negatives": 10,
    "cmli_chunk": 2,
    "kd_reduced_dim": 3,
    "kd_reduced_loss": "contrastive",
    "itm_negatives": "hard",
    "mim_loss": "in_batch",
    "dino_prototypes": 13,
    "dino_hidden": 8,
    "dino_bottleneck": 4,
}
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "itc": ("itc", {}),
    "itc full": ("itc", {"itc_gather": "full"}),
    "itc own": ("itc", {"itc_positives": "own"}),
    "ranking": ("ranking", {}),
    "bank_itc": ("bank_itc", {}),
    "proximal_itc": ("proximal_itc", {}),
    "momentum_itc": ("momentum_itc", {}),
    "kd_contrastive": ("kd_contrastive", {}),
    "kd_reduced": ("kd_reduced", {}),
    "cmli": ("cmli", {}),
    "itm": ("itm", {}),
    "mlm": ("mlm", {}),
    "mim": ("mim", {}),
    "dino": ("dino", {}),
}


def build(name: str, **options: object) -> Objective:
    """In float64; the same weights at each call."""
    torch.manual_seed(0)
    setting = replace(SETTING, target_width=SETTING.width) if name == "kd_reduced" else SETTING
    return build_objectives([name], OPTIONS | options, setting)[name].double().train()


def case_of(name: str, step: int) -> tuple:
    student, teacher, batch = make_case(IMAGES, seed=step)
    if name == "kd_reduced":
        teacher = TeacherOutput(teacher.features[:, : SETTING.width])
    # Other images at each step, some of which came before.
    return student, teacher, replace(batch, image_ids=(batch.image_ids + 5 * step) % 11)


# ----------------------------------------------------------------------------------------------------------------------
# Several processes
# ----------------------------------------------------------------------------------------------------------------------


def run_steps(name: str, options: dict[str, object], rows: slice) -> dict[str, Tensor]:
    """Loss and gradients of the last of some batches, and the state behind it."""
    cases = [part_of(case_of(name, step), rows) for step in range(STEPS)]
    return after_updates(build(name, **options), cases)


def gathered_rows() -> dict[str, Tensor]:
    """A loss of each rank's own rows and all ranks' rows, and its gradient."""
    own = (torch.arange(3.0) + 10 * rank()).requires_grad_()
    everyone = all_gather_with_gradient(own)
    (everyone * torch.arange(6.0) * (1 + rank())).sum().backward()
    return {"all": everyone.detach(), "plain": all_gather(own.detach()), "gradient": own.grad}


def drawn_mask(rows: int) -> dict[str, Tensor]:
    """Patches that the image quantizer hides, with fairseq's seed of an update, which all ranks share."""
    torch.manual_seed(7)
    return {"mask": draw_mask(rows, 6, 0.5, torch.device("cpu"), training=True)}


def worker(index: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/group", rank=index, world_size=WORLD)
    assert (world_size(), rank(), row_offset(3)) == (WORLD, index, 3 * index)
    share = IMAGES // WORLD
    rows = slice(index * share, (index + 1) * share)
    found = {"gathered rows": gathered_rows(), "mask": drawn_mask(share)}
    for variant, (name, options) in VARIANTS.items():
        found[variant] = run_steps(name, options, rows)
    torch.save(found, folder / f"{index}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, dict[str, Tensor]]]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(worker, args=(folder,), nprocs=WORLD, start_method="fork")
    yield [torch.load(folder / f"{index}.pt", weights_only=True) for index in range(WORLD)]


def test_rows_of_all_ranks_and_the_sum_of_their_gradients(of_ranks: list) -> None:
    expected = [0.0, 1.0, 2.0, 10.0, 11.0, 12.0]
    for index, found in enumerate(part["gathered rows"] for part in of_ranks):
        assert found["all"].tolist() == found["plain"].tolist() == expected
        # Of the loss of rank 0 once, of that of rank 1 twice.
        assert found["gradient"].tolist() == [3 * (3.0 * index + i) for i in range(3)]


def test_ranks_hide_the_patches_that_one_process_hides(of_ranks: list) -> None:
    assert torch.equal(torch.cat([found["mask"]["mask"] for found in of_ranks]), drawn_mask(IMAGES)["mask"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_are_one_batch(variant: str, of_ranks: list) -> None:
    name, options = VARIANTS[variant]
    want, parts = run_steps(name, options, slice(0, IMAGES)), [found[variant] for found in of_ranks]
    assert all(part.keys() == want.keys() for part in parts)
    for key, reference in want.items():
        values = [part[key] for part in parts]
        if key.startswith("buffer"):
            assert all(torch.equal(value, values[0]) for value in values), f"{key} differs between ranks"
            got = values[0]
        else:
            # Of losses whose gradients are averaged over ranks.
            got = torch.cat(values) / WORLD if key.startswith("input") else torch.stack(values).mean(0)
        torch.testing.assert_close(got, reference, rtol=1e-6, atol=1e-8, msg=lambda text, k=key: f"{k}: {text}")


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------

WITHOUT_STATE = ("kd_cluster", "kd_vq")


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in WITHOUT_STATE])
def test_state_is_in_checkpoints_and_goes_on_from_them(name: str) -> None:
    first, second = build(name), build(name)
    assert {key for key, _ in [*first.named_parameters(), *first.named_buffers()]} == first.state_dict().keys()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.01)
    for update in range(STEPS):
        first.begin_update(update, 0.9)
        first(*case_of(name, update))
    # As fairseq does: the number of updates comes before the weights.
    second.begin_update(STEPS, 0.9)
    second.load_state_dict(first.state_dict())
    for update in range(STEPS, STEPS + 3):
        losses = []
        for objective in (first, second):
            objective.begin_update(update, 0.9)
            losses.append(objective(*case_of(name, update)).loss)
        assert torch.equal(*losses)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_restored_codes_know_their_updates() -> None:
    torch.manual_seed(0)
    first, second = (Codebook(2, 3, decay=0.5, revive_below=0.0, window=5).train() for _ in range(2))
    vectors = torch.nn.functional.normalize(torch.randn(START_ROWS_PER_CODE * 2, 3), dim=1)
    first(vectors)
    first.begin_update(4)
    first(vectors.flip(1))
    second.load_state_dict(first.state_dict())
    before = second.codes.clone()
    second.begin_update(4)
    assert torch.equal(second.codes, before), "update 4 had begun before"
    second.begin_update(5)
    assert not torch.equal(second.codes, before)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers that are 0, or whose logarithm is
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("initial", "expected"), [(1.0, 1.0), (0.5, 1.0), (2.0, 2.0), (100.0, 100.0), (200.0, 100.0)])
def test_scale_starts_where_it_is_told_within_its_range(initial: float, expected: float) -> None:
    scale = LogitScale(initial)
    assert scale.log_scale.item() == pytest.approx(math.log(initial))
    assert scale().item() == pytest.approx(expected, rel=1e-6)


def test_a_decay_of_zero_takes_over_at_once() -> None:
    live = torch.nn.Linear(2, 2)
    average = EmaCopy(live, 0.75)
    with torch.no_grad():
        live.weight.add_(1.0)
    average.follow(live, 1, decay=0.0)
    assert torch.equal(average.module.weight, live.weight)


def test_a_weight_of_zero_counts_nothing() -> None:
    assert weight_at(WeightConfig(weight=0.0), 5, 10) == 0
    assert weight_at(WeightConfig(weight=2.0, weight_schedule="cosine", weight_end=0.0), 10, 10) == pytest.approx(0)
    assert weight_at(WeightConfig(weight=2.0, weight_schedule="linear"), 0, 10) == 0


@pytest.mark.parametrize("name", ["bank_itc", "proximal_itc", "momentum_itc", "kd_contrastive"])
def test_the_image_numbered_zero_is_a_negative_like_any_other(name: str) -> None:
    """Past rows of the images 0 to 6, or of the same images under other numbers, give the same loss."""
    losses = []
    for shift in (0, 1):
        objective = build(name)
        student, teacher, batch = make_case(IMAGES)
        objective(student, teacher, replace(batch, image_ids=batch.image_ids + shift))
        student, teacher, batch = make_case(IMAGES, seed=1)
        later = replace(batch, image_ids=batch.image_ids + 20, sample_ids=batch.sample_ids + 10)
        losses.append(objective(student, teacher, later).loss)
    assert torch.equal(*losses)


def test_hard_negatives_of_scale_zero_are_uniform_ones() -> None:
    outputs = []
    for options in ({"itm_hard_scale": 0.0}, {"itm_negatives": "uniform"}, {"itm_hard_scale": 50.0}):
        outputs.append(build("itm", **options)(*make_case(IMAGES)).loss)
    torch.testing.assert_close(outputs[0], outputs[1])
    assert (outputs[0] - outputs[2]).abs() > 1e-6


def test_a_center_without_inertia_is_the_last_mean() -> None:
    objective = build("dino", dino_center_decay=0.0)
    student, teacher, batch = case_of("dino", 0)
    objective(student, teacher, batch)
    objective.begin_update(1, 0.9)
    seen = torch.cat([student.average.image.cls, student.average.text.cls])
    want = build("dino").average_head.module(seen).mean(0)
    torch.testing.assert_close(objective.center, want.detach())


def test_an_encoder_whose_rate_is_zero_does_not_learn() -> None:
    student = build_student({"student_size": "tiny", "image_size": 32, "image_patch_size": 8}, 40)
    assign_overrides(student, student, LearningRateConfig(image_encoder=0.0))
    rates = {"image_encoder": set(), "text_encoder": set()}
    for name, parameter in student.named_parameters():
        rates.get(name.partition(".")[0], set()).add(parameter.optim_overrides["optimizer"]["lr_scale"])
    assert rates == {"image_encoder": {0.0}, "text_encoder": {1.0}}
