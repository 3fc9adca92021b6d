"""Task `glue` and its model through fairseq, and what it logs."""

import json
import math
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
from fairseq.data.data_utils import numpy_seed
from fairseq.logging import metrics
from omegaconf import OmegaConf

from emkum.data.glue import GlueDataset
from emkum.data.tokenizers import load_tokenizer
from emkum.errors import UserError
from emkum.evaluation.glue import glue_metrics
from emkum.models.encoder_sources import load_text_encoder
from tests.glue_cases import prepare_glue, write_source
from user_dir.models.text_classifier import TextClassifierConfig, TextClassifierModel
from user_dir.tasks.glue import GlueBatches, GlueConfig, GlueScores, GlueTask

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "run")


@pytest.fixture(scope="module")
def data(run_prepare: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_glue(tmp_path_factory.mktemp("data"), run_prepare)


def make(data: Path, name: str = "CoLA", model: dict[str, Any] | None = None, **options: Any) -> tuple:
    """A task and its model, as fairseq puts them together."""
    given = {"data": str(data), "seed": 1, "save_dir": "nowhere", "update_freq": [1], "glue_task": name} | options
    config = OmegaConf.structured(GlueConfig)
    task = GlueTask(OmegaConf.merge(config, {key: value for key, value in given.items() if key in config}))
    cfg = OmegaConf.merge(OmegaConf.structured(TextClassifierConfig), {"_name": "text_classifier"} | (model or {}))
    return task, task.build_model(cfg), cfg


# ----------------------------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------------------------


def rows(numbers: range) -> torch.Tensor:
    return torch.tensor([[n, n % 2, (n // 3) % 2] for n in numbers], dtype=torch.float64)


def test_scores_are_of_the_whole_set() -> None:
    scores = GlueScores("MRPC")
    with metrics.aggregate(new_root=True) as seen:
        for numbers in (range(0, 8), range(8, 16), range(16, 20)):
            scores.add("valid", rows(numbers))
            scores.log(metrics)
        found = seen.get_smoothed_values()
    _, predictions, labels = rows(range(20)).numpy().T
    for name, value in glue_metrics("MRPC", predictions, labels).items():
        assert found[name] == pytest.approx(value, abs=1e-3)


def test_a_row_that_comes_again_counts_once_and_splits_do_not_mix() -> None:
    scores = GlueScores("CoLA")
    scores.add("valid", rows(range(50, 60)))
    with metrics.aggregate(new_root=True) as seen:
        for numbers in (range(0, 8), range(4, 12), range(0, 3)):
            scores.add("valid_mismatched", rows(numbers))
        scores.log(metrics)
        found = seen.get_smoothed_values()["score"]
    _, predictions, labels = rows(range(12)).numpy().T
    assert found == pytest.approx(glue_metrics("CoLA", predictions, labels)["score"], abs=1e-3)


def test_who_has_not_seen_all_batches_gets_no_score() -> None:
    scores = GlueScores("CoLA")
    with metrics.aggregate(new_root=True):
        scores.add("valid", rows(range(0, 8)))
        scores.log(metrics)
    with metrics.aggregate(new_root=True) as seen:
        scores.add("valid", rows(range(8, 12)))
        scores.log(metrics)
        assert math.isnan(seen.get_smoothed_values()["score"])


# ----------------------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------------------


def test_epochs_hold_every_row_in_batches_of_similar_length(data: Path, source: Path) -> None:
    tokenizer = load_tokenizer(source / "tokenizer")
    dataset = GlueDataset(data / "MNLI" / "train", tokenizer, 3, 32)
    batches = GlueBatches(dataset, "train", training=True)

    def epoch(seed: int) -> list[np.ndarray]:
        with numpy_seed(seed):
            indices = batches.ordered_indices()
        return batches.batch_by_size(indices, max_sentences=10)

    first, again, other = epoch(1), epoch(1), epoch(2)
    assert sorted(np.concatenate(first)) == list(range(96)) and sorted(map(len, first)) == [6] + [10] * 9
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    assert not all(np.array_equal(one, two) for one, two in zip(first, other, strict=True))
    padding = sum(dataset.lengths[rows].max() * len(rows) for rows in first) - dataset.lengths.sum()
    order = np.random.default_rng(0).permutation(96)
    plain = [order[start : start + 10] for start in range(0, 96, 10)]
    assert padding < 0.5 * (sum(dataset.lengths[rows].max() * len(rows) for rows in plain) - dataset.lengths.sum())
    valid = GlueBatches(dataset, "valid", training=False)
    found = valid.batch_by_size(valid.ordered_indices(), max_sentences=10)
    lengths = dataset.lengths[np.concatenate(found)]
    assert sorted(np.concatenate(found)) == list(range(96)) and (np.diff(lengths) >= 0).all()
    assert valid.collater([dataset[0]])["split"] == "valid" and valid.collater([]) == {}
    with pytest.raises(UserError, match="give --batch-size"):
        valid.batch_by_size(np.arange(96), max_tokens=100)


# ----------------------------------------------------------------------------------------------------------------------
# Task and model
# ----------------------------------------------------------------------------------------------------------------------


def test_the_model_starts_from_its_source(data: Path, source: Path) -> None:
    task, model, cfg = make(data, "MNLI", {"init_from": str(source)}, glue_max_tokens=32)
    assert isinstance(model, TextClassifierModel) and model.num_classes == 3
    expected = load_text_encoder(str(source)).encoder.state_dict()
    found = model.state_dict()
    assert all(torch.equal(found[f"encoder.{name}"], value) for name, value in expected.items())
    # The options say what it is made of, so that a checkpoint needs no source.
    assert (cfg.text_layers, cfg.student_width, cfg.text_max_positions) == (2, 32, 40)
    overrides = {name: parameter.optim_overrides["optimizer"] for name, parameter in model.named_parameters()}
    assert overrides["head.dense.weight"] == {"lr_scale": 1.0, "weight_decay_scale": 1.0}
    assert overrides["head.dense.bias"]["weight_decay_scale"] == 0
    assert overrides["encoder.embeddings.word_embeddings.weight"]["weight_decay_scale"] == 0


def test_parts_of_a_source(data: Path, source: Path) -> None:
    _, model, _ = make(data, "CoLA", {"init_from": str(source), "init_layers": 1}, glue_max_tokens=32)
    assert model.encoder.num_layers == 1 and model.num_classes == 2
    _, model, _ = make(data, "STS-B", {"init_from": str(source), "init_random": True}, glue_max_tokens=32)
    expected = load_text_encoder(str(source)).encoder.state_dict()
    name = "embeddings.word_embeddings.weight"
    found = model.encoder.state_dict()
    assert found.keys() == expected.keys() and not torch.equal(found[name], expected[name])
    assert model.num_classes == 0


def test_options_alone_make_an_encoder(data: Path, source: Path) -> None:
    options = {"text_encoder": "bert", "student_width": 16, "student_heads": 2, "text_layers": 1}
    tokenizer = str(source / "tokenizer")
    _, model, _ = make(data, "CoLA", options, glue_tokenizer=tokenizer)
    assert (model.encoder.width, model.encoder.num_layers) == (16, 1)


def test_validation_gives_the_criterion_what_the_model_made(data: Path, source: Path) -> None:
    task, model, _ = make(data, "STS-B", {"init_from": str(source)}, glue_max_tokens=32)
    task.load_dataset("valid")
    dataset = task.datasets["valid"]
    calls = []
    model.register_forward_hook(lambda *arguments: calls.append(arguments))
    criterion = task.build_criterion(OmegaConf.create({"_name": "model"}))
    batch = dataset.collater([dataset[row] for row in range(12)])
    loss, size, log = task.valid_step(batch, model, criterion)
    assert len(calls) == 1 and size == 1
    outputs = model.eval()(**batch["net_input"])
    torch.testing.assert_close(loss, outputs["losses"]["classification"])
    with metrics.aggregate(new_root=True) as seen:
        task.scores.log(metrics)
        found = seen.get_smoothed_values()
    predictions, labels = model.predictions(outputs["outputs"]).detach().double().numpy(), dataset.dataset.labels
    # Labels have been float32 in between.
    expected = glue_metrics("STS-B", predictions, labels.astype(np.float32).astype(np.float64))
    assert found["pearson"] == pytest.approx(expected["pearson"], abs=1e-3)
    assert found["spearman"] == pytest.approx(expected["spearman"], abs=1e-3)


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        ({"glue_task": "COLA"}, {}, "--glue-task 'COLA' is none of CoLA, SST-2"),
        ({"glue_task": ""}, {}, "--glue-task '' is none of CoLA"),
        ({"glue_task": "RTE"}, {}, "holds no prepared split"),
        ({}, {}, "needs --glue-tokenizer, or an --init-from"),
        ({}, {"init_layers": 1}, "--init-layers and --init-random are of the encoder that --init-from names"),
        ({}, {"init_from": "nowhere"}, "no such checkpoint: nowhere"),
        ({}, {"init_from": "timm:test_vit"}, "sees images"),
        ({}, {"init_from": "SOURCE", "init_layers": 3}, "has 2 layers; 3 cannot be kept"),
        ({"glue_max_tokens": 128}, {"init_from": "SOURCE"}, "--glue-max-tokens 128: the text encoder has 40 positions"),
        ({}, {"init_from": "SOURCE", "lr_scale_layer_decay": 2.0}, "--lr-scale-layer-decay 2.0"),
        ({}, {"init_from": "SOURCE", "autocast": "float8"}, "--autocast 'float8' is unknown"),
    ],
)
def test_mistakes_are_named_in_one_line(data: Path, source: Path, options: dict, model: dict, message: str) -> None:
    given = {key: str(source) if value == "SOURCE" else value for key, value in model.items()}
    with pytest.raises(UserError, match=message) as caught:
        make(data, model=given, **({"glue_max_tokens": 32} | options))
    assert "\n" not in str(caught.value)


def test_wrong_data_is_named(data: Path, source: Path, tmp_path: Path) -> None:
    task, *_ = make(data, "MNLI", {"init_from": str(source)}, glue_max_tokens=32)
    with pytest.raises(UserError, match="MNLI has no split 'dev'; there are train, valid, test"):
        task.load_dataset("dev")
    with pytest.raises(UserError, match="test, row 0 has no label"):
        task.load_dataset("test")
    copy = tmp_path / "glue"
    shutil.copytree(data, copy)
    (copy / "MNLI" / "classes.json").unlink()
    with pytest.raises(UserError, match="classes.json does not go with MNLI: prepare the data again"):
        make(copy, "MNLI")


# ----------------------------------------------------------------------------------------------------------------------
# The real command
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(data: Path, source: Path) -> Callable[[Path], str]:
    """A function that trains on STS-B in a folder; the log."""

    def run(save_dir: Path) -> str:
        options = {
            "user_dir": ROOT / "user_dir", "task": "glue", "arch": "text_classifier", "criterion": "model",
            "optimizer": "grouped_adamw", "lr": 0.001, "batch_size": 8, "num_workers": 0, "update_freq": 2,
            "glue_task": "STS-B", "glue_max_tokens": 32, "init_from": source, "max_epoch": 3, "log_format": "json",
            "log_interval": 1, "save_interval_updates": 2, "best_checkpoint_metric": "score", "save_dir": save_dir,
        }  # fmt: skip
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        words += ["--cpu", "--no-epoch-checkpoints", "--maximize-best-checkpoint-metric"]
        done = subprocess.run(
            [sys.executable, "-m", "fairseq_cli.train", str(data), *words],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        log = done.stdout + done.stderr
        assert done.returncode == 0 and "Warning" not in log, log[-3000:]
        return log

    return run


def test_a_stopped_run_goes_on_exactly(train: Callable[[Path], str], tmp_path: Path, source: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    log = train(whole)
    records = [json.loads(line.split(" | ")[-1]) for line in log.splitlines() if "| valid | {" in line]
    assert {"valid_loss", "valid_pearson", "valid_spearman", "valid_score", "valid_best_score"} <= records[-1].keys()
    # 45 rows make 6 batches, the last one of 5 rows: 3 updates an epoch.
    assert int(records[-1]["valid_num_updates"]) == 9
    resumed.mkdir()
    shutil.copy(whole / "checkpoint_2_4.pt", resumed / "checkpoint_last.pt")
    train(resumed)
    one, two = (torch.load(f / "checkpoint_last.pt", weights_only=True)["model"] for f in (whole, resumed))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    record = json.loads((whole / "run.json").read_text())
    assert record["encoder"] == load_text_encoder(str(source)).identity
    assert load_tokenizer(whole / "tokenizer").vocab_size == load_tokenizer(source / "tokenizer").vocab_size
    # The fine-tuned encoder can be read without its source.
    assert load_text_encoder(str(whole)).encoder.num_layers == 2
