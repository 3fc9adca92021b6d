"""`emkum report`: runs side by side, as one table and pictures."""

import argparse
from pathlib import Path
from typing import Any

from emkum.commands.arguments import assert_at_least
from emkum.commands.evaluate import encode_split
from emkum.commands.figures import named_runs, read_histories
from emkum.commands.figures_inputs import open_samples
from emkum.commands.figures_retrieval import show_retrieval
from emkum.provenance import write_json


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="compare runs: one table, retrieved examples, loss curves",
        description="Score the best checkpoint of each run on a split, print one table with the chance level, and "
        "write report.json, the last run's retrieved examples and all runs' curves as PNG and SVG.",
        epilog='example: emkum report "ITC alone=runs/itc" "ITC + KD=runs/kd" --data data/scenes --out runs/report',
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="a run's name and folder; or its folder")
    parser.add_argument("--data", required=True, help="folder made by `emkum prepare`")
    parser.add_argument("--split", default="test", help="split to score (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, help="folder for the report")
    parser.add_argument("--examples", type=int, default=4, help="queries shown each way (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="that draws them (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    assert_at_least(args, examples=1)
    import torch

    from emkum.checkpoint import load
    from emkum.commands.retrieval_inputs import ComparedSplit
    from emkum.evaluation.curves_figure import loss_curves
    from emkum.evaluation.pair_scores import cosine_scores
    from emkum.evaluation.report import retrieval_table
    from emkum.evaluation.retrieval import chance_recall, recall_metrics

    folders = named_runs(args.runs)
    samples = open_samples(args.data, args.split)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {}
    for name, folder in folders.items():
        encoded = encode_split(load(folder, device=device), samples)
        results[name] = recall_metrics(encoded.images, encoded.texts, encoded.caption_image)
    results = {"chance": chance_recall(len(samples), encoded.caption_image)} | results
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "report.json", {"split": args.split, "results": results})
    compared = ComparedSplit(cosine_scores(encoded.images, encoded.texts), None, encoded.caption_image)
    files, _ = show_retrieval(args.out / "retrieval", samples, compared, args.examples, args.seed)
    histories = read_histories(folders, ["valid"])
    if histories:
        files += loss_curves(args.out / "curves", histories, _panels(histories))
    print(retrieval_table(results))
    print("pictures:", *(str(file) for file in files if file.suffix == ".png"))


def _panels(histories: dict[str, list[dict[str, float]]]) -> list[str]:
    """Every objective's own loss, since sums over different objectives do not compare, and the mean recall."""
    from emkum.evaluation.curves_figure import logged_keys

    keys = logged_keys(histories)
    losses = [key for key in keys if key.endswith("_loss") and "image_" not in key and "text_" not in key]
    return [*losses, *(key for key in ("mean_recall",) if key in keys)] or ["loss"]
