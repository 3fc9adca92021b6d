"""`emkum bench`: how fast data is read, a student trained and retrieval scored, and how much memory that takes."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from emkum.commands.arguments import assert_at_least
from emkum.errors import UserError
from emkum.provenance import describe_machine, write_json

RIVALS = ("webdataset", "folder")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("bench", help="measure how fast data is read and a student is trained")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    _add_data_parser(kinds)
    index = kinds.add_parser(
        "index",
        help="time and memory that an index of many samples takes",
        description="Make a synthetic index in a temporary folder, as `emkum prepare` does, open it, and draw an "
        "epoch's order and batches. Each step runs in a process of its own, whose peak of resident memory is printed; "
        "it needs no PyTorch. On the disk, 12 million samples take 1.1 GB for that time.",
        epilog="example: emkum bench index --samples 12000000",
    )
    index.add_argument("--samples", type=int, default=12_000_000, metavar="N", help="(default: %(default)s)")
    index.add_argument("--batch-size", type=int, default=512, metavar="N", help="images (default: %(default)s)")
    index.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    index.set_defaults(run=run_index)
    _add_student_parser(kinds)
    _add_retrieval_parser(kinds)


def _add_data_parser(kinds: Any) -> None:
    data = kinds.add_parser(
        "data",
        help="samples a second of reading, decoding, transforming, and of the whole loader",
        description="Samples a second of each stage of the loader in one process, and of the whole loader, captions "
        "included, for each number of workers. The bare loop decodes and transforms image files that are in memory, in "
        "one process; the ratio to it says how much of the time goes to that. All is measured in turn, several "
        "times; printed are medians.",
        epilog="example: emkum bench data data/flickr8k --workers 0 1 2 --against webdataset folder",
    )
    data.add_argument("data", type=Path, metavar="DIR", help="folder made by `emkum prepare`")
    data.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    data.add_argument("--image-size", type=int, default=128, metavar="PIXELS", help="(default: %(default)s)")
    data.add_argument("--batch-size", type=int, default=64, metavar="N", help="images (default: %(default)s)")
    data.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default: %(default)s)")
    data.add_argument("--rounds", type=int, default=3, metavar="N", help="measurements of each (default: %(default)s)")
    data.add_argument("--split", default="train", metavar="NAME", help="(default: %(default)s)")
    data.add_argument(
        "--images",
        type=int,
        default=2000,
        metavar="N",
        help="evenly spread images that are held in memory, and as files for `folder` (default: %(default)s)",
    )
    data.add_argument("--tokenizer", default="", metavar="PATH", help="file or folder; empty = DIR's own (default)")
    data.add_argument(
        "--against",
        nargs="+",
        default=[],
        choices=RIVALS,
        help="also measure others that do the same work: `webdataset` over the same shards; `folder`, image files "
        "that are opened one by one",
    )
    data.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    data.set_defaults(run=run_data)


def _add_student_parser(kinds: Any) -> None:
    student = kinds.add_parser(
        "student",
        help="speed and memory of a training step of the student, for variants of a recipe",
        description="Train the student of a recipe on random images and captions, and measure how many pairs of image "
        "and caption it takes a second, and the peak of memory. A step is that of training: forward, losses, backward "
        "and optimizer. It is without the teacher, for whose targets random ones stand, and without reading data. "
        "Weights are random. Variants take turns, each run in a process of its own; printed are medians over rounds.",
        epilog="example: emkum bench student examples/flickr8k.yaml --vary contrastive_chunk=0,16 --batch-size 64,128",
    )
    student.add_argument("recipe", help="YAML file; see examples/")
    student.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the recipe's")
    student.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="key=a,b",
        help="an option and its values, such as student_attention=stock,fused or objectives=itc,[itc,kd_mse]; may be "
        "given several times: each combination is a variant, and the first one is what others are compared with",
    )
    student.add_argument(
        "--batch-size", metavar="N[,N...]", help="images, one or more values (default: the recipe's batch_size)"
    )
    numbers = {
        "steps": ("N", 5, "updates that are timed in a run"),
        "warm-up": ("N", 2, "updates before these"),
        "rounds": ("N", 3, "runs of each variant"),
        "vocab-size": ("N", 30_522, "ids of the tokenizer"),
        "target-width": ("D", 768, "channels of the targets"),
        "classes": ("N", 1000, "of the targets' logits"),
    }
    for name, (metavar, default, words) in numbers.items():
        student.add_argument(
            f"--{name}", type=int, default=default, metavar=metavar, help=f"{words} (default: %(default)s)"
        )
    student.add_argument(
        "--caption-tokens",
        type=int,
        nargs=2,
        default=[8, 20],
        metavar=("LEAST", "MOST"),
        help="lengths of captions, special tokens included; at most caption_max_tokens (default: 8 20)",
    )
    student.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    student.set_defaults(run=run_student)


def _add_retrieval_parser(kinds: Any) -> None:
    retrieval = kinds.add_parser(
        "retrieval",
        help="time and memory of scoring retrieval",
        description="Score retrieval both ways over random features, on the CPU: as `emkum evaluate retrieval` does, "
        "by the best 10 of the whole matrix of similarities, and, where it is installed, by faiss's exact index. Each "
        "runs in a process of its own. Time is without imports and without making the features; peak memory is the "
        "whole process's, and the first line is what it is without any scoring.",
        epilog="example: OMP_NUM_THREADS=1 emkum bench retrieval --images 5000 --captions 25000 --dim 768",
    )
    for name, default, words in (
        ("images", 5000, ""),
        ("captions", 25000, "of all images together "),
        ("dim", 768, "channels of a feature "),
    ):
        retrieval.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{words}(default: %(default)s)"
        )
    retrieval.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    retrieval.set_defaults(run=run_retrieval)


def run_data(args: argparse.Namespace) -> None:
    for option in ("image_size", "batch_size", "seconds", "rounds", "images"):
        if getattr(args, option) <= 0:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)}: want more than 0")
    if min(args.workers) < 0:
        raise UserError(f"--workers {min(args.workers)}: want 0 (no worker process) or more")
    from emkum.commands.bench_data import format_rates, measure, open_work, runs

    work = open_work(args.data, args.split, args.tokenizer, args.image_size, args.batch_size, args.images)
    with runs(work, args.workers, args.against) as started:
        rates = measure(started, args.seconds, args.rounds)
    print(format_rates(rates))
    if args.json:
        names = ("split", "image_size", "batch_size", "seconds", "images")
        settings = {name: getattr(args, name) for name in names}
        write_json(args.json, {"samples_per_second": rates, "settings": settings, "machine": describe_machine()})


def run_index(args: argparse.Namespace) -> None:
    from emkum.commands.bench_index import measure_index

    for option in ("samples", "batch_size"):
        if getattr(args, option) <= 0:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)}: want more than 0")
    steps = measure_index(args.samples, args.batch_size)
    print(f"{f'{args.samples:,} samples':<30} seconds  peak memory")
    for step in steps:
        print(f"{step['step']:<30} {step['seconds']:>7.2f}  {step['peak_bytes'] / 1e6:>8,.0f} MB")
    if args.json:
        write_json(args.json, {"samples": args.samples, "steps": steps, "machine": describe_machine()})


def run_student(args: argparse.Namespace) -> None:
    # Five ids are special ones; a caption has a first and a last token.
    least = {"steps": 1, "warm_up": 1, "rounds": 1, "vocab_size": 6, "target_width": 1, "classes": 1}
    for option, number in least.items():
        if getattr(args, option) < number:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)}: want {number} or more")
    shortest, longest = args.caption_tokens
    if not 2 <= shortest <= longest:
        raise UserError(f"--caption-tokens {shortest} {longest}: want 2 or more, and the second not below the first")
    from emkum.commands.bench_student import Work, format_report, measure, parse_varied

    varied = parse_varied(args.vary, args.batch_size)
    settings = {name: getattr(args, name) for name in (*least, "caption_tokens")}
    work = Work(**{name: value for name, value in settings.items() if name != "rounds"})
    figures = measure(args.recipe, args.overrides, varied, work, args.rounds)
    command, machine = _student_command(args), describe_machine()
    print(format_report(figures, command, machine, work, args.rounds))
    if args.json:
        record = {"variants": figures, "command": command, "settings": settings, "machine": machine}
        try:
            write_json(args.json, record)
        except OSError as error:
            raise UserError(f"--json: cannot write {args.json}: {error.strerror}") from None


def run_retrieval(args: argparse.Namespace) -> None:
    # As many candidates as the best of them are looked for.
    assert_at_least(args, images=10, captions=args.images, dim=1)
    from emkum.commands.bench_retrieval import format_report, measure

    figures, machine = measure(args.images, args.captions, args.dim), describe_machine()
    print(format_report(figures, machine, args.images, args.captions, args.dim))
    if args.json:
        settings = {name: getattr(args, name) for name in ("images", "captions", "dim")}
        write_json(args.json, {"variants": figures, "settings": settings, "machine": machine})


def _student_command(args: argparse.Namespace) -> str:
    """The command with all its numbers, which makes the same variants again."""
    words = ["emkum", "bench", "student", args.recipe, *args.overrides]
    for word in args.vary:
        words += ["--vary", word]
    if args.batch_size is not None:
        words += ["--batch-size", args.batch_size]
    for name in ("steps", "warm_up", "rounds", "vocab_size", "target_width", "classes"):
        words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return shlex.join([*words, "--caption-tokens", *map(str, args.caption_tokens)])
