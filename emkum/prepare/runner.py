"""From a raw set to a published folder: parts in worker processes, joined, with tokenizer and record.

The work is done in a hidden folder beside the target, `.NAME.partial`. An interrupted run leaves it, and the same
command goes on with it; a mistake in the raw data removes it. The target appears whole or not at all.
"""

import errno
import fcntl
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emkum.errors import UserError
from emkum.prepare.raw_set import RawSet, Settings, part_path, write_part
from emkum.prepare.sources import hash_source
from emkum.provenance import package_versions, write_json

RECORD_NAME = "prepare.json"
TOKENIZER_NAME = "tokenizer.model"
SKIPPED_NAME = "skipped.jsonl"
_PLAN_NAME = "plan.json"
_LOCK_NAME = ".lock"
# What a full disk, a quota or a size limit answers.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def prepare(raw: RawSet, out: str | Path, settings: Settings, vocab_size: int = 0) -> None:
    """Write a raw set into a folder that appears whole or not at all.

    Nothing is done where the folder was made before with the same options from the same sources.

    Args:
        raw: the set.
        out: folder to make.
        settings: common to all sets.
        vocab_size: of the tokenizer trained on the captions of the split `train`; 0 = none.

    Raises:
        UserError: the folder holds something else, a split has no usable sample or too many bad ones, the tokenizer
            cannot be trained, or there is no space left.
    """
    out = Path(out).absolute()
    if vocab_size < 0:
        raise UserError(f"--vocab-size {vocab_size}: want 0 (no tokenizer) or more")
    if vocab_size > 0 and "train" not in raw.splits:
        raise UserError("the tokenizer is trained on the split train: give one, or --vocab-size 0")
    previous = _previous_record(out)
    plan: dict[str, Any] = {
        "set": raw.name,
        "options": {**raw.options, **settings.describe(), "vocab_size": vocab_size},
        "sources": {role: hash_source(path) for role, path in raw.sources.items()},
    }
    if previous is not None:
        _assert_same(out, previous, plan)
        print(f"{out}: made before with the same options and sources, nothing to do")
        return
    with _stage(out, plan) as stage:
        splits = _write_splits(raw, stage, settings)
        if vocab_size > 0:
            _train_tokenizer(stage, vocab_size)
        _publish(stage, out, {**plan, "splits": splits, "versions": package_versions()})
    for split, counts in splits.items():
        print(f"{out}: {split}: " + ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in counts.items()))


@contextmanager
def _stage(out: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """The folder to work in: a new one, or what an interrupted run with the same plan left."""
    stage = out.with_name(f".{out.name}.partial")
    try:
        stage.mkdir(parents=True, exist_ok=True)
        lock = open(stage / _LOCK_NAME, "w")
    except OSError as error:
        raise UserError(f"cannot write beside {out}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another run is making {out} right now; wait for it, or choose another --out") from None
        _adopt(stage, plan)
        try:
            yield stage
        except UserError:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        except BrokenExecutor:
            raise UserError(
                f"a worker process was killed while making {out}, perhaps for lack of memory: give the same command "
                "again, with fewer --workers; it goes on from there"
            ) from None
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            raise UserError(
                f"{error.strerror} while writing {out}: make room and run the same command again; it goes on from there"
            ) from None


def _adopt(stage: Path, plan: dict[str, Any]) -> None:
    """Empty the folder unless what is in it was made by the same plan."""
    path = stage / _PLAN_NAME
    try:
        same = json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(plan))
    except (OSError, ValueError):
        same = False
    if same:
        print(f"going on with an interrupted run in {stage}")
        # What a killed process was writing.
        for unfinished in stage.rglob(".*.tmp"):
            unfinished.unlink()
        return
    for entry in stage.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != _LOCK_NAME:
            entry.unlink()
    write_json(path, plan)


