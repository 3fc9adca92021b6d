"""A run with a folder of its own: a record there tells whether it is finished, goes on, or was another."""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from emkum.commands.energy import EnergyMeter
from emkum.provenance import describe_machine, differing_keys, write_json

# A run that is killed loses at most so much of its time.
_NOTED_EVERY = 5.0  # seconds
# Processes of commands that this one waits for.
_running: set[subprocess.Popen] = set()


@dataclass(frozen=True)
class Ended:
    """How work ended.

    Attributes:
        status: exit status; 0 = success.
        memory: peak of resident memory in MiB, of the largest of its processes; None where that is not known.
    """

    status: int
    memory: int | None = None


def run_emkum(
    words: Sequence[str], environment: Mapping[str, str] | None = None, output: IO[str] | None = None
) -> Ended:
    """Run an `emkum` command in a process of its own.

    Args:
        words: of the command.
        environment: variables that are added to this process's.
        output: file for what it prints; None = where this process prints.
    """
    command = [sys.executable, "-m", "emkum.cli", *words]
    variables = {**os.environ, **(environment or {})}
    pipes = {"stdout": output, "stderr": output and subprocess.STDOUT}
    own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Locks that this process means to share stay held for as long as the command runs, whatever becomes of this one.
    with subprocess.Popen(command, env=variables, close_fds=False, **pipes) as child:
        _running.add(child)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.terminate()
            raise
        finally:
            _running.discard(child)
        child.returncode = os.waitstatus_to_exitcode(status)
    # Linux counts the peak of the process that starts another one as the other's, too.
    if usage.ru_maxrss <= own_peak:
        return Ended(child.returncode)
    # Kilobytes on Linux, bytes on macOS.
    return Ended(child.returncode, round(usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)))


def end_running() -> None:
    """Ask the commands that threads of this process wait for to end."""
    for child in list(_running):
        child.terminate()


@dataclass(frozen=True)
class KeptRun:
    """A run that is known by a file.

    Attributes:
        path: of its record, JSON.
        identity: what tells it from other runs, by part, such as {"options": {...}} or {"words": [...]}.
    """

    path: Path
    identity: Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """What is known of the run: its identity, `finished`, machine and, once it has ended, status, seconds (None
        where nobody knows how long its beginning took), memory in MiB and joules by source; empty where it has not
        begun."""
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}

    def differing(self) -> list[str]:
        """In what the run that began under this name is another one; empty where it is this one, or none began."""
        before = self.record()
        if not before:
            return []
        names = []
        # As JSON gives it back.
        for part, own in json.loads(json.dumps(self.identity)).items():
            old = before.get(part)
            if not isinstance(own, dict) or not isinstance(old, dict):
                names += [] if old == own else [part]
            else:
                names += differing_keys(old, own)
        return names

    def is_finished(self) -> bool:
        return self.record().get("finished", False)

    def carry_out(self, work: Callable[[], Ended]) -> dict[str, Any]:
        """Do the work, from its beginning or on from where it was stopped, and keep a record of it.

        Args:
            work: can be begun anew after it was stopped.

        Returns:
            The record.
        """
        before = self.record()
        if before.get("finished") or self.differing():
            before = {}
        # A record that does not say how long it took so far is no beginning of known length.
        spent = before.get("spent") if before else {"seconds": 0.0, "joules": {}}
        content = {**self.identity, "finished": False, "machine": describe_machine()}
        with _Clock(self.path, content, spent) as clock:
            ended = work()
        content |= {"status": ended.status, "memory": _most(before.get("memory"), ended.memory)}
        if ended.status != 0:
            content |= {"spent": clock.spent()}
        else:
            spent = clock.spent() or {"seconds": None, "joules": {}}
            seconds = spent["seconds"]
            content |= {"finished": True, "seconds": None if seconds is None else round(seconds)}
            content |= {"joules": spent["joules"]}
        write_json(self.path, content)
        return self.record()


def _most(*values: int | None) -> int | None:
    return max((value for value in values if value is not None), default=None)


class _Clock:
    """Notes in a record, while work is done, how long it has taken.

    Args:
        path: of the record.
        content: of the record.
        before: seconds and joules of earlier parts of the run; None = not known.
    """

    def __init__(self, path: Path, content: Mapping[str, Any], before: Mapping[str, Any] | None) -> None:
        self.path, self.content, self.before = path, content, before
        self._meter, self._start = EnergyMeter(), time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_noting, daemon=True)

    def spent(self) -> dict[str, Any] | None:
        """Seconds and joules of all parts; None where those of an earlier one are not known."""
        if self.before is None:
            return None
        joules = {name: value + self.before["joules"].get(name, 0.0) for name, value in self._meter.joules().items()}
        return {"seconds": self.before["seconds"] + time.monotonic() - self._start, "joules": joules}

    def __enter__(self) -> "_Clock":
        self._note()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._note()

    def _keep_noting(self) -> None:
        while not self._ended.wait(_NOTED_EVERY):
            self._note()

    def _note(self) -> None:
        spent = self.spent()
        write_json(self.path, self.content if spent is None else {**self.content, "spent": spent})
