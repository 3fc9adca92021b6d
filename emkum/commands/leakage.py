"""What a model has seen of a set that it is scored on: derived from the records of its run and of those behind it.

A run leaves `run.json`: options, training folders with their content hash, and its teacher. From there go the runs that
it starts from and that taught it, each with a record of its own, and public weights, of which
`emkum.teachers.pretraining` knows what they have seen.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from emkum.data.mixture import MixedSamples
from emkum.data.overlap import shared_images
from emkum.data.shards import ShardedSamples, available_splits, open_split
from emkum.errors import UserError
from emkum.teachers.pretraining import COCO, IMAGENET_1K, LABELS, VISUAL_GENOME, exposures

RANDOM, HUB = "", "hub"
# From what must not be missed to nothing.
LEAK, NOTE, UNKNOWN, CLEAN = LEVELS = ("leak", "note", "unknown", "clean")

_RECORD = "run.json"
_TRAIN = "train"
# Sets as `emkum prepare` names them, by the words of `emkum.teachers.pretraining`.
_SETS = {IMAGENET_1K: "imagenet", COCO: "coco", VISUAL_GENOME: "visual-genome"}
_HOW = {"labels": "with labels of {}", "images": "on images of {}", "texts": "on {} with texts"}
_RUN = "the run"
_BEST, _LAST = "checkpoint_best.pt", "checkpoint_last.pt"
_PUBLIC = ("timm", "data2vec2", "beit3", "bert", "openclip")
# A run's identity as a teacher, which does not say which run.
_CACHED_RUN = "checkpoint"
# Sets that `emkum prepare` makes of whatever it is given: equal names say nothing.
_OF_ANYTHING = ("image-folder", "img2dataset", "scenes")


@dataclass(frozen=True)
class Finding:
    """One thing to know of a figure.

    Attributes:
        level: one of LEVELS. brief: in few words. text: in a sentence.
    """

    level: str
    brief: str
    text: str


@dataclass(frozen=True)
class Weights:
    """What a run began with or was taught by.

    Attributes:
        role: what it was to the run.
        name: KIND:REST or KIND of public weights; else a run's folder or checkpoint.
        file: of public weights; `hub`, RANDOM, or None where it is not known or part of the name.
    """

    role: str
    name: str
    file: str | None

    @property
    def shown(self) -> str:
        """The name, without where things lie on the machine."""
        kind, colon, rest = self.name.partition(":")
        return f"{kind}{colon}{Path(rest).name}"

    @property
    def condition(self) -> str:
        """On which what is known of the name holds of the weights."""
        if self.file == HUB:
            return ""
        return f", if {Path(self.file).name if self.file else 'its file'} holds what the name says"


@dataclass
class Run:
    """A run and its record.

    Attributes:
        role: "the run", or what it was to it.
        record: content of `run.json`.
    """

    role: str
    record: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """Of task and model, flat."""
        options = self.record.get("options", {})
        return {**(options.get("task") or {}), **(options.get("model") or {})}

    @property
    def folders(self) -> list[Path]:
        """Of its data."""
        return [Path(folder) for folder in self.record.get("data", {}).get("folders", ())]

    @cached_property
    def train_splits(self) -> list[ShardedSamples] | None:
        """Of its folders; empty where it saw no image, None where they are gone or are others than those it saw."""
        try:
            if any(folder.is_dir() and not available_splits(folder) for folder in self.folders):
                return []
            parts = [open_split(folder, _TRAIN, require_captions=False) for folder in self.folders]
        except UserError:
            return None
        return parts if parts and MixedSamples(parts).content_hash() == self.train_hash else None

    @property
    def train_hash(self) -> str:
        """Of all training splits together."""
        return self.record.get("data", {}).get("train_hash", "")


@dataclass
class Lineage:
    """What a checkpoint comes from.

    Attributes:
        checkpoint: its file.
        runs: its own, and those behind it that are known.
        weights: public ones, behind any of them.
        gaps: what is not known.
    """

    checkpoint: Path
    runs: list[Run] = field(default_factory=list)
    weights: list[Weights] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)


def read_lineage(checkpoint: Path) -> Lineage:
    """Follow the records from a checkpoint's file back."""
    lineage = Lineage(checkpoint)
    _follow(checkpoint, _RUN, lineage, set())
    # What taught a run is often what it began with.
    roles: dict[tuple[str, str | None], list[str]] = {}
    for weights in lineage.weights:
        roles.setdefault((weights.name, weights.file), []).append(weights.role)
    lineage.weights = [Weights(" and ".join(parts), *key) for key, parts in roles.items()]
    return lineage


