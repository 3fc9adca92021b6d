"""`emkum teacher cache`: what it stores, and what it refuses."""

import argparse
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from emkum.cli import main
from emkum.commands.teacher_options import add_teacher_arguments, build_from
from emkum.data.image_text import ImageTextDataset
from emkum.data.mixture import open_mixture
from emkum.data.shard_writing import ShardWriter
from emkum.data.shards import open_split
from emkum.data.transforms import ImageTransform
from emkum.errors import UserError
from emkum.models import teacher_builders
from emkum.outputs import TeacherOutput
from emkum.teachers.base import FrozenTeacher, TeacherConfig, TeacherInput
from emkum.teachers.cached import CachedTeacher

SPEC = "timm:test_vit"
# What `words` in conftest.py stores of 16 training images.
SIDE, TRAIN_IMAGES, VIEWS, TOP = 32, 16, 2, 5


@pytest.fixture(autouse=True)
def quiet_and_alone() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    # The command silences other libraries for the whole process.
    logging.disable(logging.NOTSET)


def shards_of(out: Path) -> list[Path]:
    return sorted(out.glob("*/*.npy"))


def assert_refused(command: list[str], message: str) -> str:
    with pytest.raises(UserError, match=message) as caught:
        main(command)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------------------


def test_options_are_those_of_a_teacher_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    add_teacher_arguments(parser)
    given = vars(parser.parse_args([SPEC]))
    assert given.pop("teacher") == SPEC
    assert given == {field.name: field.default for field in fields(TeacherConfig)}
    asked = []
    monkeypatch.setattr(teacher_builders, "build_teacher", lambda *all, **named: asked.append((all, named)))
    build_from(parser.parse_args([SPEC, "--weights", "w", "--image-size", "9", "--pooling", "cls", "--compile"]))
    config = TeacherConfig(weights="w", image_size=9, pooling="cls", compile=True)
    assert asked == [((SPEC, config), {"layers": False})]


# ----------------------------------------------------------------------------------------------------------------------
# What it stores
# ----------------------------------------------------------------------------------------------------------------------


def live_teacher(weights: Path) -> FrozenTeacher:
    return teacher_builders.build_teacher(SPEC, TeacherConfig(weights=str(weights), image_size=SIDE))


def training_set(scenes: Path, split: str) -> ImageTextDataset:
    """As training opens it, with a student of another size."""
    crop = (0.5, True) if split == "train" else ()
    transform = ImageTransform(24, *crop)
    return ImageTextDataset(
        open_split(scenes, split), None, transform, seed=3, num_views=VIEWS, teacher_size=SIDE, split=split
    )


@pytest.mark.parametrize("split", ["train", "valid"])
def test_cached_targets_equal_those_of_the_crops_in_training(
    whole: Path, scenes: Path, weights: Path, split: str
) -> None:
    live, cached, dataset = live_teacher(weights), CachedTeacher(whole), training_set(scenes, split)
    cached.open_split(split, dataset.samples.content_hash(), dataset.describe_crops())
    seen = []
    for epoch in range(1, VIEWS + 2):
        dataset.set_epoch(epoch)
        ids = np.random.default_rng(epoch).permutation(len(dataset)).tolist()
        crops = torch.stack([dataset.crops(number, dataset.samples[number].image)[1] for number in ids])
        batch = TeacherInput(crops, torch.tensor(ids), torch.full((len(ids),), dataset.view), split)
        expected, output = live(batch), cached(batch)
        torch.testing.assert_close(output.features, expected.features, rtol=2**-10, atol=1e-4)
        torch.testing.assert_close(output.patches, expected.patches, rtol=2**-10, atol=1e-4)
        numbers = expected.logits.topk(TOP).indices
        probabilities = [logits.softmax(1).gather(1, numbers) for logits in (output.logits, expected.logits)]
        torch.testing.assert_close(*probabilities, rtol=0, atol=1e-3)
        assert probabilities[1].max() > 0.05
        seen.append(output.features[ids.index(0)])
    # The third epoch sees the first one's crops again.
    assert torch.equal(seen[0], seen[VIEWS])
    assert torch.equal(seen[0], seen[1]) == (split == "valid")
    assert cached.identity == live.identity
    assert (cached.width, cached.num_classes, cached.grid, cached.patch_width) == (64, 1000, (2, 2), 64)


