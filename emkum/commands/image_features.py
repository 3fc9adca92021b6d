"""Prepared images with labels, and their features, computed once with centered crops.

A split's features are in a file that `numpy.load` reads, NAME.npy (n, D) float32; NAME holds a hash of NAME.json, which
says what they depend on. The latter is written last: where it is, the features are whole.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from emkum.commands.feature_models import FeatureModel
from emkum.data.crops import centered_crops
from emkum.data.labels import assert_learnable, read_class_names, read_labels
from emkum.data.mixture import MixedSamples
from emkum.data.shards import ShardedSamples, available_splits, open_split
from emkum.errors import UserError
from emkum.files import replaced_file
from emkum.provenance import write_json

TRAIN_SPLIT = "train"
TEST_SPLITS = ("test", "valid")

_FORMAT = 1
_MOST_WORKERS = 8


@dataclass(frozen=True)
class LabeledSplit:
    """Images and labels of a split.

    Attributes:
        name: of the split.
        samples: its images.
        labels: (n,) int64.
    """

    name: str
    samples: ShardedSamples
    labels: np.ndarray


@dataclass(frozen=True)
class LabeledSets:
    """What a classifier learns from and what it is scored on.

    Attributes:
        train, test: the two splits; each class of the latter is in the former.
        classes: names by label.
    """

    train: LabeledSplit
    test: LabeledSplit
    classes: list[str]


def open_sets(data_dir: str | Path, split: str = "") -> LabeledSets:
    """Open the split train and the one to score, and read their labels. No image is read.

    Args:
        data_dir: what `emkum prepare` made of a set with classes.
        split: the one to score; empty = test, or else valid.

    Raises:
        UserError: no such data or split, no labels, or labels that do not fit the classes or one another.
    """
    classes: list[str] = []
    splits = []
    for name in (TRAIN_SPLIT, _test_split(data_dir, split)):
        samples = open_split(data_dir, name, require_captions=False)
        classes = classes or read_class_names(data_dir)
        splits.append(LabeledSplit(name, samples, read_labels(MixedSamples([samples]), len(classes))))
    train, test = splits
    assert_learnable(train.labels, test.labels, classes, data_dir)
    if len(np.unique(train.labels)) < 2:
        raise UserError(f"{train.samples.directory} has images of one class alone; there is nothing to tell apart")
    return LabeledSets(train, test, classes)


def _test_split(data_dir: str | Path, wanted: str) -> str:
    if wanted == TRAIN_SPLIT:
        raise UserError(f"--split {wanted} is what the classifier learns from; choose another one")
    splits = available_splits(data_dir)
    if wanted or not splits:
        # Whether it is there is said when it is opened.
        return wanted or TEST_SPLITS[0]
    found = [name for name in TEST_SPLITS if name in splits]
    if not found:
        raise UserError(f"{data_dir} has no split test or valid to score; it has {', '.join(splits)}: give --split")
    return found[0]


def default_workers() -> int:
    """Decoding processes: one, with a GPU most of the cores."""
    return min(_MOST_WORKERS, max(1, len(os.sched_getaffinity(0)) - 1)) if torch.cuda.is_available() else 1


def split_features(
    model: FeatureModel, samples: ShardedSamples, folder: Path, batch_size: int = 64, workers: int = 0
) -> np.ndarray:
    """Features of a split, (n, D) float32, finite and mapped from their file, which is written where it is missing.

    Args:
        model: what computes them.
        samples: the split.
        folder: of the files; made where it is missing.
        batch_size: images that are run at once.
        workers: decoding processes; 0 = none.

    Raises:
        UserError: an image is damaged, a feature is not finite, or a file is damaged or cannot be written.
    """
    description = {
        "format": _FORMAT,
        "model": model.identity,
        "crop": {"size": model.image_size, "kind": "center"},
        "data_hash": samples.content_hash(),
        "samples": len(samples),
    }
    text = json.dumps(description, sort_keys=True)
    path = folder / f"{samples.directory.name}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.npy"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_description(path.with_suffix(".json"), text):
            batches = centered_crops(samples, model.image_size, batch_size, workers)
            _write(path, len(samples), _computed(model, batches, samples))
            write_json(path.with_suffix(".json"), description)
        return _read(path, len(samples))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write features into {folder}: {reason}; give another --cache") from None


def _is_description(path: Path, text: str) -> bool:
    try:
        return json.dumps(json.loads(path.read_text(encoding="utf-8")), sort_keys=True) == text
    except (OSError, ValueError):
        return False


def _computed(model: FeatureModel, batches: Iterable[Tensor], samples: ShardedSamples) -> Iterator[np.ndarray]:
    """(B, D) float32 of batch after batch; shows its progress."""
    done = 0
    with tqdm(total=len(samples), desc=f"features of {samples.directory.name}", unit="image", disable=None) as progress:
        for images in batches:
            features = model.extract(images).float().cpu()
            finite = features.isfinite().all(dim=1)
            if not bool(finite.all()):
                position = done + int((~finite).nonzero()[0])
                raise UserError(
                    f"features of sample {position} ({samples[position].key}) of {samples.directory} are NaN or "
                    "infinite: the model or its weights are broken"
                )
            done += len(features)
            progress.update(len(features))
            yield features.numpy()


def _write(path: Path, count: int, batches: Iterator[np.ndarray]) -> None:
    with replaced_file(path) as temporary, open(temporary, "wb") as file:
        for features in batches:
            if file.tell() == 0:
                header = {"descr": "<f4", "fortran_order": False, "shape": (count, features.shape[1])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(features, dtype="<f4").data)


def _read(path: Path, count: int) -> np.ndarray:
    try:
        features = np.load(path, mmap_mode="r", allow_pickle=False)
        if features.ndim != 2 or features.dtype != np.float32 or len(features) != count:
            raise ValueError
    except (OSError, ValueError, EOFError):
        raise UserError(f"{path} is damaged: delete {path.with_suffix('.json')}, and it is computed anew") from None
    # A plain array over the mapped memory, without memmap's cost on each access.
    return features.view(np.ndarray)
