"""Image-text contrast against loops, against open_clip, and on several processes."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.objectives import Objective, build_objectives, objective_configs, required
from emkum.outputs import Batch, ModalityOutput, StudentOutput
from tests.objectives.cases import CAPTIONS, SETTING, converted, make_case, part_of, with_gradients

IMAGES = 8
WORLDS = (4, 2)
# What several processes must agree on with one.
VARIANTS = {
    "local": {},
    "full": {"gather": "full"},
    "local, own": {"positives": "own"},
    "full, own": {"gather": "full", "positives": "own"},
    "local, layers": {"layers": "hidden,features,logits", "label_smoothing": 0.1},
    "full, layers": {"gather": "full", "layers": "hidden,features,logits", "label_smoothing": 0.1},
}


def build(**options: object) -> Objective:
    return build_objectives(["itc"], {f"itc_{name}": value for name, value in options.items()}, SETTING)["itc"]


def student_of(images: Tensor, texts: Tensor) -> StudentOutput:
    return StudentOutput(
        ModalityOutput(images[:, None], features=images), ModalityOutput(texts[:, None], features=texts)
    )


def naive_loss(images: Tensor, texts: Tensor, belongs: list[list[bool]], scale: Tensor, smoothing: float) -> Tensor:
    """Both ways by loops; `belongs[i][t]`: caption t is a positive of image i and the reverse."""
    ways = []
    for queries, keys, positives in (
        (images, texts, belongs),
        (texts, images, [list(column) for column in zip(*belongs, strict=True)]),
    ):
        losses = []
        for query, row in zip(queries, positives, strict=True):
            logits = [scale * (query @ key) / (query.norm() * key.norm()) for key in keys]
            total = torch.log(sum(torch.exp(logit) for logit in logits))
            loss = 0.0
            for logit, positive in zip(logits, row, strict=True):
                target = (1 - smoothing) * positive / sum(row) + smoothing / len(keys)
                loss = loss - target * (logit - total)
            losses.append(loss)
        ways.append(sum(losses) / len(losses))
    return sum(ways) / 2


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("positives", ["all", "own"])
@pytest.mark.parametrize("ids", [[0, 1, 2], [0, 1, 0]], ids=["distinct images", "an image twice"])
@pytest.mark.parametrize("captions", [[0, 1, 2], [2, 0, 0, 1, 1, 2, 2]], ids=["one caption", "several, shuffled"])
def test_against_loops(ids: list[int], captions: list[int], positives: str, smoothing: float) -> None:
    torch.manual_seed(0)
    drawn = torch.randn(len(ids), 5, dtype=torch.float64), torch.randn(len(captions), 5, dtype=torch.float64)
    objective = build(positives=positives, label_smoothing=smoothing).double().train()
    batch = Batch(torch.tensor(ids) + 3, torch.tensor(captions))
    ours, theirs = ([part.clone().requires_grad_() for part in drawn] for _ in range(2))
    log_scale = objective.scales["features"].log_scale
    their_log_scale = log_scale.detach().clone().requires_grad_()
    if positives == "own":
        belongs = [[row == owner for owner in captions] for row in range(len(ids))]
    else:
        belongs = [[ids[row] == ids[owner] for owner in captions] for row in range(len(ids))]
    want = naive_loss(*theirs, belongs, their_log_scale.exp(), smoothing)
    want.backward()
    loss = objective(student_of(*ours), None, batch).loss
    loss.backward()
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-8)
    for got, reference in zip([*ours, log_scale], [*theirs, their_log_scale], strict=True):
        torch.testing.assert_close(got.grad, reference.grad, rtol=1e-6, atol=1e-8)
    single = build(positives=positives, label_smoothing=smoothing)(student_of(*(d.float() for d in drawn)), None, batch)
    assert single.loss.dtype == torch.float32
    torch.testing.assert_close(single.loss.double(), want.detach(), rtol=1e-4, atol=1e-5)


def test_accuracies_are_of_the_most_similar() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    texts = torch.tensor([[1.0, 0.1], [0.1, 1.0], [0.05, 1.0]])
    metrics = build()(student_of(images, texts), None, Batch(torch.arange(3), torch.arange(3))).metrics
    # Images 1 and 2 are nearest to others' captions, caption 2 to image 1.
    assert metrics["i2t_accuracy"].item() == pytest.approx(100 / 3)
    assert metrics["t2i_accuracy"].item() == pytest.approx(200 / 3)
    assert set(metrics) == {"i2t_loss", "t2i_loss", "i2t_accuracy", "t2i_accuracy", "scale"}


def test_several_layers_have_a_scale_each_and_count_alike() -> None:
    student, _, batch = make_case()
    objective = build(layers="hidden, features,logits").double()
    assert list(objective.scales) == ["hidden", "features", "logits"]
    with torch.no_grad():
        for place, scale in enumerate(objective.scales.values()):
            scale.log_scale.fill_(place + 1.0)
    out = objective(student, None, batch)
    losses = []
    for place, layer in enumerate(("hidden", "features", "logits")):
        single = build(layers=layer).double()
        with torch.no_grad():
            single.scales[layer].log_scale.fill_(place + 1.0)
        alone = single(student, None, batch)
        losses.append(alone.loss)
        for name, value in alone.metrics.items():
            torch.testing.assert_close(out.metrics[f"{layer}_{name}"], value)
    assert len(out.metrics) == 15
    torch.testing.assert_close(out.loss, torch.stack(losses).mean())


def test_layers_are_required_and_checked() -> None:
    def needs(layers: str) -> list[bool]:
        found = required(objective_configs(["itc"], {"itc_layers": layers}))
        return [found.prediction, found.logits, found.teacher]

    assert needs("features,hidden") == [False, False, False]
    assert needs("prediction") == [True, False, True] and needs("hidden,logits") == [False, True, True]
    for wrong in ("tokens", "features,features", ","):
        with pytest.raises(UserError, match=r"--itc-layers .*: give each of your choice of features, hidden"):
            build(layers=wrong)
    student, _, batch = make_case()
    lacking = replace(student, text=replace(student.text, hidden=None))
    with pytest.raises(UserError, match=r"--itc-layers: .* no hidden; choose from features, prediction, logits"):
        build(layers="features,hidden")(lacking, None, batch)
    for option in ("positives", "gather"):
        with pytest.raises(UserError, match=f"--itc-{option} 'some' is unknown; choose from"):
            build(**{option: "some"})


def clip_loss(**options: object) -> nn.Module:
    """open_clip's ClipLoss out of its own file: the whole package takes seconds to import, in each process."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("open_clip is not installed")
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).with_name("loss.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ClipLoss(**options)


def compare_with_clip(rows: slice, gather: str, **options: object) -> dict[str, Tensor]:
    """Loss and gradients for one caption an image, ours under "ours ..." and open_clip's under "clip ..."."""
    student, _, _ = part_of(make_case(IMAGES), rows)
    images, texts = student.image.features, student.text.features[::CAPTIONS]
    count = torch.arange(len(images))
    objective = build(gather=gather, positives="own").double().train()
    log_scale = objective.scales["features"].log_scale.detach().clone()
    found = {}
    for name in ("ours", "clip"):
        leaves = [part.clone().requires_grad_() for part in (images, texts)]
        if name == "ours":
            scale = objective.scales["features"].log_scale
            loss = objective(student_of(*leaves), None, Batch(torch.zeros_like(count), count)).loss
        else:
            scale = log_scale.requires_grad_()
            units = [leaf / leaf.norm(dim=1, keepdim=True) for leaf in leaves]
            loss = clip_loss(gather_with_grad=True, **options)(*units, scale.exp())
        loss.backward()
        found |= {f"{name} loss": loss.detach(), f"{name} scale": scale.grad}
        found |= {f"{name} images": leaves[0].grad, f"{name} texts": leaves[1].grad}
    return found


def assert_equals_clip(found: dict[str, Tensor]) -> None:
    for part in ("loss", "scale", "images", "texts"):
        assert found[f"ours {part}"].abs().sum() > 1e-3
        torch.testing.assert_close(found[f"ours {part}"], found[f"clip {part}"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("gather", ["local", "full"])
def test_equals_clip_on_one_process(gather: str) -> None:
    assert_equals_clip(compare_with_clip(slice(0, IMAGES), gather))


def run_variant(options: dict[str, object], rows: slice) -> dict[str, Tensor]:
    """Loss and gradients of a part of the batch."""
    objective = build(**options).double().train()
    student, _, batch = part_of(make_case(IMAGES), rows)
    student, leaves = with_gradients(student)
    loss = objective(student, None, batch).loss
    loss.backward()
    found = {"loss": loss.detach()} | {f"parameter {name}": p.grad for name, p in objective.named_parameters()}
    return found | {f"input {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def worker(rank: int, folder: Path) -> None:
    """Runs as one of four processes and then, of the first two, as one of two: starting them takes longest."""
    torch.set_num_threads(1)
    for world in WORLDS:
        if rank >= world:
            continue
        torch.distributed.init_process_group("gloo", f"file://{folder}/{world}", rank=rank, world_size=world)
        share = IMAGES // world
        rows = slice(rank * share, (rank + 1) * share)
        found = {name: run_variant(options, rows) for name, options in VARIANTS.items()}
        if world == 2 and importlib.util.find_spec("open_clip") is not None:
            around = {"rank": rank, "world_size": world}
            found["clip local"] = compare_with_clip(rows, "local", local_loss=True, **around)
            found["clip full"] = compare_with_clip(rows, "full", local_loss=False, **around)
        torch.save(found, folder / f"{world}_{rank}.pt")
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, dict[str, Tensor]]]]:
    """What each process of each world size found."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(worker, args=(folder,), nprocs=max(WORLDS))
    return {
        world: [torch.load(folder / f"{world}_{rank}.pt", weights_only=True) for rank in range(world)]
        for world in WORLDS
    }


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("world", WORLDS)
def test_several_processes_equal_one(world: int, name: str, of_processes: dict) -> None:
    want = run_variant(VARIANTS[name], slice(0, IMAGES))
    parts = [result[name] for result in of_processes[world]]
    assert all(part.keys() == want.keys() for part in parts)
    for key, reference in want.items():
        values = [part[key] for part in parts]
        # Of losses whose gradients are averaged over ranks.
        got = torch.cat(values) / world if key.startswith("input") else torch.stack(values).mean(0)
        torch.testing.assert_close(got, reference, rtol=1e-9, atol=1e-11, msg=lambda text, k=key: f"{k}: {text}")
    if name.startswith("full"):
        assert all(torch.equal(part["loss"], parts[0]["loss"]) for part in parts)


@pytest.mark.parametrize("gather", ["local", "full"])
def test_equals_clip_on_two_processes(gather: str, of_processes: dict) -> None:
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed")
    for found in of_processes[2]:
        assert_equals_clip(found[f"clip {gather}"])


def test_validation_gathers_nothing_and_changes_nothing() -> None:
    student, _, batch = make_case()
    objective = build(positives="own").double()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    losses = [objective.train(mode)(student, None, batch).loss for mode in (True, False)]
    torch.testing.assert_close(losses[0], losses[1])
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())


def test_half_precision_features_are_compared_in_float32() -> None:
    student, _, batch = make_case()
    half = converted(student, lambda tensor: tensor.to(torch.bfloat16))
    out, want = build()(half, None, batch), build()(converted(half, Tensor.float), None, batch)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, want.loss)
