"""Time and peak memory of making, opening and shuffling a large index: `emkum bench index`.

Each step runs in a fresh interpreter, `python -m emkum.commands.bench_index STEP FOLDER SAMPLES BATCH_SIZE`, so that
its peak is its own.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from emkum.data.order import batches_by_length, epoch_order
from emkum.data.shard_writing import NO_ID, PART_DTYPE, SplitParts, join_parts
from emkum.data.shards import PLAIN_TEXT, ShardedSamples

SAMPLES_PER_SHARD = 10_000
SEED = 1
# Blocks of 512 bytes that a sample takes in its shard.
_BLOCKS = 40


def measure_index(samples: int, batch_size: int) -> list[dict[str, Any]]:
    """Run all steps in a temporary folder.

    Returns:
        For each its name, "step"; "seconds", without the steps before it; "peak_bytes" of resident memory, pages of
        mapped files included.
    """
    figures = []
    with tempfile.TemporaryDirectory(prefix="emkum-bench-") as folder:
        for step in STEPS:
            command = [sys.executable, "-m", "emkum.commands.bench_index", step, folder, str(samples), str(batch_size)]
            output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
            figures.append({"step": step, **json.loads(output)})
    return figures


def nothing(folder: Path, samples: int, batch_size: int) -> float:
    """What the interpreter and the imports alone take."""
    return 0.0


def write_parts(folder: Path, samples: int, batch_size: int) -> float:
    """Records of shards as if they had been written or indexed; the shards are files without content."""
    begin = time.perf_counter()
    rng = np.random.default_rng(SEED)
    (folder / "train").mkdir()
    for number, start in enumerate(range(0, samples, SAMPLES_PER_SHARD)):
        count = min(SAMPLES_PER_SHARD, samples - start)
        records = np.zeros(count, dtype=PART_DTYPE)
        records["image_block"] = 1 + _BLOCKS * np.arange(count)
        records["image_length"] = rng.integers(8_000, 18_000, count)
        records["text_block"] = _BLOCKS * np.arange(1, count + 1) - 1
        records["text_length"] = records["caption_length"] = rng.integers(20, 200, count)
        records["image_id"], records["shard"], records["text_kind"] = NO_ID, number, PLAIN_TEXT
        records["num_captions"] = 1
        for name in ("key_hash", "content_hash"):
            records[name] = rng.integers(0, 2**64, count, dtype=np.uint64)
        # One image in ten thousand is there before.
        records["content_hash"][count // 2] = records["content_hash"][0]
        np.save(_part(folder, number), records)
        with open(folder / "train" / f"{number:06d}.tar", "wb") as shard:
            shard.truncate((_BLOCKS * count + 2) * 512)
    return time.perf_counter() - begin


def join(folder: Path, samples: int, batch_size: int) -> float:
    """The index of the whole set, with equal images found."""
    begin = time.perf_counter()
    numbers = range(-(-samples // SAMPLES_PER_SHARD))
    shards = [f"{number:06d}.tar" for number in numbers]
    joined = join_parts(folder, {"train": SplitParts(".", shards, [_part(folder, number) for number in numbers])})
    assert joined["train"].images == samples
    return time.perf_counter() - begin


def open_index(folder: Path, samples: int, batch_size: int) -> float:
    """Open the split."""
    begin = time.perf_counter()
    assert len(ShardedSamples(folder / "train")) == samples
    return time.perf_counter() - begin


def draw_order(folder: Path, samples: int, batch_size: int) -> float:
    """Open the split; draw an epoch's order and cut it into batches."""
    opened = ShardedSamples(folder / "train")
    begin = time.perf_counter()
    order = epoch_order([len(opened)], np.random.RandomState(SEED))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    assert sum(map(len, batches)) == samples
    return time.perf_counter() - begin


def draw_by_length(folder: Path, samples: int, batch_size: int) -> float:
    """Open the split; draw an epoch's order and cut it into batches of captions of similar length."""
    opened = ShardedSamples(folder / "train")
    begin = time.perf_counter()
    rng = np.random.RandomState(SEED)
    batches = batches_by_length(epoch_order([len(opened)], rng), opened.caption_lengths, batch_size, rng)
    assert sum(map(len, batches)) == samples
    return time.perf_counter() - begin


STEPS: dict[str, Callable[[Path, int, int], float]] = {
    "imports alone": nothing,
    "records of the shards": write_parts,
    "joined index": join,
    "opening": open_index,
    "order and batches": draw_order,
    "order and batches by length": draw_by_length,
}


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.part.npy"


def peak_bytes() -> int:
    """Peak of this program's resident memory.

    Not `ru_maxrss`: under Linux that begins with what the parent held when it started this process.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM")


if __name__ == "__main__":
    name, where, *numbers = sys.argv[1:]
    seconds = STEPS[name](Path(where), *map(int, numbers))
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes()}))
