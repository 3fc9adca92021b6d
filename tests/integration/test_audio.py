"""The third sense: images with captions and sounds in one step, through the real commands."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.registered  # noqa: F401
from emkum.checkpoint import load
from emkum.cli import main
from emkum.commands.evaluate import PAIRS
from emkum.data.shards import open_split
from emkum.data.sounds import decode_sound
from emkum.errors import UserError
from emkum.objectives import HEARD, OBJECTIVES, build_objectives, heard_objectives
from emkum.outputs import StudentOutput
from emkum.recipe import read_recipe, to_arguments
from tests.integration.conftest import ROOT
from tests.integration.in_process import Run, make_run
from tests.objectives.cases import OPTIONS, SETTING, make_case, with_gradients
from tests.objectives.target_files import write_target_files

RECIPE = ROOT / "examples" / "rows" / "40_audio.yaml"
# Sizes that fit a test, beside the preset small.
TINY = {"image_size": 32, "image_patch_size": 8, "image_layers": 1, "text_layers": 1, "audio_layers": 1}
TINY |= {"audio_conv_width": 8, "text_max_positions": 64, "batch_size": 8, "warmup_updates": 1, "max_update": 3}
TINY |= {"objectives": "itc", "teacher": "", "num_workers": 0, "log_interval": 1, "validate_interval": 1}


@pytest.fixture(scope="module")
def heard_scenes(tmp_path_factory: pytest.TempPathFactory, run_prepare: Callable[..., None]) -> Path:
    """30 scenes with sounds: 24 to train on, 3 valid, 3 test."""
    folder = tmp_path_factory.mktemp("heard") / "scenes"
    options = ("--num-images", 30, "--seed", 1, "--image-size", 32, "--vocab-size", 120, "--sounds")
    run_prepare("scenes", "--out", folder, *options)
    return folder


@pytest.fixture
def start(heard_scenes: Path, tmp_path: Path) -> Callable[..., Run]:
    """A function that sets up a run of the recipe in this process."""

    def run(**changes: Any) -> Run:
        options = read_recipe(RECIPE, "small") | TINY | changes
        options = {key: str(value) if isinstance(value, list) else value for key, value in options.items()}
        return make_run(heard_scenes, tmp_path, {key: value for key, value in options.items() if value != ""})

    return run


def test_the_recipe_is_short_and_its_options_are_known() -> None:
    assert len(RECIPE.read_text().splitlines()) <= 20
    for presets in (None, "small"):
        options = {"user_dir": str(ROOT / "user_dir"), "data": "some/folder"} | read_recipe(RECIPE, presets)
        assert options["audio_encoder"] == "data2vec2"
        assert any(word.startswith("--audio-encoder") for word in to_arguments(options))


def test_sounds_stand_in_the_place_of_captions_in_every_objective_of_pairs(tmp_path: Path) -> None:
    names = heard_objectives(OBJECTIVES)
    assert set(OBJECTIVES) - set(names) == {"mlm", "mim", "kd_patch"}
    student, teacher, batch = make_case()
    _, count = student.image.features.shape[0], len(batch.image_ids)
    rows = slice(0, 2 * count, 2)

    def sounds(output: StudentOutput) -> Any:
        fields = {name: value[rows] for name, value in vars(output.text).items() if isinstance(value, Tensor)}
        return replace(output.text, **fields)

    student = replace(student, audio=sounds(student), average=replace(student.average, audio=sounds(student.average)))
    special = batch.special[rows]
    heard = batch.with_sounds_for_captions(special)
    # The same by hand: one caption an image.
    plain = replace(
        student,
        text=student.audio,
        audio=None,
        masked_text=None,
        average=replace(student.average, text=sounds(student.average)),
    )
    assert heard.caption_image.tolist() == list(range(count)) and torch.equal(heard.special, special)
    assert torch.equal(heard.caption_ids, batch.image_ids)
    options = OPTIONS | write_target_files(tmp_path)
    for name in names:
        torch.manual_seed(0)
        objective = build_objectives([name], options, SETTING)[name].double()
        leaves_of, leaves = with_gradients(student)
        torch.manual_seed(1)
        loss = objective(leaves_of.with_sounds_for_captions(), teacher, heard).loss
        torch.manual_seed(0)
        again = build_objectives([name], options, SETTING)[name].double()
        torch.manual_seed(1)
        torch.testing.assert_close(again(plain, teacher, heard).loss, loss)
        loss.backward()
        learned = {
            key.split(".")[0] for key, leaf in leaves.items() if leaf.grad is not None and leaf.grad.abs().sum() > 0
        }
        assert {"image", "audio"} <= learned and "text" not in learned, name


def test_losses_are_those_of_captions_and_those_of_sounds_alone(start: Callable[..., Run]) -> None:
    run = start(objectives="itc,ranking,cmli,dino,mlm", average_decay=0.9, audio_loss_weight=0.5, ranking_weight=2.0,
                dino_prototypes=32, dino_hidden=16, dino_bottleneck=8)  # fmt: skip
    assert set(run.model.audio_objectives) == {"itc", "ranking", "cmli", "dino"}
    run.model.eval()
    batch = run.batch(0, 6)

    def losses(batch: dict[str, Any]) -> dict[str, Tensor]:
        with torch.no_grad():
            _, _, log = run.criterion(run.model, batch)
        return log

    log = losses(batch)
    captions = sum(log[f"{name}_loss"] * (2 if name == "ranking" else 1) for name in run.model.objectives)
    sounds = sum(log[f"{HEARD}{name}_loss"] * (2 if name == "ranking" else 1) for name in run.model.audio_objectives)
    torch.testing.assert_close(log["loss"], captions + 0.5 * sounds)
    for key in ("text", "audio"):
        changed = batch | {"net_input": batch["net_input"] | {key: batch["net_input"][key].roll(1, 0)}}
        other = losses(changed)
        same = [name for name in ("itc", "ranking", "cmli") if torch.equal(other[f"{name}_loss"], log[f"{name}_loss"])]
        heard = [
            n for n in ("itc", "ranking", "cmli") if torch.equal(other[f"{HEARD}{n}_loss"], log[f"{HEARD}{n}_loss"])
        ]
        # What of the other sense is changed is of no account.
        assert (len(same), len(heard)) == ((0, 3) if key == "text" else (3, 0))


def test_every_part_learns_and_the_student_is_as_without_sounds(start: Callable[..., Run]) -> None:
    run = start(text_dropout=0, audio_dropout=0, image_dropout=0)
    silent = start(audio_encoder="none", text_dropout=0, image_dropout=0)
    encoders = [name for name in silent.model.state_dict() if "image_encoder" in name or "text_encoder" in name]
    assert all(torch.equal(silent.model.state_dict()[name], run.model.state_dict()[name]) for name in encoders)
    assert not [name for name in silent.model.state_dict() if "audio" in name]
    assert run.model.student.after["token_types"].embedding.weight.shape[0] == 3
    run.backward(run.batch(0, 8), 0)
    gradients = run.gradients()
    for part in ("image_encoder", "text_encoder", "audio_encoder", "shared_encoder"):
        assert any(name.startswith(f"student.{part}") and value.abs().sum() > 0 for name, value in gradients.items())
    assert gradients["student.after.token_types.embedding.weight"].abs().sum(1).gt(0).all()
    assert (
        gradients["audio_objectives.itc.scale.log_scale"] != 0
        if "audio_objectives.itc.scale.log_scale" in gradients
        else True
    )
    with pytest.raises(UserError, match="--audio-encoder: mlm learns nothing from sounds"):
        start(objectives="mlm")
    with pytest.raises(UserError, match="--audio-encoder 'wav2vec' is unknown; choose from none, data2vec2"):
        start(audio_encoder="wav2vec")


def test_chunks_give_the_gradients_of_the_whole_batch(start: Callable[..., Run]) -> None:
    found = []
    for chunk in (0, 3):
        run = start(contrastive_chunk=chunk, text_dropout=0, audio_dropout=0, image_dropout=0, autocast="")
        run.backward(run.batch(0, 8), 0)
        found.append(run.gradients())
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_train_and_evaluate(
    command: Callable, heard_scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{key}={value}" for key, value in (TINY | {"max_update": 4}).items()]
    folder = tmp_path / "run"
    command("emkum", "train", RECIPE, "--preset", "small", f"data={heard_scenes}", f"save_dir={folder}", *words)
    assert "audio_itc_loss" in (folder / "train.log").read_text()
    given = ["evaluate", "retrieval", "--checkpoint", str(folder), "--data", str(heard_scenes), "--split", "train"]
    found = {}
    for pair in PAIRS:
        main([*given, "--json", str(tmp_path / "figures.json"), "--pair", pair])
        found[pair] = json.loads((tmp_path / "figures.json").read_text())
    table = capsys.readouterr().out
    assert "a2t R@1" in table and "median rank: i2a" in table
    assert {key.partition("_")[0] for key in found["text-audio"] if key.endswith("_r1")} == {"a2t", "t2a"}
    assert "i2t_r1" in found["image-text"] and "pair" not in found["image-text"]
    assert (found["image-audio"]["num_captions"], found["text-audio"]["num_captions"]) == (24, 120)
    model, samples = load(folder), open_split(heard_scenes, "train")
    sounds = model.encode_audio([decode_sound(sample.sound) for sample in samples])
    alone = model.encode_audio([decode_sound(samples[5].sound)])
    torch.testing.assert_close(sounds[5:6], alone, rtol=0, atol=1e-5)
    captions = model.encode_text([caption for sample in samples for caption in sample.captions])
    hits = (sounds @ captions.T).argmax(1) // 5 == torch.arange(24)
    assert found["text-audio"]["a2t_r1"] == pytest.approx(100 * hits.double().mean().item())
    with pytest.raises(UserError, match="--pair text-audio compares features alone"):
        main([*given, "--pair", "text-audio", "--scores", "late_interaction"])
