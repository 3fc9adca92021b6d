"""`emkum evaluate all`: all figures of a suite on one page, each with its interval, its protocol and what leaked."""

import argparse
import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emkum.commands.arguments import assert_at_least
from emkum.errors import UserError
from emkum.files import replaced_file
from emkum.provenance import describe_machine, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from emkum.commands.leakage import Finding, Lineage
    from emkum.commands.suite import Line
    from emkum.commands.towers import Towers
    from emkum.data.shards import ShardedSamples
    from emkum.evaluation.bootstrap import Estimate
    from emkum.evaluation.scorecard_page import Figure
    from emkum.models.encoder_sources import LoadedEncoder

NAME = "scorecard"


def add_parser(kinds: Any) -> None:
    """Add the sub-command `all`."""
    parser = kinds.add_parser(
        "all",
        help="a suite of figures on one page",
        description="Score a run on every line of a suite: retrieval, zero-shot classification, nearest neighbors, "
        "linear classifiers, and results of fine-tuning and GLUE that are there. Write scorecard.json, .md and .html, "
        "with 95 % intervals and with what the run, its start and its teacher have seen of each set. A line that fails "
        "is named with its reason, and the command ends with status 1 after all others.",
        epilog="example: emkum evaluate all runs/flickr8k --suite examples/suites/flickr8k.yaml flickr8k=data/flickr8k "
        "--out runs/flickr8k/scorecard",
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="run's folder, for its best checkpoint; or a file"
    )
    parser.add_argument("overrides", nargs="*", metavar="name=DIR", help="folders and files that replace the suite's")
    parser.add_argument("--suite", required=True, type=Path, metavar="FILE", help="YAML file; see examples/suites/")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the page")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="folder to keep features of images in (default: a temporary one)"
    )
    parser.add_argument(
        "--resamples", type=int, default=1000, metavar="N", help="of the bootstrap (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images run at once (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="decoding processes; 0 = none (default: 1, with a GPU up to 8)"
    )
    parser.set_defaults(run=run)


@dataclass
class Scored:
    """What came of a line.

    Attributes:
        data: what was scored, in words. protocol: how, in words.
        figures: the first is the line's own, the others stand below.
        findings: what leaked.
    """

    data: str
    protocol: str
    figures: "list[Figure]"
    findings: "list[Finding]"


@dataclass
class Scoring:
    """What all lines share.

    Attributes:
        towers: the model. lineage: where it comes from.
        bootstrap: number of resamples and their seed, as `emkum.evaluation.bootstrap` takes them.
    """

    towers: "Towers"
    lineage: "Lineage"
    bootstrap: Mapping[str, int]
    _leakage: "dict[str, list[Finding]]" = field(default_factory=dict)

    def leakage(self, samples: "ShardedSamples") -> "list[Finding]":
        """What leaked of a split, which is looked into once."""
        from emkum.commands.leakage import find_leakage

        # By its folder, too: another one of the same content may stand beside another training split.
        key = f"{samples.content_hash()} {samples.directory.parent}"
        if key not in self._leakage:
            self._leakage[key] = find_leakage(self.lineage, samples)
        return self._leakage[key]


def run(args: argparse.Namespace) -> None:
    assert_at_least(args, resamples=1, batch_size=1, workers=0)
    from emkum.checkpoint import find_checkpoint
    from emkum.commands.leakage import read_lineage
    from emkum.commands.suite import read_lines, read_suite

    checkpoint = find_checkpoint(args.checkpoint)
    suite = read_suite(args.suite)
    lines = read_lines(suite, args.suite, str(checkpoint), args.overrides)
    bootstrap = {"resamples": args.resamples, "seed": args.seed}
    with _towers(args, checkpoint, lines) as towers:
        scoring = Scoring(towers, read_lineage(checkpoint), bootstrap)
        results = [_result(line, scoring, f"line {number} of {len(lines)}") for number, line in enumerate(lines, 1)]
    card = {
        "title": suite.title,
        "about": suite.about,
        # A page does not tell where things lie on the machine.
        "checkpoint": f"{checkpoint.resolve().parent.name}/{checkpoint.name}",
        "suite": args.suite.name,
        "bootstrap": bootstrap | {"level": 0.95},
        "machine": describe_machine(),
        "lines": results,
    }
    _write(args.out, card)
    failed = [result["name"] for result in results if result["error"]]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(results)} lines failed ({', '.join(failed)}); "
            f"their reasons and all other figures are in {args.out / NAME}.md"
        )


