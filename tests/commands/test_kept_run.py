"""Whether a run is finished, goes on, or was another; what it took."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from emkum.commands import energy, kept_run
from emkum.commands.energy import EnergyMeter
from emkum.commands.kept_run import Ended, KeptRun, run_emkum


@pytest.fixture
def run(tmp_path: Path) -> KeptRun:
    return KeptRun(tmp_path / "run" / "kept.json", {"options": {"lr": (0.1,), "seed": 1}, "encoder": {"width": 8}})


def other(run: KeptRun, **parts: object) -> KeptRun:
    return KeptRun(run.path, {**run.identity, **parts})


def test_a_run_begins_and_is_finished(run: KeptRun) -> None:
    assert run.record() == {} and run.differing() == [] and not run.is_finished()
    seen = []

    def work() -> Ended:
        seen.append(json.loads(run.path.read_text()))
        return Ended(0, 70)

    record = run.carry_out(work)
    assert seen[0]["finished"] is False and seen[0]["options"] == {"lr": [0.1], "seed": 1}
    assert run.is_finished() and run.differing() == [] and record == run.record()
    assert record["memory"] == 70 and record["status"] == 0 and record["seconds"] == 0
    assert record["machine"]["cores"] == os.cpu_count() and "spent" not in record


def test_other_runs_are_told_by_what_differs(run: KeptRun) -> None:
    run.carry_out(lambda: Ended(0))
    assert other(run, options={"lr": [0.2], "seed": 1, "batch_size": 3}).differing() == ["batch_size", "lr"]
    assert other(run, encoder={}).differing() == ["width"]
    assert other(run, words=["a"]).differing() == ["words"]


def test_a_run_that_failed_goes_on(run: KeptRun) -> None:
    assert run.carry_out(lambda: Ended(3, 90))["status"] == 3
    assert not run.is_finished() and run.record()["memory"] == 90
    record = run.carry_out(lambda: Ended(0, 70))
    # The memory is the most of all parts.
    assert record["finished"] and record["memory"] == 90


def test_seconds_add_up_over_interruptions(run: KeptRun, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(kept_run.time, "monotonic", lambda: now[0])

    def stopped() -> Ended:
        now[0] += 40
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.carry_out(stopped)
    assert not run.is_finished() and run.record()["spent"]["seconds"] == 40

    def work() -> Ended:
        now[0] += 7
        return Ended(0)

    assert run.carry_out(work)["seconds"] == 47
    # One that is made anew, since it is another, begins at zero.
    assert other(run, encoder={"width": 9}).carry_out(work)["seconds"] == 7


def test_a_beginning_of_unknown_length_makes_the_whole_unknown(run: KeptRun) -> None:
    run.carry_out(lambda: Ended(0))
    content = run.record()
    run.path.write_text(json.dumps(content | {"finished": False}))
    assert run.carry_out(lambda: Ended(0))["seconds"] is None


def test_a_killed_run_has_noted_its_time(tmp_path: Path) -> None:
    text = (
        "import time\nfrom pathlib import Path\nfrom emkum.commands import kept_run\nkept_run._NOTED_EVERY = 0.05\n"
        "kept_run.describe_machine = dict\n"
        f"run = kept_run.KeptRun(Path({str(tmp_path / 'kept.json')!r}), {{'words': ['a']}})\n"
        "run.carry_out(lambda: time.sleep(60))\n"
    )
    with subprocess.Popen([sys.executable, "-c", text]) as child:
        run = KeptRun(tmp_path / "kept.json", {"words": ["a"]})
        end = time.monotonic() + 60
        while run.record().get("spent", {}).get("seconds", 0) < 0.1 and time.monotonic() < end:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    record = run.record()
    assert not run.is_finished() and run.differing() == [] and record["spent"]["seconds"] >= 0.1


@pytest.mark.parametrize("own_peak", [0, 2**40])
def test_a_command_runs_in_a_process_of_its_own(own_peak: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(ru_maxrss=own_peak)
    monkeypatch.setattr(kept_run.resource, "getrusage", lambda who: usage)
    with open(tmp_path / "output", "w") as file:
        ended = run_emkum(["--version"], {"COLUMNS": "80"}, file)
    assert ended.status == 0
    # What is not above this process's own peak may be that.
    assert ended.memory is None if own_peak else ended.memory > 1
    assert (tmp_path / "output").read_text().startswith("emkum ")


def counter(folder: Path, name: str, value: int) -> Path:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "energy_uj").write_text(f"{value}\n")
    (folder / name / "max_energy_range_uj").write_text("10000000\n")
    return folder / name / "energy_uj"


def test_energy_of_packages_over_the_end_of_a_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy.shutil, "which", lambda name: None)
    first, second = counter(tmp_path, "intel-rapl:0", 9_000_000), counter(tmp_path, "intel-rapl:1", 0)
    counter(tmp_path, "intel-rapl:0:0", 5)  # a part of the first
    meter = EnergyMeter(tmp_path)
    first.write_text("1000000")
    second.write_text("500000")
    assert meter.joules() == {"cpu": 2.5}
    second.write_text("750000")
    assert meter.joules() == {"cpu": 2.75}


def test_energy_of_gpus_is_power_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, watts = [0.0], [300.0]
    monkeypatch.setattr(energy.shutil, "which", lambda name: name)
    monkeypatch.setattr(energy, "_gpu_watts", lambda: watts[0])
    monkeypatch.setattr(energy.time, "monotonic", lambda: now[0])
    meter = EnergyMeter(tmp_path)
    now[0], watts[0] = 2.0, 100.0
    assert meter.joules() == {"gpu": 200.0}
    now[0] = 3.0
    assert meter.joules() == {"gpu": 300.0}


def test_nothing_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy.shutil, "which", lambda name: None)
    assert EnergyMeter(tmp_path / "none").joules() == {}