def _write_splits(raw: RawSet, stage: Path, settings: Settings) -> dict[str, dict[str, int]]:
    """Make all parts, then join them; return each split's counts."""
    sizes = {split: raw.part_sizes(split, settings) for split in raw.splits}
    tasks = [(split, part) for split, parts in sizes.items() for part in range(len(parts))]
    for split in sizes:
        (stage / split).mkdir(parents=True, exist_ok=True)
    known = sum(map(sum, sizes.values()))
    bad: dict[str, Counter[str]] = {split: Counter() for split in sizes}
    totals = {split: Counter() for split in sizes}
    with tqdm(total=known or len(tasks), desc=raw.name, unit="sample" if known else "shard", disable=None) as progress:
        for split, part, counts in _parts(raw, tasks, stage, settings):
            totals[split].update({name: n for name, n in counts.items() if name != "reasons"})
            bad[split].update(counts["reasons"])
            progress.update(sizes[split][part] if known else 1)
            if sum(sizes[split]) > 0:
                _assert_good(split, raw.name, totals[split]["skipped"], sum(sizes[split]), bad[split], settings)
    for split, total in totals.items():
        if total["usable"] == 0:
            reasons = _reasons(total["skipped"], bad[split])
            raise UserError(f"split {split} of {raw.name} has no usable sample ({reasons})")
        _assert_good(split, raw.name, total["skipped"], total["usable"] + total["skipped"], bad[split], settings)
    with open(stage / SKIPPED_NAME, "wb") as skipped:
        for split, part in tasks:
            skipped.write(part_path(stage / split, part, "part.jsonl").read_bytes())
    joined = raw.join(stage, settings)
    return {
        split: {**counts, **{name: totals[split][name] for name in ("skipped", "skipped_captions")}}
        for split, counts in joined.items()
    }


def _assert_good(split: str, name: str, bad: int, total: int, reasons: Counter[str], settings: Settings) -> None:
    if bad > settings.max_bad_fraction * total and bad < total:
        raise UserError(
            f"split {split} of {name}: {bad:,} of {total:,} samples are bad, more than --max-bad-fraction "
            f"{settings.max_bad_fraction:g} allows ({_reasons(bad, reasons)})"
        )


def _reasons(bad: int, reasons: Counter[str]) -> str:
    if not reasons:
        return f"{bad} skipped"
    (reason, times), *_ = reasons.most_common(1)
    return f"{bad} skipped, {times} of them: {reason}"


def _parts(
    raw: RawSet, tasks: list[tuple[str, int]], stage: Path, settings: Settings
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Make parts in worker processes, or in this one where that is enough; yield each as it is done."""
    workers = min(settings.workers, len(tasks))
    if workers <= 1:
        for split, part in tasks:
            yield split, part, write_part(raw, split, part, stage / split, settings)
        return
    # Fresh processes: a fork would copy the locks of whatever threads run in this one.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(raw, stage, settings)) as pool:
        futures = {pool.submit(_work, split, part): (split, part) for split, part in tasks}
        try:
            for future in as_completed(futures):
                yield *futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


_worker: tuple[RawSet, Path, Settings]


def _begin_worker(raw: RawSet, stage: Path, settings: Settings) -> None:
    global _worker
    _worker = raw, stage, settings
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this, workers of a killed run would wait for work for ever, and write into what the next one makes."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _work(split: str, part: int) -> dict[str, Any]:
    raw, stage, settings = _worker
    return write_part(raw, split, part, stage / split, settings)


def _train_tokenizer(stage: Path, vocab_size: int) -> None:
    from emkum.data.shards import ShardedSamples
    from emkum.prepare.tokenizer import train_sentencepiece

    train = ShardedSamples(stage / "train")
    captions = (caption for sample in train for caption in sample.captions)
    train_sentencepiece(captions, stage / TOKENIZER_NAME, vocab_size)


def _publish(stage: Path, out: Path, record: dict[str, Any]) -> None:
    write_json(stage / RECORD_NAME, record)
    for part in stage.rglob("*.part.*"):
        part.unlink()
    (stage / _PLAN_NAME).unlink()
    (stage / _LOCK_NAME).unlink()
    try:
        os.replace(stage, out)
    except OSError:
        raise UserError(f"{out} is no longer free: choose another --out") from None


def _previous_record(out: Path) -> dict[str, Any] | None:
    """The `prepare.json` of a folder that was made before; None where the folder can be made."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        record = json.loads((out / RECORD_NAME).read_text(encoding="utf-8"))
        return {name: record[name] for name in ("set", "options", "sources")}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out} exists and holds no prepared data: choose another --out or empty it") from None


def _assert_same(out: Path, previous: dict[str, Any], record: dict[str, Any]) -> None:
    difference = f"set {previous['set']} there, {record['set']} here" if previous["set"] != record["set"] else None
    for part, what in (("options", "option"), ("sources", "source")):
        there, here = previous[part], record[part]
        for name in sorted(there.keys() | here.keys()):
            if difference is None and there.get(name) != here.get(name):
                values = f": {there.get(name)} there, {here.get(name)} here" if part == "options" else " differs"
                difference = f"{what} {name}{values}"
    if difference is not None:
        raise UserError(f"{out} holds other prepared data ({difference}): choose another --out or remove it")
