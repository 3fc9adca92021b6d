"""Recipes, and the command lines they become."""

from pathlib import Path
from typing import Any

import pytest
from fairseq import options as fairseq_options

import tests.registered  # noqa: F401
from emkum.errors import UserError
from emkum.recipe import parse_overrides, read_options, read_recipe, to_arguments

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "examples").glob("*.yaml"))
CHOICES = {
    "user_dir": str(ROOT / "user_dir"),
    "task": "image_text",
    "arch": "image_text_student",
    "criterion": "multi_objective",
    "optimizer": "grouped_adamw",
    "data": "some/folder",
}
PRETRAINING = CHOICES | {"task": "image_pretraining", "arch": "data2vec2_image", "criterion": "model"}


def write(folder: Path, **files: str) -> Path:
    """Write recipes NAME.yaml; the path of the last one."""
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.write_text(text)
    return path


def parse(arguments: list[str]) -> Any:
    """What fairseq itself makes of a command line."""
    parser = fairseq_options.get_training_parser()
    return fairseq_options.parse_args_and_arch(parser, input_args=arguments)


def one_line(call: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_recipe_changes_what_its_base_says(tmp_path: Path) -> None:
    recipe = write(
        tmp_path,
        root="lr: [0.1]\nbatch-size: 8\nseed: 1\n",
        middle="base: root.yaml\nseed: 2\nclip_norm: 1.5\n",
        leaf="base: middle.yaml\nbatch_size: 16\n",
    )
    assert read_recipe(recipe) == {"lr": [0.1], "batch_size": 16, "seed": 2, "clip_norm": 1.5}


def test_a_base_lies_beside_the_recipe_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "common").mkdir()
    write(tmp_path / "common", root="seed: 1\n", base="base: root.yaml\nlr: [0.1]\n")
    recipe = write(tmp_path, leaf="base: common/base.yaml\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_recipe(recipe) == read_recipe("../leaf.yaml") == {"seed": 1, "lr": [0.1]}


def test_null_removes_what_the_base_says(tmp_path: Path) -> None:
    recipe = write(tmp_path, root="teacher: timm:a\nseed: 1\nlr: null\n", leaf="base: root.yaml\nteacher: null\n")
    assert read_recipe(recipe) == {"seed": 1}


def test_a_preset_counts_before_all_recipes(tmp_path: Path) -> None:
    recipe = write(
        tmp_path,
        root="seed: 1\nlr: [0.1]\nteacher: timm:a\n"
        "presets:\n  small: {batch-size: 8, lr: [0.5]}\n  large: {lr: [0.01]}\n",
        leaf="base: root.yaml\nlr: [0.2]\nbatch_size: 64\npresets: {small: {seed: 3, lr: [0.6], teacher: null}}\n",
    )
    assert read_recipe(recipe) == {"seed": 1, "lr": [0.2], "teacher": "timm:a", "batch_size": 64}
    assert read_recipe(recipe, "small") == {"seed": 3, "lr": [0.6], "batch_size": 8}
    assert read_recipe(recipe, "large")["lr"] == [0.01]
    assert read_recipe(recipe, "small,large") == {"seed": 3, "lr": [0.01], "batch_size": 8}
    assert read_recipe(recipe, "large,small") == read_recipe(recipe, "small")
    assert read_options(recipe, ["preset=small", "seed=7"]) == {"seed": 7, "lr": [0.6], "batch_size": 8}
    assert read_options(recipe, ["seed=7"])["lr"] == [0.2]


def test_presets_that_are_none(tmp_path: Path) -> None:
    recipe = write(tmp_path, some="seed: 1\npresets: {small: {}, large: {}}\n")
    assert f"preset 'tiny': {recipe} has small, large" in one_line(read_recipe, recipe, "tiny")
    bare = write(tmp_path, bare="seed: 1\n")
    assert f"{bare} has none" in one_line(read_options, bare, ["preset=small"])
    wrong = write(tmp_path, wrong="presets: [small]\n")
    assert "presets must map each preset's name to options" in one_line(read_recipe, wrong)


def test_circles_are_refused(tmp_path: Path) -> None:
    itself = write(tmp_path, itself="base: itself.yaml\n")
    assert "itself.yaml: base recipes form a circle" in one_line(read_recipe, itself)
    recipe = write(tmp_path, a="base: b.yaml\n", b="base: c.yaml\n", c="base: ./a.yaml\n")
    assert "form a circle" in one_line(read_recipe, recipe)


def test_one_base_may_be_reached_twice(tmp_path: Path) -> None:
    write(tmp_path, root="seed: 1\n", left="base: root.yaml\n", right="base: left.yaml\n")
    assert read_recipe(tmp_path / "right.yaml") == {"seed": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must map names to values"),
        ("", "must map names to values"),
        ("just words\n", "must map names to values"),
        ("lr: [0.1\n", "is no valid YAML"),
        ("base: absent.yaml\n", "absent.yaml cannot be read: No such file"),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    assert message in one_line(read_recipe, write(tmp_path, recipe=text))


def test_a_missing_recipe(tmp_path: Path) -> None:
    assert "recipe" in one_line(read_recipe, tmp_path / "absent.yaml")
    assert "cannot be read" in one_line(read_recipe, tmp_path)


def test_overrides_are_read_as_yaml() -> None:
    words = ["seed=3", "lr=[0.1,0.2]", "--crop-flip=true", "save-dir=runs/a=b", "tokenizer=", "teacher=null"]
    assert parse_overrides(words) == {
        "seed": 3,
        "lr": [0.1, 0.2],
        "crop_flip": True,
        "save_dir": "runs/a=b",
        "tokenizer": "",
        "teacher": None,
    }


@pytest.mark.parametrize("word", ["seed", "=3", "", "lr=[0.1", "save_dir=@home", "a={"])
def test_malformed_overrides(word: str) -> None:
    assert f"override {word!r}" in one_line(parse_overrides, [word])


def test_arguments_mean_the_same_to_fairseq() -> None:
    given = {
        "seed": 7,
        "lr": [0.001, 0.0005],
        "update_freq": [2, 1],
        "clip_norm": 0.5,
        "max_update": 20,
        "cpu": True,
        "log_format": "json",
        "lr_scheduler": "cosine",
        "warmup_updates": 5,
        "objectives": "itc,kd_mse",
        "itc_weight": 0.25,
        "kd_mse_whiten": True,
        "adamw_weight_decay": 1e-5,
        "adamw_eps": "1e-7",
        "image_size": 32,
        "image_encoder": "timm:test_vit",
        "teacher": "timm:test_vit",
        "crop_flip": True,
        "crop_min_scale": 0.5,
        "caption_per_image": 0,
        "save_dir": "runs/with space",
        "best_checkpoint_metric": "mean_recall",
        "maximize_best_checkpoint_metric": True,
        "no_epoch_checkpoints": False,
        "ddp_backend": "legacy_ddp",
        "token_type_layer_scale": 0,
    }
    parsed = parse(to_arguments(CHOICES | given))
    different = {key: getattr(parsed, key) for key, value in given.items() if getattr(parsed, key) != value}
    assert different == {"adamw_eps": 1e-7}
    assert {key: getattr(parsed, key) for key in CHOICES} == CHOICES


def test_what_a_recipe_leaves_out_keeps_its_default() -> None:
    parsed = parse(to_arguments(CHOICES))
    assert (parsed.crop_flip, parsed.cpu, parsed.teacher, parsed.itc_weight) == (False, False, None, 1.0)


def test_null_among_the_options_leaves_one_out() -> None:
    arguments = to_arguments(CHOICES | parse_overrides(["teacher=null", "crop_flip=null", "lr_scheduler=null"]))
    assert arguments == to_arguments(CHOICES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batchsize": 8}, "unknown recipe key 'batchsize'; did you mean batch_size"),
        ({"kd_contrastive_bank": 8}, "did you mean kd_contrastive_bank_size"),
        ({"crop_flipp": True}, "did you mean crop_flip"),
        ({"zzz": 1}, "unknown recipe key 'zzz'"),
        ({"zzz": None}, "unknown recipe key 'zzz'"),
        ({"help": True}, "unknown recipe key 'help'"),
        ({"crop_flip": "yes please"}, "'crop_flip' is a switch: give true or false, not 'yes please'"),
        ({"cpu": 1}, "'cpu' is a switch: give true or false, not 1"),
        ({"lr_scheduler": "cosin"}, "recipe key 'lr_scheduler' is 'cosin'; did you mean cosine?"),
        ({"lr_scheduler": "zzz"}, "recipe key 'lr_scheduler' is 'zzz'; choose from cosine, fixed, "),
        ({"task": "image_txt"}, "recipe key 'task' is 'image_txt'; did you mean image_text"),
        ({"arch": "image_text_studnt"}, "did you mean image_text_student"),
        ({"criterion": "multi_objectives"}, "did you mean multi_objective"),
        ({"optimizer": "grouped_adam"}, "did you mean grouped_adamw"),
        ({"user_dir": "no/such/folder"}, "recipe key 'user_dir' is 'no/such/folder', which does not exist"),
    ],
)
def test_what_fairseq_would_not_know(options: dict[str, Any], message: str) -> None:
    assert message in one_line(to_arguments, CHOICES | options)


def test_options_of_parts_that_were_not_chosen_are_unknown() -> None:
    assert "unknown recipe key 'd2v_depth'" in one_line(to_arguments, CHOICES | {"d2v_depth": 3})
    assert "--d2v-depth=3" in to_arguments(PRETRAINING | {"d2v_depth": 3})
    assert "unknown recipe key 'image_layers'" in one_line(to_arguments, PRETRAINING | {"image_layers": 3})


@pytest.mark.parametrize("value", [True, False])
def test_switches(value: bool) -> None:
    assert ("--crop-flip" in to_arguments(CHOICES | {"crop_flip": value})) == value
    parsed = parse(to_arguments(CHOICES | {"crop_flip": value, "reset_optimizer": value}))
    assert (parsed.crop_flip, parsed.reset_optimizer) == (value, value)


@pytest.mark.parametrize("value", [True, False])
def test_switches_that_switch_off(value: bool) -> None:
    # The flag --can-sum of fairseq's criterion `model` sets False.
    arguments = to_arguments(PRETRAINING | {"can_sum": value})
    assert ("--can-sum" in arguments) == (not value)
    assert parse(arguments).can_sum == value


def test_there_are_recipes() -> None:
    assert len(RECIPES) > 2


def test_what_is_no_recipe_of_training_is_told_in_one_line() -> None:
    with pytest.raises(UserError, match="the recipe has no arch, so it trains nothing"):
        to_arguments({"title": "Figures", "lines": {}})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_short_and_known_to_fairseq(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 20
    options = {"user_dir": CHOICES["user_dir"], "data": "some/folder"} | read_recipe(path)
    parsed = parse(to_arguments(options))
    for key, value in options.items():
        assert getattr(parsed, key) == value, key
