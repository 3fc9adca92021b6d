"""Frozen teachers against the libraries they come from, and the cache of their targets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.models.builders import build_teacher
from emkum.models.data2vec2 import IMAGENET_MEAN, IMAGENET_STD, Data2Vec2ImageEncoder
from emkum.outputs import TeacherOutput
from emkum.teachers.base import FrozenTeacher, TeacherInput
from emkum.teachers.cached import CachedTeacher, write_cache
from emkum.teachers.encoder_teacher import encoder_teacher
from emkum.teachers.timm_teacher import timm_teacher

SIDE, SAMPLES, VIEWS = 32, 5, 2
CROPS = {"views": VIEWS, "min_scale": 0.5, "flip": True, "seed": 7}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def pixels(count: int = 3, side: int = SIDE) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


def batch(images: Tensor, ids: list[int] | None = None, views: list[int] | None = None, split: str = "train"):
    ids = list(range(len(images))) if ids is None else ids
    return TeacherInput(images, torch.tensor(ids), torch.tensor(views or [-1] * len(ids)), split)


def timm_model(name: str, **arguments: Any) -> nn.Module:
    model = timm.create_model(name, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def save(model: nn.Module, path: Path) -> str:
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return str(path)


def expected_of(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized with the model's own statistics, by timm alone: tokens, pooled feature, logits."""
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    normalized = (images.float() / 255 - mean) / std
    with torch.no_grad():
        tokens = model.forward_features(normalized)
        return tokens, model.forward_head(tokens, pre_logits=True), model(normalized)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


