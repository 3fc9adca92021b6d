"""`emkum evaluate all` on a small student: figures are those of the single commands, and each split is read once."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from emkum.cli import main
from emkum.commands import towers
from emkum.commands.suite import read_lines, read_suite
from emkum.errors import UserError
from emkum.provenance import write_json
from emkum.recipe import read_mapping
from tests.commands.small_students import save_student
from tests.small_classes import write_class_folders

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SUITE = """
title: Small <sets>
places: {scenes: data/scenes, classes: data/classes, gone: data/gone}
lines:
  Learned by heart: retrieval --data {scenes} --split train
  By tokens: retrieval --data {scenes} --split train --scores late_interaction
  Without its objective: retrieval --data {scenes} --split train --rerank itm
  Told by names: zero-shot --data {classes}
  Neighbors: knn --data {classes} --k 2,5
  Neighbors of the whole: knn {whole} --data {classes} --k 2
  Linear: linear --data {classes} --features mean --solver logistic --strengths 0.1,1
  No such data: knn --data {gone}
  Not fine-tuned: finetune {gone}
"""


@pytest.fixture(autouse=True)
def quiet_and_alone() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    # The command silences other libraries for the whole process.
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, run_prepare: Callable[..., None]) -> dict[str, Path]:
    """Scenes, images of classes, and a run that was trained on the scenes."""
    root = tmp_path_factory.mktemp("made")
    scenes, classes = root / "scenes", root / "classes"
    run_prepare("scenes", "--out", scenes, "--num-images", 24, "--seed", 1, "--image-size", 32, "--vocab-size", 110)
    run_prepare("image-folder", "--images", write_class_folders(root / "raw"), "--out", classes)
    (root / "run").mkdir()
    run = save_student(root / "run", scenes, "itc,cmli", cmli_dim=8)
    manifest = json.loads((scenes / "train" / "shards.json").read_text())
    data = {"folders": [str(scenes)], "train_hash": manifest["index_sha256"]}
    write_json(run / "run.json", {"options": {"task": {}, "model": {}}, "data": data, "teacher": None})
    (root / "suite.yaml").write_text(SUITE)
    return {"scenes": scenes, "classes": classes, "run": run, "suite": root / "suite.yaml"}


def score(made: dict[str, Path], out: Path, *words: object) -> dict[str, dict[str, Any]]:
    """Runs the command, which ends with an error since some lines fail, and gives its lines by name."""
    places = [f"{name}={made[name]}" for name in ("scenes", "classes")]
    options = ["--suite", made["suite"], "--out", out, "--workers", 0, "--resamples", 50, *words]
    with pytest.raises(UserError, match=r"3 of 9 lines failed \(Without its objective, No such data, Not fine-tuned\)"):
        main([*map(str, ["evaluate", "all", made["run"], *places, *options])])
    return {line["name"]: line for line in json.loads((out / "scorecard.json").read_text())["lines"]}


def figures_of(line: dict[str, Any]) -> dict[str, float]:
    return {figure["name"]: figure["value"] for figure in line["figures"]}


def test_one_page_of_all(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = Counter()

    def counted(name: str) -> None:
        function = getattr(towers, name)
        monkeypatch.setattr(towers, name, lambda *a, **k: calls.update([name]) or function(*a, **k))

    for name in ("load", "ReadSplit", "image_features", "open_student"):
        counted(name)
    lines = score(made, tmp_path / "card")
    # One student; its encoder and its whole as models of features; scenes read as pairs, classes as images.
    assert calls == {"load": 1, "open_student": 2, "ReadSplit": 1, "image_features": 1}

    single = tmp_path / "single.json"
    main([*map(str, ["evaluate", "retrieval", "--checkpoint", made["run"], "--data", made["scenes"]])]
         + ["--split", "train", "--scores", "late_interaction", "--json", str(single)])  # fmt: skip
    expected, found = json.loads(single.read_text()), figures_of(lines["By tokens"])
    assert found["mean recall"] == pytest.approx(expected["mean_recall"])
    assert found["text to image R@5"] == pytest.approx(expected["t2i_r5"])
    assert figures_of(lines["Learned by heart"]) != found
    main([*map(str, ["evaluate", "zero-shot", "--checkpoint", made["run"], "--data", made["classes"]])]
         + ["--workers", "0", "--json", str(single)])  # fmt: skip
    assert figures_of(lines["Told by names"])["top-1"] == json.loads(single.read_text())["top_1"]
    for name, source, words in (
        ("Neighbors", made["run"], ["--k", "2,5"]),
        ("Neighbors of the whole", f"checkpoint:{made['run']}", ["--k", "2"]),
    ):
        options = ["--data", str(made["classes"]), "--workers", "0", "--json", str(single)]
        main(["evaluate", "knn", str(source), *options, *words])
        expected = json.loads(single.read_text())
        for figure, value in figures_of(lines[name]).items():
            top, _, k = figure.partition(", k = ")
            assert value == expected[f"k{k}_{top.replace('-', '_')}"]
    options = ["--solver", "logistic", "--strengths", "0.1,1", "--features", "mean"]
    main(["evaluate", "linear", str(made["run"]), "--data", str(made["classes"]), "--workers", "0"]
         + ["--json", str(single), *options])  # fmt: skip
    assert figures_of(lines["Linear"])["top-1"] == pytest.approx(json.loads(single.read_text())["top_1"])

    assert "does not exist" in lines["No such data"]["error"]
    assert "trained with itc, cmli, without the objective itm" in lines["Without its objective"]["error"]
    assert "finetune.json cannot be read" in lines["Not fine-tuned"]["error"]
    assert [each["level"] for each in lines["Learned by heart"]["findings"]][:1] == ["leak"]
    assert [each["level"] for each in lines["Neighbors"]["findings"]] == ["clean"]
    top = lines["Neighbors"]["figures"][0]
    assert top["low"] <= top["value"] <= top["high"] and top["chance"] == pytest.approx(100 / 7)
    markdown = (tmp_path / "card" / "scorecard.md").read_text()
    assert "**LEAK**: this very split was in training" in markdown and "Failed: data folder data/gone" in markdown
    assert "`run/checkpoint_best.pt`" in markdown and "50 resamples" in markdown
    assert "LEAK: the split itself" in capsys.readouterr().out
    assert_sound((tmp_path / "card" / "scorecard.html").read_text())


def assert_sound(page: str) -> None:
    """Every element is closed in its turn, nothing runs, and nothing is read from elsewhere."""
    open_elements = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list) -> None:
            assert tag != "script" and not {"src", "href", "onload", "onclick"} & {name for name, _ in attrs}
            if tag != "meta":
                open_elements.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_elements.pop() == tag

    Reader().feed(page)
    assert not open_elements and "url(" not in page and "@import" not in page
    assert "Small &lt;sets&gt;" in page and "prefers-color-scheme: dark" in page


def test_results_of_fine_tuning_are_those_of_the_same_encoder(made: dict[str, Path], tmp_path: Path) -> None:
    from emkum.models.encoder_sources import load_image_encoder, load_text_encoder

    images = load_image_encoder(str(made["run"])).identity
    record = {"encoder": images, "data": str(made["classes"]), "split": "test", "chosen_by": "valid", "options": {}}
    record |= {"runs": [{}, {}], "top1_mean": 61.5, "top1_std": 0.25, "top5_mean": 90.0}
    write_json(tmp_path / "own" / "finetune.json", record)
    write_json(tmp_path / "other" / "finetune.json", record | {"encoder": images | {"weights_sha256": "0"}})
    rows = [{"task": task, "median": median, "constant": 50.0} for task, median in (("RTE", 55.0), ("mean", 54.0))]
    texts = load_text_encoder(str(made["run"])).identity
    write_json(tmp_path / "glue" / "glue.json", {"rows": rows, "options": {}, "encoder": texts, "from_scratch": False})
    lines = {"own": "finetune {own}", "other": "finetune {other}", "texts": "glue {glue}"}
    suite = {"title": "Finished", "lines": lines, "places": {name: str(tmp_path / name) for name in (*lines, "glue")}}
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))
    with pytest.raises(UserError, match=r"1 of 3 lines failed \(other\)"):
        main([*map(str, ["evaluate", "all", made["run"], "--suite", tmp_path / "suite.yaml", "--out", tmp_path / "o"])])
    found = {line["name"]: line for line in json.loads((tmp_path / "o" / "scorecard.json").read_text())["lines"]}
    assert figures_of(found["own"]) == {"top-1": 61.5, "top-5": 90.0}
    assert found["own"]["figures"][0]["low"] is None and "deviation 0.25 of 2 seeds" in found["own"]["protocol"]
    assert "results of another encoder" in found["other"]["error"]
    assert figures_of(found["texts"]) == {"mean of 1 tasks": 54.0, "RTE": 55.0}


@pytest.mark.parametrize(
    ("content", "words", "expected"),
    [
        ("title: T\nlines: {a: knn --data x}\nbase: y", [], "want a suite, a mapping with title, lines"),
        ("title: T\nlines: {}", [], "the suite has no lines"),
        ("title: T\nlines: {a: [knn]}", [], "lines is no mapping of names to words"),
        ("title: T\nlines: {a: 'knn --data {b}'}", [], r"line 'a' has \{b\}; it may name \{whole\}"),
        ("title: T\nlines: {a: knn --dat x --kk 3}", [], "line 'a': unrecognized arguments: --kk 3"),
        ("title: T\nlines: {a: speed --data x}", [], "line 'a': .*invalid choice: 'speed'.*retrieval"),
        ("title: T\nlines: {a: retrieval --data x --scores dot}", [], "line 'a': .*choose from.*late_interaction"),
        ("title: T\nlines: {a: 'knn --data \"x'}", [], "line 'a': No closing quotation"),
        ("title: T\nlines: {a: knn --data x --weights w}", [], "line 'a': --weights is not a line's to say"),
        ("title: T\nlines: {a: retrieval --data x --pair image-audio}", [], "--pair is not a line's to say"),
        ("title: T\nlines: {a: knn --data x}", ["b=c"], "'b=c': want name=DIR with one of no name"),
        ("title: T\nlines: {a: knn --data x}", ["--resamples", "0"], "--resamples 0: want 1 or more"),
    ],
)
def test_what_a_suite_gets_wrong_is_one_line(
    made: dict[str, Path], tmp_path: Path, content: str, words: list[str], expected: str
) -> None:
    (tmp_path / "suite.yaml").write_text(content)
    with pytest.raises(UserError, match=expected) as error:
        main(["evaluate", "all", str(made["run"]), "--suite", str(tmp_path / "suite.yaml"), "--out", "o", *words])
    assert "\n" not in error.value.message


def test_examples_are_suites_or_recipes() -> None:
    suites = [*EXAMPLES.glob("suites/*.yaml"), *EXAMPLES.glob("rows/*.yaml")]
    suites = [path for path in suites if "lines" in read_mapping(path, "example")]
    assert {path.name[:3] for path in suites} >= {"07_", "33_"} and len(suites) > 3
    for path in suites:
        suite = read_suite(path)
        assert len(read_lines(suite, path, "run", [])) == len(suite.lines)
        # Each place is of use.
        assert all(any(f"{{{name}}}" in words for words in suite.lines.values()) for name in suite.places), path
