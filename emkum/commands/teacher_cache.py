"""`emkum teacher cache`: a teacher's targets of all images of some splits, computed once.

The work is cut into shards (see `emkum.teachers.cached`), each of which appears whole. An interrupted run leaves some,
and the same command computes the others. Batches never cross shards: what is in a shard does not depend on which
process computes it, nor on what was there before. On a CPU, matrix products may differ in their last bits with the
number of threads: folders are equal byte for byte where processes had equally many.
"""

import argparse
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emkum.commands.arguments import assert_at_least
from emkum.commands.teacher_options import add_teacher_arguments, build_from
from emkum.errors import UserError
from emkum.provenance import write_json

if TYPE_CHECKING:
    from emkum.teachers.base import Teacher
    from emkum.teachers.cached import CacheManifest, Shard

SHARD_SIZE = 4096
# More decoding processes than this do not make one GPU faster.
MOST_WORKERS = 8
SHOWN_DIFFERENCES = 3


def add_parser(kinds: Any) -> None:
    """Add the sub-command `cache`."""
    cache = kinds.add_parser(
        "cache",
        help="compute a teacher's targets once",
        description="Store a teacher's targets of all images, for training with teacher=cached:DIR. Without --views "
        "the target is that of the centered crop, whatever crop the student sees; with --views K the first K random "
        "crops of the split train are stored, which training replays with the same crop_views, crop_min_scale, "
        "crop_flip and seed. An interrupted run goes on when the same command is given again.",
        epilog="example: emkum teacher cache timm:deit_tiny_patch16_224 --weights model.safetensors "
        "--data data/flickr8k --out data/flickr8k-deit",
    )
    add_teacher_arguments(cache)
    cache.add_argument(
        "--data", required=True, help="folder made by `emkum prepare`, or several as A:B, as in training"
    )
    cache.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to make, or to complete")
    cache.add_argument("--splits", default="", metavar="A,B", help="separated by commas; empty = all (default)")
    cache.add_argument("--views", type=int, default=0, metavar="K", help="random training crops; 0 = the centered one")
    cache.add_argument("--min-scale", type=float, default=0.9, help="smallest part of the area that a crop keeps")
    cache.add_argument("--flip", action="store_true", help="mirror half of the crops")
    cache.add_argument("--seed", type=int, default=1, help="seed of the training run whose crops these are")
    cache.add_argument(
        "--store",
        default="features",
        metavar="A,B",
        help="what objectives need, separated by commas: features (always stored), logits, patches",
    )
    cache.add_argument(
        "--logits-top", type=int, default=0, metavar="K", help="store the K largest logits; 0 = all (default)"
    )
    cache.add_argument(
        "--shard-size", type=int, default=SHARD_SIZE, metavar="N", help="samples of a file (default: %(default)s)"
    )
    cache.add_argument("--batch-size", type=int, default=64, help="images run at once (default: %(default)s)")
    cache.add_argument(
        "--workers",
        type=int,
        default=None,
        metavar="N",
        help="decoding processes beside each computing one; 0 = none (default: 1, and with a GPU its share of the "
        f"cores, at most {MOST_WORKERS})",
    )
    cache.add_argument(
        "--processes",
        type=int,
        default=0,
        metavar="N",
        help="computing processes, each with a teacher of its own; 0 = one a GPU, or one on the CPU (default)",
    )
    cache.set_defaults(run=run_cache)


