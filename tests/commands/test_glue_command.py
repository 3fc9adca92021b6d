"""`emkum glue`: every task and seed, the table, and the files for the server."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from emkum.cli import build_parser
from emkum.commands import glue
from emkum.data.tables import Table
from emkum.errors import UserError
from tests.glue_cases import prepare_glue, write_source

# The encoder knows nothing yet, and learns it all in seconds.
FAST = (
    "lr=[0.004]",
    "batch_size=16",
    "glue_max_tokens=32",
    "log_interval=10",
    "text_dropout=0",
    "text_attention_dropout=0",
    "classifier_dropout=0",
)


def parsed(*words: object) -> argparse.Namespace:
    return build_parser().parse_args(["glue", *(str(word) for word in words)])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "run")


@pytest.fixture(scope="module")
def data(run_prepare: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_glue(tmp_path_factory.mktemp("data"), run_prepare)


def test_a_task_is_learned_tabled_and_written_for_the_server(
    source: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    out = tmp_path / "out"
    words = (source, *FAST, "--data", data, "--tasks", "MNLI", "--seeds", 5, "--epochs", 12, "--out", out)
    args = parsed(*words)
    args.run(args)
    printed = capsys.readouterr().out
    content = json.loads((out / "glue.json").read_text())
    mnli, last = content["rows"]
    assert (mnli["task"], mnli["metrics"], mnli["rows"]) == ("MNLI", "accuracy", 96)
    assert mnli["best"] == mnli["median"] == mnli["seed 5"] > 95
    assert mnli["constant"] == pytest.approx(100 / 3)
    assert last["task"] == "mean" and last["best"] == mnli["best"] and last["constant"] == mnli["constant"]
    matched = content["runs"][0]["sets"]
    assert mnli["best"] == pytest.approx((matched["valid"]["score"] + matched["valid_mismatched"]["score"]) / 2)
    table = (out / "glue.md").read_text()
    assert "| MNLI" in table and "| mean" in table and "Epochs: 12, batches of 16, learning rate 0.004" in table
    assert "MNLI with seed 5, run 1 of 1" in printed and "written to" in printed
    # What the server gets: a line for each row of the test files, the answers by name.
    assert content["files"] == ["MNLI-m.tsv", "MNLI-mm.tsv"]
    lines = (out / "submission" / "MNLI-m.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == [
        str(number) for number in range(300, 306)
    ]
    answers = {"yes": "entailment", "maybe": "neutral", "no": "contradiction"}
    test = Table(data / "MNLI" / "test")
    assert [line.split("\t")[1] for line in lines[1:]] == [answers[test[n]["sentence2"].split()[0]] for n in range(6)]
    # Logged and scored anew are the same.
    log = (out / "MNLI" / "seed5" / "train.log").read_text()
    best = [json.loads(line.split(" | ")[-1]) for line in log.splitlines() if "| valid | {" in line][-1]
    assert float(best["valid_best_score"]) == pytest.approx(matched["valid"]["score"], abs=1e-3)
    assert not list(out.rglob("*.pt"))
    # Done is done.
    monkeypatch.setattr(glue, "_train", lambda *arguments: pytest.fail("a finished run is run again"))
    args.run(args)
    assert json.loads((out / "glue.json").read_text()) == content
    with pytest.raises(UserError, match=r"MNLI/seed5 holds another run \(it differs in text_dropout\): give another"):
        other = parsed(*(word if word != "text_dropout=0" else "text_dropout=0.2" for word in words))
        other.run(other)


def test_what_fails_is_named_and_the_rest_is_done(
    source: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(recipe: Path, words: list[str]) -> int:
        given = dict(word.split("=", 1) for word in words)
        return 1 if given["seed"] == "2" and given["glue_task"] == '"CoLA"' else 0

    def score(each: glue.Run) -> dict:
        return {"sets": {"valid": {"score": 10.0 * each.seed}}, "score": 10.0 * each.seed}

    monkeypatch.setattr(glue, "_train", train)
    monkeypatch.setattr(glue, "_score", score)
    out = tmp_path / "out"
    words = (source, "glue_max_tokens=32", "--data", data, "--tasks", "CoLA,MNLI", "--seeds", "1,2,3", "--out", out)
    args = parsed(*words)
    with pytest.raises(UserError, match="did not finish: CoLA with seed 2; their logs are below"):
        args.run(args)
    assert [row["task"] for row in json.loads((out / "glue.json").read_text())["rows"]] == ["MNLI", "mean"]
    trained = []
    monkeypatch.setattr(glue, "_train", lambda recipe, given: trained.append(given) or 0)
    args.run(args)
    assert len(trained) == 1 and "seed=2" in trained[0]
    cola, mnli, last = json.loads((out / "glue.json").read_text())["rows"]
    assert (cola["task"], cola["best"], cola["median"], cola["spread"]) == ("CoLA", 30, 20, 20)
    assert (last["best"], last["median"], last["seed 1"]) == (30, 20, 10)


def plan(*words: object) -> list[glue.Run]:
    return glue._plan(parsed(*words))


def test_numbers_of_updates_and_options(source: Path, data: Path, tmp_path: Path) -> None:
    words = (source, "glue_max_tokens=32", "lr=[0.01]", "--data", data, "--out", tmp_path)
    runs = plan(*words)
    assert [(each.task, each.seed) for each in runs] == [(t, s) for t in ("CoLA", "STS-B", "MNLI") for s in (1, 2, 3)]
    # 45 rows are two batches of 32.
    cola = runs[0].options
    assert (cola["max_epoch"], cola["max_update"], cola["total_num_update"], cola["warmup_updates"]) == (3, 6, 6, 0)
    assert (cola["glue_task"], cola["seed"], cola["lr"], cola["init_random"]) == ("CoLA", 1, [0.01], False)
    assert cola["save_dir"] == str(tmp_path / "CoLA" / "seed1")
    more = plan(source, "glue_max_tokens=32", "batch_size=4", "update_freq=[2]", "--data", data, "--epochs", 5,
                "--from-scratch", "--layers", 1, "--out", tmp_path)  # fmt: skip
    # 12 batches are 6 updates.
    assert (more[0].options["max_update"], more[0].options["warmup_updates"]) == (30, 3)
    assert more[0].options["init_random"] is True and more[0].identity["text_layers"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "CoLA,QQP"], "--tasks 'QQP': .* has CoLA, STS-B, MNLI"),
        (["--seeds", "1,1"], "--seeds '1,1': want different whole numbers"),
        (["--seeds", "a"], "--seeds 'a'"),
        (["--seeds", ""], "--seeds ''"),
        (["--epochs", "0"], "--epochs 0"),
        (["--data", "nowhere"], "--data: nowhere holds no task of GLUE; make it with `emkum prepare glue"),
        (["--layers", "9"], "has 2 layers; 9 cannot be kept"),
        (["--recipe", "nowhere.yaml"], "recipe nowhere.yaml cannot be read"),
        (["seed=3"], "override 'seed' is given by --seeds here"),
        (["glue_task=RTE"], "override 'glue_task' is given by --tasks here"),
        (["classifier_dropuot=0.2"], "unknown recipe key 'classifier_dropuot'; did you mean classifier_dropout"),
    ],
)
def test_mistakes_are_named_before_anything_runs(
    source: Path, data: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    overrides, flags = [word for word in words if "=" in word], [word for word in words if "=" not in word]
    out = tmp_path / "out"
    args = parsed(source, *overrides, "--data", data, "--out", out, *flags)
    with pytest.raises(UserError, match=message) as caught:
        args.run(args)
    assert "\n" not in str(caught.value) and not out.exists()


def test_a_source_that_is_none(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        plan(tmp_path / "none", "--data", data, "--out", tmp_path)


def test_a_task_without_what_it_is_scored_on(source: Path, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "glue"
    (copy / "MRPC" / "train").mkdir(parents=True)
    for name in ("rows.npy", "rows.jsonl"):
        (copy / "MRPC" / "train" / name).write_bytes((data / "CoLA" / "train" / name).read_bytes())
    with pytest.raises(UserError, match="MRPC has no split 'valid': prepare it again, or choose others by --tasks"):
        plan(source, "--data", copy, "--out", tmp_path / "out")


def test_default_folders_tell_encoders_apart(source: Path) -> None:
    cases = (["runs/a/"], ["runs/a", "--layers", 3], ["runs/a", "--from-scratch"], ["bert:prajjwal1/bert-tiny"])
    names = [glue._default_name(parsed(*words)) for words in cases]
    assert names == ["a", "a_3_layers", "a_from_scratch", "bert-tiny"]
