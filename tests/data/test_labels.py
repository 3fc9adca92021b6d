"""Classes and labels of prepared sets, and what is said where they are missing or wrong."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emkum.data.images import ImageDataset, collate
from emkum.data.labels import LabeledImages, assert_learnable, read_class_names, read_labels
from emkum.data.mixture import MixedSamples, open_mixture
from emkum.data.shard_writing import ShardWriter
from emkum.data.shards import open_split
from emkum.data.transforms import ImageTransform
from emkum.errors import UserError
from tests.small_classes import CLASSES, SPLITS, write_class_folders

NAMES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, run_prepare: Callable[..., None]) -> Path:
    root = tmp_path_factory.mktemp("labels")
    run_prepare("image-folder", "--images", write_class_folders(root / "raw"), "--out", root / "data")
    return root / "data"


def write_split(folder: Path, metas: Sequence[Mapping[str, Any]], per_shard: int = 2) -> MixedSamples:
    with ShardWriter(folder, samples_per_shard=per_shard) as writer:
        for number, meta in enumerate(metas):
            writer.add(f"image{number}", b"image", "png", [], meta)
    return MixedSamples([open_split(folder.parent, folder.name, require_captions=False)])


def test_labels_are_those_of_the_samples(prepared: Path) -> None:
    samples = open_mixture([prepared], "train", require_captions=False)
    labels = read_labels(samples, CLASSES)
    assert labels.dtype == np.int64
    assert labels.tolist() == [samples[i].meta["label"] for i in range(len(samples))]
    assert np.bincount(labels).tolist() == [SPLITS["train"]] * CLASSES
    assert read_class_names(prepared) == [f"class{label}" for label in range(CLASSES)]


def test_labels_of_many_shards_and_of_two_sets(tmp_path: Path) -> None:
    first, second = [2, 0, 1, 1, 2, 0, 0], [1, 2, 2]
    parts = [
        write_split(tmp_path / name / "train", [{"label": label} for label in labels])
        for name, labels in (("one", first), ("two", second))
    ]
    assert len(parts[0].parts[0].manifest.names) == 4
    assert read_labels(MixedSamples([part.parts[0] for part in parts]), 3).tolist() == first + second


def test_no_image_is_read_for_labels(tmp_path: Path) -> None:
    samples = write_split(tmp_path / "train", [{"label": 1}, {"label": 0}], per_shard=9)
    (shard,) = (tmp_path / "train").glob("*.tar")
    content = shard.read_bytes()
    assert content.count(b"image\0") >= 2
    shard.write_bytes(content.replace(b"image\0", b"EMAGE\0"))
    assert read_labels(samples, 2).tolist() == [1, 0]
    with pytest.raises(UserError, match="damaged"):
        samples[0]


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (3, r"sample image1 has the label 3; classes.json lists 3 classes, which are 0 ... 2"),
        (-1, r"the label -1"),
        (1.0, r"the label 1.0"),
        (True, r"the label True"),
        ("dog", r"the label 'dog'"),
        (None, r"sample image1 has no label; choose a split with labels"),
    ],
)
def test_wrong_labels_are_told_by_sample(label: Any, said: str, tmp_path: Path) -> None:
    samples = write_split(tmp_path / "test", [{"label": 0}, {"label": label}, {"label": 2}])
    with pytest.raises(UserError, match=said) as caught:
        read_labels(samples, 3)
    assert str(tmp_path / "test") in caught.value.message and "\n" not in caught.value.message


def test_a_split_without_labels(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sample image0 has no label"):
        read_labels(write_split(tmp_path / "test", [{}, {}]), 3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no classes.json, so its images have no classes; .* cifar10, cifar100, imagenet and image-folder"),
        ("{", "cannot be read"),
        ("[]", "lists no two classes"),
        ('{"class_name": "cat"}', "lists no two classes"),
        ('{"class_name": ["cat"]}', "lists no two classes"),
        ('{"class_name": [1, 2]}', "lists no two classes"),
        ('{"names": ["cat", "dog"]}', "lists no two classes"),
    ],
)
def test_wrong_lists_of_classes(content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "classes.json").write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        read_class_names(tmp_path)
    assert str(tmp_path) in caught.value.message


def test_class_names_are_in_the_order_of_labels(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text(json.dumps({"class_name": ["b", "a"], "wnid": ["n2", "n1"]}))
    assert read_class_names(tmp_path) == ["b", "a"]


def test_a_class_to_score_needs_training_images() -> None:
    training, asked = np.array([0, 0, 2]), np.array([1, 0, 1])
    with pytest.raises(UserError, match="data: class 1, 'dog', has 2 images to score and none to train on"):
        assert_learnable(training, asked, NAMES, "data")
    with pytest.raises(UserError, match=r"class 0, 'cat', \(and 1 classes more\) has 1 images"):
        assert_learnable(np.array([2]), np.array([0, 1]), NAMES, "data")
    # Of a part of a set, classes may be missing altogether.
    assert_learnable(training, np.array([0, 2, 2]), NAMES, "data")
    assert_learnable(training, np.array([], dtype=np.int64), NAMES, "data")


def test_batches_have_labels_and_a_key(prepared: Path) -> None:
    samples = open_mixture([prepared], "train", require_captions=False)
    labels = read_labels(samples, CLASSES)
    images = ImageDataset(samples, ImageTransform(16, 0.5, flip=True), seed=5)
    dataset = LabeledImages(images, labels)
    assert len(dataset) == len(samples) and dataset.samples is samples
    dataset.set_epoch(3)
    rows = [4, 0, 9]
    batch = dataset.collate([dataset[row] for row in rows])
    expected = collate([images[row] for row in rows])
    assert torch.equal(batch["net_input"]["image"], expected["net_input"]["image"])
    assert batch["net_input"]["labels"].tolist() == labels[rows].tolist() and batch["id"].tolist() == rows
    assert batch["key"] == (5, 3, 4) and batch["nsentences"] == 3
    assert dataset.collate([]) == {}
    with pytest.raises(ValueError, match="2 labels for"):
        LabeledImages(images, labels[:2])