def run_cache(args: argparse.Namespace) -> None:
    parts = _chosen_parts(args)
    import torch
    from tqdm import tqdm

    from emkum.commands.teacher_cache_work import Job, compute, device_of, run_processes
    from emkum.teachers.cached import missing_shards

    teacher = build_from(args)
    if "image" not in teacher.modalities or not teacher.image_size:
        raise UserError(f"{args.teacher} does not look at images: there is nothing to cache")
    manifest = _plan(args, teacher, parts)
    image_size, counts = teacher.image_size, _counts(manifest)
    with _claimed(args.out, manifest):
        missing = missing_shards(args.out, manifest)
        if not missing:
            print(f"{args.out}: complete already, nothing to do ({counts})")
            return
        total, left = _images(manifest.shards()), _images(missing)
        if left < total:
            print(f"going on with an interrupted run in {args.out}: {total - left:,} of {total:,} crops are done")
        processes = min(args.processes or max(1, torch.cuda.device_count()), len(missing))
        threads = max(1, torch.get_num_threads() // processes)
        job = Job(args, manifest, image_size, _workers(args, processes), threads)
        with tqdm(total=total, initial=total - left, desc=args.teacher, unit="image", disable=None) as progress:
            if processes == 1:
                compute(job, missing, teacher, device_of(0), progress.update)
            else:
                del teacher  # Each process has its own.
                run_processes(job, missing, processes, progress.update)
    print(f"wrote {args.out}: {counts}; train with teacher=cached:{args.out}")


def _chosen_parts(args: argparse.Namespace) -> list[str]:
    """The parts to store; raises UserError where an option has no sense."""
    from emkum.teachers.cached import FEATURES, LOGITS, PARTS

    assert_at_least(args, views=0, logits_top=0, shard_size=1, batch_size=1, workers=0, processes=0)
    if not 0 < args.min_scale <= 1:
        raise UserError(f"--min-scale {args.min_scale:g}: want more than 0, at most 1")
    if args.target != "image":
        raise UserError(f"--target {args.target}: targets of text cannot be cached; leave it at image")
    wanted = [name for name in args.store.split(",") if name]
    unknown = [name for name in wanted if name not in PARTS]
    if unknown:
        raise UserError(f"--store {unknown[0]!r} is unknown; choose from {', '.join(PARTS)}")
    if args.logits_top > 0 and LOGITS not in wanted:
        raise UserError(f"--logits-top {args.logits_top} needs logits in --store")
    return [part for part in PARTS if part in wanted or part == FEATURES]


def _plan(args: argparse.Namespace, teacher: "Teacher", parts: list[str]) -> "CacheManifest":
    """The manifest of the cache that the options ask for."""
    import torch

    from emkum.commands.teacher_cache_work import device_of, open_datasets
    from emkum.layers.precision import Autocast
    from emkum.teachers.cached import CacheManifest

    precision = Autocast(args.autocast).dtype(device_of(0)) or torch.float32
    splits = {
        name: {"data_hash": data.samples.content_hash(), "samples": len(data), "crops": data.describe_crops()}
        for name, data in open_datasets(args, teacher.image_size).items()
    }
    return CacheManifest(
        teacher=teacher.identity,
        precision=str(precision).removeprefix("torch."),
        parts={part: _describe_part(part, args, teacher) for part in parts},
        shard_size=args.shard_size,
        splits=splits,
    )


def _describe_part(part: str, args: argparse.Namespace, teacher: "Teacher") -> dict[str, Any]:
    """What the manifest says of a part; raises UserError where the teacher does not have it."""
    from emkum.teachers.cached import FEATURES, LOGITS

    if part == FEATURES:
        return {"width": teacher.width}
    if part == LOGITS:
        if teacher.num_classes == 0:
            raise UserError(f"--store logits: {args.teacher} has none")
        if args.logits_top >= teacher.num_classes:
            raise UserError(
                f"--logits-top {args.logits_top}: {args.teacher} has {teacher.num_classes:,} classes; want fewer, or "
                "0 for all"
            )
        return {"classes": teacher.num_classes, "top": args.logits_top}
    if teacher.patch_width == 0 or teacher.grid is None:
        raise UserError(f"--store patches: {args.teacher} has none")
    return {"grid": list(teacher.grid), "width": teacher.patch_width}


def _counts(manifest: "CacheManifest") -> str:
    """Images of each split in words."""
    counts = []
    for name, split in manifest.splits.items():
        views = split["crops"]["views"]
        counts.append(f"{name} {split['samples']:,} images" + (f" x {views} views" if views > 0 else ""))
    return ", ".join(counts)


def _images(shards: "Iterable[Shard]") -> int:
    return sum(shard.stop - shard.start for shard in shards)


def _workers(args: argparse.Namespace, processes: int) -> int:
    """Decoding processes of each computing one."""
    import torch

    if args.workers is not None:
        return args.workers
    if not torch.cuda.is_available():
        return 1
    return min(MOST_WORKERS, max(1, len(os.sched_getaffinity(0)) // processes))


@contextmanager
def _claimed(out: Path, manifest: "CacheManifest") -> Iterator[None]:
    """Make the folder, or take the one that an interrupted run left; nobody else may work on it within the block."""
    from emkum.teachers.cached import MANIFEST_NAME

    path = out / MANIFEST_NAME
    try:
        if _is_free(out):
            write_json(path, manifest.as_json())
        else:
            _assert_same(out, manifest)
        for split in manifest.splits:
            (out / split).mkdir(exist_ok=True)
        lock = open(path, "r+b")
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}") from None
    # A lock of this process alone: one that its decoding processes shared would outlive it for some seconds. It ends
    # when any handle of the manifest is closed, so that is not opened again.
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another run is making {out} right now; wait for it, or choose another --out") from None
        _remove_temporaries(out)
        try:
            yield
        finally:
            # Of processes that were stopped.
            _remove_temporaries(out)


def _temporaries(out: Path) -> list[Path]:
    """Files that a killed process was writing."""
    from emkum.teachers.cached import MANIFEST_NAME

    return [*out.glob(f".{MANIFEST_NAME}.*.tmp"), *out.glob("*/.*.npy.*.tmp")]


def _remove_temporaries(out: Path) -> None:
    for path in _temporaries(out):
        path.unlink(missing_ok=True)


def _is_free(out: Path) -> bool:
    """Whether there is nothing, or at most what is left of a run that was killed at its very start."""
    if not out.exists():
        return True
    return out.is_dir() and not set(out.iterdir()) - set(_temporaries(out))


def _assert_same(out: Path, manifest: "CacheManifest") -> None:
    """Raise UserError unless the folder holds the cache that is wanted, or a part of it."""
    from emkum.teachers.cached import CacheManifest

    try:
        there = _flat(CacheManifest.read(out).as_json())
    except ValueError:
        raise UserError(f"{out} exists and holds no teacher cache: choose another --out or empty it") from None
    here = _flat(manifest.as_json())
    names = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if names:
        shown = [f"{name} {there.get(name)} there, {here.get(name)} here" for name in names[:SHOWN_DIFFERENCES]]
        more = f"; {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        raise UserError(
            f"{out} holds another teacher cache ({'; '.join(shown)}{more}): choose another --out or remove it"
        )


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested entries by dotted names, values as JSON."""
    flat = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.dumps(value)
    return flat
