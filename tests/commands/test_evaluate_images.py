"""`emkum evaluate knn` and `emkum evaluate linear` on small CIFAR-like sets, and the features that they work on."""

import io
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from emkum.cli import main
from emkum.commands import image_features
from emkum.commands.evaluate_images import parse_numbers
from emkum.commands.feature_models import FeatureModel, open_model
from emkum.commands.image_features import split_features
from emkum.data.shard_writing import ShardWriter
from emkum.data.shards import open_split
from emkum.errors import UserError
from emkum.models.beit3 import BEiT3
from emkum.models.encoder import LayerChoice
from emkum.models.timm_encoder import TimmImageEncoder
from emkum.prepare.cifar import CIFAR10_CLASSES

MODEL, SIDE = "test_vit", 32
TRAIN, TEST = 4, 2


@pytest.fixture(autouse=True)
def quiet_and_alone() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    # The command silences other libraries for the whole process.
    logging.disable(logging.NOTSET)


def make_images(folder: Path) -> Path:
    """Class folders as CIFAR has them: each class a color, with noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("test", TEST)):
        for label, name in enumerate(CIFAR10_CLASSES):
            (folder / split / name).mkdir(parents=True)
            color = np.random.default_rng(label).integers(0, 200, 3)
            for number in range(count):
                pixels = color + rng.integers(0, 56, (40, 36, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{number:04d}.png")
    return folder


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory, run_prepare: Callable[..., None]) -> Path:
    """40 images to train on and 20 of the split test. Not to be changed."""
    folder = tmp_path_factory.mktemp("cifar")
    run_prepare("cifar10", "--input", make_images(folder / "images"), "--out", folder / "cifar10")
    return folder / "cifar10"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features that tests share."""
    return tmp_path_factory.mktemp("features")


def evaluate(kind: str, data: Path, *words: object, source: str = f"timm:{MODEL}") -> None:
    options = ["--data", data, "--workers", 0]
    if source.startswith("timm:") and "--image-size" not in words:
        options += ["--image-size", SIDE]
    main([*map(str, ["evaluate", kind, source, *options, *words])])


def figures(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def pixels_of(data: Path, split: str, size: int) -> Tensor:
    """(n, 3, size, size) in [0, 1], cropped and resized by Pillow alone."""
    images = []
    for sample in open_split(data, split, require_captions=False):
        image = Image.open(io.BytesIO(sample.image))
        side, left, top = min(image.size), (image.width - min(image.size)) / 2, (image.height - min(image.size)) / 2
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)
    return torch.stack(images)


def computed(model: FeatureModel, data: Path, split: str, folder: Path, **options: int) -> np.ndarray:
    return split_features(model, open_split(data, split, require_captions=False), folder, **options)


def labels_of(data: Path, split: str) -> np.ndarray:
    return np.array([sample.meta["label"] for sample in open_split(data, split, require_captions=False)])


def test_features_are_the_encoders_own(cifar: Path, tmp_path: Path, weights: Path) -> None:
    encoder = TimmImageEncoder(MODEL, str(weights), SIDE, LayerChoice(3)).eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    with torch.no_grad():
        tokens = encoder((pixels_of(cifar, "test", SIDE) - mean) / std).tokens
    expected = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}
    expected |= {"default": expected["cls"], "both": torch.cat([expected["cls"], expected["mean"]], dim=1)}
    for features, rows in expected.items():
        model = open_model(f"timm:{MODEL}", str(weights), SIDE, 3, features)
        found = computed(model, cifar, "test", tmp_path, batch_size=7)
        np.testing.assert_allclose(found, rows.numpy(), rtol=1e-4, atol=1e-5)
        assert found.dtype == np.float32
    assert not np.allclose(expected["cls"], expected["mean"], rtol=0.01)


