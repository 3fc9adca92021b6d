"""Files and folders that appear whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emkum.errors import UserError


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; what was written there takes its place on success, else it is removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged_directory(target: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside `target` that takes its place on success and is removed on any exception.

    Raises:
        UserError: `target` exists and is not an empty folder, or its parent cannot be written.
    """
    target = Path(target).absolute()
    assert_free(target)
    stage = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        stage.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write beside {target}: {error.strerror}") from None
    try:
        yield stage
        assert_free(target)
        os.replace(stage, target)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def assert_free(target: Path) -> None:
    """Raise UserError unless `target` is absent or an empty folder."""
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} exists already and is not empty")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} exists already and is not a folder")
