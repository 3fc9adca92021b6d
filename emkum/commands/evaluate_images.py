"""`emkum evaluate knn` and `emkum evaluate linear`: what an image encoder's features tell of classes."""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from emkum.commands.arguments import assert_at_least
from emkum.errors import UserError
from emkum.provenance import write_json

if TYPE_CHECKING:
    import numpy as np
    import torch

    from emkum.commands.image_features import LabeledSets
    from emkum.evaluation.linear_probe import Probe

SGD, LOGISTIC = "sgd", "logistic"

# Smallest values of options that both commands have.
_LEAST = {"batch_size": 1, "workers": 0}
# What belongs to each solver in the record of its figures.
_RECORDED = {
    SGD: ("solver", "held_out", "epochs", "update_size"),
    LOGISTIC: ("solver", "held_out", "max_iterations"),
}
_SOURCES = (
    "SOURCE is a run's folder or checkpoint (its image encoder), data2vec2:FILE, timm:NAME, or a whole model: "
    "checkpoint:RUN (a student with its shared encoder), openclip:NAME, beit3:FILE. Models of timm and BEiT-3 are "
    "run whole, with their final norm; with --layers their first blocks alone, as a student starts from them."
)


def add_parser(kinds: Any) -> None:
    """Add the sub-commands `knn` and `linear`."""
    knn = kinds.add_parser(
        "knn",
        help="nearest neighbors of an image encoder's features",
        description="Classify images by the vote of the nearest training images, weighted by exp(cosine / temperature) "
        f"(the protocol of DINO). Classes that tie count against the model. {_SOURCES}",
        epilog="example: emkum evaluate knn runs/distilled --data data/cifar10 --json knn.json",
    )
    _add_common_arguments(knn)
    knn.add_argument(
        "--k", default="10,20,100,200", metavar="K,K", help="neighbors, separated by commas (default: %(default)s)"
    )
    knn.add_argument("--temperature", type=float, default=0.07, help="of the votes' weights (default: %(default)s)")
    knn.set_defaults(run=run_knn)
    linear = kinds.add_parser(
        "linear",
        help="a linear classifier on an image encoder's features",
        description="Train linear classifiers on the features of centered crops, channels standardized. Learning rate "
        "or regularization is chosen on a held-out part of the training images, and the classifier that is scored is "
        f"then trained on all of them. {_SOURCES}",
        epilog="example: emkum evaluate linear timm:deit_tiny_patch16_224 --weights model.safetensors --features mean "
        "--data data/cifar10 --cache features",
    )
    _add_common_arguments(linear)
    _add_probe_arguments(linear)
    linear.set_defaults(run=run_linear)


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="the image encoder, see above")
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="folder that `emkum prepare` made of a set with classes"
    )
    parser.add_argument(
        "--split", default="", help="split to score; empty = test, or else valid (default); train is learned from"
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="of timm:NAME and openclip:NAME: a local file, 'hub' to download them (default), or 'random'",
    )
    parser.add_argument(
        "--image-size", type=int, default=0, metavar="PIXELS", help="side of the crops; 0 = as trained (default)"
    )
    parser.add_argument("--layers", type=int, default=0, metavar="N", help="keep the first N blocks; 0 = all (default)")
    parser.add_argument(
        "--features",
        default="default",
        metavar="WHICH",
        help="cls, mean (of patches), both side by side, or default: the CLS token of an encoder, what a whole model "
        "gives as its global feature",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder to keep features in, for this command and others; they are found again by what they depend on "
        "(default: a temporary one)",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images run at once (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="decoding processes; 0 = none (default: 1, with a GPU up to 8)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of random weights and of draws (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")


def _add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--solver",
        default="sgd",
        metavar="HOW",
        help="sgd (default), or logistic: scikit-learn's logistic regression, for small sets",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.1,
        metavar="F",
        help="part of the training images that the choice is made on (default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rates",
        default="0.0001,0.0003,0.001,0.003,0.01,0.03,0.1,0.3,1",
        metavar="X,X",
        help="of sgd: those that are tried, side by side (default: %(default)s)",
    )
    parser.add_argument("--epochs", type=int, default=100, help="of sgd (default: %(default)s)")
    parser.add_argument(
        "--update-size", type=int, default=256, metavar="N", help="of sgd: images of an update (default: %(default)s)"
    )
    parser.add_argument(
        "--strengths",
        default="0.0001,0.001,0.01,0.1,1,10",
        metavar="C,C",
        help="of logistic: inverse strengths of L2 regularization that are tried (default: %(default)s)",
    )
    parser.add_argument(
        "--max-iterations", type=int, default=1000, metavar="N", help="of logistic, for each (default: %(default)s)"
    )