@contextmanager
def _towers(args: argparse.Namespace, checkpoint: Path, lines: "Sequence[Line]") -> "Iterator[Towers]":
    from emkum.commands.image_features import default_workers
    from emkum.commands.towers import Towers

    workers = default_workers() if args.workers is None else args.workers
    with tempfile.TemporaryDirectory(prefix="emkum-features-") as temporary:
        cache = args.cache or Path(temporary)
        yield Towers(checkpoint, _objectives(lines), cache, args.batch_size, workers)


def _objectives(lines: "Sequence[Line]") -> dict[str, list[str]]:
    """By the content hash of each split that is compared as pairs, the objectives by which any line does."""
    from emkum.commands.retrieval_inputs import objectives_for
    from emkum.commands.suite import RETRIEVAL
    from emkum.data.shards import open_split

    found: dict[str, list[str]] = {}
    for line in lines:
        if line.kind != RETRIEVAL:
            continue
        try:
            key = open_split(line.args.data, line.args.split).content_hash()
        except UserError:
            # Told of when it is the line's turn.
            continue
        found.setdefault(key, []).extend(objectives_for(line.args.scores, line.args.rerank))
    return found


def _result(line: "Line", scoring: Scoring, place: str) -> dict[str, Any]:
    """A line's figures, or why it has none, as plain data."""
    print(f"emkum: {place}, {line.name}: {line.words}", flush=True)
    start, error, scored = time.monotonic(), None, None
    try:
        scored = SCORERS[line.kind](line.args, scoring)
    except UserError as wrong:
        error = wrong.message
    except Exception as wrong:  # Whatever ends one line, the figures of the others are not to be lost.
        traceback.print_exc()
        error = f"{type(wrong).__name__}: {' '.join(str(wrong).split())[:300]}"
    if error:
        print(f"emkum: {line.name} failed: {error}", flush=True)
    result = {"data": "", "protocol": "", "figures": [], "findings": []} if scored is None else asdict(scored)
    result |= {"name": line.name, "kind": line.kind, "words": line.words, "error": error}
    return result | {"seconds": round(time.monotonic() - start, 1)}


def _write(out: Path, card: Mapping[str, Any]) -> None:
    from emkum.evaluation.scorecard_page import markdown_page, plain_table, scorecard_html

    try:
        write_json(out / f"{NAME}.json", card)
        for suffix, page in (("md", markdown_page(card)), ("html", scorecard_html(card))):
            with replaced_file(out / f"{NAME}.{suffix}") as temporary:
                temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror or error}") from None
    print(plain_table(card))
    print(f"written to {out / NAME}.json, .md and .html")


# ----------------------------------------------------------------------------------------------------------------------
# One function a kind of line
# ----------------------------------------------------------------------------------------------------------------------


def _retrieval(args: argparse.Namespace, scoring: Scoring) -> Scored:
    assert_at_least(args, rerank_k=1)
    from emkum.commands.evaluate import LATE_INTERACTION
    from emkum.commands.retrieval_inputs import objectives_for
    from emkum.data.shards import open_split
    from emkum.evaluation.bootstrap import recall_estimates
    from emkum.evaluation.ranks import find_ranks
    from emkum.evaluation.retrieval import average_median_rank, chance_recall
    from emkum.evaluation.scorecard_page import Figure

    samples = open_split(args.data, args.split)
    read = scoring.towers.read(samples, objectives_for(args.scores, args.rerank))
    compared = read.compared(args.scores, args.rerank, args.rerank_k)
    pairs = compared.score, compared.caption_image, len(samples)
    ranks = find_ranks(*pairs, reranking=compared.reranking)
    estimates = recall_estimates(ranks, compared.caption_image, **scoring.bootstrap)
    medians = average_median_rank(*pairs, reranking=compared.reranking)
    figures = _figures(estimates, _RECALLS, chance_recall(len(samples), compared.caption_image))
    drawn = f"{medians['average_median_rank_draws']} x {medians['average_median_rank_images']:,} pairs"
    for way, words in (("i2t", "image to text"), ("t2i", "text to image")):
        chance = (medians["average_median_rank_images"] + 1) / 2
        name = f"average median rank of {drawn}, {words}"
        figures.append(Figure(name, medians[f"{way}_average_median_rank"], chance=chance, unit=""))
    captions = len(compared.caption_image)
    protocol = f"each of {len(samples):,} images among {captions:,} captions, and each caption among the images; "
    protocol += "mean of R@1, 5 and 10 both ways; of an image's captions the best ranked counts; compared by "
    protocol += (
        "patches and tokens (late interaction)" if args.scores == LATE_INTERACTION else "the cosine of global features"
    )
    protocol += f", the {args.rerank_k} best put in order by image-text matching" if args.rerank else ""
    findings = scoring.leakage(samples)
    return Scored(f"{_where(args.data, args.split)}, {len(samples):,} images", protocol, figures, findings)


