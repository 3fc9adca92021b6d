"""A small classifier, a few scenes, and the cache of its targets, for the tests of `emkum teacher cache`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from emkum.cli import main

MODEL, SIDE = "test_vit", 32


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory, run_prepare: Callable[..., None]) -> Path:
    """16 scenes to train on, 2 valid, 2 test."""
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    run_prepare("scenes", "--out", folder, "--num-images", 20, "--seed", 1, "--image-size", SIDE, "--vocab-size", 0)
    return folder


@pytest.fixture(scope="session")
def save_model() -> Callable[..., Path]:
    """A function that saves random weights of a classifier whose logits differ; `scale` multiplies its features."""

    def save(path: Path, scale: float = 1.0) -> Path:
        generator = torch.Generator().manual_seed(5)
        model = timm.create_model(MODEL)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            model.norm.weight.mul_(scale)
            model.head.weight.mul_(8)
        save_file(model.state_dict(), path)
        return path

    return save


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory, save_model: Callable[..., Path]) -> Path:
    torch.manual_seed(5)
    return save_model(tmp_path_factory.mktemp("teacher") / "model.safetensors")


@pytest.fixture(scope="session")
def words(scenes: Path, weights: Path) -> Callable[..., list[str]]:
    """A function that gives the words of a command that stores all parts of two views, with changed options."""

    def command(out: Path, spec: str = f"timm:{MODEL}", **changes: object) -> list[str]:
        options: dict[str, Any] = {
            "weights": weights, "image_size": SIDE, "data": scenes, "out": out,
            "store": "features,logits,patches", "logits_top": 5, "views": 2, "min_scale": 0.5,
            "seed": 3, "shard_size": 3, "batch_size": 2, "workers": 0,
        } | changes  # fmt: skip
        pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items()]
        return ["teacher", "cache", spec, "--flip", *(word for pair in pairs for word in pair)]

    return command


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, words: Callable[..., list[str]]) -> Path:
    """What an uninterrupted run leaves. Not to be changed."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "cache"
    main(words(out))
    return out