def parse_numbers(text: str, option: str, kind: Callable[[str], Any]) -> list[Any]:
    """Positive numbers, separated by commas, in ascending order without repetitions.

    Args:
        text: the option's value. option: its name, for messages.
        kind: int or float.

    Raises:
        UserError: something else stands there.
    """
    try:
        numbers = sorted({kind(part) for part in text.split(",") if part.strip()})
    except ValueError:
        numbers = []
    # Written so that NaN fails too.
    if not numbers or not all(0 < number < float("inf") for number in numbers):
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{option} {text!r}: want positive {what}, separated by commas")
    return numbers


class Features(NamedTuple):
    """Features of both splits, and what they were computed by.

    Attributes:
        train, test: (n, D) float32.
        identity: of the model.
        device: it ran on.
    """

    train: "np.ndarray"
    test: "np.ndarray"
    identity: dict[str, Any]
    device: "torch.device"


@contextmanager
def _features(args: argparse.Namespace, sets: "LabeledSets") -> Iterator[Features]:
    """Features, which may be gone after the block."""
    import torch

    from emkum.commands.feature_models import open_model
    from emkum.commands.image_features import default_workers, split_features

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workers = default_workers() if args.workers is None else args.workers
    torch.manual_seed(args.seed)
    model = open_model(args.source, _weights(args), args.image_size, args.layers, args.features, device)

    def compute(folder: Path) -> Features:
        train, test = (
            split_features(model, split.samples, folder, args.batch_size, workers) for split in (sets.train, sets.test)
        )
        return Features(train, test, model.identity, device)

    if args.cache is not None:
        yield compute(args.cache)
        return
    with tempfile.TemporaryDirectory(prefix="emkum-features-") as folder:
        yield compute(Path(folder))


def _weights(args: argparse.Namespace) -> str:
    """What the model is built with: a file, `hub`, or empty."""
    kind = args.source.partition(":")[0]
    if kind not in ("timm", "openclip"):
        if args.weights is not None:
            raise UserError(f"--weights {args.weights}: {args.source} has its own; leave it out")
        return ""
    return {None: "hub", "random": ""}.get(args.weights, args.weights)


def run_knn(args: argparse.Namespace) -> None:
    from emkum.commands.image_features import open_sets
    from emkum.evaluation.classification import top_k_accuracy
    from emkum.evaluation.report import format_table

    sets = open_sets(args.data, args.split)
    ks = vote_counts(args, sets)
    with _features(args, sets) as found:
        accuracy = {k: top_k_accuracy(ranks) for k, ranks in neighbor_ranks(args, sets, found, ks).items()}
        _print_head(args, sets, found)
        rows = [{"k": k, **accuracy[k]} for k in ks]
        print(format_table(rows, {"k": "k", "top_1": "top-1 %", "top_5": "top-5 %"}, decimals=2))
        metrics = {f"k{k}_{name}": value for k in ks for name, value in accuracy[k].items()}
        _write(args, sets, found, metrics | {"temperature": args.temperature})


def vote_counts(args: argparse.Namespace, sets: "LabeledSets") -> list[int]:
    """The numbers of neighbors; raises UserError where an option has no sense."""
    ks = parse_numbers(args.k, "--k", int)
    if not args.temperature > 0:
        raise UserError(f"--temperature {args.temperature}: want more than 0")
    assert_at_least(args, **_LEAST)
    if ks[-1] > len(sets.train.labels):
        raise UserError(
            f"--k {ks[-1]}: {sets.train.samples.directory} has {len(sets.train.labels):,} images; choose fewer"
        )
    return ks


def neighbor_ranks(
    args: argparse.Namespace, sets: "LabeledSets", found: Features, ks: Sequence[int]
) -> "dict[int, torch.Tensor]":
    """`knn_ranks` of `emkum evaluate knn`, with a progress bar.

    Args:
        args: its options.
        sets, found: images and their features.
        ks: of `vote_counts`.
    """
    from tqdm import tqdm

    from emkum.evaluation.knn import knn_ranks

    labels = sets.train.labels, sets.test.labels
    with tqdm(total=len(labels[1]), desc="neighbors", unit="image", disable=None) as progress:
        return knn_ranks(
            *(found.train, labels[0], found.test, labels[1], len(sets.classes), ks, args.temperature, found.device),
            report=progress.update,
        )


