"""The `emkum` command as a whole."""

import subprocess
import sys

import pytest

from emkum.cli import build_parser

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
