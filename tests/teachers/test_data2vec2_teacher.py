"""The Data2Vec 2 teacher, from its name on, against fairseq's own model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from emkum.models.data2vec2 import IMAGENET_MEAN, IMAGENET_STD, data2vec2_module
from emkum.models.teacher_builders import build_teacher
from emkum.teachers.base import TeacherConfig, TeacherInput

WIDTH, HEADS, SIDE, PAD = 16, 2, 24, 1


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class _Vocabulary:
    def __len__(self) -> int:
        return 30

    def pad(self) -> int:
        return PAD


def source(modality: str, path: Path) -> nn.Module:
    """fairseq's model with random parameters, saved as its trainer does."""
    fork = data2vec2_module("models.data2vec2")
    kind = data2vec2_module("data.modality").Modality[modality]
    cfg = fork.Data2VecMultiConfig(
        embed_dim=WIDTH, depth=3, num_heads=HEADS, seed=1, max_update=10, ema_anneal_end_step=10,
        supported_modality=kind, norm_eps=1e-5, encoder_dropout=0.1,
    )  # fmt: skip
    own = getattr(cfg.modalities, modality.lower())
    own.num_alibi_heads, own.model_depth, own.prenet_depth, own.decoder = HEADS, 3, 2, None
    if modality == "IMAGE":
        own.num_extra_tokens, own.input_size, own.patch_size, own.embed_dim = 1, SIDE, 8, WIDTH
    model = fork.Data2VecMultiModel(cfg, [kind], task=SimpleNamespace(source_dictionary=_Vocabulary()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("positions"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    options = OmegaConf.to_container(OmegaConf.structured(cfg), resolve=False, enum_to_str=True)
    torch.save({"cfg": {"model": options}, "model": model.state_dict()}, path)
    return model.eval()


def features_of(model: nn.Module, **inputs: Any) -> tuple[Tensor, list[Tensor]]:
    """fairseq's output, and the MLP output of every block, prenet blocks first."""
    targets: list[Tensor] = []
    (encoder,) = model.modality_encoders.values()
    for block in encoder.context_encoder.blocks:
        block.register_forward_hook(lambda *arguments: targets.append(arguments[-1][1]))
    with torch.no_grad():
        output = model.extract_features(remove_extra_tokens=False, **inputs)
    return output["x"], targets + output["layer_results"]


def averaged(layers: list[Tensor], row: int, length: int) -> Tensor:
    """(length, D): each layer with mean 0 and variance 1 of each channel over a sample's tokens, then their mean."""
    total = torch.zeros(length, WIDTH, dtype=torch.float64)
    for layer in layers:
        tokens = layer[row, :length].double()
        total += (tokens - tokens.mean(0)) / (tokens.var(0, unbiased=False) + 1e-8).sqrt()
    return total / len(layers)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean", "default", "layers"])
def test_image_teacher(tmp_path: Path, pooling: str) -> None:
    path = tmp_path / "image.pt"
    model = source("IMAGE", path)
    pixels = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    tokens, layers = features_of(model, source=(pixels / 255 - mean) / std)
    teacher = build_teacher(f"data2vec2:{path}", TeacherConfig(pooling=pooling), layers=True)
    output = teacher(TeacherInput(pixels, torch.arange(3), torch.full((3,), -1), "train"))
    for row in range(3):
        features, patches = tokens[row, 0], tokens[row, 1:]
        if pooling == "mean":
            features = patches.mean(0)
        if pooling == "default":
            features = torch.cat([patches.mean(0), patches.max(0).values])
        if pooling == "layers":
            both = averaged(layers, row, tokens.shape[1])
            both = (both - both.mean(1, keepdim=True)) / (both.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            features, patches = both[0], both[1:]
        assert_close(output.features[row], features)
        assert_close(output.patches[row], patches)
    assert len(layers) == 5
    for actual, expected in zip(output.layers, layers, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("pooling", ["cls", "layers"])
def test_text_teacher(tmp_path: Path, pooling: str) -> None:
    path = tmp_path / "text.pt"
    model = source("TEXT", path)
    text = torch.tensor([[0, 5, 6, 7, 8, 2], [0, 9, 10, 2, PAD, PAD]])
    hidden = text == PAD
    tokens, layers = features_of(model, source=text, padding_mask=hidden)
    teacher = build_teacher(f"data2vec2:{path}", TeacherConfig(pooling=pooling))
    output = teacher(TeacherInput(None, torch.arange(2), torch.full((2,), -1), "train", text, hidden))
    for row, length in enumerate((6, 4)):
        expected = averaged(layers, row, length) if pooling == "layers" else tokens[row, :length]
        assert_close(output.features[row], expected[0])
        assert_close(output.patches[row, :length], expected)
