"""Fine-tuning for classification: the model, the task, and runs of the real command."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fairseq.checkpoint_utils import load_model_ensemble_and_task
from fairseq.logging import metrics
from omegaconf import OmegaConf
from torch import Tensor

from emkum.data.shard_writing import ShardWriter
from emkum.data.shards import open_split
from emkum.data.transforms import ImageTransform
from emkum.errors import UserError
from emkum.models.encoder_sources import image_encoder_from_options
from emkum.models.parameter_groups import LearningRateConfig, assign_overrides
from emkum.training_log import parse_line
from tests.integration.in_process import ROOT, Run, make_run
from tests.small_classes import CLASSES, SPLITS, write_class_folders
from user_dir.models.image_classifier import ImageClassifierConfig, ImageClassifierModel
from user_dir.optimizers import GroupedAdamW, GroupedAdamWConfig
from user_dir.tasks.image_classification import log_accuracy

SIDE, UPDATES, EARLY = 16, 9, 3
SIZES = {"student_size": "tiny", "image_size": SIDE, "image_patch_size": 8, "image_layers": 2}
# The whole of the recipe's augmentation on a tiny encoder; 5 updates make an epoch.
OPTIONS = SIZES | {
    "task": "image_classification", "arch": "image_classifier", "criterion": "model", "optimizer": "grouped_adamw",
    "lr": 0.002, "lr_scale_layer_decay": 0.81, "image_drop_path": 0.2, "crop_min_scale": 0.3,
    "augment_rand_augment": "rand-m9-mstd0.5-inc1", "augment_erasing_prob": 0.25, "mix_prob": 1.0,
    "mix_label_smoothing": 0.1, "batch_size": 4, "update_freq": 2, "batch_size_valid": 5, "max_update": UPDATES,
    "num_workers": 0, "seed": 3, "log_format": "json", "log_interval": 1, "best_checkpoint_metric": "top1",
}  # fmt: skip
SWITCHES = ["--cpu", "--crop-flip", "--no-epoch-checkpoints", "--maximize-best-checkpoint-metric"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, run_prepare: Callable[..., None]) -> Path:
    root = tmp_path_factory.mktemp("classes")
    run_prepare("image-folder", "--images", write_class_folders(root / "raw"), "--out", root / "data")
    return root / "data"


def train(data: Path | str, save_dir: Path, **changes: object) -> subprocess.CompletedProcess:
    options = OPTIONS | {"user_dir": ROOT / "user_dir", "save_dir": save_dir} | changes
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "fairseq_cli.train", str(data), *SWITCHES, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=save_dir.parent, capture_output=True, text=True)


@pytest.fixture(scope="module")
def source(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an encoder of two blocks to start from."""
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("source")
    options = OmegaConf.to_container(OmegaConf.structured(ImageClassifierConfig)) | SIZES
    model = small_model(image_layers=2).state_dict()
    cfg = {"model": options | {"_name": "image_classifier"}}
    torch.save({"cfg": cfg, "model": model}, folder / "checkpoint_last.pt")
    return folder


# What the options say of the architecture gives way to what the source is.
OTHER = {"image_layers": 3, "image_size": 32, "student_size": "small"}


