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
from emkum.weights import HUB, fingerprint, load_strictly, official_state, read_checkpoint, timm_model

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
    assert len(message) < 900
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


# ----------------------------------------------------------------------------------------------------------------------
# Strict loading, and official files
# ----------------------------------------------------------------------------------------------------------------------


def test_load_strictly_lists_all_that_differs() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = module.state_dict()
    assert load_strictly(module, state, "file") == []
    wrong = {
        "0.weight": torch.zeros(3, 2),
        "0.bias": torch.zeros(4),
        "1.weight": state["1.weight"],
        "2.w": torch.ones(1),
    }
    message = one_line(lambda: load_strictly(module, wrong, "a/file.pt", what="the model"))
    assert (
        "a/file.pt does not fit the model; missing: 1.bias; unexpected: 2.w; of another shape: 0.bias (4,)" in message
    )
    before = module[1].bias.clone()
    assert load_strictly(module, wrong | {"0.bias": torch.ones(3)}, "f", allowed="1.b*, 2.w") == ["1.bias", "2.w"]
    assert torch.equal(module[0].bias, torch.ones(3)) and torch.equal(module[1].bias, before)
    # A wrong shape is never allowed.
    assert "of another shape" in one_line(lambda: load_strictly(module, wrong, "f", allowed="*"))


def test_long_lists_are_shortened() -> None:
    message = one_line(lambda: load_strictly(nn.Linear(1, 1), {f"n{i:02}": torch.ones(1) for i in range(30)}, "f"))
    assert "n07 and 22 more" in message and "n08" not in message


def test_parameters_that_may_be_missing(tmp_path: Path) -> None:
    model, _ = resnet_file(tmp_path)
    state = {name: value for name, value in model.state_dict().items() if name != "bn1.weight"}
    torch.save(state | {"ema.decay": torch.ones(1)}, tmp_path / "part.pt")
    message = one_line(lambda: timm_model(NAME, str(tmp_path / "part.pt")))
    assert "Missing key(s) in state_dict: bn1.weight" in message
    assert "Unexpected key(s) in state_dict: ema.decay" in message
    assert "bn1.weight" in one_line(lambda: timm_model(NAME, str(tmp_path / "part.pt"), allowed="ema.*"))
    loaded = timm_model(NAME, str(tmp_path / "part.pt"), allowed="ema.*,bn1.weight").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def altered(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.mark.parametrize("form", ["backbone alone", "full checkpoint", "several devices"])
def test_official_dino_files(tmp_path: Path, form: str) -> None:
    name = "vit_tiny_patch16_224"
    model = altered(timm.create_model(name, img_size=32, num_classes=0))
    state = model.state_dict()
    if form == "full checkpoint":
        state = {
            "student": {f"module.backbone.{key}": torch.zeros_like(value) for key, value in state.items()},
            "teacher": {f"backbone.{key}": value for key, value in state.items()}
            | {"head.mlp.0.weight": torch.ones(2), "head.last_layer.weight_g": torch.ones(2)},
            "epoch": 100,
            "args": argparse.Namespace(arch="vit_tiny"),
        }
    elif form == "several devices":
        state = {"state_dict": {f"module.{key}": value for key, value in state.items()}}
    torch.save(state, tmp_path / "dino.pth")
    loaded = timm_model(name, str(tmp_path / "dino.pth"), img_size=32)
    assert loaded.num_classes == 0
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images), model(images), rtol=0, atol=1e-6)


def test_official_file_of_beit_pretraining(tmp_path: Path) -> None:
    """Relative positions that all blocks share, a norm of the CLS token, heads that predict visual tokens."""
    options = {"img_size": 32, "depth": 2, "embed_dim": 64, "num_heads": 2}
    shared = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
    model = timm.models.beit.Beit(
        **options, **shared, num_classes=0, global_pool="token", use_abs_pos_emb=False, init_values=0.1
    )
    state = altered(model).state_dict()
    extra = {
        "mask_token": torch.ones(1, 1, 64),
        "lm_head.weight": torch.ones(8, 64),
        "lm_head.bias": torch.ones(8),
        "cls_pt_layers.0.gamma_1": torch.ones(64),
        "rel_pos_bias.relative_position_index": torch.zeros(5, 5, dtype=torch.int64),
    }
    torch.save({"model": state | extra, "epoch": 1}, tmp_path / "beitv2_pt1k.pth")
    loaded = timm_model("beitv2_base_patch16_224", str(tmp_path / "beitv2_pt1k.pth"), **options)
    assert loaded.num_classes == 0
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images), model(images), rtol=0, atol=1e-5)
    assert loaded(images).shape == (2, 64)


def test_official_file_of_a_fine_tuned_beit(tmp_path: Path) -> None:
    options = {"img_size": 32, "depth": 2, "embed_dim": 64, "num_heads": 2}
    model = altered(timm.create_model("beitv2_base_patch16_224", **options))
    index = {f"blocks.{i}.attn.relative_position_index": torch.zeros(5, 5, dtype=torch.int64) for i in range(2)}
    torch.save({"module": model.state_dict() | index}, tmp_path / "ft1k.pth")
    loaded = timm_model("beitv2_base_patch16_224", str(tmp_path / "ft1k.pth"), **options).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=1e-6)
    assert loaded(images).shape == (2, 1000)


def test_state_of_nothing() -> None:
    assert official_state([1]) == official_state({}) == official_state({"model": 3}) == {}
