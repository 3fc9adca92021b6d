"""The runs of `emkum reproduce`: one after the other, several at once, or by SLURM."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emkum.commands.finetune import Scoring, chosen_record
from emkum.commands.kept_run import Ended, KeptRun, end_running, run_emkum
from emkum.commands.reproduce_plan import Rate, Run, seconds_per_update
from emkum.commands.train import LOG_NAME
from emkum.errors import UserError
from emkum.provenance import write_json

_RECORD, _RECIPE, _OUTPUT = "kept.json", "recipe.yaml", "output.log"
# submitit's own executors; any other word is a partition of SLURM.
_LOCAL = ("local", "debug")


def kept(run: Run) -> KeptRun:
    return KeptRun(run.folder / _RECORD, {"options": run.options})


def assert_same(runs: Iterable[Run]) -> None:
    """
    Raises:
        UserError: a run's folder holds another one.
    """
    for run in runs:
        # A run that ended before its first checkpoint has left nothing to go on from.
        is_begun = (run.folder / "checkpoint_last.pt").is_file() or kept(run).is_finished()
        if is_begun and (names := ", ".join(kept(run).differing())):
            raise UserError(f"{run.folder} holds another run (it differs in {names}): give another --out")


@dataclass(frozen=True)
class Worker:
    """Carries out a run in a process of its own.

    Attributes:
        threads: of the run; 0 = as it is by itself.
        is_alone: whether it may print how far it is; what others print goes to a file.
        keep: keep the checkpoints of finished runs.
    """

    threads: int
    is_alone: bool
    keep: bool

    def __call__(self, run: Run) -> bool:
        """Whether the run is finished, before or now."""
        if kept(run).is_finished():
            return True
        print(f"emkum: {run.name}", flush=True)
        if not kept(run).carry_out(lambda: self._train(run))["finished"]:
            print(f"emkum: {run.name} failed; {run.folder} has its log", flush=True)
            return False
        if not self.keep:
            for checkpoint in run.folder.glob("checkpoint*.pt"):
                checkpoint.unlink()
        return True

    def _train(self, run: Run) -> Ended:
        # JSON is YAML; all options, so that no recipe that changes later counts.
        write_json(run.folder / _RECIPE, run.options)
        words = ["train", str(run.folder / _RECIPE)]
        environment = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        if self.is_alone:
            return run_emkum(words, environment)
        with open(run.folder / _OUTPUT, "a", encoding="utf-8") as file:
            return run_emkum(words, environment, file)


def carry_out(runs: Sequence[Run], jobs: int, keep: bool) -> list[Run]:
    """Carry out runs here, `jobs` at once; those that failed."""
    threads = 0
    if jobs > 1:
        share = max(1, len(os.sched_getaffinity(0)) // jobs)
        threads = min(share, int(os.environ.get("OMP_NUM_THREADS", share)))
    worker = Worker(threads, jobs == 1, keep)
    if jobs == 1:
        return [run for run in runs if not worker(run)]
    with ThreadPoolExecutor(jobs) as pool:
        try:
            return [run for run, done in zip(runs, pool.map(worker, runs), strict=True) if not done]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            end_running()
            raise


def submit(runs: Sequence[Run], place: str, folder: Path, parameters: Mapping[str, Any], keep: bool) -> list[Run]:
    """Carry out runs as jobs of SLURM, and wait for them; those that failed.

    Args:
        runs: of them one job each.
        place: partition; `local` and `debug` are submitit's own executors on this machine.
        folder: for submitit's files.
        parameters: of submitit's `update_parameters`.

    Raises:
        UserError: submitit is not installed, or knows no such parameter.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--slurm needs submitit: pip install submitit") from None
    executor = submitit.AutoExecutor(folder, cluster=place if place in _LOCAL else "slurm")
    wanted = {"name": "emkum"} | ({} if place in _LOCAL else {"slurm_partition": place}) | dict(parameters)
    try:
        executor.update_parameters(**wanted)
    except (NameError, TypeError, ValueError) as error:
        raise UserError(f"slurm.NAME=: {' '.join(str(error).split())[:300]}") from None
    worker, waiting = Worker(0, False, keep), [run for run in runs if not kept(run).is_finished()]
    jobs = [executor.submit(worker, run) for run in waiting]
    failed = []
    for run, job in zip(waiting, jobs, strict=True):
        try:
            done = job.result()
        except Exception as error:  # whatever ended the job elsewhere
            print(f"emkum: {run.name}: {' '.join(str(error).split())[:300]}", flush=True)
            done = False
        failed += [] if done else [run]
    return failed