def _zero_shot(args: argparse.Namespace, scoring: Scoring) -> Scored:
    from emkum.commands.evaluate_zero_shot import classify_set, sharing_texts
    from emkum.data.prompts import open_prompted_set

    found = open_prompted_set(args.data, args.split, args.prompts)
    classes, images = len(found.class_names), scoring.towers.images(found.samples)
    ranks = classify_set(scoring.towers.student, found, images).ranks
    named = "its own class names" if args.prompts is None else f"names of {Path(args.prompts).name}"
    templates = len(found.prompts.templates)
    protocol = f"cosine to the mean of a class's captions, {named} in {templates:,} template{'s' * (templates > 1)}; "
    protocol += "no label is used"
    shared = sharing_texts(found.prompts)
    protocol += f"; {shared} classes share their captions with another one and are never right" if shared else ""
    return _classified(args, scoring, found.samples, args.split, {"": ranks}, classes, protocol)


def _knn(args: argparse.Namespace, scoring: Scoring) -> Scored:
    from emkum.commands.evaluate_images import neighbor_ranks, vote_counts
    from emkum.commands.image_features import open_sets
    from emkum.commands.suite import WHOLE

    sets = open_sets(args.data, args.split)
    ks = vote_counts(args, sets)
    found = scoring.towers.features(sets, args.features, args.source == WHOLE)
    ranks = {f", k = {k}": each for k, each in neighbor_ranks(args, sets, found, ks).items()}
    protocol = f"vote of the nearest of {len(sets.train.labels):,} training images with labels, weighted by "
    protocol += f"exp(cosine / {args.temperature:g}); {_features(args)}"
    return _classified(args, scoring, sets.test.samples, sets.test.name, ranks, len(sets.classes), protocol)


def _linear(args: argparse.Namespace, scoring: Scoring) -> Scored:
    from emkum.commands.evaluate_images import SGD, draw_held_out, probe_settings, train_probe
    from emkum.commands.image_features import open_sets
    from emkum.commands.suite import WHOLE
    from emkum.evaluation.linear_probe import head_ranks

    settings, sets = probe_settings(args), open_sets(args.data, args.split)
    held_out = draw_held_out(args, sets)
    found = scoring.towers.features(sets, args.features, args.source == WHOLE)
    probe = train_probe(args, sets, found, settings, held_out)
    ranks = {"": head_ranks(probe.head, found.test, sets.test.labels)[0]}
    how = f"SGD, {args.epochs} epochs, learning rate" if args.solver == SGD else "logistic regression, C"
    protocol = f"{how} {probe.chosen:g} chosen on {100 * args.held_out:g} % of {len(sets.train.labels):,} training "
    protocol += f"images with labels; {_features(args)}"
    protocol += "" if probe.converged else "; it did not converge"
    return _classified(args, scoring, sets.test.samples, sets.test.name, ranks, len(sets.classes), protocol)


def _finetune(args: argparse.Namespace, scoring: Scoring) -> Scored:
    from emkum.data.shards import open_split
    from emkum.evaluation.scorecard_page import Figure
    from emkum.models.encoder_sources import load_image_encoder

    record = _read_finished(args.folder, "finetune.json")
    _assert_own(record, scoring, args.folder, load_image_encoder)
    # Further folders were trained on alone.
    folder = record["data"].split(os.pathsep)[0]
    samples = open_split(folder, record["split"], require_captions=False)
    seeds = len(record["runs"])
    spread = (
        "one seed" if record["top1_std"] is None else f"standard deviation {record['top1_std']:.2f} of {seeds} seeds"
    )
    figures = [Figure("top-1", record["top1_mean"]), Figure("top-5", record["top5_mean"])]
    chosen = f", the update chosen on {record['chosen_by']}" if record["chosen_by"] else ", the last update"
    protocol = f"all of the image encoder fine-tuned on the training images with labels{chosen}; mean of seeds, "
    protocol += f"{spread}; no interval, since single predictions are not kept"
    data = f"{_where(folder, record['split'])}, {len(samples):,} images"
    return Scored(data, protocol, figures, scoring.leakage(samples))


