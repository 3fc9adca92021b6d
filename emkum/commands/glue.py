"""`emkum glue`: a text encoder on GLUE, every task and seed one after the other, and one table."""

import argparse
import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emkum.commands import train
from emkum.commands.arguments import parse_seeds
from emkum.commands.kept_run import Ended, KeptRun
from emkum.errors import UserError
from emkum.files import replaced_file
from emkum.provenance import package_versions, write_json
from emkum.recipe import parse_overrides, read_options, to_arguments

if TYPE_CHECKING:
    import numpy as np

    from emkum.data.glue import GlueDataset
    from emkum.models.text_classifier import TextClassifier

RECIPE = train.USER_DIR.parent / "examples" / "glue.yaml"
SETTINGS_NAME, RESULT_NAME = "settings.json", "result.json"
# Part of the updates over which the learning rate rises.
_WARM_UP = 0.1
_PREDICTED_AT_ONCE = 128
# Recipe keys that this command has its own words for.
_RESERVED = {
    "data": "--data",
    "glue_task": "--tasks",
    "seed": "--seeds",
    "save_dir": "--out",
    "max_epoch": "--epochs",
    "init_from": "SOURCE",
    "init_layers": "--layers",
    "init_random": "--from-scratch",
    "glue_tokenizer": "--tokenizer",
}
_COLUMNS = {"task": "task", "metrics": "metric", "rows": "train rows", "constant": "constant"}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "glue",
        help="fine-tune a text encoder on GLUE and make one table",
        description="Fine-tune a text encoder on each prepared task of GLUE with each seed, one run after the other, "
        "and write a table of the official metrics in percent: best and median over the seeds, and the mean over the "
        "tasks. Runs that are finished are not run again; one that was stopped goes on. Of each task's best seed, the "
        "predictions on the test set are written as the benchmark's server wants them.",
        epilog="example: emkum glue runs/text_student lr=[0.0001] --data data/glue --tasks CoLA,RTE --seeds 1,2,3",
    )
    parser.add_argument(
        "source", help="text encoder: a run's folder or checkpoint, bert:DIR_OR_NAME, data2vec2:FILE or beit3:FILE"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the recipe's")
    parser.add_argument(
        "--data", type=Path, default=Path("data/glue"), help="folder that `emkum prepare glue` made (%(default)s)"
    )
    parser.add_argument("--tasks", default="", metavar="NAME,NAME", help="these alone; otherwise all that are there")
    parser.add_argument("--seeds", default="1,2,3", metavar="N,N", help="seeds of the runs (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for runs, table and predictions (default: runs/glue/SOURCE)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training data (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=0, help="the encoder's first so many blocks; 0 = all")
    parser.add_argument("--tokenizer", default="", help="the encoder's tokenizer, where it does not come with one")
    parser.add_argument(
        "--from-scratch", action="store_true", help="random weights in the encoder's architecture: the control"
    )
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="recipe of the runs (default: examples/glue.yaml)")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints of finished runs")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Run:
    """Fine-tuning on one task with one seed.

    Attributes:
        folder: of its checkpoints and results. data: of the prepared task.
        options: recipe keys.
        identity: of the encoder that it starts from.
    """

    task: str
    seed: int
    folder: Path
    data: Path
    options: dict[str, Any]
    identity: dict[str, Any]

    @property
    def kept(self) -> KeptRun:
        """What tells it from other runs, and how far it is."""
        options = {key: value for key, value in self.options.items() if key != "save_dir"}
        return KeptRun(self.folder / SETTINGS_NAME, {"options": options, "encoder": self.identity})


def run(args: argparse.Namespace) -> None:
    runs = _plan(args)
    done, failed = [], []
    for number, each in enumerate(runs, start=1):
        print(f"emkum: {each.task} with seed {each.seed}, run {number} of {len(runs)}", flush=True)
        result = _result(each, args)
        if result is None:
            failed.append(f"{each.task} with seed {each.seed}")
            continue
        done.append(result)
        for split, figures in result["sets"].items():
            print(f"emkum: {split}", *(f"{name} {value:.1f}" for name, value in figures.items()), flush=True)
    seeds = len(parse_seeds(args.seeds))
    whole = [each for each in done if sum(other["task"] == each["task"] for other in done) == seeds]
    if whole:
        _report(args, runs, whole)
    if failed:
        raise UserError(f"did not finish: {', '.join(failed)}; their logs are below {runs[0].folder.parent.parent}")


# ----------------------------------------------------------------------------------------------------------------------
# What to run
# ----------------------------------------------------------------------------------------------------------------------


def _plan(args: argparse.Namespace) -> list[Run]:
    """All runs, with whatever can be wrong with them found before the first one begins."""
    tasks, seeds = _tasks(args.data, args.tasks), parse_seeds(args.seeds)
    if args.epochs < 1:
        raise UserError(f"--epochs {args.epochs}: want 1 or more")
    overrides = parse_overrides(args.overrides)
    for key in overrides:
        if key in _RESERVED:
            raise UserError(f"override {key!r} is given by {_RESERVED[key]} here")
    from emkum.models.encoder_sources import load_text_encoder

    identity = load_text_encoder(args.source, args.tokenizer, args.layers).identity
    common = {"data": str(args.data), "init_from": args.source, "init_layers": args.layers}
    common |= {"init_random": args.from_scratch, "glue_tokenizer": args.tokenizer}
    out = args.out or Path("runs") / "glue" / _default_name(args)
    runs = []
    for task in tasks:
        data = args.data / task
        length = _length(data, args, overrides)
        for seed in seeds:
            folder = out / task / f"seed{seed}"
            options = common | length | overrides | {"glue_task": task, "seed": seed, "save_dir": str(folder)}
            runs.append(Run(task, seed, folder, data, options, identity))
    to_arguments(train.resolve(str(args.recipe), _words(runs[0].options), cpu=True))
    for each in runs:
        if names := ", ".join(each.kept.differing()):
            raise UserError(f"{each.folder} holds another run (it differs in {names}): give another --out")
    return runs


def _tasks(data: Path, chosen: str) -> list[str]:
    """The chosen tasks of a prepared folder, else all that are there."""
    from emkum.data.shards import available_splits
    from emkum.data.tables import TABLE_NAME
    from emkum.evaluation.glue import TASKS

    splits = {task: available_splits(data / task, TABLE_NAME) for task in TASKS}
    there = [task for task, found in splits.items() if found]
    if not there:
        raise UserError(f"--data: {data} holds no task of GLUE; make it with `emkum prepare glue --out {data}`")
    names = [name.strip() for name in chosen.split(",") if name.strip()] or there
    for name in names:
        if name not in there:
            raise UserError(f"--tasks {name!r}: {data} has {', '.join(there)}")
        missing = [split for split in ("train", *TASKS[name].valid) if split not in splits[name]]
        if missing:
            raise UserError(f"{data / name} has no split {missing[0]!r}: prepare it again, or choose others by --tasks")
    return list(dict.fromkeys(names))


def _default_name(args: argparse.Namespace) -> str:
    """From the source's name, so that different encoders have different folders."""
    name = re.sub(r"[^\w.-]+", "_", args.source.rstrip("/").split("/")[-1])
    return name + (f"_{args.layers}_layers" if args.layers else "") + ("_from_scratch" if args.from_scratch else "")


def _length(data: Path, args: argparse.Namespace, overrides: dict[str, Any]) -> dict[str, int]:
    """Recipe keys of how long to train on a task, and of how the learning rate goes."""
    import torch

    from emkum.data.tables import Table

    options = read_options(args.recipe, args.overrides)
    batches = math.ceil(len(Table(data / "train")) / int(options["batch_size"]))
    frequency = options.get("update_freq", 1)
    together = int(frequency[0] if isinstance(frequency, list) else frequency) * max(1, torch.cuda.device_count())
    updates = overrides.get("max_update", args.epochs * math.ceil(batches / together))
    return {
        "max_epoch": args.epochs,
        "max_update": updates,
        "total_num_update": updates,
        "warmup_updates": int(_WARM_UP * updates),
    }


def _words(options: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in options.items() if value != ""]


# ----------------------------------------------------------------------------------------------------------------------
# One run
# ----------------------------------------------------------------------------------------------------------------------


def _result(each: Run, args: argparse.Namespace) -> dict[str, Any] | None:
    """Train, unless that is done, and score; None where training failed."""
    path = each.folder / RESULT_NAME
    if each.kept.record() and path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    result = {"task": each.task, "seed": each.seed}

    def work() -> Ended:
        status = _train(args.recipe, _words(each.options))
        if status == 0:
            result.update(_score(each))
        return Ended(status)

    record = each.kept.carry_out(work)
    if not record["finished"]:
        return None
    result["seconds"] = record["seconds"]
    write_json(path, result)
    if not args.keep:
        for checkpoint in each.folder.glob("checkpoint*.pt"):
            checkpoint.unlink()
    return result


def _train(recipe: Path, words: list[str]) -> int:
    """Exit status of `emkum train`, run in this process: starting one more takes longer than the smallest task."""
    try:
        train.run(argparse.Namespace(recipe=str(recipe), overrides=words, preset=None, processes=1, dry_run=False))
    except UserError:
        raise
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def _score(each: Run) -> dict[str, Any]:
    """Figures of the best checkpoint on the validation sets; its predictions of the test sets go into files.

    Raises:
        UserError: the model's outputs are not finite.
    """
    import torch

    from emkum.data.glue import GlueDataset, read_classes
    from emkum.data.shards import available_splits
    from emkum.data.tables import TABLE_NAME
    from emkum.evaluation.glue import SCORE, TASKS, glue_metrics, submission
    from emkum.models.text_classifier import load_text_classifier

    scoring, classes = TASKS[each.task], read_classes(each.data)
    found = load_text_classifier(each.folder, len(classes))
    classifier = found.classifier.to("cuda" if torch.cuda.is_available() else "cpu")
    sets = {}
    for split in available_splits(each.data, TABLE_NAME):
        is_test = split in scoring.tests
        if split not in scoring.valid and not is_test:
            continue
        dataset = GlueDataset(each.data / split, found.tokenizer, len(classes), found.max_tokens, labeled=not is_test)
        predictions = predict(classifier, dataset)
        if not is_test:
            sets[split] = glue_metrics(each.task, predictions, dataset.labels)
            continue
        try:
            text = submission(dataset.index, predictions, _spelled(each.task, classes))
        except ValueError:
            raise UserError(f"{each.folder}: what the model says of {split} is not finite; train it anew") from None
        with replaced_file(each.folder / scoring.tests[split]) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return {"sets": sets, "score": sum(figures[SCORE] for figures in sets.values()) / len(sets)}


def _spelled(task: str, classes: Sequence[str]) -> list[str]:
    """The classes as the task's files have them: by name or by number."""
    from emkum.prepare.glue import TASKS

    spelled = next(each.spelled for each in TASKS if each.name == task)
    return [name if spelled else str(label) for label, name in enumerate(classes)]


def predict(classifier: "TextClassifier", dataset: "GlueDataset") -> "np.ndarray":
    """(n,) float64, a classifier's class, or score, for each row of a split."""
    import numpy as np
    import torch

    device = next(classifier.parameters()).device
    predictions = np.empty(len(dataset))
    with torch.inference_mode():
        for rows in dataset.batches(_PREDICTED_AT_ONCE):
            inputs = dataset.collate([dataset[row] for row in rows])["net_input"]
            padding = inputs["padding_mask"]
            outputs = classifier(inputs["text"].to(device), None if padding is None else padding.to(device))
            predictions[rows] = classifier.predictions(outputs).double().cpu().numpy()
    return predictions


# ----------------------------------------------------------------------------------------------------------------------
# All runs
# ----------------------------------------------------------------------------------------------------------------------


def _report(args: argparse.Namespace, runs: list[Run], done: list[dict[str, Any]]) -> None:
    """Write and print the table; put the best seeds' predictions of the test sets together."""
    from emkum.evaluation.glue import summarize
    from emkum.evaluation.report import format_table

    out = runs[0].folder.parent.parent
    scores: dict[str, dict[int, float]] = {}
    for result in done:
        scores.setdefault(result["task"], {})[result["seed"]] = result["score"]
    rows = summarize(scores)
    for row in rows[:-1]:
        row |= _about_task(next(each for each in runs if each.task == row["task"]))
    rows[-1]["constant"] = sum(row["constant"] for row in rows[:-1]) / len(scores)
    seeds = [f"seed {seed}" for seed in next(iter(scores.values()))]
    columns = _COLUMNS | {name: name for name in (*seeds, "best", "median", "spread")}
    files = _collect_submissions(out, scores)
    content = {"source": args.source, "from_scratch": args.from_scratch, "rows": rows, "runs": done, "files": files}
    write_json(out / "glue.json", content | dict(runs[0].kept.identity) | {"versions": package_versions()})
    title = f"# GLUE: {args.source}" + (", from scratch" if args.from_scratch else "")
    text = f"{title}\n\n{format_table(rows, columns, markdown=True)}\n\n{_notes(args, done)}\n"
    with replaced_file(out / "glue.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(format_table(rows, columns))
    print(f"written to {out / 'glue.md'}")
    if files:
        print(f"predictions of the test sets for GLUE's server: {len(files)} in {out / 'submission'}")


def _about_task(each: Run) -> dict[str, Any]:
    """What a row says beside the scores; "constant" is the score of the most frequent label."""
    import numpy as np

    from emkum.data.tables import Table
    from emkum.evaluation.glue import TASKS, constant_score

    def labels(split: str) -> np.ndarray:
        table = Table(each.data / split)
        return np.array([table[number]["label"] for number in range(len(table))], dtype=np.float64)

    train_labels, scoring = labels("train"), TASKS[each.task]
    return {
        "metrics": ", ".join(scoring.metrics),
        "rows": len(train_labels),
        "constant": constant_score(each.task, train_labels, [labels(split) for split in scoring.valid]),
    }


def _collect_submissions(out: Path, scores: dict[str, dict[int, float]]) -> list[str]:
    """Copy the files of each task's best seed, the first of equals, into one folder; their names."""
    from emkum.evaluation.glue import TASKS

    names = []
    for task, by_seed in scores.items():
        best = max(by_seed, key=by_seed.get)
        for name in TASKS[task].tests.values():
            source = out / task / f"seed{best}" / name
            if source.is_file():
                (out / "submission").mkdir(exist_ok=True)
                with replaced_file(out / "submission" / name) as temporary:
                    shutil.copyfile(source, temporary)
                names.append(name)
    return names


def _notes(args: argparse.Namespace, done: list[dict[str, Any]]) -> str:
    """What a reader of the table must know."""
    options = read_options(args.recipe, args.overrides)
    seconds = [result["seconds"] for result in done]
    took = "" if None in seconds else f" All runs took {sum(seconds) / 60:.0f} minutes."
    return (
        "Scores are the official metrics on the validation sets in percent: their mean where a task has two metrics\n"
        "or, as MNLI, two sets. Best, median and spread (best less worst) are over the seeds; of each run the best\n"
        "epoch counts. Constant is the score of the most frequent label.\n"
        f"Epochs: {args.epochs}, batches of {options['batch_size']}, learning rate {_first(options['lr']):g}.{took}"
    )


def _first(values: Any) -> float:
    return float(values[0] if isinstance(values, list) else values)