def test_training_with_other_crops_is_refused(whole: Path, scenes: Path) -> None:
    dataset = training_set(scenes, "train")
    dataset.seed = 4
    with pytest.raises(UserError, match="crops with seed = 3, training uses 4"):
        CachedTeacher(whole).open_split("train", dataset.samples.content_hash(), dataset.describe_crops())


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_default_options_store_features_of_centered_crops(
    scenes: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--weights", weights, "--image-size", SIDE, "--data", scenes, "--out", tmp_path / "cache"]
    main(["teacher", "cache", SPEC, *map(str, options)])
    assert [path.name for path in shards_of(tmp_path / "cache")] == ["features-00-000000.npy"] * 3
    assert np.load(tmp_path / "cache" / "train" / "features-00-000000.npy").shape == (TRAIN_IMAGES, 64)
    output = capsys.readouterr().out
    assert "train 16 images, valid 2 images, test 2 images" in output and f"teacher=cached:{tmp_path}" in output
    manifest = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert manifest["shard_size"] == 4096 and manifest["precision"] == "float32"
    assert manifest["splits"]["train"]["crops"] == {"views": 0}
    assert list(manifest["parts"]) == ["features"]


def test_several_folders_as_in_training(scenes: Path, words: Callable[..., list[str]], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(scenes, other)
    main(words(tmp_path / "cache", data=f"{scenes}:{other}", store="features", logits_top=0, views=0))
    cached = CachedTeacher(tmp_path / "cache")
    cached.open_split("train", open_mixture([scenes, other], "train").content_hash(), {"views": 0})
    cached.open_split("valid", open_split(scenes, "valid").content_hash(), {"views": 0})
    assert cached.splits["train"]["samples"] == 2 * TRAIN_IMAGES and cached.splits["valid"]["samples"] == 2
    ids = torch.tensor([0, TRAIN_IMAGES])
    features = cached(TeacherInput(torch.zeros(2), ids, torch.zeros_like(ids), "train")).features
    torch.testing.assert_close(features[0], features[1], rtol=2**-9, atol=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "splits.train.crops.seed 3 there, 4 here"),
        ({"min_scale": 0.6}, "splits.train.crops.min_scale 0.5 there, 0.6 here"),
        ({"views": 0}, "splits.train.crops.flip true there, None here"),
        ({"logits_top": 6}, "parts.logits.top 5 there, 6 here"),
        ({"store": "features,logits"}, "parts.patches.grid .* there, None here"),
        ({"shard_size": 4}, "shard_size 3 there, 4 here"),
        ({"splits": "train,valid"}, "splits.test.crops.views 0 there, None here"),
        ({"image_size": 48}, "teacher.image_size 32 there, 48 here"),
        ({"pooling": "mean"}, "teacher.pooling"),
        ({"autocast": "bfloat16"}, 'precision "float32" there, "bfloat16" here'),
    ],
)
def test_another_cache_in_the_folder_is_refused_and_left_alone(
    whole: Path, words: Callable[..., list[str]], folder_bytes: Callable, changes: dict[str, Any], message: str
) -> None:
    before = folder_bytes(whole)
    assert_refused(
        words(whole, **changes), f"holds another teacher cache .*{message}.*choose another --out or remove it"
    )
    assert folder_bytes(whole) == before


def test_other_weights_and_other_data_are_refused(
    whole: Path,
    words: Callable[..., list[str]],
    tmp_path: Path,
    run_prepare: Callable[..., None],
    save_model: Callable[..., Path],
) -> None:
    other = save_model(tmp_path / "other.safetensors", scale=2)
    assert "teacher.weights_sha256" in assert_refused(words(whole, weights=other), "holds another teacher cache")
    data = tmp_path / "scenes"
    run_prepare("scenes", "--out", data, "--num-images", 20, "--seed", 2, "--image-size", SIDE, "--vocab-size", 0)
    message = assert_refused(words(whole, data=data), "holds another teacher cache")
    assert "splits.train.data_hash" in message and "weights_sha256" not in message