# ----------------------------------------------------------------------------------------------------------------------
# What runs leave
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a finished run left.

    Attributes:
        figures: that count, in percent and as logged, by name.
        histories: of its log. record: of `KeptRun`.
        parameters: of the model; None where the log does not say.
        pairs: of image and caption, a second; None where the log is too short.
    """

    figures: Mapping[str, float]
    histories: Mapping[str, Sequence[Mapping[str, float]]]
    record: Mapping[str, Any]
    parameters: int | None
    pairs: float | None


def read_result(run: Run, scoring: Scoring) -> Result | None:
    """What a run left; None where it is not finished."""
    from emkum.training_log import read_training_log

    record = kept(run).record()
    if not record.get("finished"):
        return None
    histories = read_training_log(run.folder / LOG_NAME)
    seconds = seconds_per_update(histories)
    each = int(run.options["batch_size"]) * int(run.options.get("caption_per_image", 1) or 1)
    return Result(
        figures=chosen_record(histories, scoring, "mean_recall"),
        histories=histories,
        record=record,
        parameters=_parameters(run.folder / LOG_NAME),
        pairs=each / seconds if seconds else None,
    )


def _parameters(log: Path) -> int | None:
    with open(log, encoding="utf-8", errors="replace") as file:
        for line in file:
            _, found, rest = line.partition("num. shared model params: ")
            if found:
                return int(rest.split()[0].replace(",", ""))
    return None


def measure(runs: Sequence[Run], carry: Callable[[Sequence[Run]], list[Run]], jobs: int, allowed: float) -> list[Rate]:
    """Rates of runs by short ones.

    Args:
        runs: short ones, of which the first is taken for the slowest.
        carry: carries out runs, and gives those that failed.
        jobs: how many run at once.
        allowed: seconds; of runs that would take longer than that, the slowest known rate is taken.

    Raises:
        UserError: one failed.
    """
    rates: list[Rate] = []
    while len(rates) < len(runs):
        part = runs[len(rates) : len(rates) + jobs]
        if any(not kept(run).is_finished() for run in part):
            left = (len(runs) - len(rates)) / jobs
            if rates and left * max(rate.seconds(_updates(runs[0])) for rate in rates) > allowed:
                break
            if failed := carry(part):
                raise UserError(f"{failed[0].name} failed while it was timed; {failed[0].folder} has its log")
        rates += [_rate(run) for run in part]
    slowest = max(rates, key=lambda rate: rate.update)
    return rates + [slowest] * (len(runs) - len(rates))


def _updates(run: Run) -> int:
    return int(run.options["max_update"])


def _rate(run: Run) -> Rate:
    from emkum.training_log import read_training_log

    took = kept(run).record()["seconds"]
    if took is None:
        raise UserError(f"{run.folder} has no time: remove it, so that it is timed anew")
    update = seconds_per_update(read_training_log(run.folder / LOG_NAME)) or took / _updates(run)
    # A clock in whole seconds may call a very short update nothing.
    update = max(update, 1e-3)
    return Rate(max(0.0, took - _updates(run) * update), update)


def write_plan(path: Path, identity: Mapping[str, Any], updates: int | None, rates: Mapping[str, Rate]) -> None:
    content = {"updates": updates, "rates": {key: [rate.fixed, rate.update] for key, rate in rates.items()}}
    write_json(path, {**identity, **content})


def read_plan(path: Path) -> tuple[int | None, dict[str, Rate]]:
    """Updates of each run, and rates by the key of a variant, as `write_plan` was given them."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["updates"], {key: Rate(*pair) for key, pair in content["rates"].items()}