def set_name(folder: Path) -> str:
    """Which set a prepared folder holds, as `emkum prepare` names it; empty where it does not say."""
    try:
        return str(json.loads((folder / "prepare.json").read_text(encoding="utf-8"))["set"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


# ----------------------------------------------------------------------------------------------------------------------
# Back along the records
# ----------------------------------------------------------------------------------------------------------------------


def _follow(place: Path, role: str, lineage: Lineage, seen: set[Path]) -> None:
    """Add the run at a checkpoint's file or a run's folder, and what is behind it."""
    path = _record_beside(place)
    if path.resolve() in seen:
        return
    seen.add(path.resolve())
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        lineage.gaps.append(f"{role} has no record ({_RECORD}): what it was trained on is not known")
        return
    run = Run(role, record)
    lineage.runs.append(run)
    for weights in _behind(run):
        weights = weights if role == _RUN else replace(weights, role=f"{weights.role} of {role}")
        source = _run_behind(weights)
        if source is not None:
            _follow(source, weights.role, lineage, seen)
        elif weights.name == _CACHED_RUN:
            lineage.gaps.append(
                f"{weights.role} is a run whose targets were stored: what it was trained on is not known"
            )
        elif weights.file != RANDOM:
            lineage.weights.append(weights)


def _record_beside(place: Path) -> Path:
    """The record of a run's folder, or of that of its checkpoint."""
    return (place if place.is_dir() else place.parent) / _RECORD


def _run_behind(weights: Weights) -> Path | None:
    """The run that weights are of: of a file that is read as public ones are, such as data2vec2:FILE, it is known by a
    record beside it. None of public ones, and of a run that is not told."""
    kind, _, rest = weights.name.partition(":")
    if weights.name == _CACHED_RUN:
        return None
    if kind not in _PUBLIC:
        return Path(rest if kind == "checkpoint" else weights.name)
    file = weights.file or rest
    return Path(file) if file not in ("", HUB) and _record_beside(Path(file)).is_file() else None


def _behind(run: Run) -> Iterator[Weights]:
    """All that a run began with or was taught by."""
    options = run.options
    teacher = options.get("teacher") or ""
    if teacher.startswith("cached:"):
        # Of stored targets it is known whose they are, not what file the weights came from.
        yield Weights("the teacher", str((run.record.get("teacher") or {}).get("teacher", "")), None)
    elif teacher and teacher != "self":
        yield Weights("the teacher", teacher, _file_of(teacher, options.get("teacher_weights")))
    start = options.get("init_from") or "none"
    if start not in ("none", "teacher"):
        yield Weights("what it starts from", start, _file_of(start, options.get("init_weights")))
    for modality in ("image", "text"):
        encoder, file = options.get(f"{modality}_encoder") or "", options.get(f"{modality}_weights")
        if file and start == "none":
            name = encoder if encoder.partition(":")[0] in _PUBLIC else file
            yield Weights(f"the start of the {modality} encoder", name, file)
    restored = (run.record.get("options", {}).get("checkpoint") or {}).get("restore_file") or _LAST
    if restored != _LAST:
        yield Weights("what it goes on from", restored, None)


def _file_of(name: str, file: str | None) -> str | None:
    """What `Weights.file` is: models that a library knows by name are random without weights; others are files."""
    return file or RANDOM if name.startswith(("timm:", "openclip:")) else None


# ----------------------------------------------------------------------------------------------------------------------
# Findings
# ----------------------------------------------------------------------------------------------------------------------


def find_leakage(lineage: Lineage, samples: ShardedSamples) -> list[Finding]:
    """What is to be known of figures on a split, the worst first.

    Args:
        lineage: of the model.
        samples: the split that it is scored on.
    """
    name = set_name(samples.directory.parent)
    found = [Finding(UNKNOWN, "a record is missing", gap) for gap in lineage.gaps]
    compared, touching = 0, []
    for run in lineage.runs:
        if run.train_splits is None:
            found.append(_by_record(run, samples))
            continue
        fraction = float(run.options.get("data_fraction") or 1.0)
        for train in run.train_splits:
            compared += len(train)
            touching += _of_training(run, train, samples, name, fraction)
    found += touching
    found += _of_choice(lineage, samples)
    found += [_of_weights(weights, name) for weights in lineage.weights if _sees_images(weights)]
    if compared and not touching:
        found.append(
            Finding(CLEAN, "nothing found", f"none of its images is, byte for byte, among the {compared:,} of training")
        )
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def _by_record(run: Run, samples: ShardedSamples) -> Finding:
    """By hashes alone, where the training data cannot be opened."""
    if run.train_hash == samples.content_hash():
        return Finding(LEAK, "the split itself", f"this very split was in training ({run.role})")
    if run.train_hash == _train_hash_beside(samples):
        return Finding(NOTE, "its training split", f"this set's training split was in training ({run.role})")
    return Finding(
        UNKNOWN,
        "training data not at hand",
        f"the training data of {run.role} is not at hand, or has changed; its hash is none of this set's",
    )


def _train_hash_beside(samples: ShardedSamples) -> str | None:
    """Content hash of the split train of the same folder."""
    try:
        return open_split(samples.directory.parent, _TRAIN, require_captions=False).content_hash()
    except UserError:
        return None


def _of_training(
    run: Run, train: ShardedSamples, samples: ShardedSamples, name: str, fraction: float
) -> Iterator[Finding]:
    who = f"{run.role}{', with labels' if 'class_names' in run.record else ''}"
    who += f"; {100 * fraction:g} % of what is counted here" if fraction < 1 else ""
    if train.content_hash() == samples.content_hash():
        yield Finding(LEAK, "the split itself", f"this very split was in training ({who})")
        return
    shared = int(shared_images(samples, train).sum())
    if shared == len(samples):
        yield Finding(LEAK, "all its images", f"all {shared:,} images of this split were in training ({who})")
    elif shared:
        text = f"{shared:,} of its {len(samples):,} images were in training, byte for byte ({who})"
        yield Finding(NOTE, f"{shared:,} equal images", text)
    if train.content_hash() == _train_hash_beside(samples):
        yield Finding(NOTE, "its training split", f"this set's training split was in training ({who})")
    elif name and name == set_name(train.directory.parent) and name not in _OF_ANYTHING:
        yield Finding(NOTE, f"images of {name}", f"images of {name}, prepared otherwise, were in training ({who})")


def _of_choice(lineage: Lineage, samples: ShardedSamples) -> Iterator[Finding]:
    """Whether the split chose which of the run's checkpoints it is."""
    run = next((run for run in lineage.runs if run.role == _RUN), None)
    if run is None or lineage.checkpoint.name != _BEST:
        return
    options = run.record.get("options", {})
    metric = (options.get("checkpoint") or {}).get("best_checkpoint_metric", "loss")
    names = str((options.get("dataset") or {}).get("valid_subset", "valid")).split(",")[:1]
    folders = run.folders[:1]
    if metric.startswith("zero_shot") and run.options.get("zero_shot_data"):
        folders, names = [Path(run.options["zero_shot_data"])], [run.options.get("zero_shot_split") or "test"]
    for folder, split in zip(folders, names, strict=False):
        try:
            chosen_by = open_split(folder, split, require_captions=False).content_hash()
        except UserError:
            continue
        if chosen_by == samples.content_hash():
            yield Finding(
                NOTE,
                "chose the checkpoint",
                f"this split chose the checkpoint (the best {metric} of the run's validations)",
            )


def _sees_images(weights: Weights) -> bool:
    return not weights.name.startswith("bert") and weights.role != "the start of the text encoder"


def _of_weights(weights: Weights, name: str) -> Finding:
    known = exposures(weights.name)
    if not known:
        return Finding(
            UNKNOWN, f"what {weights.shown} saw", f"what {weights.shown}, {weights.role}, was trained on is not known"
        )
    parts = [f"{_HOW[each.how].format(each.data)} ({each.source})" for each in known]
    text = f"{weights.shown}, {weights.role}, was trained {' and '.join(parts)}{weights.condition}"
    own = [each for each in known if name and _SETS.get(each.data) == name]
    if own:
        with_labels = any(each.how == LABELS for each in own)
        text += f": this set's training images{' with their classes' if with_labels else ''}"
    brief = ", ".join(f"{each.data} {each.how}" for each in known)
    brief = f"by its name {brief}" if weights.condition else brief
    return Finding(NOTE, f"{weights.shown} ({brief})", text)
