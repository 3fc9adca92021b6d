"""Encoders that take over another one's layers, or get another input size."""

from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import emkum.models.timm_encoder as timm_encoder
from emkum.errors import UserError
from emkum.layers.token_types import IMAGE, TokenTypes
from emkum.models.bert import BertEncoder
from emkum.models.cnn_encoder import CnnImageEncoder
from emkum.models.data2vec2 import Data2Vec2ImageEncoder, Data2Vec2TextEncoder
from emkum.models.encoder import Encoder, LayerChoice
from emkum.models.encoder_changes import WithAdditions, copy_layers, resize_timm_encoder
from emkum.models.timm_encoder import TimmImageEncoder


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def randomized(encoder: Encoder) -> Encoder:
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return encoder.eval()


def data2vec2_images(depth: int, prenet_depth: int, input_size: int = 16) -> Data2Vec2ImageEncoder:
    sizes = {"embed_dim": 24, "num_heads": 4, "input_size": input_size, "patch_size": 8}
    return Data2Vec2ImageEncoder(depth=depth, prenet_depth=prenet_depth, **sizes)


def data2vec2_text(depth: int, vocab_size: int = 20) -> Data2Vec2TextEncoder:
    return Data2Vec2TextEncoder(vocab_size, embed_dim=24, depth=depth, num_heads=4, max_positions=12)


def bert(layers: int, vocab_size: int = 20, width: int = 24) -> BertEncoder:
    return BertEncoder(vocab_size, width, layers, heads=4, ffn_width=40, max_positions=12)


def vit(layers: int | None = None, size: int = 32, name: str = "test_vit") -> TimmImageEncoder:
    return TimmImageEncoder(name, image_size=size, choice=LayerChoice(layers))


