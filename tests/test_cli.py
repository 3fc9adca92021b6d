"""The `emkum` command as a whole."""

import subprocess
import sys

import pytest

from emkum.cli import build_parser, parse

# What takes seconds or hundreds of megabytes to import. Worker processes of `emkum prepare` import the command too.
HEAVY = ("torch", "fairseq", "timm", "matplotlib", "transformers", "sklearn")


def test_starting_imports_nothing_heavy() -> None:
    code = (
        "import sys, emkum.cli, emkum.prepare.runner, emkum.data.token_blocks, emkum.data.tokenizers\n"
        "emkum.cli.build_parser()\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("words", [["--help"], ["prepare", "--help"], ["bench", "--help"], ["data", "--help"]])
def test_help_ends_well(words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(words)
    assert ended.value.code == 0
    assert "usage: emkum" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["train", "a.yaml", "data=x", "lr=[0.1]", "--preset", "small"], ["data=x", "lr=[0.1]"]),
        (["train", "a.yaml", "--preset", "small", "data=x", "--processes", "2", "lr=[0.1]"], ["data=x", "lr=[0.1]"]),
        (["train", "--preset", "small", "a.yaml", "data=x"], ["data=x"]),
        (["glue", "run", "--seeds", "1", "lr=[0.1]"], ["lr=[0.1]"]),
        (["evaluate", "finetune", "run", "--data", "d", "lr=0.1"], ["lr=0.1"]),
        (["study", "a.yaml", "--out", "runs", "glue=x"], ["glue=x"]),
        (["train", "a.yaml"], []),
    ],
)
def test_words_of_options_stand_anywhere(words: list[str], overrides: list[str]) -> None:
    assert parse(words).overrides == overrides


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train", "a.yaml", "data=x", "--presets", "small"], "--presets small"),
        (["train", "a.yaml", "--preset", "small", "data"], "data"),
        (["evaluate", "zero-shot", "--checkpoint", "c", "--data", "d", "split=test"], "split=test"),
    ],
)
def test_other_words_are_refused(words: list[str], named: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(words)
    assert ended.value.code == 2
    assert f"unrecognized arguments: {named}" in capsys.readouterr().err
