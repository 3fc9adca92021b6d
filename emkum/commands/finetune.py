"""`emkum evaluate finetune`: what an image encoder reaches when all of it learns a set with classes."""

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emkum.commands.arguments import parse_seeds
from emkum.commands.kept_run import KeptRun, run_emkum
from emkum.commands.train import LOG_NAME
from emkum.errors import UserError
from emkum.provenance import describe_machine, write_json

RECIPE = Path(__file__).resolve().parents[2] / "examples" / "image_classification.yaml"

HUB, RANDOM = "hub", "random"
_RECORD = "finetune.json"
_SETS_ITSELF = {
    "data": "--data",
    "init_from": "SOURCE",
    "seed": "--seeds",
    "save_dir": "--out",
    "valid_subset": "the splits of --data",
    "init_weights": "--weights",
    "init_image_size": "--image-size",
    "init_layers": "--layers",
}
COLUMNS = {"seed": "seed", "top1": "top-1 %", "top5": "top-5 %", "best_top1": "best top-1 %", "update": "update"}


def add_parser(kinds: Any) -> None:
    """Add the sub-command `finetune`.

    Args:
        kinds: the sub-commands of `emkum evaluate`.
    """
    parser = kinds.add_parser(
        "finetune",
        help="fine-tune an image encoder on a set with classes, with several seeds",
        description="Train examples/image_classification.yaml from the encoder, once a seed, and print the top-1 "
        "accuracy with its spread. A set with the splits valid and test is scored on test at the update with the best "
        "top-1 on valid; a set with one of them is scored on it at the last update. A run that was stopped goes on "
        "when the command is given again; one that is finished is not run again.",
        epilog="example: emkum evaluate finetune runs/student batch_size=64 lr=0.0005 --data data/cifar10 --epochs 10 "
        "--seeds 1,2,3 --out runs/finetune",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="image encoder: a run's folder or checkpoint, timm:NAME, data2vec2:FILE or beit3:FILE",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="options that replace the recipe's",
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of a set with classes, by `emkum prepare`")
    parser.add_argument(
        "--weights", metavar="FILE", help="of timm:NAME: a local file, 'hub' to download them (default), or 'random'"
    )
    parser.add_argument(
        "--image-size", type=int, default=0, metavar="PIXELS", help="side of the crops; 0 = as trained (default)"
    )
    parser.add_argument("--layers", type=int, default=0, metavar="N", help="keep the first N blocks; 0 = all (default)")
    parser.add_argument("--epochs", type=int, metavar="N", help="length of each run; without it as the recipe has it")
    parser.add_argument("--seeds", default="1", metavar="N,N", help="one run each (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/finetune"), metavar="DIR", help="folder (default: %(default)s)"
    )
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Scoring:
    """Which splits a run is validated on.

    Attributes:
        scored: the split whose accuracy counts.
        chosen_by: the split by whose top-1 the update is chosen; None = the last update.
    """

    scored: str
    chosen_by: str | None = None

    @property
    def subsets(self) -> str:
        """For fairseq; the best checkpoint is that of the first one."""
        return self.scored if self.chosen_by is None else f"{self.chosen_by},{self.scored}"


def run(args: argparse.Namespace) -> None:
    from emkum.data.labels import read_class_names
    from emkum.models.encoder_sources import load_image_encoder

    seeds = parse_seeds(args.seeds)
    options = common_options(args)
    scoring = choose_scoring(args.data)
    read_class_names(args.data.split(os.pathsep)[0])
    weights = choose_weights(args.source, args.weights)
    encoder = {"weights": weights, "image_size": args.image_size, "layers": args.layers}
    # Mistakes in the source and the data show before the first run.
    identity = load_image_encoder(args.source, **encoder).identity
    if args.weights == RANDOM:
        # Each run draws its own.
        del identity["weights_sha256"]
    options |= {"data": args.data, "init_from": args.source, "valid_subset": scoring.subsets}
    options |= {f"init_{name}": value for name, value in encoder.items() if value}
    results = []
    for seed in seeds:
        folder = args.out / f"seed{seed}"
        train_once(options | {"seed": seed, "save_dir": str(folder)}, identity, folder)
        results.append({"seed": seed, **read_result(folder / LOG_NAME, scoring)})
    summary = summarize(results)
    report = {"source": args.source, "encoder": identity, "data": args.data, "split": scoring.scored}
    report |= {"chosen_by": scoring.chosen_by, "options": options, "runs": results, **summary}
    write_json(args.out / _RECORD, report | {"machine": describe_machine()})
    _print(results, summary, scoring)
    print(f"written to {args.out / _RECORD}")


def choose_weights(source: str, weights: str | None) -> str:
    """What the encoder is built with: a file, `hub`, or empty where it is random or has its own.

    Raises:
        UserError: the source has its own, and others are given.
    """
    if source.partition(":")[0] == "timm":
        return {None: HUB, RANDOM: ""}.get(weights, weights)
    if weights is not None:
        raise UserError(f"--weights {weights}: {source} has its own; leave it out")
    return ""


def choose_scoring(data: str) -> Scoring:
    """
    Raises:
        UserError: the folder has no training images, or no others.
    """
    from emkum.data.shards import available_splits

    # Further folders are trained on alone.
    folder = data.split(os.pathsep)[0]
    splits = available_splits(folder)
    scored = [split for split in ("test", "valid") if split in splits]
    if "train" not in splits or not scored:
        there = f"has the splits {', '.join(splits)}" if splits else "holds no prepared split"
        raise UserError(f"--data: {folder} {there}; want train, and valid or test or both")
    return Scoring(*scored)


