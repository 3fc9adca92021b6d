"""`emkum teacher check`: whether a teacher is alive and rightly loaded, before anything is trained on it."""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from emkum.commands.arguments import assert_at_least
from emkum.commands.teacher_inputs import (
    SCENES,
    SENTENCES,
    Pictures,
    crop_batches,
    make_input,
    open_photos,
    render_scenes,
    tokenize_sentences,
)
from emkum.commands.teacher_options import add_teacher_arguments, build_from
from emkum.errors import UserError
from emkum.provenance import package_versions, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from emkum.outputs import TeacherOutput
    from emkum.teachers.base import Teacher

SHOWN_CLASSES = 5
SHOWN_BAD = 3
# Features of different photos are far from parallel; those of weights that do not fit the model hardly differ.
MOST_COSINE = 0.99
# Fewer images say little of whether a classifier is better than chance.
FEWEST_LABELED = 10

# Statistics in the order in which they are printed.
_STATISTICS = {
    "count": "number",
    "norm_mean": "norm, mean",
    "norm_std": "norm, standard deviation",
    "channel_mean": "channels, absolute mean",
    "channel_std": "channels, standard deviation",
    "constant_channels": "channels that are constant, %",
    "mean_cosine": "cosine of different ones, mean",
    "bad_values": "values that are NaN or infinite",
}
_WNID = re.compile(r"n\d{8}(?!\d)")


def add_parser(kinds: Any) -> None:
    """Add the sub-command `check`."""
    check = kinds.add_parser(
        "check",
        help="whether a teacher is alive and rightly loaded",
        description="Print what a teacher is and what its features look like, on photos or, without --images, on "
        f"{SCENES} rendered scenes; of a classifier also the likeliest classes of some images, and its accuracy where "
        "photos are named by class: n01440764_tench.jpg, or n01440764/1.jpg. A teacher that gives NaN, or the same "
        "features for all images, ends it with exit status 1.",
        epilog="example: emkum teacher check timm:deit_tiny_patch16_224 --weights model.safetensors "
        "--images photos.zip",
    )
    add_teacher_arguments(check)
    check.add_argument("--images", type=Path, metavar="PATH", help="folder, zip or uncompressed tar of photos")
    check.add_argument(
        "--limit", type=int, default=0, metavar="N", help="most photos, evenly spread over --images; 0 = all (default)"
    )
    check.add_argument(
        "--crop-fraction",
        type=float,
        default=1.0,
        metavar="F",
        help="side of the centered square that the teacher sees, as part of the photo's shorter side; 1 = all of it, "
        "as in training (default). Published accuracies often are of 0.875 or 0.9",
    )
    check.add_argument(
        "--synsets",
        type=Path,
        metavar="FILE",
        help="classes in the order of the teacher's logits, `n01440764 tench, Tinca tinca` a line; without it, those "
        "of the ImageNet that has as many",
    )
    check.add_argument(
        "--show", type=int, default=5, metavar="N", help="images whose classes are printed (default: %(default)s)"
    )
    check.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="images run at once (default: %(default)s)"
    )
    check.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    check.set_defaults(run=run_check)


def run_check(args: argparse.Namespace) -> None:
    assert_at_least(args, limit=0, show=0, batch_size=1)
    if not 0 < args.crop_fraction <= 1:
        raise UserError(f"--crop-fraction {args.crop_fraction}: want more than 0, at most 1")
    if args.teacher.startswith("cached:"):
        raise UserError(f"{args.teacher} holds targets, not a model; check the teacher that it was made of")
    # First, because to build the model takes longer.
    pictures = None if args.images is None else open_photos(args.images, args.limit)
    teacher = build_from(args)
    classes = find_classes(teacher.num_classes, args.synsets)
    declared = declare(args.teacher, teacher)
    print(*declaration_lines(declared), sep="\n", flush=True)
    findings = Findings(classes, args.show)
    if "image" in teacher.modalities:
        checked_on = _look(teacher, pictures or render_scenes(args.limit or SCENES), findings, args)
    elif pictures is not None:
        raise UserError(f"--images {args.images}: {args.teacher} reads text alone; leave it out")
    else:
        checked_on = _read(teacher, findings)
    figures = findings.figures()
    failures, warnings = judge(figures)
    print(*findings_lines(checked_on, figures), *verdict_lines(figures, failures, warnings), sep="\n")
    if args.json:
        verdict = "failed" if failures else "warning" if warnings else "alive"
        record = {"teacher": declared, "checked_on": checked_on, **figures, "verdict": verdict}
        _write(args.json, record | {"reasons": failures + warnings, "versions": package_versions()})
    if failures:
        raise UserError(f"{args.teacher} cannot teach: {'; '.join(failures)}")


