"""`emkum train`: one recipe, one command, on whatever devices there are."""

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from emkum.errors import UserError
from emkum.recipe import PRESET, read_options, to_arguments
from emkum.training_log import Progress

LOG_NAME = "train.log"
USER_DIR = Path(__file__).resolve().parents[2] / "user_dir"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train from a recipe",
        description="Train from a recipe. Any option of the recipe can be changed by key=value. A run that was stopped "
        "goes on from its last checkpoint when the same command is given again.",
        epilog="example: emkum train examples/flickr8k.yaml data=data/flickr8k seed=2",
    )
    parser.add_argument("recipe", help="YAML file; see examples/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the recipe's")
    parser.add_argument("--preset", metavar="NAME,NAME", help="presets of the recipe, such as small")
    parser.add_argument("--processes", type=int, default=1, help="processes that train together on the CPU")
    parser.add_argument("--dry-run", action="store_true", help="print the fairseq-train command and stop")
    parser.set_defaults(run=run)


def resolve(recipe: str, overrides: list[str], cpu: bool) -> dict[str, Any]:
    """All options of a run, checked as far as that needs no model."""
    options = {"user_dir": str(USER_DIR)} | read_options(recipe, overrides)
    if "data" not in options:
        raise UserError(f"{recipe} names no data: add data=DIR, a folder made by `emkum prepare`")
    if cpu:
        options.setdefault("cpu", True)
    if options.get("cpu"):
        for half in ("fp16", "bf16", "amp"):
            if options.get(half):
                raise UserError(f"{half} needs a GPU; on a CPU leave it out, or set autocast=bfloat16")
    for folder in str(options["data"]).split(os.pathsep):
        if not Path(folder).is_dir():
            raise UserError(f"data folder {folder} does not exist; make it with `emkum prepare`")
    assert_room_after_warm_up(options)
    options.setdefault("save_dir", str(Path("runs") / Path(recipe).stem))
    return options


def assert_room_after_warm_up(options: dict[str, Any]) -> None:
    """fairseq's cosine schedule divides by what is left of the run after its warm-up."""
    warm_up, total = options.get("warmup_updates"), options.get("max_update")
    if not isinstance(warm_up, int) or not isinstance(total, int):
        return
    if options.get("lr_scheduler") == "cosine" and 0 < total <= warm_up:
        raise UserError(f"warmup_updates {warm_up} leaves nothing of max_update {total}: give fewer, or more updates")


def run(args: argparse.Namespace) -> None:
    import torch

    words = args.overrides if args.preset is None else [f"{PRESET}={args.preset}", *args.overrides]
    options = resolve(args.recipe, words, cpu=not torch.cuda.is_available())
    arguments = to_arguments(options)
    if args.dry_run:
        print("fairseq-train", *arguments)
        return
    commands = [[sys.executable, "-u", "-m", "fairseq_cli.train", *arguments]]
    if args.processes > 1:
        commands = _together(commands[0], args.processes)
    log = Path(str(options["save_dir"])) / LOG_NAME
    print(f"emkum: training {args.recipe} on {options['data']}; full log in {log}", flush=True)
    sys.exit(_watch(commands, log, Progress(int(options.get("max_update", 0)))))


def _together(command: list[str], processes: int) -> list[list[str]]:
    """One command a process, for CPU processes that share a gloo group."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"tcp://localhost:{free.getsockname()[1]}"
    common = [
        "--distributed-backend=gloo",
        f"--distributed-world-size={processes}",
        # Without this flag fairseq starts no process at all and exits with success.
        "--distributed-no-spawn",
        f"--distributed-init-method={address}",
        # fairseq's default wrapper asks for device ids, which a CPU has not.
        "--ddp-backend=legacy_ddp",
    ]
    return [[*command, *common, f"--distributed-rank={rank}"] for rank in range(processes)]


def _watch(commands: list[list[str]], log: Path, progress: Progress) -> int:
    """Run the commands side by side; show the first one's progress, keep its log; end all when one fails."""
    environment = dict(os.environ)
    if len(commands) > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(commands))))
    log.parent.mkdir(parents=True, exist_ok=True)
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    quiet = {"stdout": subprocess.DEVNULL}
    children = [
        subprocess.Popen(command, env=environment, **(quiet if rank else pipe)) for rank, command in enumerate(commands)
    ]
    try:
        with log.open("a", buffering=1) as file:
            for line in children[0].stdout:
                file.write(line)
                shown = progress.show(line)
                if shown is not None:
                    print(shown, flush=True)
        return max(abs(child.wait()) for child in children)
    finally:
        for child in children:
            child.terminate()
