"""The commands behind a table of results."""

import argparse
import json
from pathlib import Path

import pytest

from emkum.cli import build_parser
from emkum.commands.study import read_study
from emkum.errors import UserError
from emkum.recipe import read_mapping

ROOT = Path(__file__).parents[2]
STEPS = """
  pieces: prepare tokenizer --input {texts}/words.txt --vocab-size 50 --out {out}/pieces
  words: prepare tokenizer --input {texts}/words.txt --vocab-size 40 --out "{out}/of words"
"""
TABLES = """
  - title: What was made
    rows: {all words: "of words", none: nowhere}
    columns:
      sentences: "{row}/tokenizer.json#sentences"
      sentences (of them): ["{row}/tokenizer.json#sentences", "{row}/tokenizer.json#sentences"]
    notes: Of words.
"""


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "some texts"
    folder.mkdir()
    words = "one two three four five six seven eight nine ten eleven twelve"
    (folder / "words.txt").write_text("".join(f"{word} {word}\n" for word in words.split()))
    return folder


def study_file(folder: Path, steps: str = STEPS, tables: str = TABLES, more: str = "") -> Path:
    path = folder / "study.yaml"
    path.write_text(
        f"title: A study\nabout: About it.\nplaces: {{texts: nowhere}}\nsteps: {steps}\ntables: {tables}\n{more}"
    )
    return path


def run(*words: object) -> None:
    args: argparse.Namespace = build_parser().parse_args(["study", *(str(word) for word in words)])
    args.run(args)


def test_steps_are_run_once_and_make_a_page(tmp_path: Path, texts: Path, capfd: pytest.CaptureFixture) -> None:
    path, out, page = study_file(tmp_path), tmp_path / "out", tmp_path / "pages" / "page.md"
    run(path, f"texts={texts}", "--out", out, "--only", "pieces")
    assert "not yet run: words" in capfd.readouterr().out and not page.exists()
    assert (out / "pieces" / "tokenizer.model").is_file() and not (out / "of words").exists()
    run(path, f"texts={texts}", "--out", out, "--page", page)
    said = capfd.readouterr().out
    assert "words: emkum prepare tokenizer" in said and "pieces: emkum" not in said
    text = page.read_text()
    sentences = json.loads((out / "of words" / "tokenizer.json").read_text())["sentences"]
    assert sentences == 12
    assert "# A study\n\nAbout it.\n" in text and "Of words." in text
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "words" in line]
    assert ["all words", "12.0", "12.0 (12.0)"] in cells
    assert "| none" in text and "cores of" in text
    assert str(tmp_path) not in text and "--input {texts}/words.txt" in text
    made = page.stat().st_mtime_ns
    run(path, f"texts={texts}", "--out", out, "--page", page)
    assert page.read_text() == text and page.stat().st_mtime_ns >= made
    assert "emkum: step" not in capfd.readouterr().out


def test_a_step_that_was_stopped_goes_on_and_has_no_time(tmp_path: Path, texts: Path) -> None:
    path, out = study_file(tmp_path), tmp_path / "out"
    run(path, f"texts={texts}", "--out", out)
    record = out / "steps" / "words.json"
    content = json.loads(record.read_text())
    assert content["finished"] and content["seconds"] >= 0
    record.write_text(json.dumps(content | {"finished": False}))
    run(path, f"texts={texts}", "--out", out)
    assert json.loads(record.read_text())["finished"] and json.loads(record.read_text())["seconds"] is None


def test_commands_are_listed_without_running(tmp_path: Path, texts: Path, capfd: pytest.CaptureFixture) -> None:
    run(study_file(tmp_path), f"texts={texts}", "--out", tmp_path / "out", "--list")
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].startswith(f"emkum prepare tokenizer --input '{texts}/words.txt'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("steps", "words", "said"),
    [
        (STEPS, ["text=."], "'text=.': want name=DIR with one of texts"),
        (STEPS, ["texts=absent"], "no folder absent: give texts=DIR"),
        (STEPS, [".", "--only", "b"], "want name=DIR"),
        ("\n  a: prepare scenes --out {there}\n", [], "step 'a' has {there}; it may name {out}, {recipes}, {texts}"),
        ("\n  a/b: prepare scenes\n", [], "a name that is no word"),
        ("[]", [], "steps is no mapping"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, steps: str, words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        run(study_file(tmp_path, steps), *words, "--out", tmp_path / "out")
    assert said in str(caught.value)


def test_a_failing_step_ends_the_study(tmp_path: Path, texts: Path) -> None:
    path = study_file(tmp_path, "\n  bad: prepare tokenizer --input {texts}/none.txt --vocab-size 40 --out {out}/x\n")
    with pytest.raises(UserError, match="step bad ended with status 1"):
        run(path, f"texts={texts}", "--out", tmp_path / "out")
    with pytest.raises(UserError, match="has the steps bad"):
        run(path, f"texts={texts}", "--out", tmp_path / "out", "--only", "good")
    mended = study_file(
        tmp_path, "\n  bad: prepare tokenizer --input {texts}/words.txt --vocab-size 40 --out {out}/x\n"
    )
    run(mended, f"texts={texts}", "--out", tmp_path / "out", "--only", "bad")
    assert (tmp_path / "out" / "x" / "tokenizer.model").is_file()


def test_other_words_under_a_name_are_refused(tmp_path: Path, texts: Path) -> None:
    out = tmp_path / "out"
    run(study_file(tmp_path), f"texts={texts}", "--out", out, "--only", "words")
    path = study_file(tmp_path, STEPS.replace("40", "41"))
    with pytest.raises(UserError, match="step words of other words: give another --out"):
        run(path, f"texts={texts}", "--out", out, "--only", "words")


def test_a_key_that_is_not_there_is_told(tmp_path: Path, texts: Path) -> None:
    path = study_file(tmp_path, tables=TABLES.replace("#sentences", "#sentence"))
    with pytest.raises(UserError, match=r"tokenizer.json has no sentence"):
        run(path, f"texts={texts}", "--out", tmp_path / "out")


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_steps_of_the_examples_are_commands(path: Path, tmp_path: Path) -> None:
    study = read_study(path)
    given = {name: str(tmp_path) for name in study.places} | {"out": str(tmp_path), "recipes": str(ROOT / "examples")}
    for name, text in study.steps.items():
        words = text.format(**given).split()
        args = build_parser().parse_args(words)
        if words[0] == "train":
            assert read_mapping(Path(args.recipe), "recipe")["task"], name
    files = {
        cell.partition("#")[0]
        for table in study.tables
        for cells in table.columns.values()
        for cell in ([cells] if isinstance(cells, str) else cells)
    }
    # Each file that a table reads is one that a step writes.
    for file in files:
        stem = file.replace("{row}", "teacher").rsplit("/", 1)
        assert any(f"{{out}}/{stem[0]}" in text for text in study.steps.values()), file
