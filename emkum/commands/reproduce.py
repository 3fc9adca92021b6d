"""`emkum reproduce`: rows of the study with several seeds, their figures beside the thesis's, and one report."""

import argparse
import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emkum.commands.arguments import assert_at_least
from emkum.commands.finetune import Scoring, choose_scoring
from emkum.commands.kept_run import KeptRun
from emkum.commands.reproduce_plan import (
    SLURM,
    Catalog,
    Given,
    Rate,
    Run,
    Variant,
    assert_needs,
    choose_updates,
    choose_variants,
    make_run,
    owners,
    read_catalog,
    read_words,
    resolve,
    sized,
    step_words,
)
from emkum.commands.reproduce_runs import assert_same, carry_out, measure, read_plan, submit, write_plan
from emkum.commands.study import run_step
from emkum.commands.train import USER_DIR, assert_room_after_warm_up
from emkum.errors import UserError
from emkum.recipe import to_arguments

_PLAN = "plan.json"
# A run is timed by so many updates between two validations.
_TIMED = 3
# Part of a budget that timing may take; part that is planned for.
_TIMING, _PLANNED = 0.1, 0.95


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "reproduce",
        help="train rows of the study with several seeds and report which of its effects come out",
        description="Prepare data and teacher once, train rows of the study with several seeds, and write report.html "
        "and report.md: figures beside the thesis's, effects with their intervals, curves and cost. What is finished "
        "is not run again; a run that was stopped goes on. Rows are in examples/reproduction/rows.yaml; "
        "docs/reproduction.md says more.",
        epilog="example: emkum reproduce --data flickr8k flickr8k=RAW image_weights=model.safetensors image_size=64 "
        "--rows 3,5,6,17,23 --seeds 3 --budget-minutes 240 --out runs/reproduction",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="options of all runs; paths that the data needs; STEP.OPTION=value of a preparing step, such as "
        "data.num_images=1000 or cache.image_size=112",
    )
    parser.add_argument(
        "--data", default="scenes", metavar="WHAT", help="scenes (default), flickr8k, or a prepared folder"
    )
    parser.add_argument(
        "--rows",
        default="3,5,6,17,23",
        metavar="N,N",
        help="rows, with all of their variants, or ROW:VARIANT (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each (default: %(default)s)")
    parser.add_argument("--preset", metavar="NAME", help="of the recipes; without it that which suits the data")
    parser.add_argument(
        "--budget-minutes",
        type=float,
        metavar="N",
        help="choose the number of updates, equal for all, such that all is done in this time",
    )
    parser.add_argument(
        "--checks", type=int, default=3, metavar="N", help="validations of each run (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="K", help="runs at once (default: %(default)s)")
    parser.add_argument(
        "--slurm",
        metavar="PARTITION",
        help="each run as a job of SLURM, through submitit; slurm.NAME=value are its parameters, such as "
        "slurm.timeout_min=600",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/reproduction"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--plan", action="store_true", help="print the plan and stop, after what it needs was timed")
    parser.add_argument("--report", action="store_true", help="write the report of what is finished and stop")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints of finished runs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    start = time.monotonic()
    assert_at_least(args, seeds=1, checks=1, jobs=1)
    if args.budget_minutes is not None and args.budget_minutes <= 0:
        raise UserError(f"--budget-minutes {args.budget_minutes:g}: want more than 0")
    catalog = read_catalog()
    variants = choose_variants(catalog, args.rows)
    given = read_words(catalog, args.overrides, args.data, args.out, args.preset)
    assert_needs(variants, given)
    with _alone(args.out):
        plan = _assert_same_plan(args, given)
        if args.report and not plan.record():
            raise UserError(f"--report: nothing has begun in {args.out}")
        # A plan that needs no timing needs no data either.
        is_listed = args.plan and args.budget_minutes is None
        whose = owners(catalog, variants, given)
        if not plan.record():
            _assert_known(args, catalog, given, whose.values())
        if not args.report and not is_listed:
            _prepare(args, given)
        scoring = Scoring("") if is_listed else choose_scoring(str(given.data))
        runs = _plan_runs(args, catalog, given, whose, scoring, plan, start)
        if args.plan:
            return
        assert_same(runs)
        failed = [] if args.report else _carrier(args, given)(runs)
        _report(args, catalog, given, variants, whose, runs, scoring)
    if failed:
        raise UserError(f"did not finish: {'; '.join(run.name for run in failed)}")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Nobody else may work on the folder within the block, nor as long as a run that was begun in it goes on."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another command is working on {out} right now; wait for it, or give another --out"
            ) from None
        os.set_inheritable(lock.fileno(), True)
        yield


def _assert_same_plan(args: argparse.Namespace, given: Given) -> KeptRun:
    """The file of the plan. Rows and seeds may be added to it; data, options and budget are those of the first start.

    Raises:
        UserError: the folder holds another plan.
    """
    words = sorted(word for word in args.overrides if not word.startswith(f"{SLURM}."))
    identity = {"data": args.data, "preset": given.setup.preset, "words": words, "checks": args.checks}
    plan = KeptRun(args.out / _PLAN, identity | {"budget_minutes": args.budget_minutes})
    before = plan.record()
    if before and args.budget_minutes is None:
        plan = KeptRun(plan.path, identity | {"budget_minutes": before["budget_minutes"]})
    if names := ", ".join(plan.differing()):
        raise UserError(f"{args.out} holds another plan (it differs in {names}): give another --out")
    return plan