def run_linear(args: argparse.Namespace) -> None:
    settings = probe_settings(args)
    from emkum.commands.image_features import open_sets
    from emkum.evaluation.classification import top_k_accuracy
    from emkum.evaluation.linear_probe import head_ranks

    sets = open_sets(args.data, args.split)
    held_out = draw_held_out(args, sets)
    with _features(args, sets) as found:
        started = time.perf_counter()
        probe = train_probe(args, sets, found, settings, held_out)
        metrics: dict[str, Any] = top_k_accuracy(head_ranks(probe.head, found.test, sets.test.labels)[0])
        metrics["seconds"] = time.perf_counter() - started
        _print_head(args, sets, found)
        _print_probe(args, probe, metrics)
        held_out_top_1 = {f"{setting:g}": value for setting, value in probe.held_out.items()}
        metrics |= {"chosen": probe.chosen, "held_out_top_1": held_out_top_1, "converged": probe.converged}
        _write(args, sets, found, metrics | {name: getattr(args, name) for name in _RECORDED[args.solver]})


def probe_settings(args: argparse.Namespace) -> tuple[float, ...]:
    """What is tried; raises UserError where an option has no sense."""
    if args.solver not in _RECORDED:
        raise UserError(f"--solver {args.solver!r} is unknown; choose from {', '.join(_RECORDED)}")
    assert_at_least(args, **_LEAST, epochs=1, update_size=1, max_iterations=1)
    if not 0 < args.held_out < 1:
        raise UserError(f"--held-out {args.held_out:g}: want more than 0, less than 1")
    if args.solver == SGD:
        return tuple(parse_numbers(args.learning_rates, "--learning-rates", float))
    return tuple(parse_numbers(args.strengths, "--strengths", float))


def draw_held_out(args: argparse.Namespace, sets: "LabeledSets") -> "np.ndarray":
    """(n,) bool, the training images that the choice is made on; raises UserError where none can be."""
    from emkum.evaluation.linear_probe import held_out_rows

    try:
        return held_out_rows(sets.train.labels, args.held_out, args.seed)
    except ValueError:
        raise UserError(
            f"{sets.train.samples.directory} has one image a class alone: none can be held out for the choice"
        ) from None


def train_probe(
    args: argparse.Namespace,
    sets: "LabeledSets",
    found: Features,
    settings: tuple[float, ...],
    held_out: "np.ndarray",
) -> "Probe":
    """The classifier of `emkum evaluate linear`.

    Args:
        args: its options.
        sets, found: images and their features.
        settings: of `probe_settings`. held_out: of `draw_held_out`.
    """
    from tqdm import tqdm

    from emkum.evaluation.linear_probe import LogisticConfig, SgdConfig, logistic_probe, sgd_probe

    known = (found.train, sets.train.labels, len(sets.classes))
    if args.solver == LOGISTIC:
        return logistic_probe(*known, LogisticConfig(settings, args.max_iterations), held_out)
    config = SgdConfig(settings, args.epochs, args.update_size, args.seed)
    with tqdm(total=2 * args.epochs, desc="linear probe", unit="epoch", disable=None) as progress:
        return sgd_probe(*known, config, held_out, found.device, progress.update)


def _print_head(args: argparse.Namespace, sets: "LabeledSets", found: Features) -> None:
    print(
        f"{args.source}: {args.features} features of {found.train.shape[1]:,} channels; {args.data}: "
        f"{len(sets.classes):,} classes, {len(found.train):,} images of {sets.train.name}, {len(found.test):,} of "
        f"{sets.test.name}"
    )


def _print_probe(args: argparse.Namespace, probe: "Probe", metrics: Mapping[str, float]) -> None:
    """The choice, the result, and what a reader of them should know."""
    from emkum.evaluation.report import format_table

    name, option = ("learning rate", "--learning-rates") if args.solver == SGD else ("C", "--strengths")
    rows = [{"setting": f"{setting:g}", "held_out": value} for setting, value in probe.held_out.items()]
    print(format_table(rows, {"setting": name, "held_out": "held-out top-1 %"}, decimals=2))
    print(f"chosen {name} {probe.chosen:g}: top-1 {metrics['top_1']:.2f} %, top-5 {metrics['top_5']:.2f} %")
    if len(rows) > 1 and probe.chosen in (min(probe.held_out), max(probe.held_out)):
        print(f"the chosen {name} is at the end of what was tried: a wider range of {option} may do better")
    if not probe.converged:
        print(f"it did not converge in {args.max_iterations:,} iterations: more --max-iterations may change it")


def _write(args: argparse.Namespace, sets: "LabeledSets", found: Features, figures: Mapping[str, Any]) -> None:
    if not args.json:
        return
    about = {
        "source": args.source,
        "model": found.identity,
        "data": args.data,
        "split": sets.test.name,
        "features": args.features,
        "width": found.train.shape[1],
        "classes": len(sets.classes),
        "train_images": len(found.train),
        "test_images": len(found.test),
        "seed": args.seed,
    }
    try:
        write_json(args.json, about | dict(figures))
    except OSError as error:
        raise UserError(f"cannot write {args.json}: {error.strerror}") from None