def test_a_timm_model_is_run_whole_without_layers(cifar: Path, tmp_path: Path, weights: Path) -> None:
    whole = timm.create_model(MODEL, True, pretrained_cfg_overlay={"file": str(weights)}, img_size=SIDE).eval()
    mean, std = (torch.tensor(whole.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        tokens = whole.forward_features((pixels_of(cifar, "test", SIDE) - mean) / std)
    expected = {"default": tokens[:, 0], "cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}
    expected["both"] = torch.cat([expected["cls"], expected["mean"]], dim=1)
    for features, rows in expected.items():
        found = computed(open_model(f"timm:{MODEL}", str(weights), SIDE, 0, features), cifar, "test", tmp_path)
        np.testing.assert_allclose(found, rows.numpy(), rtol=1e-4, atol=1e-5)
    model = open_model(f"timm:{MODEL}", str(weights), SIDE, 6)
    blocks = computed(model, cifar, "test", tmp_path)
    assert not np.allclose(blocks, expected["cls"], rtol=0.01), "the blocks alone have no final norm"


def test_beit3_is_run_whole_without_layers(cifar: Path, tmp_path: Path) -> None:
    whole = BEiT3(9, width=64, layers=3, heads=1, ffn_width=256, image_size=SIDE, patch_size=8, max_positions=4).eval()
    torch.save({"model": whole.state_dict()}, tmp_path / "beit3.pth")
    pixels = 2 * pixels_of(cifar, "test", SIDE) - 1
    with torch.no_grad():
        expected = {0: whole(pixels).cls, 2: whole.hidden_states(pixels)[1][:, 0]}
    for layers, rows in expected.items():
        model = open_model(f"beit3:{tmp_path / 'beit3.pth'}", layers=layers)
        np.testing.assert_allclose(computed(model, cifar, "test", tmp_path), rows.numpy(), rtol=1e-4, atol=1e-5)


def test_knn_command(cifar: Path, cache: Path, tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "knn.json"
    evaluate("knn", cifar, "--weights", weights, "--k", "5,1", "--temperature", 0.1, "--cache", cache, "--json", out)
    printed, found = capsys.readouterr().out, figures(out)
    model = open_model(f"timm:{MODEL}", str(weights), SIDE)
    train, test = (computed(model, cifar, split, tmp_path) for split in ("train", "test"))
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (train, test)]
    for k in (1, 5):
        hits = 0
        for row, label in zip(unit[1].astype(float), labels_of(cifar, "test"), strict=True):
            cosine = unit[0] @ row
            nearest = np.argsort(-cosine, kind="stable")[:k]
            votes = np.bincount(labels_of(cifar, "train")[nearest], np.exp(cosine[nearest] / 0.1), minlength=10)
            hits += int(np.argmax(votes) == label)
        assert found[f"k{k}_top_1"] == pytest.approx(100 * hits / 20)
    assert found["k1_top_1"] > 20, "colors are told apart by any features"
    assert (found["train_images"], found["test_images"], found["classes"], found["split"]) == (40, 20, 10, "test")
    assert found["model"]["features"] == "default" and found["width"] == 64 and found["temperature"] == 0.1
    lines = printed.splitlines()
    assert "40 images of train, 20 of test" in lines[0] and [line.split()[0] for line in lines[-2:]] == ["1", "5"]
    assert f"{found['k5_top_1']:.2f}" in lines[-1] and f"{found['k5_top_5']:.2f}" in lines[-1]


@pytest.mark.parametrize("solver", ["sgd", "logistic"])
def test_linear_command(
    cifar: Path, cache: Path, tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture, solver: str
) -> None:
    out = tmp_path / "linear.json"
    words = ["--weights", weights, "--features", "both", "--cache", cache, "--json", out, "--held-out", 0.25]
    words += ["--epochs", 20, "--update-size", 8, "--learning-rates", "0.01,0.001,0.1", "--strengths", "0.001,1"]
    evaluate("linear", cifar, "--solver", solver, *words)
    printed, found = capsys.readouterr().out, figures(out)
    tried = {"sgd": ["0.001", "0.01", "0.1"], "logistic": ["0.001", "1"]}[solver]
    assert list(found["held_out_top_1"]) == tried and f"{found['chosen']:g}" in tried
    assert found["held_out_top_1"][f"{found['chosen']:g}"] == max(found["held_out_top_1"].values())
    assert found["solver"] == solver and found["width"] == 128 and found["top_1"] > 50
    assert f"chosen {'learning rate' if solver == 'sgd' else 'C'} {found['chosen']:g}: top-1" in printed
    if solver == "logistic":
        train, test = (
            computed(open_model(f"timm:{MODEL}", str(weights), SIDE, 0, "both"), cifar, split, tmp_path)
            for split in ("train", "test")
        )
        mean, std = train.mean(0), train.std(0)
        reference = LogisticRegression(C=found["chosen"], max_iter=1000)
        reference.fit((train - mean) / std, labels_of(cifar, "train"))
        assert found["top_1"] == pytest.approx(100 * reference.score((test - mean) / std, labels_of(cifar, "test")))
    before = out.read_bytes()
    evaluate("linear", cifar, "--solver", solver, *words)
    again, first = figures(out), json.loads(before)
    assert again | {"seconds": 0} == first | {"seconds": 0}


def test_features_are_computed_once(cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, out = tmp_path / "features", tmp_path / "knn.json"
    words = ["--weights", "random", "--cache", cache, "--k", 3, "--json", out]
    evaluate("knn", cifar, *words)
    first, files = figures(out), sorted(cache.iterdir())
    assert len(files) == 4 and not [path for path in files if path.name.startswith(".")]
    with monkeypatch.context() as patched:

        def refuse(*arguments: Any) -> None:
            raise AssertionError("features are computed anew")

        patched.setattr(image_features, "_computed", refuse)
        evaluate("knn", cifar, *words)
        assert figures(out) == first
        evaluate("linear", cifar, "--weights", "random", "--cache", cache, "--epochs", 1)
        for changes in (["--seed", 2], ["--features", "mean"], ["--image-size", 48], ["--layers", 2]):
            with pytest.raises(AssertionError, match="anew"):
                evaluate("knn", cifar, *words, *changes)
    evaluate("knn", cifar, *words, "--seed", 2)
    assert len(list(cache.iterdir())) == 8 and figures(out)["model"] != first["model"]


def test_what_is_damaged_or_unfinished_is_not_used(cifar: Path, tmp_path: Path) -> None:
    fed = []

    def extract(images: Tensor) -> Tensor:
        fed.append(len(images))
        if sum(fed) > 30:
            raise KeyboardInterrupt
        return images.float().flatten(1)[:, :5]

    model = FeatureModel(extract, SIDE, {"tiny": 1})
    with pytest.raises(KeyboardInterrupt):
        computed(model, cifar, "train", tmp_path, batch_size=8)
    assert not list(tmp_path.iterdir())
    fed[:] = [-100]
    found = computed(model, cifar, "train", tmp_path, batch_size=8)
    expected = found.copy()
    assert found.shape == (40, 5) and fed[1:] == [8] * 5
    path = next(tmp_path.glob("*.npy"))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"\.npy is damaged: delete .*\.json, and"):
        computed(model, cifar, "train", tmp_path)
    next(tmp_path.glob("*.json")).unlink()
    assert np.array_equal(computed(model, cifar, "train", tmp_path, batch_size=8), expected)


def test_without_a_cache_nothing_is_left(cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    evaluate("knn", cifar, "--weights", "random", "--k", 1)
    assert not list((tmp_path / "tmp").iterdir())


def test_decoding_processes_give_the_same(cifar: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    with ShardWriter(broken / "train") as writer:
        for number in range(5):
            image = open_split(cifar, "train", require_captions=False)[number].image
            writer.add(f"image{number}", b"image" if number == 4 else image, "png", [], {"label": number})
    model = FeatureModel(lambda images: images.float().flatten(1)[:, ::97], SIDE, {"tiny": 2})
    alone = computed(model, cifar, "train", tmp_path / "alone", batch_size=6)
    beside = computed(model, cifar, "train", tmp_path / "beside", batch_size=16, workers=2)
    assert np.array_equal(alone, beside)
    samples = open_split(broken, "train", require_captions=False)
    with pytest.raises(UserError, match=r"train: sample 4 \(image4\) has no usable image"):
        split_features(model, samples, tmp_path / "wrong", batch_size=3, workers=1)
    assert not list((tmp_path / "wrong").iterdir())


def test_features_that_are_not_finite(cifar: Path, tmp_path: Path) -> None:
    def extract(images: Tensor) -> Tensor:
        features = images.float().flatten(1)[:, :3]
        features[-1, 1] = float("inf")
        return features

    with pytest.raises(UserError, match=r"features of sample 5 \(.*\) of .*test are NaN or infinite"):
        computed(FeatureModel(extract, SIDE, {}), cifar, "test", tmp_path, batch_size=6)


KNN = ["knn", "--k", "1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*KNN, "--split", "valid"], "has no split 'valid'; splits of .*: train, test"),
        ([*KNN, "--split", "train"], "--split train is what the classifier learns from"),
        ([*KNN, "--data", "nowhere"], "data folder nowhere does not exist"),
        ([*KNN, "--features", "patches"], "--features 'patches' is unknown; choose from default, cls, mean, both"),
        ([*KNN, "--image-size", "-1"], "--image-size -1: want 0 or more"),
        ([*KNN, "--layers", "-2"], "--layers -2: want 0 or more"),
        ([*KNN, "--batch-size", "0"], "--batch-size 0: want 1 or more"),
        ([*KNN, "--workers", "-1"], "--workers -1: want 0 or more"),
        ([*KNN, "--weights", "nowhere.pt"], "no such file: nowhere.pt"),
        ([*KNN, "--temperature", "0"], "--temperature 0.0: want more than 0"),
        (["knn"], "--k 200: .*train has 40 images"),
        (["knn", "--k", "3,x"], "--k '3,x': want positive whole numbers"),
        (["knn", "--k", "0"], "--k '0': want positive"),
        (["linear", "--solver", "adam"], "--solver 'adam' is unknown; choose from sgd, logistic"),
        (["linear", "--epochs", "0"], "--epochs 0: want 1 or more"),
        (["linear", "--held-out", "1"], "--held-out 1: want more than 0, less than 1"),
        (["linear", "--learning-rates", "nan"], "--learning-rates 'nan': want positive numbers"),
        (["linear", "--solver", "logistic", "--strengths", ""], "--strengths '': want positive numbers"),
    ],
)
def test_mistakes(cifar: Path, tmp_path: Path, words: list[str], message: str) -> None:
    kind, *more = words
    weights = [] if "--weights" in more else ["--weights", "random"]
    with pytest.raises(UserError, match=message) as caught:
        evaluate(kind, cifar, *weights, *more, "--json", tmp_path / "x.json")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "words", "message"),
    [
        ("runs/nowhere", [], "no such checkpoint: runs/nowhere"),
        ("runs/nowhere", ["--weights", "x.pt"], "--weights x.pt: runs/nowhere has its own"),
        ("cached:x", [], "cached:x holds what a teacher made of other crops"),
        ("checkpoint:x", ["--layers", 2], "--layers 2: checkpoint:x is run whole"),
        ("bert:x", [], "bert:x reads text"),
        (f"timm:{MODEL}", ["--weights", "random", "--layers", 9], "has 6 layers; 9 cannot be kept"),
        ("timm:resnet10t", ["--weights", "random", "--features", "cls"], "--features cls: .* has no CLS token"),
    ],
)
def test_mistaken_sources(cifar: Path, source: str, words: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        evaluate("knn", cifar, "--k", 1, *words, source=source)
    assert "\n" not in str(caught.value)


def test_a_label_outside_the_classes(cifar: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(cifar, data)
    (data / "classes.json").write_text(json.dumps({"class_name": CIFAR10_CLASSES[:7]}))
    with pytest.raises(UserError, match=r".*sample .* has the label 7; classes.json lists 7 classes"):
        evaluate("knn", data, "--weights", "random", "--k", 1)


def test_sets_without_labels(cifar: Path, scenes: Path, tmp_path: Path, run_prepare: Callable[..., None]) -> None:
    with pytest.raises(UserError, match="has no classes.json, so its images have no classes"):
        evaluate("knn", scenes, "--weights", "random", "--k", 1)
    # A test set of images that nobody has labeled, beside a train split that has labels.
    shutil.copytree(cifar, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "test")
    shutil.copytree(scenes / "test", tmp_path / "data" / "test")
    with pytest.raises(UserError, match="test: sample .* has no label"):
        evaluate("knn", tmp_path / "data", "--weights", "random", "--k", 1)


def test_an_empty_class_folder(tmp_path: Path, run_prepare: Callable[..., None]) -> None:
    images = make_images(tmp_path / "images")
    for path in (images / "train" / "cat").iterdir():
        path.unlink()
    run_prepare("cifar10", "--input", images, "--out", tmp_path / "data")
    message = "class 3, 'cat', has 2 images to score and none to train on"
    for kind in ("knn", "linear"):
        with pytest.raises(UserError, match=message):
            evaluate(kind, tmp_path / "data", "--weights", "random", *(["--k", 1] if kind == "knn" else []))


def test_classes_of_one_image_cannot_be_held_out(tmp_path: Path, run_prepare: Callable[..., None]) -> None:
    images = make_images(tmp_path / "images")
    for path in images.glob("train/*/000[1-9].png"):
        path.unlink()
    run_prepare("cifar10", "--input", images, "--out", tmp_path / "data")
    with pytest.raises(UserError, match="train has one image a class alone: none can be held out"):
        evaluate("linear", tmp_path / "data", "--weights", "random")


def test_images_of_one_class_alone(tmp_path: Path, run_prepare: Callable[..., None]) -> None:
    images = make_images(tmp_path / "images")
    for folder in images.glob("*/*"):
        if folder.name != "dog":
            shutil.rmtree(folder)
    run_prepare("cifar10", "--input", images, "--out", tmp_path / "data")
    with pytest.raises(UserError, match="train has images of one class alone"):
        evaluate("linear", tmp_path / "data", "--weights", "random")


def test_the_split_valid_where_there_is_no_test(cifar: Path, tmp_path: Path) -> None:
    shutil.copytree(cifar, tmp_path / "data")
    (tmp_path / "data" / "test").rename(tmp_path / "data" / "valid")
    evaluate("knn", tmp_path / "data", "--weights", "random", "--k", 1, "--json", tmp_path / "x.json")
    assert figures(tmp_path / "x.json")["split"] == "valid"
    (tmp_path / "data" / "valid").rename(tmp_path / "data" / "other")
    with pytest.raises(UserError, match="has no split test or valid to score; it has train, other: give --split"):
        evaluate("knn", tmp_path / "data", "--weights", "random", "--k", 1)
    evaluate("knn", tmp_path / "data", "--weights", "random", "--k", 1, "--split", "other")


def test_numbers() -> None:
    assert parse_numbers("20, 5,5", "--k", int) == [5, 20]
    assert parse_numbers("1e-3,0.5", "--x", float) == [0.001, 0.5]
    for text, kind in (("1.5", int), ("inf", float), (",", int), ("-1", float)):
        with pytest.raises(UserError, match="--x .*: want positive"):
            parse_numbers(text, "--x", kind)


def test_real_photos(shared_data: Path, tmp_path: Path, run_prepare: Callable[..., None]) -> None:
    """A trained model on CIFAR-10, six images a class to learn from; chance is 10 %."""
    run_prepare("cifar10", "--input", shared_data / "cifar10" / "images.zip", "--out", tmp_path / "data", "--limit", 60)
    file = shared_data / "deit_tiny_patch16_224" / "model_fp16.safetensors"
    words = ["--weights", file, "--k", 5, "--image-size", 160, "--json", tmp_path / "knn.json"]
    evaluate("knn", tmp_path / "data", *words, source="timm:deit_tiny_patch16_224")
    assert figures(tmp_path / "knn.json")["k5_top_1"] > 35