@pytest.fixture(scope="module")
def run(data: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run's folder and its log."""
    save_dir = tmp_path_factory.mktemp("run") / "checkpoints"
    done = train(data, save_dir, **OTHER, init_from=source, save_interval_updates=EARLY)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    return save_dir, log


def records(log: str, wanted: str) -> list[dict[str, float]]:
    found = [parse_line(line) for line in log.splitlines()]
    return [item[1] for item in found if item is not None and item[0] == wanted]


def in_process(data: Path, save_dir: Path, **changes: object) -> Run:
    return make_run(data, save_dir, OPTIONS, **changes)


# ----------------------------------------------------------------------------------------------------------------------
# The model
# ----------------------------------------------------------------------------------------------------------------------


def small_model(**options: object) -> ImageClassifierModel:
    return ImageClassifierModel(image_encoder_from_options(SIZES | options), CLASSES)


def test_the_learning_rates_of_the_thesis() -> None:
    model = small_model(image_layers=6)
    assign_overrides(model, model, LearningRateConfig(layer_decay=0.81))
    optimizer = GroupedAdamW(GroupedAdamWConfig(lr=[1e-3]), list(model.parameters()))
    rates = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates.setdefault(parameter.optim_overrides["part"], set()).add(group["lr"])
    assert {part: len(found) for part, found in rates.items()} == dict.fromkeys(rates, 1)
    expected = {
        "encoder embeddings": 2.2877e-4,
        "encoder layer 1": 2.8243e-4,
        "encoder layer 2": 3.4868e-4,
        "encoder layer 3": 4.3047e-4,
        "encoder layer 4": 5.3144e-4,
        "encoder layer 5": 6.5610e-4,
        "encoder layer 6": 8.1000e-4,
        "head": 1.0000e-3,
    }
    assert {part: found.pop() for part, found in rates.items()} == pytest.approx(expected, rel=1e-4)


def shares(labels: Tensor) -> Tensor:
    """(B, C) float64, 0.7 of one class and 0.3 of the next one."""
    one_hot = torch.eye(CLASSES, dtype=torch.float64)
    return 0.7 * one_hot[labels] + 0.3 * one_hot[(labels + 1) % CLASSES]


@pytest.mark.parametrize("soft", [True, False])
def test_the_loss_of_training_is_the_mean_cross_entropy(soft: bool) -> None:
    model = small_model(image_layers=1).double().train()
    images = torch.rand(4, 3, SIDE, SIDE, dtype=torch.float64) * 255
    labels = torch.tensor([3, 0, 6, 3])
    found, expected = (images.clone().requires_grad_() for _ in range(2))
    loss = model(found, shares(labels) if soft else labels)["losses"]["classification"]
    logits = model.head(model.encoder((expected / 255 - model.normalize.mean) / model.normalize.std))
    naive = torch.zeros((), dtype=torch.float64)
    for row, target in zip(logits, shares(labels) if soft else F.one_hot(labels, CLASSES), strict=True):
        total = row.exp().sum()
        naive = naive - sum(target[c] * (row[c].exp() / total).log() for c in range(CLASSES)) / 4
    torch.testing.assert_close(loss, naive, rtol=1e-6, atol=1e-6)
    loss.backward()
    naive.backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-6, atol=1e-6)


def test_validation_adds_up() -> None:
    model = small_model(image_layers=1).eval()
    images, labels = torch.randint(0, 256, (5, 3, SIDE, SIDE), dtype=torch.uint8), torch.tensor([0, 1, 2, 3, 4])
    output = model(images, labels)
    logits = model.logits(images)
    assert output["sample_size"] == output["logs"]["_images"] == 5
    torch.testing.assert_close(output["losses"]["classification"], F.cross_entropy(logits, labels) * 5)
    order = logits.argsort(dim=1, descending=True)
    for k in (1, 5):
        hits = sum(int(label) in row[:k].tolist() for label, row in zip(labels, order, strict=True))
        assert int(output["logs"][f"_top{k}"]) == hits


def test_accuracy_is_that_of_all_images() -> None:
    logs = [(5, 2, 4), (5, 0, 5), (1, 1, 1)]
    with metrics.aggregate(new_root=True) as total:
        for devices in (logs[:2], logs[2:]):
            with metrics.aggregate() as one_step:
                log_accuracy(
                    [{"_images": n, "_top1": torch.tensor(a), "_top5": torch.tensor(b)} for n, a, b in devices]
                )
        # Batches differ in size: the last one's figure is its own.
        assert one_step.get_smoothed_value("top1") == 100
        log_accuracy([{"loss": 1.0}])
        values = total.get_smoothed_values()
    assert values == {"top1": round(300 / 11, 3), "top5": round(1000 / 11, 3)}
    restored = metrics.MetersDict()
    restored.load_state_dict(total.state_dict())
    assert "top1" not in restored


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------


