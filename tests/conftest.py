"""Fixtures for all tests."""

import argparse
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import emkum.prepare


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small real data: EMKUM_SHARED_DATA, or `shared/data` in the checkout or above it."""
    named = os.environ.get("EMKUM_SHARED_DATA")
    places = [Path(named)] if named else [parent / "shared" / "data" for parent in Path(__file__).parents[1:]]
    for place in places:
        if place.is_dir():
            return place
    pytest.skip("real data not found: set EMKUM_SHARED_DATA or put it into shared/data beside the checkout")


@pytest.fixture(scope="session")
def run_prepare() -> Callable[..., None]:
    """A function that runs `emkum prepare ARGUMENTS`."""

    def run(*arguments: object) -> None:
        parser = argparse.ArgumentParser()
        emkum.prepare.add_parser(parser.add_subparsers(required=True))
        words = [str(argument) for argument in arguments]
        if words[0] != "tokenizer" and not any(word.startswith("--workers") for word in words):
            # Worker processes take longer to start than the few samples of a test do.
            words += ["--workers", "1"]
        args = parser.parse_args(["prepare", *words])
        args.run(args)

    return run


@pytest.fixture(scope="session")
def folder_bytes() -> Callable[[Path], dict[str, bytes]]:
    """A function that reads all files below a folder, by relative name."""

    def read(folder: Path) -> dict[str, bytes]:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    return read


@pytest.fixture
def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures of Matplotlib that a test draws, in their order."""
    from matplotlib.figure import Figure

    from emkum.evaluation.figure_style import STYLE

    figures, save = [], Figure.savefig
    # Files of few pixels are written faster, and sizes in points are as they were.
    monkeypatch.setitem(STYLE, "savefig.dpi", 40)

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        if figure not in figures:
            figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures
