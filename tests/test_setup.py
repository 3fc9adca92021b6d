"""The search for an interpreter and the bookkeeping of examples/setup.sh, with stand-ins for Python and pip."""

import shutil
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parent.parent / "examples" / "setup.sh"

# Stands in for an interpreter: answers the probe with its version, "creates" environments, and notes pip's arguments.
FAKE_PYTHON = """#!{bash}
case "$*" in
    "-c "*) echo {version} ;;
    "-m venv --clear "*)
        rm -rf "$4"
        mkdir -p "$4/bin"
        cp "$0" "$4/bin/python"
        echo "version = {version}" >"$4/pyvenv.cfg" ;;
    "-m pip install "*) echo "$*" >>"$CALLS"; echo "some output of pip"; exit "${{PIP_STATUS:-0}}" ;;
    "-m pip freeze") ;;
    "-m pip --version") ;;
    "-W ignore -c "*) exit "${{IMPORT_STATUS:-0}}" ;;
esac
"""
TOOLS = ["bash", "cat", "cksum", "cp", "dirname", "flock", "grep", "head", "mkdir", "rm", "sed", "tail", "touch"]


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def python(path: Path, version: str) -> Path:
    return script(path, FAKE_PYTHON.format(bash=shutil.which("bash"), version=version))


def refusing(path: Path) -> Path:
    return script(path, f"#!{shutil.which('bash')}\necho 'no such version is selected' >&2\nexit 127\n")


class Machine:
    """A home, a PATH with the bare tools alone, and a clone holding setup.sh and setup.py."""

    def __init__(self, root: Path) -> None:
        self.bin, self.home, self.clone, self.calls = root / "bin", root / "home", root / "clone", root / "calls"
        for folder in (self.bin, self.home, self.clone / "examples"):
            folder.mkdir(parents=True)
        for tool in TOOLS:
            found = shutil.which(tool)
            if found:
                (self.bin / tool).symlink_to(found)
        shutil.copy(SETUP, self.clone / "examples")
        (self.clone / "setup.py").write_text('REQUIREMENTS = ["torch==1.2.3", "fairseq-fixed==4.5.6.7"]\n')

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        variables = {"PATH": str(self.bin), "HOME": str(self.home), "CALLS": str(self.calls)} | environment
        command = [str(self.bin / "bash"), str(self.clone / "examples" / "setup.sh"), *arguments]
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)

    def find(self, **environment: str) -> str:
        return self.run("--find", **environment).stdout.strip()

    def installs(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_3_12_is_first_wherever_it_is(machine):
    python(machine.bin / "python3.11", "3.11.7")
    hidden = python(machine.home / ".pyenv/versions/3.12.1/bin/python", "3.12.1")
    assert machine.find() == str(hidden)
    plain = python(machine.bin / "python3.12", "3.12.4")
    assert machine.find() == str(plain)


def test_a_shim_that_refuses_is_passed_over(machine, tmp_path):
    refusing(machine.bin / "python3.12")
    second = python(tmp_path / "later" / "python3.12", "3.12.5")
    assert machine.find(PATH=f"{machine.bin}:{second.parent}") == str(second)


def test_other_places(machine, tmp_path):
    root = python(tmp_path / "pyenv" / "versions/3.12.0/bin/python", "3.12.0")
    assert machine.find(PYENV_ROOT=str(tmp_path / "pyenv")) == str(root)
    generic = python(machine.bin / "python3", "3.12.8")
    assert machine.find() == str(generic)


def test_3_11_is_second_and_others_are_refused(machine):
    python(machine.bin / "python3", "3.13.0")
    python(machine.bin / "python3.12", "3.10.1")  # a wrong name
    result = machine.run("--find")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("emkum: error: no working Python 3.12 or 3.11") and result.stderr.count("\n") == 1
    found = python(machine.home / ".pyenv/versions/3.11.7/bin/python", "3.11.7")
    assert machine.find() == str(found)


def test_the_users_choice_wins_or_fails(machine, tmp_path):
    python(machine.bin / "python3.12", "3.12.4")
    chosen = python(tmp_path / "my python" / "python", "3.11.9")
    assert machine.find(EMKUM_PYTHON=str(chosen)) == str(chosen)
    result = machine.run("--find", EMKUM_PYTHON=str(tmp_path / "absent"))
    assert result.returncode == 1 and "EMKUM_PYTHON=" in result.stderr and result.stdout == ""


def test_installs_once_and_again_after_a_change(machine):
    python(machine.bin / "python3.12", "3.12.4")
    first = machine.run(EMKUM_PIP_ARGS="--index-url there")
    assert first.returncode == 0, first.stderr
    assert len(machine.installs()) == 1
    assert machine.installs()[0].endswith(f"--index-url there -e {machine.clone}[test]")
    again = machine.run()
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "") and len(machine.installs()) == 1
    (machine.clone / "setup.py").write_text("# changed\n")
    assert machine.run().returncode == 0 and len(machine.installs()) == 2


def test_a_moved_clone_is_installed_anew(machine):
    python(machine.bin / "python3.12", "3.12.4")
    machine.run()
    machine.clone = machine.clone.rename(machine.clone.with_name("moved"))
    assert machine.run().returncode == 0
    assert machine.installs()[-1].endswith(f"-e {machine.clone}[test]")


def test_a_failed_install_is_no_finished_one(machine):
    python(machine.bin / "python3.12", "3.12.4")
    failed = machine.run(PIP_STATUS="1")
    assert failed.returncode == 1
    assert "some output of pip" in failed.stderr and "emkum: error: pip failed" in failed.stderr
    assert machine.run().returncode == 0 and len(machine.installs()) == 2
    assert machine.run().stderr == ""


def test_what_an_interrupted_install_left_broken_is_thrown_away(machine):
    python(machine.bin / "python3.12", "3.12.4")
    machine.run(PIP_STATUS="1")
    (machine.clone / ".venv" / "half").touch()
    result = machine.run(IMPORT_STATUS="1")
    assert result.returncode == 1 and "starting again from an empty .venv" in result.stderr
    assert not (machine.clone / ".venv" / "half").exists()


def test_packages_that_do_not_work_together_are_an_error(machine):
    python(machine.bin / "python3.12", "3.12.4")
    result = machine.run(IMPORT_STATUS="1")
    assert result.returncode == 1 and "do not work together" in result.stderr
    assert not (machine.clone / ".venv" / "emkum-stamp").exists()


def test_a_venv_whose_interpreter_is_gone_is_rebuilt(machine):
    python(machine.bin / "python3.12", "3.12.4")
    machine.run()
    (machine.clone / ".venv" / "bin" / "python").unlink()
    assert machine.run().returncode == 0 and len(machine.installs()) == 2


def test_another_choice_than_the_existing_venv_is_an_error(machine, tmp_path):
    python(machine.bin / "python3.12", "3.12.4")
    machine.run()
    other = python(tmp_path / "other" / "python", "3.11.9")
    result = machine.run(EMKUM_PYTHON=str(other))
    assert result.returncode == 1 and "remove .venv to change over" in result.stderr
    assert machine.run(EMKUM_PYTHON=str(machine.bin / "python3.12")).stderr == ""


def test_on_3_11_torch_comes_before_fairseq(machine):
    python(machine.bin / "python3.11", "3.11.7")
    assert machine.run().returncode == 0
    torch, fairseq, rest = machine.installs()
    assert "torch==1.2.3" in torch and "cython" in torch
    assert fairseq.endswith("--no-build-isolation fairseq-fixed==4.5.6.7")
    assert rest.endswith("[test]")


def test_two_at_once_install_once(machine):
    if shutil.which("flock") is None:
        pytest.skip("needs flock")
    python(machine.bin / "python3.12", "3.12.4")
    variables = {"PATH": str(machine.bin), "HOME": str(machine.home), "CALLS": str(machine.calls)}
    command = [str(machine.bin / "bash"), str(machine.clone / "examples" / "setup.sh")]
    running = [subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait(timeout=60) for process in running] == [0, 0, 0]
    assert len(machine.installs()) == 1


def test_sourced_it_puts_the_environment_first(machine):
    python(machine.bin / "python3.12", "3.12.4")
    line = f'set -euo pipefail; source "{machine.clone}/examples/setup.sh"; type -p python; echo "$VIRTUAL_ENV"'
    variables = {"PATH": str(machine.bin), "CALLS": str(machine.calls)}  # HOME may be unset
    result = subprocess.run([str(machine.bin / "bash"), "-c", line], env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [f"{machine.clone}/.venv/bin/python", f"{machine.clone}/.venv"]