def _write(path: str, record: dict[str, Any]) -> None:
    try:
        write_json(path, record)
    except OSError as error:
        raise UserError(f"--json: cannot write {path}: {error.strerror}") from None


# ----------------------------------------------------------------------------------------------------------------------
# What the teacher says of itself
# ----------------------------------------------------------------------------------------------------------------------


def declare(spec: str, teacher: "Teacher") -> dict[str, Any]:
    """What a teacher says of itself, as plain data."""
    model = getattr(teacher, "model", None)
    return {
        "spec": spec,
        "parameters": None if model is None else sum(parameter.numel() for parameter in model.parameters()),
        "modalities": list(teacher.modalities),
        "image_size": teacher.image_size,
        "width": teacher.width,
        "grid": None if teacher.grid is None else list(teacher.grid),
        "patch_width": teacher.patch_width,
        "num_classes": teacher.num_classes,
        "max_tokens": teacher.max_tokens,
        "tokenizer": None if teacher.tokenizer is None else str(teacher.tokenizer),
        "identity": teacher.identity,
    }


def declaration_lines(declared: Mapping[str, Any]) -> Iterator[str]:
    """What `declare` returned, for the terminal."""
    identity = dict(declared["identity"])
    lines = {"teacher": declared["spec"]}
    if declared["parameters"] is not None:
        lines["parameters"] = f"{declared['parameters'] / 1e6:,.2f} million"
    lines["weights"] = f"SHA-256 {str(identity.pop('weights_sha256', '?'))[:12]}"
    lines["reads"] = " and ".join(declared["modalities"])
    mean, std = identity.pop("mean", None), identity.pop("std", None)
    if declared["image_size"]:
        lines["input"] = f"{declared['image_size']} x {declared['image_size']} pixels"
        if mean and std:
            lines["normalization"] = f"mean {_numbers(mean)}, standard deviation {_numbers(std)}"
    if declared["max_tokens"]:
        lines["text"] = f"at most {declared['max_tokens']:,} tokens by {declared['tokenizer'] or 'no known tokenizer'}"
    pooling, target = identity.pop("pooling", "default"), identity.pop("target", "image")
    lines["features"] = f"{declared['width']:,} channels, pooling {pooling}, target {target}"
    if declared["patch_width"]:
        grid = declared["grid"]
        where = "of each token" if grid is None else f"in {grid[0]} x {grid[1]}"
        lines["patches"] = f"{declared['patch_width']:,} channels {where}"
    lines["classes"] = f"{declared['num_classes']:,}" if declared["num_classes"] else "none"
    for name in ("teacher", "image_size"):
        identity.pop(name, None)
    lines |= {f"identity: {name}": str(value) for name, value in identity.items()}
    width = max(map(len, lines))
    return (f"{name:<{width}}  {value}" for name, value in lines.items())


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


# ----------------------------------------------------------------------------------------------------------------------
# What it makes of images and sentences
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classes:
    """What a classifier's logits mean.

    Attributes:
        names: words of each class; empty = unknown.
        wnids: synset of each class; empty = unknown.
    """

    names: Sequence[str] = ()
    wnids: Sequence[str] = ()

    def describe(self, label: int) -> str:
        """A class in words."""
        return f"{self.wnids[label]} {self.names[label]}" if self.names else f"class {label}"


def find_classes(count: int, synsets: Path | None) -> Classes:
    """Classes of a file, or else those of the ImageNet that has as many as there are logits.

    Args:
        count: logits; 0 = it is no classifier.
        synsets: the file.

    Raises:
        UserError: the file is malformed or of another number of classes.
    """
    if synsets is not None:
        from emkum.prepare.imagenet import read_synsets

        words = read_synsets(synsets)
        if len(words) != count:
            has = f"has {count:,}" if count else "is no classifier"
            raise UserError(f"--synsets: {synsets} lists {len(words):,} classes, but the teacher {has}")
        return Classes(list(words.values()), list(words))
    if count == 0:
        return Classes()
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return Classes()
    words = ImageNetInfo(subset).label_descriptions(as_dict=True)
    return Classes(list(words.values()), list(words))


def wnids_of(name: str) -> Iterator[str]:
    """Synsets that a photo's folders, the inmost first, and its own name begin with."""
    path = PurePosixPath(name)
    for part in (*reversed(path.parts[:-1]), path.name):
        if found := _WNID.match(part):
            yield found.group()


