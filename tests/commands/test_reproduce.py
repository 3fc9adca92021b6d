"""Plan, runs and report of `emkum reproduce`, with a training that only writes a log."""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emkum.cli import parse
from emkum.commands import reproduce, reproduce_runs
from emkum.commands.kept_run import Ended
from emkum.commands.reproduce_plan import (
    Given,
    Rate,
    choose_updates,
    choose_variants,
    owners,
    raw_files,
    read_catalog,
    read_words,
    resolve,
    seconds_per_update,
    sized,
    step_words,
)
from emkum.commands.reproduce_report import mean_history
from emkum.commands.train import USER_DIR
from emkum.errors import UserError
from emkum.recipe import to_arguments

CATALOG = read_catalog()


def given(tmp_path: Path, *words: str, data: str = "scenes") -> Given:
    return read_words(CATALOG, words, data, tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Plan
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scenes", "flickr8k"])
def test_every_variant_has_options_that_exist(name: str, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    words = [] if name == "scenes" else [f"flickr8k={tmp_path / 'raw'}", f"image_weights={tmp_path}"]
    asked = given(tmp_path, *words, data=name)
    for variant in CATALOG.variants.values():
        options = resolve(variant, asked)
        assert to_arguments({"user_dir": str(USER_DIR)} | sized(options, 30, 3, {})), variant.key
        assert (variant.teacher is not None) == ("teacher" in options), variant.key
        assert variant.teacher is None or variant.teacher in CATALOG.teachers
        assert set(variant.expected.values()) <= {"better", "worse", "same"}
        if name == "scenes":
            # The teacher of scenes has no classes.
            assert "kd_kl" not in options["objectives"] and "logits" not in str(options.get("itc_layers"))


def test_directions_agree_with_the_figures_of_the_thesis() -> None:
    figures = {"retrieval": ("coco", "flickr30k"), "zero_shot": ("imagenet",)}
    checked = 0
    for variant in CATALOG.variants.values():
        for other in (CATALOG.variants[key] for key in variant.against):
            for measure, names in figures.items():
                both = [name for name in names if name in variant.thesis and name in other.thesis]
                for name in both if variant.expected.get(measure) in ("better", "worse") else ():
                    gained = variant.thesis[name] > other.thesis[name]
                    assert gained == (variant.expected[measure] == "better"), (variant.key, other.key, name)
                    checked += 1
    assert checked > 20


def test_equal_options_are_one_run(tmp_path: Path) -> None:
    chosen = choose_variants(CATALOG, "37,17")
    whose = owners(CATALOG, chosen, given(tmp_path))
    assert whose["37"] == whose["17"] == "17" and whose["37:percent50"] == "37:percent50"
    # The name does not depend on what else was chosen.
    assert owners(CATALOG, choose_variants(CATALOG, "37"), given(tmp_path))["37"] == "17"
    assert [variant.key for variant in choose_variants(CATALOG, "12:before,23")] == ["12:before", "23"]
    assert {variant.key for variant in choose_variants(CATALOG, "12")} == {"12", "12:before", "12:after", "12:none"}


def test_options_of_a_run(tmp_path: Path) -> None:
    asked = given(tmp_path, "image_size=32", "adamw_weight_decay=null", "zero_shot_data=classes")
    options = resolve(CATALOG.variants["6"], asked)
    assert options["image_size"] == 32 and "adamw_weight_decay" not in options
    # Options of a live teacher mean nothing to a cached one.
    assert options["teacher"] == f"cached:{tmp_path}/cache" and "teacher_pooling" not in options
    alone = resolve(CATALOG.variants["23"], asked)
    assert "teacher" not in alone and alone["zero_shot_data"] == "classes"
    live = resolve(CATALOG.variants["5"], given(tmp_path, "teacher=timm:deit", "teacher_weights=FILE"))
    assert live["teacher_weights"] == "FILE" and live["objectives"] == "itc,kd_kl"
    short = sized(options, 31, 3, {"log_interval": 4})
    assert (short["max_update"], short["warmup_updates"], short["save_interval_updates"]) == (31, 3, 11)
    assert short["log_interval"] == 4
    # Of 155 in the recipe, 16 are the warm-up.
    few = resolve(CATALOG.variants["23"], given(tmp_path, "max_update=31"))
    assert (few["max_update"], few["warmup_updates"]) == (31, 3)


def test_steps_make_what_runs_share(tmp_path: Path) -> None:
    asked = given(tmp_path, "data.num_images=50", "teacher.max_update=3", "slurm.timeout_min=5")
    steps = step_words(asked)
    assert steps["data"][-2:] == ["--num-images", "50"] and steps["teacher"][-1] == "max_update=3"
    for words in steps.values():
        assert callable(parse(words).run)
    assert list(step_words(given(tmp_path, "teacher=timm:deit"))) == ["data"]


def test_raw_files_are_found(tmp_path: Path) -> None:
    for name in ("captions.txt", "Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="no photos there; looked for images.zip"):
        raw_files(tmp_path)
    (tmp_path / "Images").mkdir()
    words = raw_files(tmp_path)
    assert words[:4] == ["--images", f"{tmp_path}/Images", "--captions", f"{tmp_path}/captions.txt"]
    assert f"valid={tmp_path}/Flickr_8k.devImages.txt" in words and not any(word.startswith("test=") for word in words)
    asked = given(tmp_path, f"flickr8k={tmp_path}", f"image_weights={tmp_path}", data="flickr8k")
    assert "image_weights" not in asked.options and resolve(CATALOG.variants["6"], asked)["image_weights"]
    for step in step_words(asked).values():
        assert callable(parse(step).run)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "7"], "--rows '7': choose from 3, 5, 6"),
        (["--rows", "12:x"], "--rows '12:x': choose from 12:before, 12, 12:after"),
        (["--rows", ","], "name one row or more"),
        (["--data", "nowhere"], "--data nowhere: there is no such folder; want scenes, flickr8k or a folder"),
        (["--data", "flickr8k"], "needs flickr8k=PATH, the raw folder"),
        (["--data", "flickr8k", "flickr8k=nowhere"], "flickr8k: there is no nowhere"),
        (["--rows", "20"], "row 20 needs kd_vq_quantizer=FILE of row 21"),
        (["cash.store=a"], "cash.store=: want data.OPTION, teacher.OPTION, cache.OPTION"),
        (["seed=3"], "seed is set by the command"),
        (["--seeds", "0"], "--seeds 0: want 1 or more"),
        (["--budget-minutes", "0"], "--budget-minutes 0: want more than 0"),
        (["--preset", "smal", "--plan"], "preset 'smal': .* has small"),
        (["--report"], "--report: nothing has begun"),
    ],
)
def test_mistakes_are_told(words: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        run(*words, "--out", tmp_path / "out")
    assert "\n" not in caught.value.message


def test_updates_that_fit() -> None:
    rates = [Rate(10, 1.0), Rate(20, 2.0)] * 3
    assert choose_updates(rates, 1, 990, 1000, 6) == 100
    assert choose_updates(rates, 2, 990, 1000, 6) == 210
    assert choose_updates(rates, 1, 990, 70, 6) == 70
    with pytest.raises(UserError, match="6 runs of 6 updates alone take about 2 more minutes"):
        choose_updates(rates, 1, 100, 1000, 6)


def test_seconds_of_an_update_leave_validations_out() -> None:
    walls = {1: 10, 2: 12, 3: 14, 4: 90, 5: 92, 6: 1}
    histories = {"train_inner": [{"step": step, "wall": wall} for step, wall in walls.items()], "valid": [{"step": 3}]}
    # From 3 to 4 it is validated; from 5 to 6 the clock began anew.
    assert seconds_per_update(histories) == 2.0
    assert seconds_per_update({"valid": [{"step": 3}]}) is None


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------


def run(*words: object) -> None:
    args: argparse.Namespace = parse(["reproduce", *(str(word) for word in words)])
    args.run(args)


@pytest.fixture
def words(tmp_path: Path, run_prepare: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Words of a command whose steps are left out."""
    run_prepare("scenes", "--out", tmp_path / "scenes", "--num-images", 12, "--image-size", 32, "--vocab-size", 0)
    monkeypatch.setattr(reproduce, "run_step", lambda *step: None)
    (tmp_path / "weights").touch()
    return ["--data", tmp_path / "scenes", f"image_weights={tmp_path / 'weights'}", "--out", tmp_path / "out"]


class Training:
    """Stands for `emkum train`: a run of row 17 comes to more than others, and one of less data to less."""

    def __init__(self) -> None:
        self.done: list[tuple[str, int]] = []
        self.fails: set[tuple[str, int]] = set()

    def __call__(self, command: list[str], *more: object) -> Ended:
        options = json.loads(Path(command[1]).read_text())
        folder = Path(options["save_dir"])
        self.done.append((folder.parent.name, options["seed"]))
        if self.done[-1] in self.fails:
            return Ended(1)
        value = 30.0 * ("kd_contrastive" in options["objectives"]) * options.get("data_fraction", 1) + options["seed"]
        step, wall, lines = (
            options["log_interval"],
            3,
            ["x | INFO | fairseq_cli.train | num. shared model params: 5,000 (1)"],
        )
        for update in range(step, options["max_update"] + 1, step):
            losses = {"itc_i2t_loss": 1 / update, "itc_t2i_loss": 2 / update}
            lines.append(self._line("train_inner", update, losses | {"wall": wall}))
            wall += 2 * step
            if update % options["save_interval_updates"] == 0 or update == options["max_update"]:
                recalls = {"mean_recall": value, "i2t_r1": 1.0, "t2i_r1": 2.0}
                lines += [self._line(tag, update, recalls) for tag in options["valid_subset"].split(",")]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.log").write_text("\n".join(lines))
        (folder / "checkpoint_last.pt").touch()
        return Ended(0, 500)

    def _line(self, tag: str, update: int, values: dict[str, float]) -> str:
        named = values if tag == "train_inner" else {f"{tag}_{key}": value for key, value in values.items()}
        prefix = "" if tag == "train_inner" else f"{tag}_"
        return f"x | INFO | {tag} | " + json.dumps(named | {f"{prefix}num_updates": update})


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    stand_in = Training()
    monkeypatch.setattr(reproduce_runs, "run_emkum", stand_in)
    return stand_in


def cells(text: str, first: str) -> list[list[str]]:
    """Cells of the lines of tables that begin with a name."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()]
    return [line for line in lines if line[0] == first and len(line) > 1]


def test_runs_are_done_once_and_reported(words: list[object], training: Training, tmp_path: Path) -> None:
    training.fails = {("row23", 2)}
    words += ["max_update=6", "--rows", "17:no_bank,17,23,37", "--seeds", 2]
    with pytest.raises(UserError, match="did not finish: row 23, seed 2"):
        run(*words)
    # Row 37 with all data is row 17.
    names = ["row17_no_bank", "row17", "row23"] + [f"row37_percent{part}" for part in (50, 25, 10, 5)]
    assert training.done == [(name, seed) for seed in (1, 2) for name in names]
    out = tmp_path / "out"
    assert not list(out.rglob("checkpoint*.pt"))
    text = (out / "report.md").read_text()
    assert "13 of 14 runs are finished" in text
    assert cells(text, "23 Without distillation")[1][5] == "unknown"
    training.done, training.fails = [], set()
    run(*words)
    assert training.done == [("row23", 2)]
    text = (out / "report.md").read_text()
    row, effect = cells(text, "23 Without distillation")[:2]
    assert row[:3] == ["23 Without distillation", "2", "1.50 ± 0.71"] and row[-3:] == ["64.01", "74.14", "25.8"]
    assert effect[1:4] == ["17 Contrastive distillation", "mean recall", "-30.00"]
    assert effect[5:] == ["worse", "worse", "COCO -3.3, Flickr30k -5.8", "yes"]
    # Two runs are 1 apart, so that Welch's interval with 2 degrees of freedom is 4.303 wide on either side.
    assert float(effect[4]) == pytest.approx(4.303 * (0.25 + 0.25) ** 0.5, abs=0.01)
    assert cells(text, "17 Contrastive distillation")[1][5] == "within noise"
    assert "a supervised teacher is not BEiT-2" in text and "Without a teacher: row 23." in text
    assert "the same runs: 17 Contrastive distillation; 37 Less data." in text
    assert cells(text, "23 Without distillation")[2][1] == "0.01"
    assert str(tmp_path) not in text


def test_the_page_is_one_file_that_runs_nothing(words: list[object], training: Training, tmp_path: Path) -> None:
    run(*words, "max_update=6", "--rows", "23,37", "--seeds", 1)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page and not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/svg+xml;base64,") == 3 and "prefers-color-scheme: dark" in page
    for name in ("row23", "row37", "row37_data"):
        assert (tmp_path / "out" / "figures" / f"{name}.png").stat().st_size > 1000
    assert page.count("<table>") == page.count("</table>") == 3


def test_a_budget_chooses_updates_and_keeps_them(
    words: list[object], training: Training, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(UserError, match="--budget-minutes chooses max_update"):
        run(*words, "max_update=6", "--rows", "23", "--seeds", 2, "--budget-minutes", 1)
    words += ["image_size=64", "--rows", "17,23", "--seeds", 2]
    run(*words, "--budget-minutes", 1e5, "--plan")
    assert [name for name, _ in training.done] == ["row17_no_bank", "row17", "row23"]
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    # As many as the recipe has; 2 s each by the logs.
    assert plan["updates"] == 690 and plan["rates"]["23"][1] == 2.0
    assert "6 runs, about 138 minutes" in capsys.readouterr().out
    plan["updates"] = 9
    (tmp_path / "out" / "plan.json").write_text(json.dumps(plan))
    run(*words)
    log = (tmp_path / "out" / "runs" / "row23" / "seed2" / "train.log").read_text()
    assert '"num_updates": 9' in log and '"num_updates": 10' not in log
    with pytest.raises(UserError, match=r"holds another plan \(it differs in budget_minutes\)"):
        run(*words, "--budget-minutes", 7)
    with pytest.raises(UserError, match=r"holds another plan \(it differs in words\)"):
        run(*words, "image_size=32")
    training.done = []
    run(*words, "--rows", "17,22,23", "--seeds", 3)
    assert training.done == [("row22", 1), ("row22", 2)] + [
        (name, 3) for name in ("row17_no_bank", "row17", "row22", "row23")
    ]


def test_several_at_once(words: list[object], training: Training, tmp_path: Path) -> None:
    run(*words, "max_update=6", "--rows", "17,23", "--seeds", 2, "--jobs", 2, "--keep")
    assert sorted(training.done) == sorted(
        (name, seed) for name in ("row17", "row17_no_bank", "row23") for seed in (1, 2)
    )
    assert len(list((tmp_path / "out").rglob("checkpoint_last.pt"))) == 6


def test_two_commands_do_not_share_a_folder(words: list[object], training: Training, tmp_path: Path) -> None:
    with reproduce._alone(tmp_path / "out"), pytest.raises(UserError, match="another command is working on"):
        run(*words, "--rows", "23")


def test_what_a_killed_command_left_running_keeps_the_folder(tmp_path: Path) -> None:
    with reproduce._alone(tmp_path):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    with pytest.raises(UserError, match="another command is working on"), reproduce._alone(tmp_path):
        pass
    child.kill()
    child.wait()
    with reproduce._alone(tmp_path):
        pass


def test_slurm_needs_submitit(words: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="--slurm needs submitit: pip install submitit"):
        run(*words, "--rows", "23", "--slurm", "long")


def test_jobs_of_slurm(words: list[object], monkeypatch: pytest.MonkeyPatch, training: Training) -> None:
    """As submitit's `debug` runs them: when their result is asked for, in this process."""

    class Job:
        def __init__(self, work: Callable[..., bool], run: Any) -> None:
            self.result = lambda: work(run)

    class Executor:
        made: list[Any] = []

        def __init__(self, folder: Path, cluster: str) -> None:
            self.cluster, self.parameters = cluster, {}
            self.made.append(self)

        def update_parameters(self, **parameters: Any) -> None:
            self.parameters |= parameters

        submit = staticmethod(Job)

    monkeypatch.setitem(sys.modules, "submitit", argparse.Namespace(AutoExecutor=Executor))
    training.fails = {("row23", 2)}
    with pytest.raises(UserError, match="did not finish: row 23, seed 2"):
        run(*words, "max_update=6", "--rows", "23", "--seeds", 2, "--slurm", "long", "slurm.timeout_min=5")
    (made,) = Executor.made
    assert made.cluster == "slurm"
    assert made.parameters == {"name": "emkum", "slurm_partition": "long", "timeout_min": 5}


def test_histories_are_averaged_where_all_have_them() -> None:
    first, second = [{"step": 1, "a": 1.0}, {"step": 2, "a": 3.0}], [{"step": 1, "a": 2.0, "b": 5.0}]
    assert mean_history([first, second]) == [{"step": 1, "a": 1.5}]
    assert mean_history([]) == []