def _assert_known(args: argparse.Namespace, catalog: Catalog, given: Given, keys: Iterable[str]) -> None:
    """
    Raises:
        UserError: a run would have options that there are not, or that do not go together.
    """
    for key in dict.fromkeys(keys):
        options = resolve(catalog.variants[key], given)
        assert_room_after_warm_up(options)
        to_arguments({"user_dir": str(USER_DIR)} | sized(options, int(options["max_update"]), args.checks, {}))


def _prepare(args: argparse.Namespace, given: Given) -> None:
    steps = step_words(given)
    for number, (name, words) in enumerate(steps.items(), start=1):
        run_step(name, words, args.out, f"preparing, {number} of {len(steps)}")


def _carrier(args: argparse.Namespace, given: Given) -> Callable[[Sequence[Run]], list[Run]]:
    """What carries out runs, and gives those that failed."""
    if args.slurm:
        parameters = given.steps.get(SLURM, {})
        return lambda runs: submit(runs, args.slurm, args.out / SLURM, parameters, args.keep)
    return lambda runs: carry_out(runs, args.jobs, args.keep)


# ----------------------------------------------------------------------------------------------------------------------
# The plan
# ----------------------------------------------------------------------------------------------------------------------


def _plan_runs(
    args: argparse.Namespace,
    catalog: Catalog,
    given: Given,
    whose: dict[str, str],
    scoring: Scoring,
    plan: KeptRun,
    start: float,
) -> list[Run]:
    """All runs, once each; with a budget, their number of updates is chosen at the first start and kept."""
    options = {key: resolve(catalog.variants[key], given) for key in dict.fromkeys(whose.values())}
    if plan.path.is_file():
        updates, rates = read_plan(plan.path)
    else:
        updates, rates = None, {}
        if args.budget_minutes is not None:
            rates = _time(args, given, options, scoring)
            left = args.budget_minutes * 60 * _PLANNED - (time.monotonic() - start)
            each = [rate for rate in rates.values() for _ in range(args.seeds)]
            most = min(int(values["max_update"]) for values in options.values())
            updates = choose_updates(each, args.jobs, left, most, least=2 * args.checks)
        write_plan(plan.path, plan.identity, updates, rates)
    runs = []
    for seed in range(1, args.seeds + 1):
        for key, values in options.items():
            size = int(values["max_update"]) if updates is None else updates
            own = sized(values, size, args.checks, given.options)
            runs.append(make_run(own, key, seed, args.out / "runs", scoring.subsets))
    _print_plan(args, runs, rates, whose)
    return runs


def _time(
    args: argparse.Namespace, given: Given, options: dict[str, dict[str, Any]], scoring: Scoring
) -> dict[str, Rate]:
    """Rates by the key of a variant, from short runs; that with the most objectives comes first."""
    if "max_update" in given.options:
        raise UserError("--budget-minutes chooses max_update: leave one of them out")
    keys = sorted(options, key=lambda key: -len(str(options[key]["objectives"]).split(",")))
    short = [
        make_run(
            sized(options[key], _TIMED * args.checks, args.checks, {}) | {"log_interval": 1},
            key,
            1,
            args.out / "timed",
            scoring.subsets,
        )
        for key in keys
    ]
    rates = measure(short, _carrier(args, given), args.jobs, args.budget_minutes * 60 * _TIMING)
    return dict(zip(keys, rates, strict=True))


def _print_plan(args: argparse.Namespace, runs: list[Run], rates: dict[str, Rate], whose: dict[str, str]) -> None:
    from emkum.evaluation.report import format_table

    rows, total = [], 0.0
    for key in dict.fromkeys(run.key for run in runs):
        own = [run for run in runs if run.key == key]
        updates = int(own[0].options["max_update"])
        rate = rates.get(key) or max(rates.values(), key=lambda rate: rate.update, default=None)
        seconds = None if rate is None else rate.seconds(updates)
        total += (seconds or 0.0) * len(own)
        names = ", ".join(name for name, owner in whose.items() if owner == key)
        minutes = None if seconds is None else seconds / 60
        rows.append({"rows": names, "seeds": len(own), "updates": updates, "minutes": minutes})
    columns = {"rows": "rows", "seeds": "seeds", "updates": "updates", "minutes": "minutes a run"}
    print(format_table(rows, columns), flush=True)
    about = f"about {total / args.jobs / 60:.0f} minutes" if rates else "not timed, since no --budget-minutes is given"
    print(f"{len(runs)} runs, {about}; the plan is in {args.out / _PLAN}", flush=True)


def _report(
    args: argparse.Namespace,
    catalog: Catalog,
    given: Given,
    variants: list[Variant],
    whose: dict[str, str],
    runs: list[Run],
    scoring: Scoring,
) -> None:
    from emkum.commands.reproduce_report import Findings, write_report
    from emkum.commands.reproduce_runs import read_result

    results = {(run.key, run.seed): read_result(run, scoring) for run in runs}
    found = {key: result for key, result in results.items() if result is not None}
    findings = Findings(catalog, given, variants, whose, found, scoring, len(runs), args.overrides)
    for path in write_report(args.out, findings):
        print(f"written to {path}")
