"""timm's ViTs and BEiTs as encoders, held against timm itself."""

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import DropPath, resample_abs_pos_embed
from timm.models import beit
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.models import timm_encoder
from emkum.models.encoder import LayerChoice
from emkum.models.timm_encoder import TimmImageEncoder

NAME, SIDE = "test_vit", 64
DEIT = "deit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def random_model(name: str = NAME, **arguments: Any) -> nn.Module:
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
    encoder = TimmImageEncoder(NAME, weights, SIDE, LayerChoice(layers)).eval()
    images = torch.randn(2, 3, SIDE, SIDE)
    encoded = encoder(images)
    assert encoded.padding_mask is None and encoder.num_layers == layers
    assert encoded.tokens.shape == (2, 1 + (SIDE // 16) ** 2, encoder.width)
    torch.testing.assert_close(encoded.tokens, after_block(model, layers, images), rtol=0, atol=1e-6)


def test_vit_tiny_gives_the_hidden_state(tmp_path: Path) -> None:
    model = random_model("vit_tiny_patch16_224", img_size=SIDE)
    encoder = TimmImageEncoder(
        "vit_tiny_patch16_224", save(model, tmp_path / "v.safetensors"), SIDE, LayerChoice(5)
    ).eval()
    images = torch.randn(1, 3, SIDE, SIDE)
    torch.testing.assert_close(encoder(images).tokens, after_block(model, 5, images), rtol=0, atol=1e-6)


def test_no_choice_keeps_all(source: tuple[nn.Module, str]) -> None:
    model, weights = source
    encoder = TimmImageEncoder(NAME, weights, SIDE)
    assert encoder.num_layers == len(model.blocks)
    assert encoder.num_heads == model.blocks[0].attn.num_heads
    assert (encoder.mean, encoder.std) == (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    assert not any(name.startswith(("model.norm.", "model.head")) for name in encoder.state_dict())


def test_positions_are_interpolated_as_timm_does(tmp_path: Path) -> None:
    model = random_model("vit_tiny_patch16_224")
    weights = save(model, tmp_path / "model.safetensors")
    encoder = TimmImageEncoder("vit_tiny_patch16_224", weights, 96, LayerChoice(1))
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
    expected = TimmImageEncoder(NAME, source[1], SIDE, LayerChoice(2)).eval()(images).tokens
    assert torch.equal(TimmImageEncoder(NAME, str(path), SIDE, LayerChoice(2)).eval()(images).tokens, expected)


def test_random_weights_differ_from_a_file(source: tuple[nn.Module, str]) -> None:
    weight = source[0].blocks[0].attn.qkv.weight
    assert torch.equal(TimmImageEncoder(NAME, source[1], SIDE, LayerChoice(1)).model.blocks[0].attn.qkv.weight, weight)
    assert not torch.equal(TimmImageEncoder(NAME, "", SIDE, LayerChoice(1)).model.blocks[0].attn.qkv.weight, weight)


def test_real_deit_tiny(shared_data: Path) -> None:
    weights = str(shared_data / DEIT / "model_fp16.safetensors")
    encoder = TimmImageEncoder(DEIT, weights, 112, LayerChoice(6)).eval()
    overlay = {"file": weights}
    model = timm.create_model(DEIT, pretrained=True, pretrained_cfg_overlay=overlay, img_size=112).eval()
    images = torch.randn(1, 3, 112, 112)
    assert (encoder.width, encoder.num_heads, encoder.num_layers) == (192, 3, 6)
    assert encoder.mean == (0.485, 0.456, 0.406)
    torch.testing.assert_close(encoder(images).tokens, after_block(model, 6, images), rtol=0, atol=1e-6)


def test_stochastic_depth_grows_to_the_last_kept_block() -> None:
    encoder = TimmImageEncoder(NAME, "", SIDE, LayerChoice(3), drop_path=0.4)
    rates = [[getattr(block, f"drop_path{i}") for i in (1, 2)] for block in encoder.model.blocks]
    assert not any(isinstance(layer, DropPath) for layer in rates[0])
    assert [layer.drop_prob for layer in rates[1] + rates[2]] == pytest.approx([0.2, 0.2, 0.4, 0.4])
    images = torch.randn(4, 3, SIDE, SIDE)
    assert not torch.equal(encoder(images).tokens, encoder(images).tokens)
    encoder.eval()
    assert torch.equal(encoder(images).tokens, encoder(images).tokens)
    plain = TimmImageEncoder(NAME, "", SIDE, LayerChoice(3))
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
            TimmImageEncoder(NAME, str(path), SIDE, LayerChoice(2))
        assert "\n" not in str(caught.value)


def test_other_models_are_refused(source: tuple[nn.Module, str], tmp_path: Path) -> None:
    cnn = save(timm.create_model("test_resnet"), tmp_path / "cnn.safetensors")
    supported = "; choose a ViT (also of AugReg, CLIP, DeiT, DeiT-3, DINO or DINOv2) or a BEiT"
    for name, weights, side, layers, message in (
        ("test_resnet", "", SIDE, 2, f"timm's test_resnet is no Vision Transformer: it takes no image size{supported}"),
        ("test_resnet", cnn, SIDE, 2, "timm's test_resnet is no Vision Transformer: it takes no image size"),
        ("test_vit2", "", SIDE, 2, f"timm's test_vit2 has no CLS token{supported}"),
        ("eva02_tiny_patch14_224", "", 28, 2, f"timm's eva02_tiny_patch14_224, a Eva, is not supported{supported}"),
        ("vit_base_patch16_xp_224", "", SIDE, 2, "timm's vit_base_patch16_xp_224 has blocks that are not supported"),
        ("vit_tiny_r_s16_p8_224", "", SIDE, 2, "timm's vit_tiny_r_s16_p8_224, a VisionTransformer, is not supported"),
        (NAME, "", SIDE, 7, "timm's test_vit has 6 layers; 7 cannot be kept"),
        (NAME, "", 72, 2, "--image-size 72 is no multiple of the 16-pixel patches of timm's test_vit"),
        (NAME, source[1], 72, 2, "--image-size 72 is no multiple of the 16-pixel patches of timm's test_vit"),
        ("test_vitt", "", SIDE, 2, "timm has no model 'test_vitt'; close ones: test_"),
        (NAME, "no/such.safetensors", SIDE, 2, "no such file: no/such.safetensors"),
    ):
        with pytest.raises(UserError) as caught:
            TimmImageEncoder(name, weights, side, LayerChoice(layers))
        assert message in str(caught.value) and "\n" not in str(caught.value)


# every kind of model --------------------------------------------------------------------------------------------------

SMALL = {"embed_dim": 32, "num_heads": 2, "depth": 4}
SHARED_BIAS = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "deep vit": ("vit_tiny_patch16_224", {"depth": 12}),
    "any size": (NAME, {}),
    "augreg": ("vit_base_patch16_224", {}),
    "deit with distillation": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "dino": ("vit_small_patch16_224", {}),
    "dinov2": ("vit_small_patch14_dinov2", {"patch_size": 16}),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}),
    "registers with positions": ("vit_small_patch14_reg4_dinov2", {"patch_size": 16, "no_embed_class": False}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "deep beit": ("beit_base_patch16_224", {"depth": 12}),
    "beit2": ("beitv2_base_patch16_224", {}),
    "beit with a shared bias": ("beit_base_patch16_224", SHARED_BIAS),
    "beit with positions": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_abs_pos_emb": True}),
}


class Small:
    """A small model of a kind: timm's own, the file of its weights, and encoders of it."""

    def __init__(self, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **further: Any) -> None:
        self.name, special = KINDS[kind]
        arguments = {**SMALL, **special, **further}
        # Of a width that suits a test; everything else of the way from name and file to model is as ever.
        monkeypatch.setattr(timm_encoder, "timm_model", partial(timm_encoder.timm_model, **arguments))
        self.source = random_model(self.name, img_size=SIDE, **arguments)
        self.weights = save(self.source, folder / "small.safetensors")

    def encoder(self, side: int = SIDE, choice: LayerChoice | None = None, **options: Any) -> TimmImageEncoder:
        return TimmImageEncoder(self.name, self.weights, side, choice, **options).eval()

    def features(self, images: Tensor, kept: slice = slice(None)) -> Tensor:
        """(B, 1 + N, D) by timm alone, of some of its blocks at the size of the images, without registers."""
        model = copy.deepcopy(self.source)
        model.set_input_size(images.shape[-2:])
        model.blocks = nn.Sequential(*list(model.blocks)[kept]) if self.is_vit else model.blocks[kept]
        model.norm = nn.Identity()
        with torch.no_grad():
            tokens = model.forward_features(images)
        return torch.cat([tokens[:, :1], tokens[:, model.num_prefix_tokens :]], dim=1)

    @property
    def is_vit(self) -> bool:
        return not isinstance(self.source, beit.Beit)


@pytest.fixture
def small(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    return Small(request.param, tmp_path, monkeypatch)


def of_kinds(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("small", kinds, indirect=True)


@of_kinds(*KINDS)
def test_all_kinds_give_the_features_of_timm(small: Small) -> None:
    for side in (SIDE, 96):
        images = torch.randn(2, 3, side, side)
        encoder, expected = small.encoder(side), small.features(images)
        # Values that a missing part would change, and tokens that differ.
        assert expected.std() > 0.1 and (expected[:, 1] - expected[:, 2]).abs().max() > 0.1
        tokens = encoder(images).tokens
        assert tokens.shape == (2, 1 + (side // 16) ** 2, 32) and encoder.image_size == side
        torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
        assert torch.equal(encoder.encode(encoder.embed(images)), tokens)
        torch.testing.assert_close(encoder(images[1:]).tokens[0], tokens[1], rtol=0, atol=1e-5)


@of_kinds("deep vit", "deep beit")
@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        (LayerChoice(6), slice(6)),
        (LayerChoice(every_second=True), slice(0, 12, 2)),
        (LayerChoice(2, every_second=True, further=1), slice(0, 6, 2)),
    ],
)
def test_chosen_blocks(small: Small, choice: LayerChoice, kept: slice) -> None:
    images = torch.randn(2, 3, SIDE, SIDE)
    encoder = small.encoder(choice=choice)
    assert encoder.num_layers == len(encoder.all_blocks()) == len(range(12)[kept])
    torch.testing.assert_close(encoder(images).tokens, small.features(images, kept), rtol=0, atol=1e-5)


@of_kinds("deep vit", "deep beit", "deit with distillation", "registers with positions")
def test_masked_patches_are_replaced_before_positions_are_added(small: Small) -> None:
    images, token = torch.randn(2, 3, SIDE, SIDE), torch.randn(32)
    masked = torch.rand(2, 16) < 0.4
    assert masked.any() and not masked.all()
    encoder = small.encoder()

    def replace(module: nn.Module, inputs: Any, patches: Tensor) -> Tensor:
        return torch.where(masked[..., None], token, patches)

    small.source.patch_embed.register_forward_hook(replace)
    actual = encoder.encode(encoder.embed(images, masked, token))
    torch.testing.assert_close(actual, small.features(images), rtol=0, atol=1e-5)
    assert (actual - encoder(images).tokens).abs().max() > 0.1


@of_kinds("deep vit", "any size", "deit3", "registers with positions", "beit2", "beit with a shared bias")
def test_without_positions_order_means_nothing(small: Small) -> None:
    encoder = small.encoder(own_positions=False)
    assert not any("pos" in name for name in encoder.state_dict())
    images, order = torch.randn(2, 3, SIDE, SIDE), torch.randperm(16)
    patches = F.unfold(images, 16, stride=16)  # (B, 3 * 16 * 16, 16), row by row
    moved = F.fold(patches[:, :, order], (SIDE, SIDE), 16, stride=16)
    tokens, expected = encoder(moved).tokens, encoder(images).tokens
    torch.testing.assert_close(tokens[:, 0], expected[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens[:, 1:], expected[:, 1:][:, order], rtol=0, atol=1e-5)
    with_positions = small.encoder()
    assert (with_positions(moved).tokens[:, 1:] - with_positions(images).tokens[:, 1:][:, order]).abs().max() > 1e-3


def test_images_are_of_one_size_and_have_no_padding() -> None:
    encoder = TimmImageEncoder(NAME, "", SIDE, LayerChoice(1))
    with pytest.raises(ValueError, match="not 64 by 64"):
        encoder(torch.randn(1, 3, 96, 96))
    images = torch.randn(1, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match="images have no padding"):
        encoder(images, torch.zeros(1, 17, dtype=torch.bool))


# blocks ---------------------------------------------------------------------------------------------------------------


def naive_pre_norm(state: Mapping[str, Tensor], x: Tensor, heads: int) -> Tensor:
    """A ViT's block on (N, D) tokens, one head after the other."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    outputs = []
    parts = [part.chunk(heads, -1) for part in linear("attn.qkv", norm("norm1", x)).chunk(3, -1)]
    for query, key, value in zip(*parts, strict=True):
        outputs.append((query @ key.T / query.shape[-1] ** 0.5).softmax(-1) @ value)
    x = x + linear("attn.proj", torch.cat(outputs, -1))
    return x + linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm("norm2", x))))


@of_kinds("deep vit", "dinov2", "deit3", "deep beit", "beit with positions")
def test_the_state_of_a_block_computes_what_the_block_does(small: Small) -> None:
    encoder = small.encoder(own_positions=False).double()
    for index, block in enumerate(encoder.all_blocks()):
        state = encoder.block_state(index)
        assert state.keys() == timm.models.vision_transformer.Block(32, 2, qkv_bias=True).state_dict().keys()
        assert not any(value.requires_grad for value in state.values())
        x = torch.randn(7, 32, dtype=torch.float64)
        torch.testing.assert_close(block(x[None])[0], naive_pre_norm(state, x, 2), rtol=0, atol=1e-10)


def test_a_bias_that_a_block_lacks_is_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Small("augreg", tmp_path, monkeypatch, qkv_bias=False).encoder().double()
    x = torch.randn(7, 32, dtype=torch.float64)
    expected = naive_pre_norm(encoder.block_state(1), x, 2)
    torch.testing.assert_close(encoder.all_blocks()[1](x[None])[0], expected, rtol=0, atol=1e-10)


def test_blocks_of_another_kind_have_no_such_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Small("augreg", tmp_path, monkeypatch, qk_norm=True).encoder()
    with pytest.raises(UserError) as caught:
        encoder.block_state(0)
    assert "timm's vit_base_patch16_224: they differ in attn.k_norm.bias, attn.k_norm.weight" in str(caught.value)


def test_parts_by_name(source: tuple[nn.Module, str]) -> None:
    encoder = TimmImageEncoder(NAME, source[1], SIDE).eval()
    patch = encoder.model.patch_embed.proj
    assert {id(parameter) for parameter in encoder.embedding_parameters()} == {id(patch.weight), id(patch.bias)}
    images = torch.randn(1, 3, SIDE, SIDE)
    encoder.drop_last_blocks(0)
    assert encoder.num_layers == len(encoder.all_blocks()) == 6
    encoder.drop_last_blocks(4)
    assert encoder.num_layers == len(encoder.all_blocks()) == 2
    torch.testing.assert_close(encoder(images).tokens, after_block(source[0], 2, images), rtol=0, atol=1e-5)


# training -------------------------------------------------------------------------------------------------------------


@of_kinds("deit with distillation", "dinov2 with registers", "clip", "beit2", "beit with a shared bias")
def test_every_parameter_learns_with_recomputed_activations_too(small: Small) -> None:
    encoder = small.encoder(drop_path=0.3).train()
    images, gradients = torch.randn(4, 3, SIDE, SIDE), []
    runs: list[int] = []
    encoder.all_blocks()[1].register_forward_pre_hook(lambda *_: runs.append(1))
    for checkpoint in (False, True):
        encoder.checkpoint_activations = checkpoint
        encoder.zero_grad()
        torch.manual_seed(5)
        encoder(images).tokens.square().mean().backward()
        assert not [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
        gradients.append({name: parameter.grad.clone() for name, parameter in encoder.named_parameters()})
    assert len(runs) == 3  # the second time once more, in the backward pass
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6, msg=name)
    with torch.no_grad():
        encoder(images)
    assert len(runs) == 4


@of_kinds("deep vit", "deep beit")
def test_plain_attention_gives_the_same(small: Small) -> None:
    images = torch.randn(2, 3, SIDE, SIDE)
    fused, plain = small.encoder(), small.encoder(fused_attention=False)
    assert all(block.attn.fused_attn for block in fused.all_blocks())
    assert not any(block.attn.fused_attn for block in plain.all_blocks())
    torch.testing.assert_close(plain(images).tokens, fused(images).tokens, rtol=0, atol=1e-5)
