"""Put known bugs into a copy of the tree, one at a time, and see whether its tests notice.

    python tests/mutation_check.py [--only NAME] [--list]

Exit status 1 if a bug is not caught, or if the copy without any bug does not pass the same tests.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.mutations.base import Edit, Mutation  # noqa: E402
from tests.mutations.table import MUTATIONS, TRAPS_AND_MUTATIONS  # noqa: E402

COPIED = ("emkum", "user_dir", "tests", "examples", "setup.py", "pyproject.toml")
TIMEOUT = 300  # seconds a run of pytest may take
SOME_FAILED, NOT_THE_COPY = 1, 42  # exit statuses: of pytest; of the guard below

# Beside the copy's tests: what was imported must be the copy's, not an installed package.
GUARD = f"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def pytest_sessionfinish(session):
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] in ("emkum", "user_dir", "tests") and file:
            if ROOT not in Path(file).resolve().parents:
                print("imported from elsewhere:", file)
                session.exitstatus = {NOT_THE_COPY}
"""


class Mistake(Exception):
    """The check itself cannot be done."""


@dataclass
class Outcome:
    """Of a run of pytest.

    Attributes:
        status: exit status; None where it took too long.
        failed: the first failing test, and why in a line; empty where there is none.
        output: everything that was printed.
        seconds: how long it took.
    """

    status: int | None
    failed: str
    output: str
    seconds: float


def applied(text: str, edit: Edit) -> str:
    """A file's text with an edit.

    Raises:
        Mistake: what is to be replaced does not stand there as often as expected.
    """
    found = text.count(edit.old)
    if found != edit.count:
        raise Mistake(f"{edit.file} has {found} times, not {edit.count}: {edit.old!r}")
    return text.replace(edit.old, edit.new)


@contextmanager
def mutated(tree: Path, mutation: Mutation) -> Iterator[None]:
    """The tree with a bug, for as long as the context lasts."""
    before: dict[Path, str] = {}
    try:
        for edit in mutation.edits:
            path = tree / edit.file
            text = path.read_text(encoding="utf-8")
            before.setdefault(path, text)
            path.write_text(applied(text, edit), encoding="utf-8")
        yield
    finally:
        for path, text in before.items():
            path.write_text(text, encoding="utf-8")


def copy_tree(target: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    (target / "conftest.py").write_text(GUARD, encoding="utf-8")


def run_tests(tree: Path, tests: Sequence[str]) -> Outcome:
    """pytest in a tree, up to the first failure."""
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        # Sources change within a second and keep their length: compiled files would be taken for theirs.
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rfE", "-p", "no:cacheprovider", "--tb=short", *tests]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        # A group of its own, so that what hangs ends with all processes that it has started.
        process = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        text = output.read()
    lines = [line for line in text.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    reason = next((line[1:].strip() for line in text.splitlines() if re.match(r"E\s+\S", line)), "")
    failed = f"{lines[0].split(' - ')[0].split(' ', 1)[1]} ({reason[:110]})" if lines else ""
    return Outcome(status, failed, text, time.monotonic() - start)


def assert_sound(tree: Path, tests: Sequence[str]) -> None:
    """Check that the tree without any bug passes.

    Raises:
        Mistake: it does not, or not all of the tests ran.
    """
    outcome = run_tests(tree, tests)
    if outcome.status != 0:
        what = "takes too long" if outcome.status is None else f"does not pass (exit status {outcome.status})"
        raise Mistake(f"the tree without any bug {what}:\n{outcome.output[-4000:]}")
    if re.search(r"\b\d+ (skipped|deselected|xfailed)\b", outcome.output):
        raise Mistake(f"some of the tests did not run:\n{outcome.output[-2000:]}")
    print(f"without any bug: passed ({outcome.seconds:.0f} s)", flush=True)


def is_caught(tree: Path, mutation: Mutation) -> bool:
    """Whether the tests notice a bug; says so."""
    with mutated(tree, mutation):
        outcome = run_tests(tree, mutation.tests)
    caught = outcome.status == SOME_FAILED and outcome.failed != ""
    if caught:
        print(f"caught      {mutation.name} ({outcome.seconds:.0f} s): {outcome.failed}", flush=True)
        return True
    why = {None: "the tests took too long", 0: "all tests pass"}.get(outcome.status)
    print(f"NOT CAUGHT  {mutation.name}: {why or outcome.output[-1500:]}", flush=True)
    return False


def list_mutations() -> None:
    for trap, mutations in TRAPS_AND_MUTATIONS.items():
        print(f"{trap}:")
        for mutation in mutations:
            print(f"  {mutation.name} ({', '.join(sorted({edit.file for edit in mutation.edits}))})")


def chosen(names: list[str]) -> list[Mutation]:
    """Mutations by name; none given = all.

    Raises:
        Mistake: there is no such one.
    """
    unknown = [name for name in names if name not in MUTATIONS]
    if unknown:
        raise Mistake(f"no bug is named {', '.join(unknown)}; --list says which there are")
    return [MUTATIONS[name] for name in names] or list(MUTATIONS.values())


def check(mutations: Sequence[Mutation]) -> int:
    """Number of bugs that are not caught."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        tree = Path(folder).resolve()
        copy_tree(tree)
        assert_sound(tree, list(dict.fromkeys(test for mutation in mutations for test in mutation.tests)))
        missed = [mutation.name for mutation in mutations if not is_caught(tree, mutation)]
    print(
        f"{len(mutations) - len(missed)} of {len(mutations)} bugs are caught" + "".join(f"\n  not {m}" for m in missed)
    )
    return len(missed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this bug alone; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the bugs and stop")
    arguments = parser.parse_args()
    if arguments.list:
        list_mutations()
        return 0
    try:
        return 1 if check(chosen(arguments.only)) else 0
    except Mistake as mistake:
        print(f"mutation_check: {mistake}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