def common_options(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe's options, as all runs have them. They are spelled out, so that the record of a run tells it from one
    by a recipe that has changed since.

    Raises:
        UserError: an option is malformed or is what the command itself sets.
    """
    from emkum.recipe import parse_overrides, read_recipe

    given = parse_overrides(args.overrides)
    by_command = _SETS_ITSELF | ({} if args.epochs is None else {"max_update": "--epochs"})
    for name in given.keys() & by_command.keys():
        raise UserError(f"{name} is set by {by_command[name]}: leave {name}= out")
    recipe = read_recipe(RECIPE)
    if args.epochs is None:
        return recipe | given
    if args.epochs < 1:
        raise UserError(f"--epochs {args.epochs}: want 1 or more")
    updates = args.epochs * updates_per_epoch(args.data, recipe | given)
    # The same part of the run as in the recipe.
    warm_up = updates * recipe["warmup_updates"] // recipe["max_update"]
    return recipe | {"max_update": updates, "warmup_updates": warm_up} | given


def updates_per_epoch(data: str, options: Mapping[str, Any]) -> int:
    """
    Args:
        data: prepared folders, as A:B.
        options: of a run; batch_size, update_freq and where it runs count here.

    Raises:
        UserError: there are fewer training images than one batch a device.
    """
    from emkum.data.shards import open_split

    images = sum(len(open_split(folder, "train", require_captions=False)) for folder in data.split(os.pathsep))
    batch_size, devices = int(options["batch_size"]), _count_devices(options)
    batches = images // batch_size // devices
    if batches == 0:
        raise UserError(
            f"{data}: {images} training images are too few for batch_size={batch_size} on {devices} devices"
        )
    frequency = options.get("update_freq", 1)
    return math.ceil(batches / int(frequency[0] if isinstance(frequency, Sequence) else frequency))


def _count_devices(options: Mapping[str, Any]) -> int:
    import torch

    if "distributed_world_size" in options:
        return int(options["distributed_world_size"])
    return 1 if options.get("cpu") else max(1, torch.cuda.device_count())


def train_once(options: dict[str, Any], identity: dict[str, Any], folder: Path) -> None:
    """Train one seed to its end, unless that is done.

    Args:
        options: of `emkum train`.
        identity: of the encoder that it starts from.
        folder: of the run.

    Raises:
        UserError: the folder holds a run with other options.
        SystemExit: the run ended with an error, which it has told of itself.
    """
    kept = KeptRun(folder / _RECORD, {"options": options, "encoder": identity})
    # A run that ended before its first checkpoint has left nothing to go on from.
    if (folder / "checkpoint_last.pt").is_file():
        if not kept.path.is_file():
            raise UserError(f"{folder} holds a run of another command: give another --out")
        differing = ", ".join(kept.differing())
        if differing:
            raise UserError(f"{folder} holds a run with other options (it differs in {differing}): give another --out")
        if kept.is_finished():
            return
    words = [f"{key}={json.dumps(value)}" for key, value in options.items()]
    record = kept.carry_out(lambda: run_emkum(["train", str(RECIPE), *words]))
    if not record["finished"]:
        sys.exit(abs(record["status"]))


def read_result(log: Path, scoring: Scoring) -> dict[str, Any]:
    """Figures of a finished run.

    Returns:
        top1, top5, loss of the scored split at `update`, and best_top1, the highest that it had at any validation;
        seconds, of the whole run.
    """
    from emkum.training_log import read_training_log

    histories = read_training_log(log)
    scored, chosen = histories[scoring.scored], chosen_record(histories, scoring, "top1")
    return {
        "update": int(chosen["step"]),
        **{name: chosen[name] for name in ("top1", "top5", "loss")},
        "best_top1": max(record["top1"] for record in scored),
        "seconds": histories["train"][-1].get("wall"),
    }


def chosen_record(
    histories: Mapping[str, Sequence[Mapping[str, float]]], scoring: Scoring, key: str
) -> Mapping[str, float]:
    """What counts of a run: the record of the scored split at the last update, or at that with the best `key` on the
    split that chooses; of equals the last, as fairseq keeps it."""
    scored = histories[scoring.scored]
    if scoring.chosen_by is None:
        return scored[-1]
    best = max(histories[scoring.chosen_by], key=lambda record: (record[key], record["step"]))
    return next(record for record in scored if record["step"] == best["step"])


def summarize(results: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Mean, standard deviation (of a sample; None of one run), lowest and highest top-1, and mean top-5."""
    top1 = [result["top1"] for result in results]
    return {
        "top1_mean": statistics.fmean(top1),
        "top1_std": statistics.stdev(top1) if len(top1) > 1 else None,
        "top1_min": min(top1),
        "top1_max": max(top1),
        "top5_mean": statistics.fmean(result["top5"] for result in results),
    }


def _print(results: Sequence[Mapping[str, Any]], summary: Mapping[str, float | None], scoring: Scoring) -> None:
    from emkum.evaluation.report import format_table

    print(format_table(results, COLUMNS, decimals=2))
    spread = ""
    if summary["top1_std"] is not None:
        spread = f" ± {summary['top1_std']:.2f} ({summary['top1_min']:.2f} to {summary['top1_max']:.2f})"
    runs = "1 run" if len(results) == 1 else f"{len(results)} runs"
    print(f"top-1 on {scoring.scored}: {summary['top1_mean']:.2f}{spread} %, {runs}")
