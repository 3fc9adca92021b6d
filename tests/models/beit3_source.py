"""torchscale's BEiT-3 in a small form, which wrote the released files in its large ones."""

import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, LAYERS, SIDE, PATCH, PAD = 60, 128, 3, 32, 8, 1
POSITIONS = 22


def torchscale_maker() -> Callable[..., nn.Module]:
    """A function that makes torchscale's tiny BEiT-3 in eval mode, with every parameter random."""
    pytest.importorskip("torchscale")
    # It imports two functions that wrap layers for training in pieces, and calls neither.
    package, stub = ModuleType("fairscale"), ModuleType("fairscale.nn")
    package.nn = stub
    stub.checkpoint_wrapper = stub.wrap = None
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        if importlib.util.find_spec("fairscale") is None:
            patch.setitem(sys.modules, "fairscale", package)
            patch.setitem(sys.modules, "fairscale.nn", stub)
        warnings.filterwarnings("ignore", "Importing from timm.models.layers is deprecated", FutureWarning)
        from torchscale.architecture.config import EncoderConfig
        from torchscale.model.BEiT3 import BEiT3 as Source

    def make(**changes: Any) -> nn.Module:
        options = {
            "vocab_size": VOCABULARY,
            "img_size": SIDE,
            "patch_size": PATCH,
            "encoder_embed_dim": WIDTH,
            "encoder_attention_heads": WIDTH // 64,
            "encoder_ffn_embed_dim": 192,
            "encoder_layers": LAYERS,
            "max_source_positions": POSITIONS + 2,
            "normalize_output": True,
        }
        fixed = {"multiway": True, "no_output_layer": True, "layernorm_embedding": False}
        torch.manual_seed(0)
        model = Source(EncoderConfig(**fixed, **(options | changes)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return model.eval()

    return make


def save(state: dict[str, Tensor], folder: Path, **more: Tensor) -> Path:
    """As the released files are made."""
    path = folder / "beit3.pth"
    torch.save({"model": {f"beit3.{name}": value for name, value in state.items()} | more}, path)
    return path


def positions_of_another_size(table: Tensor, before: int, after: int) -> Tensor:
    """BEiT-3's published rule: rows of patches as an image, bicubic; three further rows as they are."""
    width = table.shape[1]
    image = table[3:].reshape(1, before, before, width).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(after, after), mode="bicubic", align_corners=False)
    return torch.cat([table[:3], image.permute(0, 2, 3, 1).reshape(after * after, width)])


def source_outputs(source: nn.Module, **arguments: Tensor) -> tuple[Tensor, list[Tensor]]:
    """torchscale's normed output, and what each of its layers gave."""
    states: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: states.append(output[0])) for layer in source.encoder.layers
    ]
    with torch.no_grad():
        output = source(**arguments)["encoder_out"]
    for hook in hooks:
        hook.remove()
    return output, states
