"""The commands people use, on real files: train by hand, validate, resume, evaluate, load."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import emkum
from emkum.data.decoding import decode
from emkum.data.shards import open_split
from emkum.training_log import parse_line

TEACHER = "test_vit"
RECALLS = ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "mean_recall"]
DISTILLATION = {"objectives": "itc,kd_mse,kd_contrastive", "kd_contrastive_bank_size": 20, "teacher": f"timm:{TEACHER}"}


def records(text: str, tag: str) -> list[dict[str, float]]:
    found = [parse_line(line) for line in text.splitlines()]
    return [record for item in found if item is not None for name, record in [item] if name == tag]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["model"]


@pytest.fixture(scope="module")
def finished_run(train_by_hand, scenes, teacher_weights, tmp_path_factory) -> tuple[Path, str]:
    """Six updates over one and a half epochs of four, with a checkpoint in the middle of each; and the log."""
    folder = tmp_path_factory.mktemp("run")
    done = train_by_hand(
        scenes,
        **DISTILLATION,
        teacher_weights=teacher_weights,
        teacher_image_size=32,
        save_dir=folder,
        save_interval_updates=3,
    )
    return folder, done.stdout + done.stderr


def test_training_by_hand_logs_losses_and_corpus_recall(finished_run) -> None:
    _, log = finished_run
    training = records(log, "train_inner")
    assert [record["step"] for record in training] == [1, 2, 3, 4, 5, 6]
    assert all({"itc_loss", "kd_mse_loss", "kd_contrastive_loss"} <= set(record) for record in training)
    validation = records(log, "valid")[-1]
    assert validation["mean_recall"] == pytest.approx(np.mean([validation[key] for key in RECALLS[:6]]), abs=2e-3)
    assert "Traceback" not in log and "Warning" not in log


def test_run_leaves_its_record_beside_the_checkpoints(finished_run, scenes) -> None:
    folder, _ = finished_run
    record = json.loads((folder / "run.json").read_text())
    assert record["options"]["model"]["student_size"] == "tiny"
    assert record["options"]["optimization"]["max_update"] == 6
    assert record["data"]["train_hash"] == open_split(scenes, "train").content_hash()
    assert record["teacher"]["teacher"] == f"timm:{TEACHER}"
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]


def test_resumed_run_is_bit_identical(train_by_hand, finished_run, scenes, teacher_weights, tmp_path) -> None:
    folder, _ = finished_run
    # Stopped in the middle of the first epoch: what a killed run leaves.
    shutil.copy(folder / "checkpoint_1_3.pt", tmp_path / "checkpoint_last.pt")
    train_by_hand(scenes, **DISTILLATION, teacher_weights=teacher_weights, teacher_image_size=32, save_dir=tmp_path)
    whole, resumed = weights(folder / "checkpoint_last.pt"), weights(tmp_path / "checkpoint_last.pt")
    assert whole.keys() == resumed.keys()
    different = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    assert different == []
    started = weights(folder / "checkpoint_1_3.pt")
    assert any(not torch.equal(whole[name], started[name]) for name in whole)


def test_checkpoints_know_their_teacher(train_by_hand, finished_run, scenes, teacher_weights, tmp_path) -> None:
    folder, _ = finished_run
    state = torch.load(folder / "checkpoint_last.pt", weights_only=True)["task_state"]
    assert state["teacher"] == json.loads((folder / "run.json").read_text())["teacher"]
    assert state["teacher"]["weights_sha256"] and state["teacher"]["image_size"] == 32
    for name in ("checkpoint_last.pt", "run.json"):
        shutil.copy(folder / name, tmp_path / name)
    other = {"teacher_weights": teacher_weights, "teacher_image_size": 48, "save_dir": tmp_path}
    done = train_by_hand(scenes, **DISTILLATION, **other, expect=1)
    assert "was begun with another teacher (it differs in image_size, weights_sha256)" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "checkpoint_last.pt").read_bytes() == (folder / "checkpoint_last.pt").read_bytes()


def test_a_trained_student_as_teacher_of_both_modalities(train_by_hand, finished_run, scenes, tmp_path) -> None:
    folder, _ = finished_run
    done = train_by_hand(
        scenes,
        objectives="itc,kd_mse,kd_contrastive",
        kd_contrastive_bank_size=20,
        teacher=f"checkpoint:{folder}",
        teacher_target="own",
        save_dir=tmp_path,
        max_update=3,
    )
    records_of = records(done.stdout + done.stderr, "train_inner")
    assert len(records_of) == 3 and all(record["kd_mse_text_loss"] > 0 for record in records_of)
    identity = json.loads((tmp_path / "run.json").read_text())["teacher"]
    assert (identity["teacher"], identity["target"]) == ("checkpoint", "own")


def test_the_moving_average_as_teacher_resumes_exactly(train_by_hand, scenes, tmp_path) -> None:
    options = {"objectives": "itc,kd_mse", "teacher": "self", "average_decay": 0.9}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_by_hand(scenes, **options, save_dir=whole, save_interval_updates=3)
    parts.mkdir()
    shutil.copy(whole / "checkpoint_1_3.pt", parts / "checkpoint_last.pt")
    train_by_hand(scenes, **options, save_dir=parts)
    expected, resumed = weights(whole / "checkpoint_last.pt"), weights(parts / "checkpoint_last.pt")
    assert expected.keys() == resumed.keys()
    assert [name for name in expected if not torch.equal(expected[name], resumed[name])] == []
    # It follows when the next update begins.
    assert expected["ema.updates"] == 5
    name = "shared_encoder.norm.weight"
    average, student = expected[f"ema.module.{name}"], expected[f"student.{name}"]
    assert not torch.equal(average, student)
    assert (average - 1).abs().max() < (student - 1).abs().max(), "from one on, the average lags behind"
    # What is loaded for use is the student, without its average.
    assert emkum.load(whole).encode_text(["a red circle"]).shape == (1, 128)


def test_validate_and_evaluate_agree_with_training(command, finished_run, scenes, tmp_path) -> None:
    folder, log = finished_run
    checkpoint = folder / "checkpoint_last.pt"
    done = command(
        "fairseq-validate", scenes, "--user-dir=user_dir", "--task=image_text", f"--path={checkpoint}",
        "--batch-size=3", "--cpu", "--log-format=json",
    )  # fmt: skip
    figures = next(
        json.loads(line.split(" | ")[-1]) for line in done.stdout.splitlines() if '"valid_mean_recall"' in line
    )
    output = tmp_path / "figures.json"
    done = command(
        "emkum", "evaluate", "retrieval", "--checkpoint", checkpoint, "--data", scenes, "--split", "valid",
        "--json", output,
    )  # fmt: skip
    by_evaluate = json.loads(output.read_text())
    assert by_evaluate["num_images"] == 4 and by_evaluate["num_captions"] == 20
    trained = records(log, "valid")[-1]
    for key in RECALLS:
        assert by_evaluate[key] == pytest.approx(trained[key], abs=1e-3), key
        assert float(figures[f"valid_{key}"]) == pytest.approx(trained[key], abs=1e-3), key
    assert "chance" in done.stdout and f"{by_evaluate['mean_recall']:.1f}" in done.stdout


def test_load_gives_unit_vectors_without_the_training_data(finished_run, scenes, tmp_path) -> None:
    folder, _ = finished_run
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    model = emkum.load(moved)
    sample = open_split(scenes, "test")[0]
    images = model.encode_image([decode(sample.image), Image.new("L", (50, 20))])
    texts = model.encode_text(["a red circle", "a small blue star above a large green square", "a"])
    for features, count in ((images, 2), (texts, 3)):
        assert features.shape == (count, 128)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(count))
    torch.testing.assert_close(model.encode_text(["a red circle"])[0], texts[0])
    assert model.encode_image([]).shape == (0, 128)


def test_train_recipe_with_cached_teacher_on_two_processes(
    command, examples, scenes, teacher_weights, tmp_path
) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    command(
        "emkum", "teacher", "cache", f"timm:{TEACHER}", "--weights", teacher_weights, "--image-size", 32,
        "--data", scenes, "--out", cache,
    )  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {examples}/scenes.yaml\nimage_size: 32\ncaption_per_image: 2\n")
    done = command(
        "emkum", "train", "--processes", 2, recipe, f"data={scenes}", f"save_dir={run}", f"teacher=cached:{cache}",
        "batch_size=4", "max_update=4", "warmup_updates=1", "log_interval=1", "autocast=",
    )  # fmt: skip
    assert "update 4/4" in done.stdout and "mean recall" in done.stdout
    log = (run / "train.log").read_text()
    assert "training on 2 devices" in log
    # Eight images are contrasted although each process has four of them.
    assert records(log, "train_inner")[0]["bsz"] == 8
    assert (run / "checkpoint_best.pt").is_file()


def test_cached_views_train_as_the_live_teacher_does(command, train_by_hand, scenes, teacher_weights, tmp_path) -> None:
    cache = tmp_path / "cache"
    command(
        "emkum", "teacher", "cache", f"timm:{TEACHER}", "--weights", teacher_weights, "--image-size", 32,
        "--data", scenes, "--out", cache, "--views", 2, "--flip", "--shard-size", 10,
    )  # fmt: skip
    live = {"teacher_weights": teacher_weights, "teacher_image_size": 32}
    losses = []
    for name, teacher in (("live", live), ("cached", {"teacher": f"cached:{cache}"})):
        # Ten updates are two and a half epochs: the first view comes again.
        options = DISTILLATION | teacher | {"crop_views": 2, "max_update": 10, "save_dir": tmp_path / name}
        done = train_by_hand(scenes, "--no-save", **options)
        losses.append([record["loss"] for record in records(done.stdout + done.stderr, "train_inner")])
    assert len(losses[0]) == 10
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


def test_report_compares_runs(command, finished_run, scenes, tmp_path) -> None:
    folder, log = finished_run
    (folder / "train.log").write_text(log)
    done = command("emkum", "report", f"six updates={folder}", "--data", scenes, "--out", tmp_path / "report")
    assert "six updates" in done.stdout and "chance" in done.stdout
    for name in ("retrieval.png", "curves.png", "retrieval.svg", "curves.svg"):
        assert (tmp_path / "report" / name).stat().st_size > 1000
    results = json.loads((tmp_path / "report" / "report.json").read_text())["results"]
    assert set(RECALLS) <= set(results["six updates"])


def test_two_folders_in_windows_by_length_with_augmentation(train_by_hand, scenes, tmp_path, run_prepare) -> None:
    other = tmp_path / "other"
    run_prepare("scenes", "--out", other, "--num-images", 20, "--seed", 9, "--image-size", 48, "--vocab-size", 0)
    done = train_by_hand(
        f"{scenes}:{other}",
        "--order-by-length",
        save_dir=tmp_path / "run",
        order_weights="0.5,2",
        order_window=4,
        augment_color_jitter=0.4,
        max_update=8,
    )
    log = done.stdout + done.stderr
    # Half of 32 images and twice 16 make 6 batches of 8 an epoch; only the first folder is validated on.
    assert [record["epoch"] for record in records(log, "train_inner")] == [1] * 6 + [2] * 2
    assert records(log, "valid")[-1]["mean_recall"] > 0
    folders = json.loads((tmp_path / "run" / "run.json").read_text())["data"]["folders"]
    assert [Path(folder).name for folder in folders] == ["scenes", "other"]