@pytest.mark.parametrize("what", ["file", "folder", "damaged"])
def test_a_place_that_holds_something_else(words: Callable[..., list[str]], tmp_path: Path, what: str) -> None:
    out = tmp_path / "cache"
    mine = out
    if what != "file":
        out.mkdir()
        mine = out / {"folder": "mine.txt", "damaged": "cache.json"}[what]
    mine.write_text("mine")
    assert_refused(words(out), "exists and holds no teacher cache: choose another --out")
    assert mine.read_text() == "mine" and [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"store": "features,layers"}, "--store 'layers' is unknown; choose from features, logits, patches"),
        ({"store": "features"}, "--logits-top 5 needs logits in --store"),
        ({"logits_top": 1000}, "--logits-top 1000: timm:test_vit has 1,000 classes; want fewer, or 0 for all"),
        ({"logits_top": -1}, "--logits-top -1: want 0 or more"),
        ({"batch_size": 0}, "--batch-size 0: want 1 or more"),
        ({"shard_size": 0}, "--shard-size 0: want 1 or more"),
        ({"views": -1}, "--views -1: want 0 or more"),
        ({"min_scale": 1.5}, "--min-scale 1.5: want more than 0, at most 1"),
        ({"target": "fused"}, "--target fused: targets of text cannot be cached"),
        ({"splits": "train,dev"}, "no split 'dev'; splits of .*: train, valid, test"),
        ({"data": "no/such"}, "no/such holds no prepared split; make one with `emkum prepare`"),
        ({"weights": "no/such.safetensors"}, "no such file: no/such.safetensors"),
    ],
)
def test_wrong_options(words: Callable[..., list[str]], tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert_refused(words(tmp_path / "cache", **changes), message)
    assert not (tmp_path / "cache").exists()


class Stub(nn.Module):
    """The global feature alone, of an image or a text."""

    def forward(
        self,
        images: Tensor | None,
        text: Tensor | None = None,
        padding_mask: Tensor | None = None,
        layers: bool = False,
    ) -> TeacherOutput:
        return TeacherOutput((text if images is None else images).float().flatten(1)[:, :2])


@pytest.mark.parametrize(
    ("modality", "store", "message"),
    [
        ("text", "features", "bert:x does not look at images: there is nothing to cache"),
        ("image", "features,logits", "--store logits: bert:x has none"),
        ("image", "patches", "--store patches: bert:x has none"),
    ],
)
def test_what_a_teacher_does_not_have(
    words: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    modality: str,
    store: str,
    message: str,
) -> None:
    side = SIDE if modality == "image" else 0
    teacher = FrozenTeacher(Stub(), {"teacher": "stub"}, side, modalities=(modality,))
    monkeypatch.setattr(teacher_builders, "build_teacher", lambda *_, **__: teacher)
    assert_refused(words(tmp_path / "cache", spec="bert:x", store=store, logits_top=0), message)
    assert not (tmp_path / "cache").exists()


def test_features_that_do_not_fit_float16_are_not_stored(
    words: Callable[..., list[str]], tmp_path: Path, save_model: Callable[..., Path]
) -> None:
    huge = save_model(tmp_path / "huge.safetensors", scale=1e6)
    assert_refused(
        words(tmp_path / "cache", weights=huge, store="features", logits_top=0),
        r"features of sample 0 of split 'train' \(view 0\) do not fit float16: they reach from -.*e\+06 to .*e\+06",
    )
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["cache.json"]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded(words: Callable[..., list[str]], tmp_path: Path, workers: int) -> None:
    with ShardWriter(tmp_path / "data" / "train") as writer:
        writer.add("dog", b"no image", "jpg", ["a dog"])
    assert_refused(
        words(tmp_path / "cache", data=tmp_path / "data", workers=workers),
        r"sample 0 \(dog\) of split 'train' has no usable image: no image, or damaged",
    )