class Findings:
    """What a teacher made of images or sentences, added up batch by batch.

    Args:
        classes: what its logits mean.
        show: images whose likeliest classes are kept.
    """

    def __init__(self, classes: Classes, show: int) -> None:
        from emkum.evaluation.classification import FeatureStatistics

        self.bad: dict[str, str] = {}
        self.features, self.patches, self.text_features = (FeatureStatistics() for _ in range(3))
        self._classes = classes
        self._label_of = {wnid: label for label, wnid in enumerate(classes.wnids)}
        self._show = show
        self._shown: list[dict[str, Any]] = []
        self._bad_logits = 0
        self._ranks: list[Tensor] = []
        self._without_class = 0

    def add(self, output: "TeacherOutput", padding_mask: "Tensor | None" = None) -> None:
        """Features and patches; `padding_mask` is (B, N), True where a patch is none."""
        self.features.add(output.features)
        if output.patches is not None:
            self.patches.add(output.patches.flatten(0, 1) if padding_mask is None else output.patches[~padding_mask])

    def add_logits(self, names: Sequence[str], logits: "Tensor") -> None:
        """(B, C) logits of the images of these names."""
        import torch

        from emkum.evaluation.classification import label_ranks

        finite = logits.isfinite()
        self._bad_logits += int((~finite).sum())
        sound = finite.all(dim=1).nonzero()[:, 0].tolist()
        for row in sound[: self._show - len(self._shown)]:
            self._shown.append({"image": names[row], "classes": self._likeliest(logits[row])})
        labels = [next((self._label_of[w] for w in wnids_of(name) if w in self._label_of), None) for name in names]
        rows = [row for row, label in enumerate(labels) if label is not None]
        self._without_class += len(names) - len(rows)
        if rows:
            right = torch.tensor([labels[row] for row in rows], device=logits.device)
            self._ranks.append(label_ranks(logits[rows], right).cpu())

    def _likeliest(self, logits: "Tensor") -> list[dict[str, Any]]:
        likely = logits.softmax(dim=0).topk(min(SHOWN_CLASSES, len(logits)))
        return [
            {"label": label, "class": self._classes.describe(label), "percent": 100 * value}
            for value, label in zip(likely.values.tolist(), likely.indices.tolist(), strict=True)
        ]

    def figures(self) -> dict[str, Any]:
        """All of it as plain data: parts that the teacher does not give are left out of `statistics`; `accuracy` and
        its chance level are in percent, and None where no image is named by class."""
        import torch

        from emkum.evaluation.classification import top_k_accuracy

        parts = {"features": self.features, "patches": self.patches, "text_features": self.text_features}
        statistics = {name: part.figures() for name, part in parts.items()}
        accuracy = None
        if self._ranks:
            ranks = torch.cat(self._ranks)
            accuracy = top_k_accuracy(ranks) | {"chance": 100 / len(self._classes.wnids)}
            accuracy |= {"images": len(ranks), "without_class": self._without_class}
        return {
            "statistics": {name: found for name, found in statistics.items() if found["count"] or found["bad_values"]},
            "bad_logits": self._bad_logits,
            "shown": self._shown,
            "accuracy": accuracy,
            "bad_images": len(self.bad),
            "first_bad_images": dict(list(self.bad.items())[:SHOWN_BAD]),
        }


def _look(teacher: "Teacher", pictures: Pictures, findings: Findings, args: argparse.Namespace) -> str:
    """Show images, and sentences to a teacher whose target needs them; returns in words what it was shown."""
    from emkum.teachers.base import reads_captions

    texts = None
    if reads_captions(teacher):
        if teacher.tokenizer is None:
            raise UserError(f"--target {args.target} needs a tokenizer, and {args.teacher} names none; choose image")
        texts = tokenize_sentences(teacher.tokenizer, teacher.max_tokens)
    seen = 0
    for names, crops in crop_batches(pictures, teacher.image_size, args.crop_fraction, args.batch_size, findings.bad):
        output = teacher(make_input(crops, texts, seen, len(names)))
        findings.add(output)
        if output.logits is not None:
            findings.add_logits(names, output.logits)
        if output.text_features is not None:
            # Each sentence once, though images may be many more.
            findings.text_features.add(output.text_features[: max(0, len(SENTENCES) - seen)])
        seen += len(names)
    if seen == 0:
        first = ": ".join(next(iter(findings.bad.items())))
        raise UserError(f"--images {pictures.origin}: none of {len(findings.bad):,} images can be read; {first}")
    square = "largest centered square" if args.crop_fraction == 1 else f"{args.crop_fraction:g} of the centered square"
    also = "" if texts is None else f", with {len(SENTENCES)} sentences"
    return f"{seen:,} image{'' if seen == 1 else 's'} ({pictures.origin}), {square}{also}"


