"""`emkum report`: runs side by side, as one table and pictures."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emkum.commands.evaluate import EncodedSplit, encode_split
from emkum.commands.train import LOG_NAME
from emkum.errors import UserError
from emkum.provenance import write_json

if TYPE_CHECKING:
    from emkum.data.shards import ShardedSamples


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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import torch

    from emkum.checkpoint import load
    from emkum.data.shards import open_split
    from emkum.evaluation.figures import loss_curves
    from emkum.evaluation.report import retrieval_table
    from emkum.evaluation.retrieval import chance_recall, recall_metrics

    folders = dict(_named(word) for word in args.runs)
    samples = open_split(args.data, args.split)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {}
    for name, folder in folders.items():
        encoded = encode_split(load(folder, device=device), samples)
        results[name] = recall_metrics(encoded.images, encoded.texts, encoded.caption_image)
    results = {"chance": chance_recall(len(samples), encoded.caption_image)} | results
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "report.json", {"split": args.split, "results": results})
    files = _show_examples(args.out / "retrieval", samples, encoded, args.examples)
    histories = _histories(folders)
    if histories:
        files += loss_curves(args.out / "curves", histories, _panels(histories))
    print(retrieval_table(results))
    print("pictures:", *(str(file) for file in files if file.suffix == ".png"))


def _named(word: str) -> tuple[str, Path]:
    name, equals, folder = word.partition("=")
    folder = Path(folder if equals else name)
    if not folder.is_dir():
        raise UserError(f"{word}: there is no folder {folder}")
    return (name if equals else folder.name), folder


def _histories(folders: dict[str, Path]) -> dict[str, list[dict[str, float]]]:
    """Validation records of the runs that kept a log."""
    from emkum.training_log import read_training_log

    logs = {name: folder / LOG_NAME for name, folder in folders.items()}
    found = {name: read_training_log(log).get("valid") for name, log in logs.items() if log.is_file()}
    return {name: history for name, history in found.items() if history}


def _panels(histories: dict[str, list[dict[str, float]]]) -> list[str]:
    """Every objective's own loss, since sums over different objectives do not compare, and the mean recall."""
    keys = dict.fromkeys(key for history in histories.values() for record in history for key in record)
    losses = [key for key in keys if key.endswith("_loss") and "image_" not in key and "text_" not in key]
    return [*losses, *(key for key in ("mean_recall",) if key in keys)] or ["loss"]


def _show_examples(path: Path, samples: "ShardedSamples", encoded: EncodedSplit, count: int) -> list[Path]:
    """Evenly spread queries of both directions with what the student retrieves for them."""
    from emkum.data.decoding import decode
    from emkum.evaluation.figures import retrieval_examples
    from emkum.evaluation.retrieval import nearest

    found = nearest(encoded.images, encoded.texts, k=5)
    owner = encoded.caption_image.tolist()
    # The middles of equal parts for one direction, their thirds for the other: the page shows more of the data.
    image_rows = [int((i + 1 / 2) * len(encoded.images) / count) for i in range(count)]
    caption_rows = [int((i + 1 / 3) * len(owner) / count) for i in range(count)]
    image_to_text = {row: found.image_to_text[row].tolist() for row in image_rows}
    text_to_image = {row: found.text_to_image[row].tolist() for row in caption_rows}
    shown_images = {*image_rows, *(row for rows in text_to_image.values() for row in rows)}
    shown_captions = {*caption_rows, *(row for rows in image_to_text.values() for row in rows)}
    first = {}
    for row, image in enumerate(owner):
        first.setdefault(image, row)
    captions = {row: samples[owner[row]].captions[row - first[owner[row]]] for row in shown_captions}
    images = {row: decode(samples[row].image) for row in shown_images}
    return retrieval_examples(path, images, captions, image_to_text, text_to_image, owner)
