"""`emkum evaluate zero-shot`: a trained student as a classifier that has seen no label."""

import argparse
import csv
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emkum.commands.arguments import assert_at_least
from emkum.errors import UserError
from emkum.provenance import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from emkum.checkpoint import ImageTextModel
    from emkum.data.prompts import ClassPrompts, PromptedSet
    from emkum.data.shards import ShardedSamples
    from emkum.evaluation.zero_shot import Classified


def add_parser(kinds: Any) -> None:
    """Add the sub-command `zero-shot`."""
    parser = kinds.add_parser(
        "zero-shot",
        help="classification by the captions of classes",
        description="Classify images by the cosine to their classes' captions (CLIP's protocol: the mean of a class's "
        "unit text features over all names and templates, normalized again). Ties count against the model. Without "
        "--prompts the set's own class names are put into 'a photo of a {}.'. FILE is "
        '{"classes": ["cat", "dog"], "templates": ["a photo of a {}.", "a drawing of a {}."]}: names in the order of '
        "the set's labels, or an object from its class names (or wnid) to a name or a list of names; CLIP's own files "
        "({c} in templates, classnames) fit, too.",
        epilog="example: emkum evaluate zero-shot --checkpoint runs/flickr8k --data data/cifar10 --prompts "
        "cifar10_prompts.json --confusion confusion.png",
    )
    parser.add_argument("--checkpoint", required=True, help="checkpoint file, or a run's folder for its best one")
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="folder that `emkum prepare` made of a set with classes"
    )
    parser.add_argument("--split", default="test", help="split to score (default: %(default)s)")
    parser.add_argument("--prompts", metavar="FILE", help="class names and templates, see above")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--per-class", metavar="FILE.csv", help="also write each class's accuracy to this file")
    parser.add_argument(
        "--confusion",
        metavar="FILE.png",
        help="also draw what is taken for what, as PNG and SVG: a matrix, or of many classes the most confused pairs",
    )
    parser.add_argument("--batch-size", type=int, default=128, help="images encoded at once (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="decoding processes; 0 = none (default: 1, with a GPU up to 8)"
    )
    parser.set_defaults(run=run)


def image_features(
    model: "ImageTextModel", samples: "ShardedSamples", batch_size: int = 128, workers: int = 0
) -> "Tensor":
    """(n, D) unit vectors of every image of a split, float32 on the CPU; shows its progress.

    Args:
        model: a student.
        samples: the split.
        batch_size: images encoded at once.
        workers: decoding processes; 0 = none.

    Raises:
        UserError: an image is damaged, or features are not finite.
    """
    import torch
    from tqdm import tqdm

    from emkum.data.crops import centered_crops

    parts = []
    with tqdm(total=len(samples), desc="encoding images", unit="image", disable=None) as progress:
        for crops in centered_crops(samples, model.image_size, batch_size, workers):
            parts.append(_finite(model.encode_crops(crops)))
            progress.update(len(crops))
    return torch.cat(parts)


def classify_set(model: "ImageTextModel", found: "PromptedSet", images: "Tensor") -> "Classified":
    """Classify every image of a set.

    Args:
        model: a student.
        found: the set.
        images: (n, D) of `image_features`.

    Raises:
        UserError: features are not finite.
    """
    from emkum.evaluation.zero_shot import class_features, classify

    captions, owners = found.prompts.texts(range(len(found.class_names)))
    classes = class_features(_finite(model.encode_text(captions)), owners, len(found.class_names))
    return classify(images, classes, found.labels)


def _finite(features: "Tensor") -> "Tensor":
    if not bool(features.isfinite().all()):
        raise UserError("the model's features are NaN or infinite: its weights are broken")
    return features


def run(args: argparse.Namespace) -> None:
    assert_at_least(args, batch_size=1, workers=0)
    import torch

    from emkum.checkpoint import load
    from emkum.commands.image_features import default_workers
    from emkum.data.prompts import open_prompted_set
    from emkum.evaluation.report import format_table
    from emkum.evaluation.zero_shot import zero_shot_metrics

    found = open_prompted_set(args.data, args.split, args.prompts)
    model = load(args.checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")
    workers = default_workers() if args.workers is None else args.workers
    result = classify_set(model, found, image_features(model, found.samples, args.batch_size, workers))
    metrics = zero_shot_metrics(result.ranks, found.labels, len(found.class_names))
    print(
        f"{args.data}, {args.split}: {metrics['num_images']:,} images of {metrics['num_classes']:,} classes; "
        f"{len(found.prompts.templates):,} templates"
    )
    shared = sharing_texts(found.prompts)
    if shared:
        print(f"{shared:,} classes have the texts of another one: they tie, and ties count against the model")
    rows = [
        {"name": "chance", "top_1": metrics["chance_top_1"], "top_5": metrics["chance_top_5"]},
        {"name": str(args.checkpoint), **metrics},
    ]
    columns = {"name": "", "top_1": "top-1 %", "top_5": "top-5 %", "mean_per_class": "mean per class %"}
    print(format_table(rows, columns, decimals=2))
    _write(args, found, result, metrics)


def sharing_texts(prompts: "ClassPrompts") -> int:
    """How many classes have the same names as another one."""
    counts = Counter(frozenset(names) for names in prompts.names)
    return sum(count for count in counts.values() if count > 1)


def _write(args: argparse.Namespace, found: "PromptedSet", result: "Classified", metrics: dict[str, Any]) -> None:
    about = {"checkpoint": str(args.checkpoint), "data": args.data, "split": args.split, "prompts": args.prompts}
    target = None
    try:
        if args.json:
            target = args.json
            write_json(target, about | {"num_templates": len(found.prompts.templates)} | metrics)
        if args.per_class:
            target = args.per_class
            write_per_class(Path(target), found, result)
        if args.confusion:
            from emkum.evaluation.confusion_figure import confusion_picture

            target = args.confusion
            confusion_picture(target, result.predicted, found.labels, found.class_names)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None


def write_per_class(path: Path, found: "PromptedSet", result: "Classified") -> None:
    """Write a table with one row a class: its accuracy, empty without images, and what it is taken for most.

    Raises:
        OSError: the file cannot be written.
    """
    import numpy as np

    from emkum.evaluation.zero_shot import most_confused, per_class_accuracy
    from emkum.files import replaced_file

    number = len(found.class_names)
    accuracy = {k: per_class_accuracy(result.ranks, found.labels, number, k).tolist() for k in (1, 5)}
    images = np.bincount(found.labels, minlength=number).tolist()
    # The first pair of each class is that with the most images.
    worst = {pair.true: pair for pair in reversed(most_confused(result.predicted, found.labels, number))}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["label", "class", "prompt_names", "images", "top_1", "top_5", "taken_for", "taken_for_images"])
        for label, name in enumerate(found.class_names):
            own = ["" if images[label] == 0 else round(accuracy[k][label], 3) for k in (1, 5)]
            pair = worst.get(label)
            other = ["", 0] if pair is None else [found.class_names[pair.predicted], pair.images]
            table.writerow([label, name, "; ".join(found.prompts.names[label]), images[label], *own, *other])