def _glue(args: argparse.Namespace, scoring: Scoring) -> Scored:
    from emkum.commands.leakage import UNKNOWN, Finding
    from emkum.evaluation.scorecard_page import Figure
    from emkum.models.encoder_sources import load_text_encoder

    record = _read_finished(args.folder, "glue.json")
    _assert_own(record, scoring, args.folder, load_text_encoder)
    rows = {row["task"]: row for row in record["rows"]}
    mean = rows.pop("mean")
    figures = [Figure(f"mean of {len(rows)} tasks", mean["median"], chance=mean["constant"])]
    figures += [Figure(task, row["median"], chance=row["constant"]) for task, row in rows.items()]
    protocol = "all of the text encoder fine-tuned on each task, official metrics on the validation sets; median of "
    protocol += "seeds; chance is the most frequent label; no interval, since single predictions are not kept"
    findings = [Finding(UNKNOWN, "texts not compared", "the texts of pretraining are not compared with the tasks")]
    return Scored("GLUE, validation sets", protocol, figures, findings)


SCORERS: dict[str, Callable[[argparse.Namespace, Scoring], Scored]] = {
    "retrieval": _retrieval,
    "zero-shot": _zero_shot,
    "knn": _knn,
    "linear": _linear,
    "finetune": _finetune,
    "glue": _glue,
}
_RECALLS = {"mean_recall": "mean recall"} | {
    f"{way}_r{k}": f"{words} R@{k}"
    for way, words in (("i2t", "image to text"), ("t2i", "text to image"))
    for k in (1, 5, 10)
}


def _classified(
    args: argparse.Namespace,
    scoring: Scoring,
    samples: "ShardedSamples",
    split: str,
    ranks: "Mapping[str, Tensor]",
    classes: int,
    protocol: str,
) -> Scored:
    """Figures of classifiers, whose ranks are given by what tells them apart in words."""
    from emkum.evaluation.bootstrap import accuracy_estimates

    figures = []
    for what, each in ranks.items():
        ks = (1, 5) if classes > 5 else (1,)
        names = {f"top_{k}": f"top-{k}{what}" for k in ks}
        chance = {f"top_{k}": 100.0 * k / classes for k in ks}
        figures += _figures(accuracy_estimates(each, ks, **scoring.bootstrap), names, chance)
    data = f"{_where(args.data, split)}, {len(samples):,} images of {classes:,} classes"
    return Scored(data, protocol, figures, scoring.leakage(samples))


def _figures(
    estimates: "Mapping[str, Estimate]", names: Mapping[str, str], chance: Mapping[str, float]
) -> "list[Figure]":
    from emkum.evaluation.scorecard_page import Figure

    return [Figure(names[key], *estimate, chance=chance[key]) for key, estimate in estimates.items()]


def _where(data: str, split: str) -> str:
    return f"{Path(data).resolve().name}, {split}"


def _features(args: argparse.Namespace) -> str:
    from emkum.commands.suite import WHOLE

    of = "the whole student" if args.source == WHOLE else "the image encoder alone"
    which = {"default": "CLS token", "cls": "CLS token", "mean": "mean of patches", "both": "CLS token and mean"}
    return f"{which.get(args.features, args.features)} of {of}"


def _read_finished(folder: str, name: str) -> dict[str, Any]:
    path = Path(folder) / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"no finished results: {path} cannot be read ({error.strerror})") from None
    except ValueError:
        raise UserError(f"{path} is damaged: run its command again") from None


def _assert_own(record: Mapping[str, Any], scoring: Scoring, folder: str, load: "Callable[..., LoadedEncoder]") -> None:
    """
    Args:
        record: of finished results. folder: of them.
        load: makes the encoder of a source.

    Raises:
        UserError: they are of another encoder than this run's.
    """
    options, encoder = record["options"], record["encoder"]
    sizes = {key: options[f"init_{key}"] for key in ("image_size", "layers") if options.get(f"init_{key}")}
    own = load(str(scoring.towers.source), **sizes).identity["weights_sha256"]
    if encoder.get("weights_sha256") != own or record.get("from_scratch"):
        of = "random weights" if record.get("from_scratch") else encoder.get("source", "an unknown one")
        raise UserError(f"{folder} has results of another encoder: {of}")
