"""What users get wrong: one clear line, a non-zero exit, no traceback, nothing half written."""

from pathlib import Path

import pytest
import torch

from emkum.data.shard_writing import ShardWriter


def only_line(done) -> str:
    """The one line of complaint on standard error."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr + done.stdout
    lines = [line for line in (done.stdout + "\n" + done.stderr).splitlines() if "emkum: error:" in line]
    assert len(lines) == 1, done.stderr[-2000:]
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["data=/nowhere/scenes"], ["/nowhere/scenes", "emkum prepare"]),
        (["data={scenes}", "itc_wieght=2"], ["itc_wieght", "itc_weight"]),
        (["data={scenes}", "fp16=true", "cpu=true"], ["fp16", "autocast"]),
        (["data={scenes}", "objectives"], ["key=value"]),
        (["data={scenes}", "no_progress_bar=3"], ["no_progress_bar", "true or false"]),
        (["data={scenes}", "warmup_updates=155"], ["warmup_updates 155", "max_update 155"]),
    ],
)
def test_recipe_mistakes(command, examples, scenes, tmp_path, overrides, named) -> None:
    run = tmp_path / "run"
    words = [word.format(scenes=scenes) for word in overrides]
    done = command("emkum", "train", examples / "scenes_itc.yaml", *words, f"save_dir={run}", expect=None)
    assert all(word in only_line(done) for word in named)
    assert not run.exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"objectives": "itc,kd_mse"}, ["kd_mse", "--teacher", "timm:NAME"]),
        ({"objectives": "itc,kd_mse", "teacher": "self"}, ["--teacher self", "--average-decay"]),
        ({"objectives": "itc,kd_nothing"}, ["kd_nothing", "kd_contrastive"]),
        ({"student_size": "huge"}, ["huge", "tiny", "base"]),
        ({"image_encoder": "resnet"}, ["resnet", "data2vec2", "timm:NAME"]),
        ({"order_weights": "1,2"}, ["--order-weights", "2 weights for 1"]),
        ({"augment_rand_augment": "rand-x"}, ["--augment-rand-augment", "rand-m9-mstd0.5-inc1"]),
    ],
)
def test_wrong_options_by_hand(train_by_hand, scenes, tmp_path, options, named) -> None:
    done = train_by_hand(scenes, **options, save_dir=tmp_path / "run", expect=None)
    assert all(word in only_line(done) for word in named)
    assert not list(tmp_path.glob("run/*"))


def test_half_precision_on_the_cpu_by_hand(train_by_hand, scenes, tmp_path) -> None:
    done = train_by_hand(scenes, "--fp16", save_dir=tmp_path / "run", expect=None)
    assert "--fp16" in only_line(done)


def test_folder_without_splits(train_by_hand, tmp_path) -> None:
    done = train_by_hand(tmp_path, save_dir=tmp_path / "run", expect=None)
    assert str(tmp_path) in only_line(done) and "emkum prepare" in only_line(done)


def test_split_without_captions(train_by_hand, scenes, tmp_path) -> None:
    data = tmp_path / "data"
    for split in ("train", "valid"):
        with ShardWriter(data / split) as writer:
            writer.add("a", b"image", "jpg", [])
    tokenizer = Path(scenes) / "tokenizer.model"
    done = train_by_hand(data, save_dir=tmp_path / "run", caption_tokenizer=tokenizer, expect=None)
    assert "caption" in only_line(done)


@pytest.mark.parametrize("content", ["other", "text", "missing"])
def test_checkpoint_of_another_kind(command, scenes, tmp_path, content) -> None:
    path = tmp_path / "checkpoint.pt"
    if content == "other":
        torch.save({"cfg": {"model": {"_name": "transformer_lm"}}, "model": {}}, path)
    elif content == "text":
        path.write_text("no checkpoint")
    output = tmp_path / "figures.json"
    done = command(
        "emkum", "evaluate", "retrieval", "--checkpoint", path, "--data", scenes, "--json", output, expect=None
    )
    assert str(path) in only_line(done)
    assert not output.exists()


def test_unknown_split_names_the_others(command, scenes, tmp_path) -> None:
    checkpoint = tmp_path / "checkpoint_best.pt"
    checkpoint.touch()
    done = command(
        "emkum", "evaluate", "retrieval", "--checkpoint", tmp_path, "--data", scenes, "--split", "dev", expect=None
    )
    assert all(word in only_line(done) for word in ("dev", "train", "valid", "test"))