def scores(model: ImageClassifierModel, data: Path, split: str) -> dict[str, float]:
    """top1, top5 and loss, in plain terms, one image at a time."""
    ranks, losses = [], []
    transform = ImageTransform(SIDE)
    with torch.no_grad():
        for sample in open_split(data, split, require_captions=False):
            logits = model.eval().logits(transform(sample.image)[None])[0]
            right = logits[sample.meta["label"]]
            ranks.append(int((logits > right).sum()))
            losses.append(float(logits.logsumexp(0) - right))
    ranks = np.array(ranks)
    return {"top1": 100 * (ranks < 1).mean(), "top5": 100 * (ranks < 5).mean(), "loss": np.mean(losses)}


def test_top1_of_the_log_is_that_of_the_checkpoint(run: tuple[Path, str], data: Path) -> None:
    folder, log = run
    valid = records(log, "valid")
    assert [record["step"] for record in valid] == [3, 5, 6, 9]
    (model,), _, task = load_model_ensemble_and_task([str(folder / "checkpoint_last.pt")])
    assert task.class_names == [f"class{label}" for label in range(CLASSES)]
    expected = scores(model, data, "valid")
    assert 0 < expected["top1"] < expected["top5"]
    assert {key: valid[-1][key] for key in expected} == pytest.approx(expected, abs=2e-3)
    best = torch.load(folder / "checkpoint_best.pt", weights_only=True)
    assert best["extra_state"]["best"] == pytest.approx(max(record["top1"] for record in valid))
    assert "Warning" not in log and "Traceback" not in log


def test_resuming_equals_an_uninterrupted_run(run: tuple[Path, str], source: Path, data: Path, tmp_path: Path) -> None:
    """From the checkpoint that the whole run left amid an epoch; mixing, augmentation and stochastic depth are on."""
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(run[0] / f"checkpoint_1_{EARLY}.pt", resumed / "checkpoint_last.pt")
    done = train(data, resumed, **OTHER, init_from=source)
    assert done.returncode == 0, done.stderr
    whole, again = (torch.load(folder / "checkpoint_last.pt", weights_only=True) for folder in (run[0], resumed))
    assert whole["model"].keys() == again["model"].keys()
    assert [name for name, value in whole["model"].items() if not torch.equal(value, again["model"][name])] == []
    assert again["optimizer_history"][-1]["num_updates"] == UPDATES
    late = [record["loss"] for record in records(run[1], "train_inner")][EARLY:]
    assert [record["loss"] for record in records(done.stdout + done.stderr, "train_inner")] == late


def test_training_batches_are_mixed_by_their_key(data: Path, tmp_path: Path) -> None:
    one, other = (in_process(data, tmp_path, seed=seed) for seed in (3, 4))
    batch = one.batch(0, 4)
    mixed, again = one.task._mixed(batch), one.task._mixed(batch)
    labels, pure = mixed["net_input"]["labels"], batch["net_input"]["labels"]
    torch.testing.assert_close(labels.sum(1), torch.ones(4))
    assert (labels.gather(1, pure[:, None]) < 0.91).all(), "smoothed and mixed"
    assert not torch.equal(mixed["net_input"]["image"], batch["net_input"]["image"].float())
    assert torch.equal(labels, again["net_input"]["labels"])
    assert torch.equal(mixed["net_input"]["image"], again["net_input"]["image"])
    for key in ((4, *batch["key"][1:]), (3, 2, batch["key"][2])):
        assert not torch.equal(one.task._mixed(batch | {"key": key})["net_input"]["labels"], labels)
    assert not torch.equal(other.batch(0, 4)["net_input"]["image"], batch["net_input"]["image"])
    loss = one.backward(batch, 0)["loss"]
    assert loss > 0 and all(gradient.isfinite().all() for gradient in one.gradients().values())
    learning = {name for name, parameter in one.model.named_parameters() if parameter.requires_grad}
    assert one.gradients().keys() == learning, "devices would wait for the others"