# Encoders of so many layers; whatever lies in a prenet does so by the rule of the number.
KINDS: dict[str, Any] = {
    "bert": (bert, 4),
    "data2vec2 text": (data2vec2_text, 4),
    "data2vec2 images": (lambda layers: data2vec2_images(layers - layers // 2, layers // 2), 4),
    "vit": (vit, 6),
}


def inputs_of(encoder: Encoder) -> Tensor:
    if hasattr(encoder, "image_size"):
        return torch.randn(2, 3, encoder.image_size, encoder.image_size)
    return torch.randint(4, 20, (2, 7))


@pytest.mark.parametrize("every_second", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_another_encoder(kind: str, every_second: bool) -> None:
    make, total = KINDS[kind]
    source, target = randomized(make(total)), make(total // 2).eval()
    copy_layers(target, source, "a file", LayerChoice(total // 2, every_second))
    kept = list(range(0, total, 2)) if every_second else list(range(total // 2))
    blocks = source.all_blocks()
    for own, index in zip(target.all_blocks(), kept, strict=True):
        state = blocks[index].state_dict()
        assert all(torch.equal(value, state[name]) for name, value in own.state_dict().items())
    inputs = inputs_of(source)
    with torch.no_grad():
        torch.testing.assert_close(target.embed(inputs), source.embed(inputs), rtol=0, atol=0)
        got, states = target.hidden_states(inputs), source.hidden_states(inputs)
    assert len(got) == total // 2
    if not every_second:
        for one, other in zip(got, states, strict=False):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    else:
        # The second of the kept layers sees what the first one gives, not what a layer left out made of it.
        torch.testing.assert_close(got[0], states[0], rtol=0, atol=0)
        assert not torch.allclose(got[1], states[1], atol=1e-3)


def test_of_a_larger_vocabulary_the_first_words_are_taken() -> None:
    for make in (bert, data2vec2_text):
        source, target = randomized(make(2, 25)), make(2, 20).eval()
        copy_layers(target, source, "a file")
        text = torch.randint(4, 20, (2, 7))
        with torch.no_grad():
            assert torch.equal(target(text).tokens, source(text).tokens)
        with pytest.raises(UserError, match="a file does not fit the encoder; of another shape"):
            copy_layers(make(2, 30), source, "a file")


def test_what_does_not_fit() -> None:
    with pytest.raises(UserError, match="a file has 2 layers; 3 cannot be kept"):
        copy_layers(bert(3), bert(2), "a file")
    with pytest.raises(UserError, match="a file does not fit the encoder's blocks; of another shape"):
        copy_layers(bert(2), bert(2, width=32), "a file")
    with pytest.raises(UserError, match="a file does not fit the encoder's blocks; missing"):
        copy_layers(bert(2), data2vec2_text(2), "a file")
    with pytest.raises(UserError, match="2 layers of a file are chosen for an encoder of 1"):
        copy_layers(bert(1), bert(2), "a file", LayerChoice(2))


def test_fixed_positions_are_those_of_the_own_size() -> None:
    source, target = randomized(data2vec2_images(2, 1)), data2vec2_images(2, 1, input_size=32).eval()
    positions = target.modality_encoders["IMAGE"].fixed_positional_encoder.positions.clone()
    copy_layers(target, source, "a file")
    assert torch.equal(target.modality_encoders["IMAGE"].fixed_positional_encoder.positions, positions)
    assert torch.equal(target.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_a_convolutional_network_is_copied_whole() -> None:
    source, target = randomized(CnnImageEncoder("test_resnet", "", 32)), CnnImageEncoder("test_resnet", "", 64).eval()
    copy_layers(target, source, "a file")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(target(images).tokens, source(images).tokens, rtol=0, atol=0)


# timm's models in a small form, with which options each one differs from the encoder's usual input.
SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}),
    "registers without positions": ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
    "deit": ("deit_tiny_distilled_patch16_224", {}),
    "beit": ("beit_base_patch16_224", {}),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TimmImageEncoder:
    name, changes = request.param
    make = partial(timm.create_model, name, **SMALL, **changes)
    monkeypatch.setattr(timm_encoder, "timm_model", lambda name, weights, **arguments: make(**arguments))
    return randomized(TimmImageEncoder(name, image_size=32))


def test_another_input_size_is_timms_own_interpolation(variant: TimmImageEncoder) -> None:
    before = {key: value.clone() for key, value in variant.state_dict().items()}
    own = TimmImageEncoder(variant.name, image_size=48).eval()
    resize_timm_encoder(variant, 48, "a file")
    assert variant.image_size == 48
    after = variant.state_dict()
    assert {key: value.shape for key, value in after.items()} == {k: v.shape for k, v in own.state_dict().items()}
    changed = [key for key in before if before[key].shape != after[key].shape]
    assert changed and all("pos" in key for key in changed)
    assert all(torch.equal(before[key], after[key]) for key in before.keys() - set(changed))
    with torch.no_grad():
        assert variant(torch.randn(1, 3, 48, 48)).tokens.shape == (1, 10, 48)
    with pytest.raises(UserError, match="images of 40 pixels are no multiple of the 16-pixel patches of a file"):
        resize_timm_encoder(variant, 40, "a file")


def test_layers_of_a_vit_are_those_that_timm_gives(variant: TimmImageEncoder) -> None:
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        options = {"intermediates_only": True, "output_fmt": "NLC", "return_prefix_tokens": True}
        parts = variant.model.forward_intermediates(images, **options)
        states = variant.hidden_states(images)
        assert torch.equal(variant(images).tokens, states[-1])
    assert len(states) == len(parts) == variant.num_layers == 3
    for state, (patches, prefix) in zip(states, parts, strict=True):
        torch.testing.assert_close(state, torch.cat([prefix[:, :1], patches], dim=1), rtol=1e-5, atol=1e-5)


def test_additions_come_before_the_first_block() -> None:
    inner = randomized(vit(2))
    types = TokenTypes(inner.width, layer_scale=None)
    encoder = WithAdditions(inner, nn.ModuleDict({"token_types": types}), IMAGE).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = inner.encode(inner.embed(images) + types.embedding.weight[IMAGE])
        assert torch.equal(encoder(images).tokens, expected)
        assert not torch.allclose(expected, inner(images).tokens)
    assert (encoder.width, encoder.image_size, encoder.mean) == (inner.width, 32, inner.mean)
    encoder.drop_last_blocks(1)
    assert encoder.num_layers == inner.num_layers == 1 == len(encoder.all_blocks())
