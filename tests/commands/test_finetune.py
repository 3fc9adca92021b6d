"""`emkum evaluate finetune`: a real run of it, and its parts."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from emkum.commands import finetune
from emkum.commands.finetune import Scoring, choose_scoring, parse_seeds, read_result, summarize, updates_per_epoch
from emkum.errors import UserError
from tests.small_classes import CLASSES, SPLITS, write_class_folders

SMALL = ["batch_size=8", "update_freq=1", "num_workers=0", "log_interval=1", "crop_min_scale=0.5", "autocast="]


def parsed(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    finetune.add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["finetune", *map(str, words)])


def run(*words: object) -> None:
    args = parsed(*words)
    args.run(args)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, run_prepare: Callable[..., None]) -> Path:
    root = tmp_path_factory.mktemp("classes")
    run_prepare("image-folder", "--images", write_class_folders(root / "raw"), "--out", root / "data")
    return root / "data"


def test_a_run_end_to_end(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    torch.set_num_threads(1)
    out = tmp_path / "out"
    source = ["timm:test_vit", *SMALL]
    options = ["--data", data, "--weights", "random", "--image-size", 32, "--layers", 2, "--epochs", 2, "--out", out]
    run(*source, *options, "--seeds", 5)
    report = json.loads((out / "finetune.json").read_text())
    assert (report["split"], report["chosen_by"], report["encoder"]["image_layers"]) == ("test", "valid", 2)
    images = CLASSES * SPLITS["train"]
    assert report["options"]["max_update"] == 2 * (images // 8)
    assert report["options"]["mix_prob"] == 1.0 and report["options"]["lr_scale_layer_decay"] == 0.81
    (result,) = report["runs"]
    assert result["seed"] == 5 and 0 <= result["top1"] <= result["top5"] <= 100 and result["loss"] > 0
    printed = capfd.readouterr().out
    assert f"top-1 on test: {result['top1']:.2f} %, 1 run" in printed
    recorded = json.loads((out / "seed5" / "run.json").read_text())["options"]
    assert recorded["common"]["seed"] == 5 and recorded["model"]["image_size"] == 32
    assert recorded["dataset"]["valid_subset"] == "valid,test"
    # A finished run is not run again, and a folder keeps to its options.
    checkpoint = out / "seed5" / "checkpoint_last.pt"
    before = checkpoint.stat().st_mtime_ns
    run(*source, *options, "--seeds", 5)
    assert json.loads((out / "finetune.json").read_text())["runs"] == report["runs"]
    assert checkpoint.stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"seed5 holds a run with other options \(it differs in lr\)"):
        run(*source, "lr=0.5", *options, "--seeds", 5)
    (out / "seed5" / "finetune.json").unlink()
    with pytest.raises(UserError, match="seed5 holds a run of another command: give another --out"):
        run(*source, *options, "--seeds", 5)


def test_each_seed_has_its_run(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    monkeypatch.setattr(finetune, "train_once", lambda options, identity, folder: trained.append((options, folder)))
    figures = iter([50.0, 53.0])
    result = {"update": 4, "top5": 90.0, "loss": 1.0, "best_top1": 60.0, "seconds": 1.0}
    monkeypatch.setattr(finetune, "read_result", lambda log, scoring: result | {"top1": next(figures)})
    run("timm:test_vit", "--data", data, "--weights", "random", "--out", tmp_path, "--seeds", "3,1")
    assert [(options["seed"], options["save_dir"], folder) for options, folder in trained] == [
        (seed, str(tmp_path / f"seed{seed}"), tmp_path / f"seed{seed}") for seed in (3, 1)
    ]
    assert all(options["max_update"] == 250200 for options, _ in trained)
    report = json.loads((tmp_path / "finetune.json").read_text())
    assert [found["seed"] for found in report["runs"]] == [3, 1] and report["top1_mean"] == 51.5
    assert "top-1 on test: 51.50 ± 2.12 (50.00 to 53.00) %, 2 runs" in capfd.readouterr().out


def history(steps: list[int], top1: list[float]) -> list[dict[str, float]]:
    return [{"step": s, "top1": t, "top5": 90 + t / 10, "loss": 1.0} for s, t in zip(steps, top1, strict=True)]


@pytest.mark.parametrize(
    ("scoring", "update", "top1"),
    [(Scoring("test", "valid"), 20, 40.0), (Scoring("test"), 30, 45.0), (Scoring("valid"), 30, 60.0)],
)
def test_the_update_is_chosen_by_the_other_split(
    scoring: Scoring, update: int, top1: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [10, 20, 30]
    histories = {
        "train": [{"step": 30, "wall": 12.0}],
        # Of equals the last one, which fairseq keeps as best checkpoint.
        "valid": history(steps, [70.0, 70.0, 60.0]),
        "test": history(steps, [50.0, 40.0, 45.0]),
    }
    monkeypatch.setattr("emkum.training_log.read_training_log", lambda path: histories)
    found = read_result(tmp_path, scoring)
    assert (found["update"], found["top1"], found["top5"]) == (update, top1, 90 + top1 / 10)
    assert found["best_top1"] == (70.0 if scoring.scored == "valid" else 50.0) and found["seconds"] == 12.0


def test_spread() -> None:
    found = summarize([{"top1": value, "top5": 90.0} for value in (50.0, 52.0, 57.0)])
    assert found == pytest.approx(
        {"top1_mean": 53.0, "top1_std": 13**0.5, "top1_min": 50.0, "top1_max": 57.0, "top5_mean": 90.0}
    )
    assert summarize([{"top1": 50.0, "top5": 90.0}])["top1_std"] is None


@pytest.mark.parametrize(
    ("options", "updates"),
    [
        ({"batch_size": 8}, 5),
        ({"batch_size": 8, "update_freq": 2}, 3),
        ({"batch_size": 8, "update_freq": [2]}, 3),
        ({"batch_size": 8, "distributed_world_size": 2}, 2),
        ({"batch_size": 42}, 1),
    ],
)
def test_updates_of_an_epoch(data: Path, options: dict[str, Any], updates: int) -> None:
    assert updates_per_epoch(str(data), {"cpu": True} | options) == updates


def test_an_epoch_of_two_folders(data: Path) -> None:
    assert updates_per_epoch(f"{data}:{data}", {"batch_size": 8, "cpu": True}) == 84 // 8


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ("train,valid,test", Scoring("test", "valid")),
        ("train,test", Scoring("test")),
        ("train,valid", Scoring("valid")),
    ],
)
def test_splits_to_score(splits: str, expected: Scoring, data: Path, tmp_path: Path) -> None:
    for split in splits.split(","):
        shutil.copytree(data / split, tmp_path / split)
    assert choose_scoring(str(tmp_path)) == expected
    assert expected.subsets == splits.removeprefix("train,")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "1,x"], "--seeds '1,x': want different whole numbers"),
        (["--seeds", "1,1"], "--seeds '1,1'"),
        (["--epochs", "0"], "--epochs 0: want 1 or more"),
        (["--weights", "model.safetensors"], "--weights model.safetensors: .*nothing has its own"),
        (["batch_size=64", "--epochs", "1"], "42 training images are too few for batch_size=64"),
        (["seed=3"], "seed is set by --seeds"),
        (["save_dir=x"], "save_dir is set by --out"),
        (["init_layers=3"], "init_layers is set by --layers"),
        (["max_update=3", "--epochs", "1"], "max_update is set by --epochs"),
        (["batch_size"], "must read key=value"),
        ([], "nothing"),
    ],
)
def test_mistakes_are_told_before_anything_runs(words: list[str], said: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        run(tmp_path / "nothing", *words, "--data", data, "--out", tmp_path / "out")
    assert "\n" not in caught.value.message and not (tmp_path / "out").exists()


def test_data_without_splits(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no prepared split; want train, and valid or test"):
        choose_scoring(str(tmp_path))
    shutil.copytree(data / "train", tmp_path / "train")
    with pytest.raises(UserError, match="has the splits train; want train, and valid or test"):
        choose_scoring(str(tmp_path))


def test_seeds() -> None:
    assert parse_seeds("3, 1,2") == [3, 1, 2]


def test_a_set_without_classes(data: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(data, tmp_path / "data")
    (copied / "classes.json").unlink()
    with pytest.raises(UserError, match="data has no classes.json"):
        run("timm:test_vit", "--data", copied, "--weights", "random", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_speaks_for_itself(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        run("timm:test_vit", "lrr=1", "--data", data, "--weights", "random", "--out", tmp_path / "out")
    assert caught.value.code == 1
    assert capfd.readouterr().err.count("emkum: error: unknown recipe key 'lrr'") == 1
    assert json.loads((tmp_path / "out" / "seed1" / "finetune.json").read_text())["finished"] is False
