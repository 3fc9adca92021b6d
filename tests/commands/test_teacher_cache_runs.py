"""`emkum teacher cache`: what it leaves on the disk is the same however it got there."""

import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emkum.cli import main
from emkum.commands import teacher_cache_work
from emkum.errors import UserError
from emkum.teachers.cached import CachedTeacher


@pytest.fixture(autouse=True)
def quiet_and_alone() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    # The command silences other libraries for the whole process.
    logging.disable(logging.NOTSET)


def shards_of(out: Path) -> list[Path]:
    return sorted(out.glob("*/*.npy"))


def refuse(command: list[str], message: str) -> str:
    with pytest.raises(UserError, match=message) as caught:
        main(command)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_is_missing_is_made_again_byte_for_byte(
    whole: Path, words: Callable[..., list[str]], tmp_path: Path, folder_bytes: Callable, seed: int
) -> None:
    out = tmp_path / "cache"
    shutil.copytree(whole, out)
    rng = random.Random(seed)
    files = shards_of(out)
    gone = rng.sample(files, len(files) // 2)
    for path in gone:
        path.unlink()
    cut, *kept = [path for path in files if path not in gone]
    cut.write_bytes(cut.read_bytes()[:-3])
    before = {path: path.stat().st_mtime_ns for path in kept}
    (out / "train" / ".features-00-000000.npy.123.tmp").write_bytes(b"half of it")
    (out / ".cache.json.123.tmp").write_text("{")
    with pytest.raises(UserError, match="is incomplete"):
        CachedTeacher(out)
    main(words(out))
    assert folder_bytes(out) == folder_bytes(whole)
    # Whole shards stay: only such as lack a part are computed.
    shards = {path.name.partition("-")[2] + path.parent.name for path in [*gone, cut]}
    untouched = [path for path in kept if path.name.partition("-")[2] + path.parent.name not in shards]
    assert all(path.stat().st_mtime_ns == before[path] for path in untouched)


def test_a_second_run_does_nothing(whole: Path, words: Callable[..., list[str]], capsys: pytest.CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    main(words(whole))
    assert "complete already, nothing to do (train 16 images x 2 views, valid 2" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


@pytest.mark.parametrize("start", ["empty", "killed"])
def test_a_folder_with_nothing_in_it(
    whole: Path, words: Callable[..., list[str]], tmp_path: Path, folder_bytes: Callable, start: str
) -> None:
    out = tmp_path / "cache"
    out.mkdir()
    if start == "killed":
        (out / ".cache.json.7.tmp").write_text('{"teach')
    main(words(out))
    assert folder_bytes(out) == folder_bytes(whole)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_decoding_processes_change_nothing(
    whole: Path, words: Callable[..., list[str]], tmp_path: Path, folder_bytes: Callable
) -> None:
    main(words(tmp_path / "cache", workers=2))
    assert folder_bytes(tmp_path / "cache") == folder_bytes(whole)


def start_command(command: list[str]) -> subprocess.Popen:
    program = Path(sys.executable).parent / "emkum"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([program, *command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_when(process: subprocess.Popen, ready: Callable[[], bool]) -> None:
    """SIGKILL as soon as something is there."""
    end = time.monotonic() + 120
    while not ready():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.002)
    process.kill()
    process.wait()


def settled(out: Path) -> list[Path]:
    """Files once there come no more: processes of a killed command end soon after it, but not in the same instant."""
    before, files = [], shards_of(out)
    while files != before:
        time.sleep(0.4)
        before, files = files, shards_of(out)
    return files


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_killed_run_goes_on_and_ends_byte_for_byte(
    words: Callable[..., list[str]], tmp_path: Path, folder_bytes: Callable
) -> None:
    # Many small shards, and a decoding process, which outlives the command for a moment.
    slow = {"views": 15, "shard_size": 2, "batch_size": 1, "store": "features,logits", "workers": 1}
    out, reference = tmp_path / "cache", tmp_path / "reference"
    main(words(reference, **slow))
    kill_when(start_command(words(out, **slow)), lambda: len(shards_of(out)) >= 20)
    kill_when(start_command(words(out, **slow, processes=2)), lambda: len(shards_of(out)) >= 60)
    left = settled(out)
    assert 60 <= len(left) < len(shards_of(reference))
    # Whole files alone, beside what was being written.
    assert all(path.read_bytes() == (reference / path.relative_to(out)).read_bytes() for path in left)
    with pytest.raises(UserError, match="is incomplete"):
        CachedTeacher(out)
    main(words(out, **slow))
    assert folder_bytes(out) == folder_bytes(reference)


def break_sample(scenes: Path, copy: Path) -> tuple[Path, bytes]:
    """A copy of the data with one wrong byte in the middle of the training images; its file, and the right bytes."""
    shutil.copytree(scenes, copy)
    path = next((copy / "train").glob("*.tar"))
    right = path.read_bytes()
    record = np.load(copy / "train" / "index.npy")[9]
    position = int(record["image_block"]) * 512 + 20
    path.write_bytes(right[:position] + bytes([right[position] ^ 1]) + right[position + 1 :])
    return path, right


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that need not import everything; those of real commands are fresh ones."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(teacher_cache_work.multiprocessing, "get_context", lambda method: context)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_two_processes_and_what_one_of_them_meets_with(
    whole: Path,
    scenes: Path,
    words: Callable[..., list[str]],
    tmp_path: Path,
    folder_bytes: Callable,
    forks: None,
    capfd: pytest.CaptureFixture,
) -> None:
    path, right = break_sample(scenes, tmp_path / "data")
    command = words(tmp_path / "cache", data=tmp_path / "data", processes=2)
    refuse(command, "000000.tar is damaged at sample 9")
    # The process itself says nothing, and leaves nothing half done.
    assert capfd.readouterr().err == ""
    assert list((tmp_path / "cache").rglob("*.tmp")) == []
    path.write_bytes(right)
    main(command)
    assert folder_bytes(tmp_path / "cache") == folder_bytes(whole)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(*_: Any) -> None:
    raise RuntimeError("of no kind that was thought of")


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize(
    ("end", "message"),
    [(die, "was killed, perhaps for lack of memory"), (fail, "failed; what it met with stands above")],
)
def test_a_process_that_ends_otherwise(
    words: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forks: None,
    capfd: pytest.CaptureFixture,
    end: Callable,
    message: str,
) -> None:
    monkeypatch.setattr(teacher_cache_work, "compute", end)
    refuse(words(tmp_path / "cache", processes=3), f"a computing process {message}")
    assert ("of no kind that was thought of" in capfd.readouterr().err) == (end is fail)


def is_alive(process: int) -> bool:
    try:
        # The state follows the name, which is in parentheses; Z is one that nobody has asked for its end.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_processes_of_a_killed_command_end_in_the_middle_of_their_work(
    words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forks: None
) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()

    def work(*_: Any) -> None:
        (pids / str(os.getpid())).touch()
        time.sleep(100)

    monkeypatch.setattr(teacher_cache_work, "compute", work)
    command = multiprocessing.get_context("fork").Process(target=main, args=(words(tmp_path / "cache", processes=2),))
    command.start()
    end = time.monotonic() + 60
    while len(list(pids.iterdir())) < 2:
        assert command.is_alive() and time.monotonic() < end
        time.sleep(0.01)
    command.kill()
    command.join()
    while any(is_alive(int(path.name)) for path in pids.iterdir()):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_runs_at_once_are_refused(whole: Path, words: Callable[..., list[str]], tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "cache")
    shards_of(tmp_path / "cache")[0].unlink()
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "cache" / "cache.json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdout.readline() == "1\n"
        refuse(words(tmp_path / "cache"), "another run is making .*cache right now")
        other.kill()
    main(words(tmp_path / "cache"))
    CachedTeacher(tmp_path / "cache")
