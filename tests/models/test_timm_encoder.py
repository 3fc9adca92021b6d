"""The first blocks of a timm ViT, held against timm itself."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import DropPath, resample_abs_pos_embed
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.models.timm_encoder import TimmImageEncoder

NAME, SIDE = "test_vit", 64
DEIT = "deit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def random_model(name: str = NAME, **arguments: int) -> nn.Module:
    """A timm model whose every parameter is random."""
    model = timm.create_model(name, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def save(model: nn.Module, path: Path) -> str:
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return str(path)


def after_block(model: nn.Module, number: int, images: Tensor) -> Tensor:
    """What the source library computes after a block, counted from 1."""
    kept: list[Tensor] = []
    hook = model.blocks[number - 1].register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        model(images)
    hook.remove()
    return kept[0]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, str]:
    """A full model at 64 pixels, and the file of its weights."""
    torch.manual_seed(3)
    model = random_model(img_size=SIDE)
    return model, save(model, tmp_path_factory.mktemp("timm") / "model.safetensors")


@pytest.mark.parametrize("layers", [1, 4, 6])
def test_first_blocks_give_the_hidden_state(source: tuple[nn.Module, str], layers: int) -> None:
    model, weights = source
    encoder = TimmImageEncoder(NAME, weights, SIDE, layers).eval()
    images = torch.randn(2, 3, SIDE, SIDE)
    encoded = encoder(images)
    assert encoded.padding_mask is None and encoder.num_layers == layers
    assert encoded.tokens.shape == (2, 1 + (SIDE // 16) ** 2, encoder.width)
    torch.testing.assert_close(encoded.tokens, after_block(model, layers, images), rtol=0, atol=1e-6)


def test_vit_tiny_gives_the_hidden_state(tmp_path: Path) -> None:
    model = random_model("vit_tiny_patch16_224", img_size=SIDE)
    encoder = TimmImageEncoder("vit_tiny_patch16_224", save(model, tmp_path / "v.safetensors"), SIDE, 5).eval()
    images = torch.randn(1, 3, SIDE, SIDE)
    torch.testing.assert_close(encoder(images).tokens, after_block(model, 5, images), rtol=0, atol=1e-6)


def test_zero_layers_keep_all(source: tuple[nn.Module, str]) -> None:
    model, weights = source
    encoder = TimmImageEncoder(NAME, weights, SIDE)
    assert encoder.num_layers == len(model.blocks)
    assert encoder.num_heads == model.blocks[0].attn.num_heads
    assert (encoder.mean, encoder.std) == (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    assert not any(name.startswith(("model.norm.", "model.head")) for name in encoder.state_dict())


def test_positions_are_interpolated_as_timm_does(tmp_path: Path) -> None:
    model = random_model("vit_tiny_patch16_224")
    weights = save(model, tmp_path / "model.safetensors")
    encoder = TimmImageEncoder("vit_tiny_patch16_224", weights, 96, 1)
    overlay = {"file": weights}
    theirs = timm.create_model(
        "vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, img_size=96
    ).pos_embed
    assert encoder.model.pos_embed.shape == (1, 1 + 6 * 6, 192)
    assert torch.equal(encoder.model.pos_embed, theirs)
    assert torch.equal(encoder.model.pos_embed[:, 0], model.pos_embed[:, 0])
    direct = resample_abs_pos_embed(model.pos_embed, new_size=[6, 6], num_prefix_tokens=1)
    torch.testing.assert_close(encoder.model.pos_embed, direct, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["torch", "nested", "headless", "other_classes"])
def test_other_files_of_the_same_weights_load(source: tuple[nn.Module, str], tmp_path: Path, kind: str) -> None:
    state = dict(source[0].state_dict())
    path = tmp_path / "weights.pt"
    if kind == "headless":
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    if kind == "other_classes":
        state |= {"head.weight": torch.zeros(3, 64), "head.bias": torch.zeros(3)}
    torch.save({"model": state, "epoch": 3} if kind == "nested" else state, path)
    images = torch.randn(1, 3, SIDE, SIDE)
    expected = TimmImageEncoder(NAME, source[1], SIDE, 2).eval()(images).tokens
    assert torch.equal(TimmImageEncoder(NAME, str(path), SIDE, 2).eval()(images).tokens, expected)


def test_random_weights_differ_from_a_file(source: tuple[nn.Module, str]) -> None:
    weight = source[0].blocks[0].attn.qkv.weight
    assert torch.equal(TimmImageEncoder(NAME, source[1], SIDE, 1).model.blocks[0].attn.qkv.weight, weight)
    assert not torch.equal(TimmImageEncoder(NAME, "", SIDE, 1).model.blocks[0].attn.qkv.weight, weight)


def test_real_deit_tiny(shared_data: Path) -> None:
    weights = str(shared_data / DEIT / "model_fp16.safetensors")
    encoder = TimmImageEncoder(DEIT, weights, 112, 6).eval()
    overlay = {"file": weights}
    model = timm.create_model(DEIT, pretrained=True, pretrained_cfg_overlay=overlay, img_size=112).eval()
    images = torch.randn(1, 3, 112, 112)
    assert (encoder.width, encoder.num_heads, encoder.num_layers) == (192, 3, 6)
    assert encoder.mean == (0.485, 0.456, 0.406)
    torch.testing.assert_close(encoder(images).tokens, after_block(model, 6, images), rtol=0, atol=1e-6)


def test_stochastic_depth_grows_to_the_last_kept_block() -> None:
    encoder = TimmImageEncoder(NAME, "", SIDE, 3, drop_path=0.4)
    rates = [[getattr(block, f"drop_path{i}") for i in (1, 2)] for block in encoder.model.blocks]
    assert not any(isinstance(layer, DropPath) for layer in rates[0])
    assert [layer.drop_prob for layer in rates[1] + rates[2]] == pytest.approx([0.2, 0.2, 0.4, 0.4])
    images = torch.randn(4, 3, SIDE, SIDE)
    assert not torch.equal(encoder(images).tokens, encoder(images).tokens)
    encoder.eval()
    assert torch.equal(encoder(images).tokens, encoder(images).tokens)
    plain = TimmImageEncoder(NAME, "", SIDE, 3)
    assert not any(isinstance(layer, DropPath) for layer in plain.modules())


def test_foreign_weights_are_refused(source: tuple[nn.Module, str], tmp_path: Path) -> None:
    state = dict(source[0].state_dict())
    files = {
        "resnet": timm.create_model("test_resnet").state_dict(),
        "lacks_a_block": {name: value for name, value in state.items() if not name.startswith("blocks.1.")},
        "lacks_what_is_cut_off": {name: value for name, value in state.items() if not name.startswith("blocks.5.")},
        "has_more": state | {"blocks.0.ls1.gamma": torch.ones(64)},
        "other_width": random_model("vit_tiny_patch16_224", img_size=SIDE).state_dict(),
    }
    for name, content in files.items():
        path = tmp_path / f"{name}.pt"
        torch.save(content, path)
        with pytest.raises(UserError, match=f"{name}.pt does not hold the weights of timm's {NAME}: ") as caught:
            TimmImageEncoder(NAME, str(path), SIDE, 2)
        assert "\n" not in str(caught.value)


def test_other_models_are_refused(source: tuple[nn.Module, str], tmp_path: Path) -> None:
    cnn = save(timm.create_model("test_resnet"), tmp_path / "cnn.safetensors")
    for name, weights, layers, message in (
        ("test_resnet", "", 2, "timm's test_resnet is no Vision Transformer: it takes no image size"),
        ("test_resnet", cnn, 2, "timm's test_resnet is no Vision Transformer: it takes no image size"),
        ("test_vit2", "", 2, "timm's test_vit2 has no blocks or no CLS token; choose a ViT, DeiT or BEiT"),
        (NAME, "", 7, "timm's test_vit has 6 blocks, fewer than the 7 asked for"),
        ("test_vitt", "", 2, "timm has no model 'test_vitt'; close ones: test_"),
        (NAME, "no/such.safetensors", 2, "no such file: no/such.safetensors"),
    ):
        with pytest.raises(UserError) as caught:
            TimmImageEncoder(name, weights, SIDE, layers)
        assert message in str(caught.value) and "\n" not in str(caught.value)
