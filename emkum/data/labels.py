"""Classes of a prepared set and labels of its images, and images with labels. Plain PyTorch: `user_dir` adapts it to
fairseq.

A set with classes has `classes.json` beside its splits, which lists `class_name` by label, and each of its samples has
`label`, a number from 0.
"""

import json
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emkum.data.images import ImageDataset, ImageItem, collate
from emkum.data.mixture import MixedSamples
from emkum.data.shards import CLASSES_NAME, FOREIGN_JSON, INDEX_NAME, OWN_JSON, ShardedSamples
from emkum.errors import UserError

_MAKERS = "`emkum prepare` makes sets with classes of cifar10, cifar100, imagenet and image-folder"


def read_class_names(folder: str | Path) -> list[str]:
    """Names of a prepared set's classes, by label; raises as `read_classes` does."""
    return read_classes(folder)["class_name"]


def read_classes(folder: str | Path) -> dict[str, list[Any]]:
    """What a prepared set says of its classes: lists by label, `class_name` among them.

    Raises:
        UserError: the set has no classes, or no list of two or more of them.
    """
    path = Path(folder) / CLASSES_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no {CLASSES_NAME}, so its images have no classes; {_MAKERS}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    names = content.get("class_name") if isinstance(content, dict) else None
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise UserError(f'{path} lists no two classes: want {{"class_name": ["cat", "dog"]}}, in the order of labels')
    return {key: values for key, values in content.items() if isinstance(values, list) and len(values) == len(names)}


def read_labels(samples: MixedSamples, num_classes: int) -> np.ndarray:
    """(len(samples),) int64, the label of each image. No image is read for it.

    Args:
        samples: one split, of one set or of several with the same classes.
        num_classes: C.

    Raises:
        UserError: a sample has no label, or one that is not in 0 ... C - 1.
    """
    return np.concatenate([_labels_of_split(part, num_classes) for part in samples.parts])


def assert_learnable(training: np.ndarray, asked: np.ndarray, class_names: Sequence[str], source: Any) -> None:
    """
    Args:
        training: (N,) labels of the training images.
        asked: (M,) labels of the images of other splits.
        class_names: by label.
        source: where they are from, for the message.

    Raises:
        UserError: a class that is asked for has no training image, such as one whose folder was empty.
    """
    known, wanted = (np.bincount(labels, minlength=len(class_names)) for labels in (training, asked))
    missing = np.flatnonzero((known == 0) & (wanted > 0))
    if len(missing) > 0:
        first = int(missing[0])
        more = f" (and {len(missing) - 1:,} classes more)" if len(missing) > 1 else ""
        raise UserError(
            f"{source}: class {first}, {class_names[first]!r},{more} has {wanted[first]:,} images to score and none to "
            "train on: prepare the set again with training images of each class"
        )


def _labels_of_split(samples: ShardedSamples, num_classes: int) -> np.ndarray:
    index = np.load(samples.directory / INDEX_NAME, mmap_mode="r")
    names, folder = samples.manifest.names, samples.directory / samples.manifest.folder
    order = np.argsort(index["shard"], kind="stable")
    ends = np.cumsum(np.bincount(index["shard"], minlength=len(names)))
    labels = np.empty(len(index), dtype=np.int64)

    def read_shard(number: int) -> None:
        rows = order[ends[number - 1] if number else 0 : ends[number]]
        columns = (index[name][rows].tolist() for name in ("text_kind", "text_block", "text_length"))
        with open(folder / names[number], "rb") as file:
            for row, kind, block, length in zip(rows.tolist(), *columns, strict=True):
                text = b""
                if kind in (OWN_JSON, FOREIGN_JSON):
                    text = os.pread(file.fileno(), length, block * tarfile.BLOCKSIZE)
                labels[row] = _label(text, row, num_classes, samples.directory)

    # Disks answer many small requests side by side faster than one after the other.
    with ThreadPoolExecutor() as pool:
        list(pool.map(read_shard, range(len(names))))
    return labels


def _label(text: bytes, row: int, num_classes: int, directory: Path) -> int:
    """The label in a sample's JSON, empty where it has none."""
    content = json.loads(text) if text else {}
    label, key = content.get("label"), content.get("key", f"number {row}")
    if label is None:
        raise UserError(
            f"{directory}: sample {key} has no label; choose a split with labels, or another set: {_MAKERS}"
        )
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < num_classes:
        raise UserError(
            f"{directory}: sample {key} has the label {label!r}; {CLASSES_NAME} lists {num_classes} classes, which "
            f"are 0 ... {num_classes - 1}"
        )
    return label


@dataclass
class LabeledItem(ImageItem):
    """An image with its label."""

    label: int


class LabeledImages(torch.utils.data.Dataset):
    """Crops with their labels.

    Args:
        images: the crops.
        labels: (len(images),) int64.

    Raises:
        ValueError: another number of labels than of images.
    """

    def __init__(self, images: ImageDataset, labels: np.ndarray) -> None:
        if len(labels) != len(images):
            raise ValueError(f"{len(labels)} labels for {len(images)} images")
        self.images = images
        self.labels = labels

    @property
    def samples(self) -> ShardedSamples | MixedSamples:
        """Where the images are from."""
        return self.images.samples

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        """Choose the crops of an epoch, counted from 1."""
        self.images.set_epoch(epoch)

    def __getitem__(self, index: int) -> LabeledItem:
        item = self.images[index]
        return LabeledItem(item.id, item.views, int(self.labels[index]))

    def collate(self, items: list[LabeledItem]) -> dict[str, Any]:
        """Stack items to a batch of B images.

        Returns:
            What `emkum.data.images.collate` gives without `views`, and in net_input labels, (B,) int64. key: seed,
            epoch and id of the first sample, from which the randomness of a whole batch derives. Empty for no items.
        """
        if not items:
            return {}
        batch = collate(items)
        del batch["views"]
        batch["net_input"]["labels"] = torch.tensor([item.label for item in items])
        batch["key"] = (self.images.seed, self.images.epoch, items[0].id)
        return batch