def test_a_run_starts_from_another_ones_encoder(source: Path, data: Path, tmp_path: Path) -> None:
    started = in_process(data, tmp_path / "started", **OTHER, init_from=source)
    before = torch.load(source / "checkpoint_last.pt", weights_only=True)["model"]
    state = started.model.state_dict()
    encoder = [name for name in state if name.startswith("encoder.")]
    assert len(encoder) > 20 and all(torch.equal(state[name], before[name]) for name in encoder)
    assert not torch.equal(state["head.linear.weight"], before["head.linear.weight"])
    assert started.task.image_size == SIDE and started.task.start is None
    rates = {getattr(block.drop_path, "drop_prob", 0) for block in started.model.encoder.all_blocks()}
    assert max(rates) == pytest.approx(0.2), "the run's own"
    record = json.loads((tmp_path / "started" / "run.json").read_text())
    assert record["encoder"]["weights_sha256"] and record["class_names"][0] == "class0"
    assert {name: record["options"]["model"][name] for name in SIZES} == SIZES
    cut = in_process(data, tmp_path / "cut", init_from=source, init_layers=1)
    assert cut.model.encoder.num_layers == 1
    assert cut.task.identity["weights_sha256"] != started.task.identity["weights_sha256"]


def test_a_checkpoint_needs_no_source(run: tuple[Path, str], source: Path) -> None:
    moved = source.rename(source.with_name("moved"))
    try:
        (model,), _, _ = load_model_ensemble_and_task([str(run[0] / "checkpoint_last.pt")])
    finally:
        moved.rename(source)
    assert (model.encoder.num_layers, model.encoder.image_size) == (2, SIDE)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes
# ----------------------------------------------------------------------------------------------------------------------


def test_a_label_outside_the_classes(data: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(data, tmp_path / "data")
    (copied / "classes.json").write_text('{"class_name": ["cat", "dog"]}')
    with pytest.raises(UserError, match="data/train: sample .* has the label 2; classes.json lists 2 classes"):
        in_process(copied, tmp_path / "run")
    assert not list(tmp_path.glob("run/*"))


def test_sets_without_classes_or_labels(data: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        with ShardWriter(tmp_path / "none" / split) as writer:
            writer.add("a", b"image", "png", [])
    with pytest.raises(UserError, match="none has no classes.json"):
        in_process(tmp_path / "none", tmp_path / "run")
    copied = shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(copied / "test")
    shutil.copytree(tmp_path / "none" / "test", copied / "test")
    made = in_process(copied, tmp_path / "run")
    with pytest.raises(UserError, match="data/test: sample a has no label; choose a split with labels"):
        made.task.load_dataset("test")
    with pytest.raises(UserError, match="none has no classes.json"):
        in_process(f"{data}:{tmp_path / 'none'}", tmp_path / "run")


def test_an_empty_class_folder(tmp_path: Path, run_prepare: Callable[..., None], data: Path) -> None:
    raw = write_class_folders(tmp_path / "raw", SPLITS | {"train": 1})
    shutil.rmtree(raw / "train" / "class5")
    (raw / "train" / "class5").mkdir()
    run_prepare("image-folder", "--images", raw, "--out", tmp_path / "data")
    made = in_process(data, tmp_path / "run")
    made.task.folders = [str(tmp_path / "data")]
    made.task.load_dataset("valid")
    with pytest.raises(UserError, match="class 5, 'class5', has 2 images to score and none to train on"):
        made.task.load_dataset("train")


def test_wrong_options_name_themselves(data: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"init_layers": 2}, "--init-layers 2 is of the encoder that --init-from names"),
        ({"init_weights": "hub"}, "--init-weights hub is of the encoder"),
        ({"init_from": tmp_path / "nothing"}, "nothing"),
        ({"mix_prob": 1.5}, "--mix-prob is 1.5"),
        ({"lr_scale_layer_decay": 0.0}, "--lr-scale-layer-decay 0.0"),
        ({"autocast": "int8"}, "--autocast 'int8' is unknown"),
    ]
    for options, said in cases:
        with pytest.raises(UserError, match=said):
            in_process(data, tmp_path / "run", **options)


def test_a_checkpoint_of_other_classes(run: tuple[Path, str], data: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(data, tmp_path / "data")
    (copied / "classes.json").write_text(json.dumps({"class_name": [f"kind{label}" for label in range(CLASSES)]}))
    with pytest.raises(UserError, match="the checkpoint tells 7 classes from 'class0' on; .* has 7, from 'kind0' on"):
        load_model_ensemble_and_task([str(run[0] / "checkpoint_last.pt")], arg_overrides={"data": str(copied)})
