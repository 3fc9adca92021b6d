"""What a run takes over from a trained student."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from emkum.data.tokenizers import load_tokenizer
from emkum.errors import UserError
from emkum.models.builders import STUDENT_PARTS, Targets, build_student
from emkum.models.student_start import assert_same_tokenizer, fill_objectives, fill_student, read_start
from emkum.objectives import Setting, build_objectives
from emkum.options import flat_fields

OPTIONS = {
    "student_size": "tiny", "image_size": 16, "image_patch_size": 8, "image_layers": 1, "text_layers": 1,
    "text_dropout": 0.3, "token_type_place": "before", "position_kind": "learned",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, run_prepare: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    run_prepare("scenes", "--out", folder, "--num-images", 30, "--image-size", 32, "--vocab-size", 100)
    return folder


def objectives(names: list[str], student: Any) -> torch.nn.ModuleDict:
    setting = Setting(width=student.width, contrast_width=student.contrast_width, target_width=5)
    return build_objectives(names, {"kd_contrastive_bank_size": 4}, setting)


@pytest.fixture(scope="module")
def source(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a student that was distilled from a teacher of 5 channels."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    tokenizer = load_tokenizer(tokenizer_folder)
    student = build_student(OPTIONS, tokenizer.vocab_size, Targets(prediction=5, masked_images=True))
    kept = objectives(["itc", "kd_contrastive"], student)
    with torch.no_grad():
        kept["itc"].scales["features"].log_scale.fill_(3.5)
    weights = {f"student.{name}": value for name, value in student.state_dict().items()}
    weights |= {f"objectives.{name}": value for name, value in kept.state_dict().items()}
    heard = objectives(["itc"], student)
    with torch.no_grad():
        heard["itc"].scales["features"].log_scale.fill_(2.5)
    weights |= {f"audio_objectives.{name}": value for name, value in heard.state_dict().items()}
    every = {name: item.default if item.default != "" else None for name, item in flat_fields(STUDENT_PARTS)}
    model = every | OPTIONS | {"_name": "image_text_student", "objectives": "itc,kd_contrastive"}
    task = {"caption_max_tokens": 16, "caption_tokenizer": None, "data": str(tokenizer_folder)}
    torch.save({"cfg": {"model": model, "task": task}, "model": weights}, folder / "checkpoint_best.pt")
    return folder


def test_weights_come_over_without_the_heads_of_other_objectives(source: Path) -> None:
    start = read_start(source)
    saved = torch.load(source / "checkpoint_best.pt", weights_only=True)["model"]
    torch.manual_seed(1)
    student = build_student(start.options, start.tokenizer.vocab_size)
    fill_student(student, start)
    state = student.state_dict()
    assert len(state) > 30 and all(torch.equal(value, saved[f"student.{name}"]) for name, value in state.items())
    assert any(name.startswith("student.heads.prediction.") for name in saved)
    assert not any(name.startswith(("heads.prediction.", "mask_token")) for name in state)


def test_heads_that_the_new_run_asks_for_begin_anew(source: Path) -> None:
    start = read_start(source)
    torch.manual_seed(1)
    student = build_student(start.options, start.tokenizer.vocab_size, Targets(prediction=7, logits=3))
    heads = {name: value.clone() for name, value in student.heads.state_dict().items()}
    fill_student(student, start)
    assert all(torch.equal(value, heads[name]) for name, value in student.heads.state_dict().items())


def test_options_say_what_the_student_is_made_of_and_leave_the_rest(source: Path) -> None:
    options = read_start(source).options
    assert {name: options[name] for name in OPTIONS if name != "text_dropout"} == {
        name: value for name, value in OPTIONS.items() if name != "text_dropout"
    }
    chosen_anew = {"text_dropout", "text_attention_dropout", "image_drop_path", "shared_dropout", "image_weights"}
    chosen_anew |= {"shared_init", "student_attention", "student_checkpoint_activations", "head_kd"}
    assert not chosen_anew & options.keys()
    assert {"image_encoder", "text_encoder", "shared_kind", "head_itc", "projection_kind"} <= options.keys()


def test_objectives_go_on_with_their_temperatures_and_empty_banks(source: Path) -> None:
    start = read_start(source)
    student = build_student(start.options, start.tokenizer.vocab_size)
    made = objectives(["itc", "kd_contrastive", "ranking"], student)
    buffers = {name: value.clone() for name, value in made.named_buffers()}
    assert buffers, "the bank"
    heard = objectives(["itc", "ranking"], student)
    fill_objectives(torch.nn.ModuleDict({"objectives": made, "audio_objectives": heard}), start)
    assert made["itc"].scales["features"].log_scale.item() == 3.5
    assert heard["itc"].scales["features"].log_scale.item() == 2.5
    assert all(torch.equal(value, buffers[name]) for name, value in made.named_buffers())


def test_another_architecture_is_refused(source: Path) -> None:
    start = read_start(source)
    student = build_student({**start.options, "text_layers": 2}, start.tokenizer.vocab_size)
    with pytest.raises(
        UserError, match="checkpoint_best.pt does not fit the student that the options describe; missing"
    ):
        fill_student(student, start)


def test_another_tokenizer_is_refused(
    source: Path, tokenizer_folder: Path, tmp_path: Path, run_prepare: Callable[..., None]
) -> None:
    start = read_start(source)
    assert_same_tokenizer(load_tokenizer(tokenizer_folder), start)
    copied = shutil.copy(tokenizer_folder / "tokenizer.model", tmp_path / "other.model")
    assert_same_tokenizer(load_tokenizer(copied), start)
    run_prepare("scenes", "--out", tmp_path / "other", "--num-images", 30, "--image-size", 32, "--vocab-size", 90)
    with pytest.raises(UserError, match="another tokenizer than this run; give --caption-tokenizer") as caught:
        assert_same_tokenizer(load_tokenizer(tmp_path / "other"), start)
    assert str(tokenizer_folder) in caught.value.message


def test_other_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        read_start(tmp_path / "nothing")
    torch.save({"cfg": {"model": {"_name": "image_classifier"}}, "model": {}}, tmp_path / "checkpoint_last.pt")
    with pytest.raises(UserError, match="is a checkpoint of image_classifier, not of image_text_student"):
        read_start(tmp_path)