# test_vit normalizes with 0.5, deit_tiny with ImageNet's statistics.
@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_patch16_224"])
def test_a_timm_vit_gives_its_own_features(name: str, tmp_path: Path) -> None:
    model = timm_model(name, img_size=SIDE)
    teacher = timm_teacher(name, save(model, tmp_path / "weights.safetensors"), SIDE)
    images = pixels()
    tokens, pooled, logits = expected_of(model, images)
    output = teacher(batch(images))
    assert_close(output.features, pooled)
    assert_close(output.logits, logits)
    assert_close(output.patches, tokens[:, 1:])
    assert teacher.width == pooled.shape[1] and teacher.image_size == SIDE
    assert output.patches.shape == (3, (SIDE // 16) ** 2, teacher.width)


# The last one widens its features before the classifier.
@pytest.mark.parametrize("name", ["test_resnet", "test_mambaout"])
def test_a_timm_cnn_gives_its_own_features_at_any_size(name: str, tmp_path: Path) -> None:
    model = timm_model(name)
    weights = save(model, tmp_path / "weights.safetensors")
    assert timm_teacher(name, weights).image_size == model.pretrained_cfg["input_size"][-1] == 160
    teacher = timm_teacher(name, weights, image_size=64)
    images = pixels(side=64)
    _, pooled, logits = expected_of(model, images)
    output = teacher(batch(images))
    assert_close(output.features, pooled)
    assert_close(output.logits, logits)
    assert output.patches is None
    assert (teacher.width, teacher.image_size) == (pooled.shape[1], 64)


def test_a_model_without_classifier_has_no_logits() -> None:
    teacher = timm_teacher("vit_small_patch16_224.dino", "", SIDE)
    output = teacher(batch(pixels()))
    assert output.logits is None
    assert output.features.shape == (3, teacher.width) == (3, 384)


def test_real_deit_tiny_tells_images_apart(shared_data: Path) -> None:
    name = "deit_tiny_patch16_224"
    weights = str(shared_data / name / "model_fp16.safetensors")
    teacher = build_teacher(f"timm:{name}", weights)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": weights}).eval()
    images = pixels(2, 224)
    assert (teacher.width, teacher.image_size) == (192, 224)
    assert_close(teacher(batch(images)).features, expected_of(model, images)[1])


def test_targets_take_no_gradient_but_losses_may_use_them(tmp_path: Path) -> None:
    teacher = timm_teacher("test_vit", "", SIDE)
    output = teacher(batch(pixels()))
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    prediction = torch.randn(3, teacher.width, requires_grad=True)
    for part in (output.features, output.patches, output.logits):
        assert not part.requires_grad and not part.is_inference()
    (prediction * output.features).sum().backward()
    assert torch.equal(prediction.grad, output.features)


def test_a_teacher_stays_in_eval_mode() -> None:
    teacher = timm_teacher("test_resnet", "", 64)
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    teacher(batch(pixels(side=64)))
    assert not any(module.training for module in teacher.model.modules())
    assert all(torch.equal(before[name], value) for name, value in teacher.model.state_dict().items())
    # No module's train(), to() or state_dict() can reach it.
    assert not isinstance(teacher, nn.Module)


def small_encoder(seed: int = 0) -> Data2Vec2ImageEncoder:
    torch.manual_seed(seed)
    encoder = Data2Vec2ImageEncoder(16, depth=2, prenet_depth=1, num_heads=2, input_size=SIDE, patch_size=8)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return encoder


def test_encoder_teacher_pools_mean_and_maximum_of_patches() -> None:
    encoder = small_encoder()
    teacher = encoder_teacher(encoder, {"teacher": "mine"})
    images = pixels()
    output = teacher(batch(images))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        tokens = encoder((images.float() / 255 - mean) / std).tokens
    for row in range(3):
        patches = tokens[row, 1:].double().numpy()
        expected = np.concatenate([patches.mean(0), patches.max(0)])
        np.testing.assert_allclose(output.features[row].numpy(), expected, atol=1e-5)
    assert torch.equal(output.patches, tokens[:, 1:])
    assert output.logits is None
    assert (teacher.width, teacher.image_size) == (32, SIDE)
    assert (output.features[0] - output.features[1]).abs().max() > 1e-2


def test_data2vec2_teacher_from_a_checkpoint(tmp_path: Path) -> None:
    encoder = small_encoder()
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": encoder.state_dict(), "cfg": {"model": {"num_heads": 2, "norm_eps": 1e-6}}}, path)
    teacher = build_teacher(f"data2vec2:{path}")
    images = pixels()
    assert_close(teacher(batch(images)).features, encoder_teacher(encoder, {})(batch(images)).features)
    assert teacher.image_size == SIDE
    assert build_teacher(f"data2vec2:{path}", image_size=48).image_size == 48


def test_identity_changes_with_the_weights(tmp_path: Path) -> None:
    model = timm_model("test_vit", img_size=SIDE)
    first = save(model, tmp_path / "first.safetensors")
    with torch.no_grad():
        model.blocks[3].mlp.fc1.bias[5] += 1e-3
    second = save(model, tmp_path / "second.safetensors")
    identities = [timm_teacher("test_vit", weights, SIDE).identity for weights in (first, first, second)]
    assert identities[0] == identities[1]
    assert {key for key in identities[0] if identities[0][key] != identities[2][key]} == {"weights_sha256"}
    assert identities[0]["teacher"] == "timm:test_vit" and identities[0]["image_size"] == SIDE
    other = [encoder_teacher(small_encoder(seed), {"teacher": "x"}).identity for seed in (0, 0, 1)]
    assert other[0] == other[1] != other[2]


@pytest.mark.parametrize("spec", ["", "resnet50", "timm", "timm:", "cached:", "data2vec2:", "clip:ViT-B-32"])
def test_unknown_teachers_name_the_choices(spec: str) -> None:
    with pytest.raises(UserError, match="choose timm:NAME, data2vec2:FILE or cached:DIR") as caught:
        build_teacher(spec)
    assert repr(spec) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "weights", "message"),
    [
        ("timm:no_such_model", "", "timm has no model 'no_such_model'"),
        ("timm:test_vit", "no/such.safetensors", "no such file: no/such.safetensors"),
        ("data2vec2:no/such.pt", "", "no such file: no/such.pt"),
        ("cached:no/such", "", "no teacher cache at no/such"),
    ],
)
def test_teachers_that_are_not_there(spec: str, weights: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_teacher(spec, weights)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# The cache
# ----------------------------------------------------------------------------------------------------------------------


def all_crops(views: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (views, SAMPLES, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


def batches(crops: Tensor, split: str) -> Iterator[TeacherInput]:
    """Batches of two samples, the last one smaller; views one after the other."""
    for view, images in enumerate(crops):
        for start in range(0, SAMPLES, 2):
            ids = list(range(start, min(start + 2, SAMPLES)))
            yield batch(images[ids], ids, [view] * len(ids), split)


@pytest.fixture(scope="module")
def teacher() -> FrozenTeacher:
    torch.manual_seed(0)
    return encoder_teacher(small_encoder(), {"teacher": "mine"})


@pytest.fixture(scope="module")
def train_crops() -> Tensor:
    return all_crops(VIEWS, 1)


@pytest.fixture(scope="module")
def valid_crops() -> Tensor:
    return all_crops(1, 2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher: FrozenTeacher, train_crops: Tensor, valid_crops: Tensor) -> Path:
    directory = tmp_path_factory.mktemp("teacher") / "cache"
    splits = {
        "train": ("hash-train", CROPS, (VIEWS, SAMPLES), batches(train_crops, "train")),
        "valid": ("hash-valid", {"views": 0}, (1, SAMPLES), batches(valid_crops, "valid")),
    }
    write_cache(directory, teacher, splits)
    return directory


def test_cached_targets_equal_live_ones(cache: Path, teacher: FrozenTeacher, valid_crops: Tensor) -> None:
    cached = CachedTeacher(cache)
    cached.open_split("valid", "hash-valid", {"views": 0})
    ids = [4, 0, 2]
    live = teacher(batch(valid_crops[0, ids])).features
    output = cached(batch(valid_crops[0, ids], ids, split="valid"))
    torch.testing.assert_close(output.features, live, rtol=2**-10, atol=1e-4)
    assert output.features.dtype == torch.float32
    assert output.patches is None and output.logits is None
    assert (cached.width, cached.identity, cached.image_size) == (teacher.width, teacher.identity, 0)


def test_cached_views_replay(cache: Path, teacher: FrozenTeacher, train_crops: Tensor) -> None:
    cached = CachedTeacher(cache)
    cached.open_split("train", "hash-train", CROPS)
    ids, views = [3, 3, 1, 0], [0, 1, 1, 0]
    live = teacher(batch(train_crops[views, ids])).features
    torch.testing.assert_close(
        cached(batch(train_crops[views, ids], ids, views)).features, live, rtol=2**-10, atol=1e-4
    )
    assert (live[0] - live[1]).abs().max() > 1e-2


def test_centered_targets_serve_any_crop(cache: Path, teacher: FrozenTeacher, valid_crops: Tensor) -> None:
    cached = CachedTeacher(cache)
    cached.open_split("valid", "hash-valid", CROPS)
    live = teacher(batch(valid_crops[0, [1, 1, 1]])).features
    output = cached(batch(pixels(), [1, 1, 1], [-1, 0, 1], "valid")).features
    torch.testing.assert_close(output, live, rtol=2**-10, atol=1e-4)


@pytest.mark.parametrize(
    ("split", "data_hash", "crops", "message"),
    [
        ("test", "hash-train", CROPS, "has no split 'test', only train, valid"),
        ("train", "hash-other", CROPS, "was made of other data than the split 'train'"),
        ("train", "hash-train", CROPS | {"seed": 8}, "crops with seed = 7, training uses 8"),
        ("train", "hash-train", CROPS | {"min_scale": 0.6}, "crops with min_scale = 0.5, training uses 0.6"),
        ("train", "hash-train", CROPS | {"flip": False}, "crops with flip = True, training uses False"),
        ("train", "hash-train", CROPS | {"views": 4}, "crops with views = 2, training uses 4"),
        ("train", "hash-train", CROPS | {"views": 0}, "crops with views = 2, training uses 0"),
        ("train", "hash-train", {"views": 0}, "training uses"),
    ],
)
def test_cache_refuses_what_it_was_not_made_for(
    cache: Path, split: str, data_hash: str, crops: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        CachedTeacher(cache).open_split(split, data_hash, crops)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("manifest", [None, "", "{", "[]", "{}", '"text"', '{"teacher": {}, "width": 3}'])
def test_a_folder_that_is_no_cache(tmp_path: Path, manifest: str | None) -> None:
    if manifest is not None:
        (tmp_path / "cache.json").write_text(manifest)
    with pytest.raises(UserError, match="no teacher cache at .* make one with `emkum teacher cache`"):
        CachedTeacher(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"no array", b"cut"])
def test_a_cache_whose_features_are_damaged(tmp_path: Path, cache: Path, content: bytes | None) -> None:
    (tmp_path / "cache.json").write_bytes((cache / "cache.json").read_bytes())
    if content is not None:
        (tmp_path / "train.npy").write_bytes((cache / "train.npy").read_bytes()[:150] if content == b"cut" else content)
    with pytest.raises(UserError, match="train.npy is missing or damaged"):
        CachedTeacher(tmp_path).open_split("train", "hash-train", CROPS)


def test_write_cache_leaves_nothing_when_the_teacher_raises(tmp_path: Path, train_crops: Tensor) -> None:
    calls = []

    def fail(model: nn.Module, images: Tensor) -> TeacherOutput:
        calls.append(len(images))
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return TeacherOutput(torch.zeros(len(images), 4))

    teacher = FrozenTeacher(nn.Identity(), fail, 4, SIDE, (0.5,) * 3, (0.5,) * 3, {})
    splits = {"train": ("hash", CROPS, (VIEWS, SAMPLES), batches(train_crops, "train"))}
    with pytest.raises(RuntimeError, match="out of memory"):
        write_cache(tmp_path / "cache", teacher, splits)
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []


def test_write_cache_leaves_an_existing_folder_alone(tmp_path: Path, teacher: FrozenTeacher) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="exists already"):
        write_cache(tmp_path / "cache", teacher, {})
    assert [path.name for path in tmp_path.rglob("*")] == ["cache", "mine.txt"]


def test_write_cache_publishes_the_cache_and_nothing_else(cache: Path, teacher: FrozenTeacher) -> None:
    assert [path.name for path in cache.parent.iterdir()] == ["cache"]
    assert sorted(path.name for path in cache.iterdir()) == ["cache.json", "train.npy", "valid.npy"]
    assert np.load(cache / "train.npy").shape == (VIEWS, SAMPLES, teacher.width)
    assert np.load(cache / "train.npy").dtype == np.float16
