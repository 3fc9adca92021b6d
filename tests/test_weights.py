"""Where weights come from: local files, the hub, and clear errors for all else."""

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from emkum.errors import UserError
from emkum.weights import HUB, fingerprint, read_checkpoint, timm_model

NAME = "test_resnet"


class Exploit:
    """Unpickling this makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.target),)


def one_line(call: Callable[[], Any]) -> str:
    """The message of the UserError that `call` raises."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith("emkum: error: ") and "\n" not in message
    return message


def resnet_file(tmp_path: Path, suffix: str = "safetensors") -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model, path = timm.create_model(NAME), tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return model, path


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
def test_tensors_come_back(tmp_path: Path, suffix: str) -> None:
    model, path = resnet_file(tmp_path, suffix)
    state = read_checkpoint(path)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    loaded = timm_model(NAME, str(path))
    assert fingerprint(loaded) == fingerprint(model) != fingerprint(timm_model(NAME))


def test_plain_data_and_the_options_of_old_checkpoints_come_back(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    content = {"args": argparse.Namespace(lr=[0.1], arch="x"), "epoch": 3, "model": {"w": torch.ones(2)}}
    torch.save(content, path)
    read = read_checkpoint(str(path))
    assert read["args"] == content["args"] and read["epoch"] == 3
    assert torch.equal(read["model"]["w"], torch.ones(2))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_code_is_refused_and_not_run(tmp_path: Path, nested: bool, plain: bool) -> None:
    path, target = tmp_path / "weights.pt", tmp_path / "made_by_the_file"
    content = {"model": {"w": torch.ones(2)}, "extra": Exploit(target)} if nested else Exploit(target)
    if plain:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    for call in (lambda: read_checkpoint(path), lambda: timm_model(NAME, str(path))):
        message = one_line(call)
        assert str(path) in message and "is refused: it holds more than tensors" in message
        assert not target.exists()
    # The file does what it threatens where it is trusted.
    if plain:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert target.is_dir()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files(tmp_path: Path, suffix: str, kept: float) -> None:
    _, path = resnet_file(tmp_path, suffix)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    for call in (lambda: read_checkpoint(path), lambda: timm_model(NAME, str(path))):
        assert str(path) in one_line(call)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_files_that_are_no_checkpoint(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("<html>404: not found</html>\n" * 20)
    assert str(path) in one_line(lambda: read_checkpoint(path))


def test_missing_files(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pt", tmp_path):
        for call in (lambda path=path: read_checkpoint(path), lambda path=path: timm_model(NAME, str(path))):
            assert f"no such file: {path}" in one_line(call)


def test_weights_of_another_model(tmp_path: Path) -> None:
    _, path = resnet_file(tmp_path)
    message = one_line(lambda: timm_model("test_efficientnet", str(path)))
    assert f"{path} does not hold the weights of timm's test_efficientnet: " in message
    assert len(message) < 500
    listing = tmp_path / "list.pt"
    torch.save([torch.ones(2)], listing)
    assert f"{listing} does not hold the weights" in one_line(lambda: timm_model(NAME, str(listing)))


def test_a_model_without_classifier_is_loaded_strictly_too(tmp_path: Path) -> None:
    model, path = resnet_file(tmp_path)
    headless = timm_model(NAME, str(path), num_classes=0)
    expected = {name: value for name, value in model.state_dict().items() if not name.startswith("fc.")}
    assert headless.state_dict().keys() == expected.keys()
    assert all(torch.equal(headless.state_dict()[name], value) for name, value in expected.items())
    # The weights are not held a second time.
    assert headless.pretrained_cfg["state_dict"] is None
    message = one_line(lambda: timm_model("test_efficientnet", str(path), num_classes=0))
    assert "does not hold the weights of timm's test_efficientnet: " in message


@pytest.mark.parametrize("weights", ["", HUB, "weights.safetensors"])
def test_unknown_names(weights: str) -> None:
    message = one_line(lambda: timm_model("test_resnett", weights))
    assert "timm has no model 'test_resnett'; close ones: test_" in message
    assert "timm has no model 'zzz'" in one_line(lambda: timm_model("zzz", weights))


@pytest.mark.parametrize("weights", ["", HUB])
def test_unknown_tags(weights: str) -> None:
    assert "nonsense" in one_line(lambda: timm_model("test_resnet.nonsense", weights))


def test_unknown_arguments_are_told_apart_from_wrong_weights(tmp_path: Path) -> None:
    _, path = resnet_file(tmp_path)
    for weights in ("", str(path)):
        with pytest.raises(TypeError, match="img_size"):
            timm_model(NAME, weights, img_size=64)


def test_no_way_to_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    message = one_line(lambda: timm_model(NAME, HUB))
    assert "weights of timm's test_resnet could not be downloaded (" in message
    assert message.endswith("download the model's model.safetensors elsewhere and give its path instead of 'hub'")


def test_a_model_that_was_never_released() -> None:
    name = "mobilenetv3_large_075"
    assert name not in {tagged.split(".")[0] for tagged in timm.list_models(pretrained=True)}
    assert f"weights of timm's {name} could not be downloaded (No pretrained weights" in one_line(
        lambda: timm_model(name, HUB)
    )


class Parts(nn.Module):
    """One parameter, one saved and one unsaved buffer."""

    def __init__(self, name: str = "w", shape: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.ones(shape, dtype=dtype)))
        self.register_buffer("saved", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)


def test_fingerprint_sees_names_shapes_types_and_values() -> None:
    def altered(module: Parts, change: Callable[[Parts], Any]) -> Parts:
        with torch.no_grad():
            change(module)
        return module

    plain = fingerprint(Parts())
    assert plain == fingerprint(Parts()) == fingerprint(Parts().eval().requires_grad_(False))
    assert plain == fingerprint(altered(Parts(), lambda module: module.unsaved.fill_(3)))
    others = [
        Parts("v"),
        Parts(shape=(3, 2)),
        Parts(dtype=torch.float64),
        Parts(dtype=torch.bfloat16),
        altered(Parts(), lambda module: module.w[1, 2].mul_(1 + 1e-6)),
        altered(Parts(), lambda module: module.saved[0].add_(1)),
        # Equal bytes of another type.
        altered(Parts(), lambda module: setattr(module, "saved", torch.zeros(2, dtype=torch.float64))),
    ]
    assert len({plain, *map(fingerprint, others)}) == 1 + len(others)
