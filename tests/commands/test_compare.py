"""Variants of a recipe side by side."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from emkum.cli import build_parser
from emkum.commands import kept_run
from emkum.commands.compare import read_variants
from emkum.errors import UserError

ROOT = Path(__file__).parents[2]
COMMON = (
    "{student_size: tiny, image_size: 32, image_patch_size: 8, batch_size: 8, max_update: 3, warmup_updates: 1, "
    "log_interval: 1}"
)


def parsed(*words: object) -> argparse.Namespace:
    return build_parser().parse_args([str(word) for word in words])


@pytest.fixture
def variants(tmp_path: Path) -> Path:
    path = tmp_path / "variants.yaml"
    path.write_text(
        f"recipe: {ROOT / 'examples' / 'scenes_itc.yaml'}\noptions: {COMMON}\n"
        "metrics: {with blocks: itc_i2t_accuracy}\n"
        "variants:\n  with blocks:\n  no/shared: {shared_kind: none}\n"
    )
    return path


def test_variants_are_run_once_and_compared(
    variants: Path,
    tmp_path: Path,
    run_prepare: Callable[..., None],
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Tests before have made this process larger than a command's is.
    monkeypatch.setattr(kept_run.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=0))
    data, out = tmp_path / "scenes", tmp_path / "out"
    run_prepare("scenes", "--out", data, "--num-images", 24, "--image-size", 32, "--vocab-size", 100)
    args = parsed("compare", variants, f"data={data}", "--out", out)
    args.run(args)
    results = json.loads((out / "comparison.json").read_text())["results"]
    assert [result["name"] for result in results] == ["with blocks", "no/shared"]
    for result in results:
        assert result["first_loss"] > 0 and result["last_loss"] > 0
        assert 0 <= result["mean_recall"] <= 100 and result["memory"] > 100 and result["step_ms"] > 0
    assert results[0]["metric"] == "itc_i2t_accuracy" and "metric" not in results[1]
    assert results[0]["last_loss"] != results[1]["last_loss"]
    assert "| with blocks" in (out / "comparison.md").read_text()
    assert (out / "no_shared" / "checkpoint_last.pt").is_file()
    changed = (out / "no_shared" / "checkpoint_last.pt").stat().st_mtime_ns
    capfd.readouterr()
    args.run(args)
    assert (out / "no_shared" / "checkpoint_last.pt").stat().st_mtime_ns == changed
    assert "with blocks" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recipe: a.yaml\n", "want a mapping with recipe, variants"),
        ("recipe: a.yaml\nvariants: [a]\n", "variants is no mapping"),
        ("recipe: a.yaml\nvariants: {a: 3}\n", "'a' is no variant"),
        ("recipe: a.yaml\nvariants: {a: {}}\nmetrics: {b: loss}\n", "'b' is no variant"),
        ("{", "is no valid YAML"),
    ],
)
def test_wrong_files_are_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "variants.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        read_variants(path)
    assert str(path) in caught.value.message


def test_wrong_words_are_refused(variants: Path, tmp_path: Path) -> None:
    args = parsed("compare", variants, "--only", "nothing", "--out", tmp_path / "out")
    with pytest.raises(UserError, match="--only 'nothing': .* has the variants with blocks, no/shared"):
        args.run(args)
    with pytest.raises(UserError, match="cannot be read"):
        read_variants(tmp_path / "none.yaml")


def test_a_variant_that_fails_is_named(variants: Path, tmp_path: Path) -> None:
    args = parsed("compare", variants, "data=/nowhere", "--only", "with blocks", "--out", tmp_path / "out")
    with pytest.raises(UserError, match="did not finish: with blocks"):
        args.run(args)


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_files_name_options_that_exist(path: Path) -> None:
    from emkum.commands.train import USER_DIR
    from emkum.recipe import read_recipe, to_arguments

    content = read_variants(path)
    recipe = {"user_dir": str(USER_DIR)} | read_recipe(path.parent / content["recipe"])
    every = {key: value for options in content["variants"].values() for key, value in (options or {}).items()}
    assert to_arguments(recipe | content["options"] | every)
