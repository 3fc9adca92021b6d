"""The recipes of the study's rows: options that fairseq knows, a few updates on scenes and a validation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import tests.registered  # noqa: F401
from emkum.recipe import read_mapping, read_recipe, to_arguments
from tests.integration.conftest import ROOT
from tests.integration.in_process import Run, make_run
from tests.objectives.target_files import write_target_files

FILES = {path.stem: path for path in sorted((ROOT / "examples" / "rows").glob("[0-9]*.yaml"))}
# Rows that train nothing are suites of `emkum evaluate all`, which tests/commands/test_scorecard.py reads.
# Suites of figures have lines, recipes of training have not.
ROWS = {name: path for name, path in FILES.items() if "lines" not in read_mapping(path, "row")}
USER_DIR = {"user_dir": str(ROOT / "user_dir"), "data": "some/folder"}
TEACHER_WIDTH = 64
# Sizes that fit a test, beside the preset small.
TINY = {"student_size": "tiny", "image_size": 32, "image_patch_size": 8, "text_max_positions": 64, "warmup_updates": 1}
TINY |= {"kd_contrastive_bank_size": 20, "momentum_itc_size": 20, "bank_itc_size": 20, "contrastive_chunk": 0}
TINY |= {"dino_prototypes": 32, "dino_hidden": 16, "dino_bottleneck": 8}
# Rows whose run needs what is not made here, or is another task's: these have tests of their own.
ELSEWHERE = {
    "01_unimodal_kd_vision": "tests/user_dir/test_image_distillation.py",
    "02_unimodal_kd_language": "tests/user_dir/test_text_distillation.py",
    "21_image_quantizer": "tests/integration/test_kill_and_resume.py",
    "27_multimodal_teacher": "tests/integration/test_training.py",
    "28_biased_initialization": "tests/models/test_builders.py",
    "31_without_distillation_finetuned": "tests/integration/test_finetuning.py",
    "32_retrieval_finetuning": "tests/integration/test_finetuning.py",
    "36_distil_beit3": "tests/integration/test_distil_beit3.py",
    "40_audio": "tests/integration/test_audio.py",
}


def presets(path: Path) -> list[str]:
    """Names of a recipe's own presets and of its bases'."""
    content = read_mapping(path, "recipe")
    base = content.get("base")
    return [*(presets(path.parent / base) if base else ()), *content.get("presets", ())]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A teacher with features, logits and as many patches as the student has; centroids and codes of its features."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("made")
    save_file(timm.create_model("test_vit").state_dict(), folder / "vit.safetensors")
    teacher = {"teacher": "timm:test_vit", "teacher_weights": folder / "vit.safetensors", "teacher_image_size": 64}
    return teacher | write_target_files(folder, TEACHER_WIDTH, teacher=None)


@pytest.mark.parametrize("name", ROWS)
def test_options_are_known_in_every_preset(name: str) -> None:
    found = list(dict.fromkeys(presets(ROWS[name])))
    assert "small" in found
    for chosen in (None, *found, *(f"small,{preset}" for preset in found)):
        arguments = to_arguments(USER_DIR | read_recipe(ROWS[name], chosen))
        assert any(word.startswith("--task") for word in arguments)


def test_rows_are_short_and_of_different_numbers() -> None:
    numbers = [name.partition("_")[0] for name in FILES]
    assert len(set(numbers)) == len(numbers) > len(ROWS) > 30
    for path in (ROOT / "examples" / "rows").glob("*.yaml"):
        assert len(path.read_text().splitlines()) <= 20, path


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ELSEWHERE])
def test_a_row_learns_and_is_validated(
    name: str, scenes: Path, tmp_path: Path, made: dict[str, Any], make: Callable[..., Run] = make_run
) -> None:
    options = read_recipe(ROWS[name], "small") | TINY
    objectives = options["objectives"].split(",")
    needs = {key: value for key, value in made.items() if "teacher" in options or not key.startswith("teacher")}
    if "kd_reduced" in objectives:
        needs |= {"student_width": TEACHER_WIDTH, "student_heads": 1, "kd_reduced_dim": 8}
    run = make(scenes, tmp_path, {key: _word(value) for key, value in (options | needs).items()})
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    for update in range(2):
        log = run.backward(run.batch(0, 8), update)
        assert torch.isfinite(log["loss"]) and all(f"{objective}_loss" in log for objective in objectives)
        run.optimizer.clip_grad_norm(1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.model.set_num_updates(update + 1)
    changed = [key for key, value in run.model.state_dict().items() if not torch.equal(value, before[key])]
    for part in ("image_encoder", "text_encoder"):
        assert any(key.startswith(f"student.{part}") for key in changed), part
    run.task.load_dataset("valid")
    run.task.begin_valid_epoch(1, run.model)
    dataset = run.task.datasets["valid"]
    batch = dataset.collater(dataset.__getitems__(list(range(4))))
    run.model.eval()
    loss, _, log = run.task.valid_step(batch, run.model, run.criterion)
    assert torch.isfinite(loss) and log["nsentences"] == 4


def _word(value: Any) -> Any:
    """A recipe's value as a flag's."""
    return str(value) if isinstance(value, list) else value


@pytest.mark.parametrize("name", ELSEWHERE)
def test_other_rows_have_tests(name: str) -> None:
    assert name in ROWS and (ROOT / ELSEWHERE[name]).is_file()