def _read(teacher: "Teacher", findings: Findings) -> str:
    """Show sentences to a teacher of text alone; returns in words what it was shown."""
    if teacher.tokenizer is None:
        return "nothing: it reads text alone, and no tokenizer is known"
    texts = tokenize_sentences(teacher.tokenizer, teacher.max_tokens)
    batch = make_input(None, texts, 0, len(SENTENCES))
    findings.add(teacher(batch), batch.text_padding_mask)
    return f"{len(SENTENCES)} sentences"


# ----------------------------------------------------------------------------------------------------------------------
# What is to be thought of it
# ----------------------------------------------------------------------------------------------------------------------


def judge(figures: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What is wrong with a teacher, in words: what makes it useless, and what makes it suspect.

    Args:
        figures: of `Findings`.
    """
    failures, warnings = [], []
    for part, found in figures["statistics"].items():
        what = part.replace("_", " ")
        if found["bad_values"]:
            failures.append(f"{found['bad_values']:,} values of its {what} are NaN or infinite")
        elif found["constant_channels"] == 100:
            failures.append(f"its {what} are the same {found['count']:,} times")
        elif part != "patches" and found["mean_cosine"] is not None and found["mean_cosine"] > MOST_COSINE:
            warnings.append(
                f"{what} hardly differ (mean cosine {found['mean_cosine']:.3f}), as those of random or wrongly loaded "
                "weights do"
            )
    if figures["bad_logits"]:
        failures.append(f"{figures['bad_logits']:,} of its logits are NaN or infinite")
    features = figures["statistics"].get("features")
    if features is None:
        warnings.append("its features have not been looked at")
    elif features["count"] == 1:
        warnings.append("one image does not show whether features differ")
    accuracy = figures["accuracy"]
    if accuracy and accuracy["images"] >= FEWEST_LABELED:
        # Hits of a guess are binomial: better than chance begins three standard deviations above their mean.
        chance, images = accuracy["chance"] / 100, accuracy["images"]
        guessed = images * chance + 3 * (images * chance * (1 - chance)) ** 0.5
        if images * accuracy["top_1"] / 100 <= guessed:
            warnings.append(f"it classifies no better than chance (top-1 {accuracy['chance']:.2g} %)")
    return failures, warnings


def findings_lines(checked_on: str, figures: Mapping[str, Any]) -> Iterator[str]:
    """Statistics, the likeliest classes and the accuracy, for the terminal."""
    from emkum.evaluation.report import format_table

    yield f"\nchecked on {checked_on}"
    if figures["bad_images"]:
        yield f"left out, as they cannot be read: {figures['bad_images']:,}"
        yield from (f"  {name}: {reason}" for name, reason in figures["first_bad_images"].items())
    parts = figures["statistics"]
    if parts:
        rows = [{"": label} | {name: parts[name][key] for name in parts} for key, label in _STATISTICS.items()]
        yield "\n" + format_table(rows, {"": ""} | {name: name.replace("_", " ") for name in parts}, decimals=3)
    for image in figures["shown"]:
        yield f"\n{image['image']}"
        yield from (f"  {found['percent']:5.1f} %  {found['class']}" for found in image["classes"])
    accuracy = figures["accuracy"]
    if accuracy:
        others = accuracy["without_class"]
        left_out = f"; {others:,} without a known class left out" if others else ""
        scores = f"top-1 {accuracy['top_1']:.1f} %, top-5 {accuracy['top_5']:.1f} %"
        yield f"\n{scores} of {accuracy['images']:,} images named by class{left_out}"


def verdict_lines(figures: Mapping[str, Any], failures: Sequence[str], warnings: Sequence[str]) -> Iterator[str]:
    """The verdict; failures are left to the error that ends the command."""
    yield from (f"\nWARNING: {warning}" for warning in warnings)
    if not failures and not warnings:
        features = figures["statistics"]["features"]
        cosine = features["mean_cosine"]
        differ = "" if cosine is None else f" (mean cosine {cosine:.3f})"
        yield f"\nalive: features of {features['count']:,} inputs are finite and differ{differ}"
