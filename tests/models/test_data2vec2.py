"""The Data2Vec 2 encoders, held against fairseq's own model."""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.models.data2vec2 import Data2Vec2Encoder, Data2Vec2ImageEncoder, Data2Vec2TextEncoder, data2vec2_module
from emkum.models.data2vec2_checkpoints import (
    encoder_arguments_from_checkpoint,
    image_encoder_from_checkpoint,
    load_data2vec2_weights,
    text_encoder_from_checkpoint,
)
from emkum.models.encoder import LayerChoice

WIDTH, HEADS, LAYERS, PAD = 24, 4, 12, 1
SIDE, PATCH, VOCABULARY = 24, 8, 20


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def source_model(modality: str, prenet_depth: int, side: int = SIDE) -> nn.Module:
    """fairseq's pretraining model, EMA copy and decoder included, with every parameter random."""
    fork = data2vec2_module("models.data2vec2")
    kind = data2vec2_module("data.modality").Modality[modality]
    depth = LAYERS - prenet_depth
    cfg = fork.Data2VecMultiConfig(
        embed_dim=WIDTH, depth=depth, num_heads=HEADS, seed=1, max_update=10, ema_anneal_end_step=10,
        supported_modality=kind, norm_eps=1e-6 if modality == "IMAGE" else 1e-5, recon_loss=1.0,
    )  # fmt: skip
    for own in (cfg.modalities.audio, cfg.modalities.image, cfg.modalities.text):
        own.num_alibi_heads, own.model_depth, own.prenet_depth = HEADS, depth, prenet_depth
        own.decoder.decoder_dim, own.decoder.decoder_groups, own.decoder.decoder_layers = 16, 4, 1
    cfg.modalities.image.num_extra_tokens = 1
    cfg.modalities.image.input_size, cfg.modalities.image.patch_size = side, PATCH
    cfg.modalities.image.embed_dim = WIDTH
    model = fork.Data2VecMultiModel(cfg, [kind], task=SimpleNamespace(source_dictionary=_Vocabulary()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("positions"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


class _Vocabulary:
    def __len__(self) -> int:
        return VOCABULARY

    def pad(self) -> int:
        return PAD


def save(model: nn.Module, path: Path) -> Path:
    """As fairseq's trainer does."""
    options = OmegaConf.to_container(OmegaConf.structured(model.cfg), resolve=False, enum_to_str=True)
    state = {"args": None, "cfg": {"model": options}, "model": model.state_dict(), "extra_state": {"epoch": 1}}
    torch.save(state, path)
    return path


@pytest.fixture(scope="module", params=[0, 2], ids=["no_prenet", "prenet"])
def image_source(request, tmp_path_factory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = source_model("IMAGE", request.param)
    return model, save(model, tmp_path_factory.mktemp("image") / "checkpoint.pt")


@pytest.fixture(scope="module", params=[0, 2], ids=["no_prenet", "prenet"])
def text_source(request, tmp_path_factory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = source_model("TEXT", request.param)
    return model, save(model, tmp_path_factory.mktemp("text") / "checkpoint.pt")


def text_batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(4, VOCABULARY, (3, 9))
    tokens[:, 0] = 0
    tokens[1, 6:] = PAD
    tokens[2, 3:] = PAD
    return tokens, tokens.eq(PAD)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    (encoder,) = model.modality_encoders.values()
    return [*encoder.context_encoder.blocks, *model.blocks]


def block_outputs(model: nn.Module, **inputs) -> tuple[list[Tensor], dict]:
    """The source's features after each prenet and main block, and what `extract_features` returns."""
    outputs: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda *arguments: outputs.append(arguments[-1][0])) for block in blocks_of(model)
    ]
    with torch.no_grad():
        features = model.extract_features(remove_extra_tokens=False, **inputs)
    for hook in hooks:
        hook.remove()
    return outputs, features


def features_with_layers(model: nn.Module, layers: list[int], **inputs) -> Tensor:
    """What the source gives when it is made of these layers alone."""
    model = deepcopy(model)
    blocks = blocks_of(model)
    (encoder,) = model.modality_encoders.values()
    prenet_depth = len(encoder.context_encoder.blocks)
    encoder.context_encoder.blocks = nn.ModuleList(blocks[i] for i in layers if i < prenet_depth)
    model.blocks = nn.ModuleList(blocks[i] for i in layers if i >= prenet_depth)
    with torch.no_grad():
        return model.extract_features(remove_extra_tokens=False, **inputs)["x"]


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# features against the source ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stock"])
def test_image_features_of_the_source(image_source, fused):
    model, path = image_source
    encoder = Data2Vec2ImageEncoder(**encoder_arguments_from_checkpoint(path, "IMAGE"), fused_attention=fused).eval()
    load_data2vec2_weights(encoder, path)
    images = torch.randn(2, 3, SIDE, SIDE)
    outputs, source = block_outputs(model, source=images)
    with torch.no_grad():
        encoded = encoder(images)
        assert_same(encoded.tokens, source["x"])
        for actual, expected in zip(encoder.hidden_states(images, end_of_block=True), outputs, strict=True):
            assert_same(actual, expected)
        targets = source["layer_results"]
        for actual, expected in zip(encoder.hidden_states(images)[-len(targets) :], targets, strict=True):
            assert_same(actual, expected)
    assert encoded.tokens.shape == (2, 1 + (SIDE // PATCH) ** 2, WIDTH) and encoded.padding_mask is None
    assert (encoder.width, encoder.num_heads, encoder.image_size) == (WIDTH, HEADS, SIDE)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stock"])
def test_text_features_of_the_source(text_source, fused):
    model, path = text_source
    encoder = Data2Vec2TextEncoder(**encoder_arguments_from_checkpoint(path, "TEXT"), fused_attention=fused).eval()
    load_data2vec2_weights(encoder, path)
    tokens, padding_mask = text_batch()
    outputs, padded = block_outputs(model, source=tokens, padding_mask=padding_mask)
    _, full = block_outputs(model, source=tokens[:1])
    with torch.no_grad():
        encoded = encoder(tokens, padding_mask)
        assert_same(encoded.tokens[~padding_mask], padded["x"][~padding_mask])
        assert_same(encoder(tokens[:1]).tokens, full["x"])
        states = encoder.hidden_states(tokens, padding_mask, end_of_block=True)
    for actual, expected in zip(states, outputs, strict=True):
        assert_same(actual[~padding_mask], expected[~padding_mask])
    assert encoded.padding_mask is padding_mask
    assert (encoder.width, encoder.max_positions, encoder.vocab_size) == (WIDTH, 512, VOCABULARY)


# Choice -> layers of 12 that it means.
CHOICES = [
    (LayerChoice(1), [0]),
    (LayerChoice(6), [0, 1, 2, 3, 4, 5]),
    (LayerChoice(6, further=1), [0, 1, 2, 3, 4, 5, 6]),
    (LayerChoice(6, every_second=True), [0, 2, 4, 6, 8, 10]),
    (LayerChoice(None, every_second=True), [0, 2, 4, 6, 8, 10]),
    (LayerChoice(3, every_second=True, further=1), [0, 2, 4, 6]),
]


@pytest.mark.parametrize(("choice", "layers"), CHOICES)
def test_chosen_image_layers(image_source, choice, layers):
    model, path = image_source
    encoder = image_encoder_from_checkpoint(path, choice=choice).eval()
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        assert_same(encoder(images).tokens, features_with_layers(model, layers, source=images))
        assert_same(encoder(images[:1]).tokens, features_with_layers(model, layers, source=images[:1]))
    assert encoder.num_layers == len(layers) == len(encoder.hidden_states(images))


@pytest.mark.parametrize(("choice", "layers"), CHOICES)
def test_chosen_text_layers(text_source, choice, layers):
    model, path = text_source
    encoder = text_encoder_from_checkpoint(path, choice=choice).eval()
    tokens, padding_mask = text_batch()
    expected = features_with_layers(model, layers, source=tokens, padding_mask=padding_mask)
    with torch.no_grad():
        assert_same(encoder(tokens, padding_mask).tokens[~padding_mask], expected[~padding_mask])
        assert_same(encoder(tokens[:1]).tokens, features_with_layers(model, layers, source=tokens[:1]))
    assert encoder.num_layers == len(layers)


def test_first_layers_are_those_inside_the_whole_source(image_source, text_source):
    images, (tokens, padding_mask) = torch.randn(2, 3, SIDE, SIDE), text_batch()
    outputs, _ = block_outputs(image_source[0], source=images)
    texts, _ = block_outputs(text_source[0], source=tokens, padding_mask=padding_mask)
    image_encoder = image_encoder_from_checkpoint(image_source[1], choice=LayerChoice(6)).eval()
    text_encoder = text_encoder_from_checkpoint(text_source[1], choice=LayerChoice(6)).eval()
    with torch.no_grad():
        assert_same(image_encoder(images).tokens, outputs[5])
        assert_same(text_encoder(tokens, padding_mask).tokens[~padding_mask], texts[5][~padding_mask])


@pytest.mark.parametrize("prenet_depth", [0, 1, 3, 6])
def test_layers_may_lie_in_the_prenet_or_not(image_source, prenet_depth):
    model, path = image_source
    layers = {"prenet_depth": prenet_depth, "depth": 6 - prenet_depth}
    encoder = Data2Vec2ImageEncoder(**encoder_arguments_from_checkpoint(path, "IMAGE") | layers).eval()
    images = torch.randn(1, 3, SIDE, SIDE)
    for choice, chosen in ((None, range(6)), (LayerChoice(6, every_second=True), range(0, 12, 2))):
        load_data2vec2_weights(encoder, path, choice)
        with torch.no_grad():
            assert_same(encoder(images).tokens, features_with_layers(model, list(chosen), source=images))


def test_another_image_size(image_source):
    model, path = image_source
    larger = source_model("IMAGE", len(model.modality_encoders["IMAGE"].context_encoder.blocks), 2 * SIDE)
    with torch.no_grad():
        for (name, own), value in zip(larger.named_parameters(), model.parameters(), strict=True):
            if not name.endswith("positions"):
                own.copy_(value)
    encoder = image_encoder_from_checkpoint(path, 2 * SIDE, LayerChoice(6)).eval()
    images = torch.randn(2, 3, 2 * SIDE, 2 * SIDE)
    with torch.no_grad():
        assert_same(encoder(images).tokens, features_with_layers(larger, list(range(6)), source=images))
    assert encoder(images).tokens.shape == (2, 37, WIDTH) and encoder.image_size == 2 * SIDE


def test_padding_changes_nothing(text_source):
    encoder = text_encoder_from_checkpoint(text_source[1]).eval().double()
    tokens, padding_mask = text_batch()
    with torch.no_grad():
        together = encoder(tokens, padding_mask).tokens
        for row, (ids, mask) in enumerate(zip(tokens, padding_mask, strict=True)):
            alone = encoder(ids[~mask][None]).tokens[0]
            assert_same(together[row, ~mask], alone, 1e-6)


def test_dropout_is_that_of_the_source(text_source):
    model, path = deepcopy(text_source[0]).train(), text_source[1]
    assert model.cfg.encoder_dropout == model.cfg.modalities.text.dropout == 0.1
    # Fused kernels draw other random numbers.
    encoder = Data2Vec2TextEncoder(**encoder_arguments_from_checkpoint(path, "TEXT"), fused_attention=False)
    load_data2vec2_weights(encoder, path)
    tokens, padding_mask = text_batch()
    with torch.no_grad():
        torch.manual_seed(1)
        expected = model.extract_features(tokens, padding_mask=padding_mask, remove_extra_tokens=False)["x"]
        torch.manual_seed(1)
        actual = encoder(tokens, padding_mask).tokens
    assert_same(actual[~padding_mask], expected[~padding_mask])


def test_safetensors(image_source, tmp_path):
    from safetensors.torch import save_file

    model, path = image_source
    state = {name: value for name, value in model.state_dict().items() if name != "_ema"}
    save_file(state, tmp_path / "weights.safetensors")
    encoder = Data2Vec2ImageEncoder(**encoder_arguments_from_checkpoint(path, "IMAGE")).eval()
    load_data2vec2_weights(encoder, tmp_path / "weights.safetensors")
    images = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        assert_same(encoder(images).tokens, model.extract_features(images, remove_extra_tokens=False)["x"])
    with pytest.raises(UserError, match="attention heads"):
        image_encoder_from_checkpoint(tmp_path / "weights.safetensors")


# embedding and blocks apart -------------------------------------------------------------------------------------------


def test_embedding_then_blocks_is_the_whole(image_source, text_source):
    image_encoder = image_encoder_from_checkpoint(image_source[1]).eval()
    text_encoder = text_encoder_from_checkpoint(text_source[1]).eval()
    images, (tokens, padding_mask) = torch.randn(2, 3, SIDE, SIDE), text_batch()
    with torch.no_grad():
        assert torch.equal(image_encoder.encode(image_encoder.embed(images)), image_encoder(images).tokens)
        encoded = text_encoder.encode(text_encoder.embed(tokens), padding_mask)
        assert torch.equal(encoded, text_encoder(tokens, padding_mask).tokens)


def test_what_is_added_to_words_is_normed_with_them(text_source):
    model, path = deepcopy(text_source[0]), text_source[1]
    encoder = text_encoder_from_checkpoint(path).eval()
    tokens, padding_mask = text_batch()
    added = torch.randn(WIDTH)
    local = model.modality_encoders["TEXT"].local_encoder
    with torch.no_grad():
        # Positions are counted from 2 on, over all tokens but padding.
        plain = local.embed_tokens.weight[tokens[0]] + local.embed_positions.weight[2 : 2 + tokens.shape[1]]
        assert_same(encoder.embed(tokens)[0], plain, 1e-6)
        actual = encoder.encode(encoder.embed(tokens) + added, padding_mask)
        local.embed_tokens.weight += added
        expected = model.extract_features(tokens, padding_mask=padding_mask, remove_extra_tokens=False)["x"]
    assert_same(actual[~padding_mask], expected[~padding_mask])


def test_masked_patches_are_replaced_before_positions(image_source):
    model, path = image_source
    encoder = image_encoder_from_checkpoint(path).eval()
    images, masked = torch.randn(2, 3, SIDE, SIDE), torch.zeros(2, 9, dtype=torch.bool)
    masked[0, [1, 4]] = masked[1, 8] = True
    mask_token = torch.randn(WIDTH, requires_grad=True)
    actual = encoder.encode(encoder.embed(images, masked, mask_token))
    source = model.modality_encoders["IMAGE"]
    with torch.no_grad():
        features = source.local_features(images)
        features[0, 1] = features[0, 4] = features[1, 8] = mask_token
        expected = source.contextualized_features(features, None, mask=False, remove_masked=False)["x"]
        for block in model.blocks:
            expected, _ = block(expected)
    assert_same(actual.detach(), expected)
    assert torch.autograd.grad(actual.square().sum(), mask_token)[0].abs().sum() > 0
    encoder.embed(images, torch.ones_like(masked), mask_token).sum().backward()
    assert_same(mask_token.grad, torch.full((WIDTH,), 18.0))
    assert encoder.modality_encoders["IMAGE"].local_encoder.proj.weight.grad.abs().max() == 0


def without_positions(path: Path, modality: str) -> Data2Vec2Encoder:
    kind = Data2Vec2ImageEncoder if modality == "IMAGE" else Data2Vec2TextEncoder
    encoder = kind(**encoder_arguments_from_checkpoint(path, modality), own_positions=False)
    load_data2vec2_weights(encoder, path)
    names = {*encoder.state_dict(), *dict(encoder.named_buffers()), *dict(encoder.named_modules())}
    assert not [name for name in names if "position" in name]
    return encoder.eval()


def test_without_positions_patches_have_no_order(image_source):
    images, order = torch.randn(2, 3, SIDE, SIDE), torch.randperm(9)
    patches = images.unflatten(3, (3, PATCH)).unflatten(2, (3, PATCH)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    shuffled = patches[:, order].unflatten(1, (3, 3)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    for encoder, equal in (
        (without_positions(image_source[1], "IMAGE"), True),
        (image_encoder_from_checkpoint(image_source[1]).eval(), False),
    ):
        with torch.no_grad():
            tokens, others = encoder(images).tokens, encoder(shuffled).tokens
        assert torch.allclose(others[:, 0], tokens[:, 0], atol=1e-5) == equal
        assert torch.allclose(others[:, 1:], tokens[:, 1:][:, order], atol=1e-5) == equal


def test_without_positions_words_have_no_order(text_source):
    (tokens, _), order = text_batch(), torch.randperm(9)
    for encoder, equal in (
        (without_positions(text_source[1], "TEXT"), True),
        (text_encoder_from_checkpoint(text_source[1]).eval(), False),
    ):
        with torch.no_grad():
            features, others = encoder(tokens[:1]).tokens, encoder(tokens[:1, order]).tokens
        assert torch.allclose(others, features[:, order], atol=1e-5) == equal


# blocks ---------------------------------------------------------------------------------------------------------------


def test_the_seventh_block_can_be_had_and_taken_off(image_source):
    model, path = image_source
    encoder = image_encoder_from_checkpoint(path, choice=LayerChoice(6, further=1)).eval()
    state = encoder.block_state(6)
    source = blocks_of(model)[6].state_dict()
    assert state.keys() == source.keys() == timm.create_model("test_vit").blocks[0].state_dict().keys()
    assert all(torch.equal(state[name], source[name]) for name in state)
    assert not any(value.requires_grad for value in state.values())
    encoder.drop_last_blocks(1)
    images = torch.randn(1, 3, SIDE, SIDE)
    outputs, _ = block_outputs(model, source=images)
    with torch.no_grad():
        assert_same(encoder(images).tokens, outputs[5])
        assert encoder.num_layers == 6 == len(encoder.all_blocks())
        encoder.drop_last_blocks(5)
        assert_same(encoder(images).tokens, outputs[0])
    assert encoder.num_layers == 1 == len(encoder.all_blocks())


@pytest.mark.parametrize("prenet_depth", [0, 2, 5])
def test_drop_path_grows_over_prenet_and_main_blocks(prenet_depth):
    encoder = Data2Vec2ImageEncoder(
        WIDTH, 5 - prenet_depth, prenet_depth, HEADS, input_size=16, patch_size=8, drop_path=0.4
    )
    expected = [0, 0.1, 0.2, 0.3, 0.4]
    for count in (0, 1, 2):
        encoder.drop_last_blocks(count)
        rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in encoder.all_blocks()]
        expected = expected[: len(expected) - count]
        assert rates == pytest.approx(expected)


@pytest.mark.parametrize("modality", ["IMAGE", "TEXT"])
def test_recomputed_activations_give_the_same_gradients(modality):
    options = {"embed_dim": WIDTH, "depth": 2, "prenet_depth": 2, "num_heads": HEADS}
    options |= {"dropout": 0.2, "attention_dropout": 0.2, "drop_path": 0.3}
    tokens, padding_mask = text_batch()
    if modality == "IMAGE":
        encoder = Data2Vec2ImageEncoder(**options, input_size=SIDE, patch_size=PATCH)
        inputs = (torch.randn(3, 3, SIDE, SIDE),)
    else:
        encoder = Data2Vec2TextEncoder(VOCABULARY, **options)
        inputs = (tokens, padding_mask)
    calls: list[nn.Module] = []
    for block in encoder.all_blocks():
        block.attn.register_forward_hook(lambda module, *_: calls.append(module))
    results = []
    for encoder.checkpoint_activations in (False, True):
        calls.clear()
        encoder.zero_grad()
        torch.manual_seed(1)
        output = encoder(*inputs).tokens
        (output * torch.linspace(-1, 1, WIDTH)).sum().backward()
        gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
        results.append((output.detach(), gradients, len(calls)))
    (plain, expected, once), (output, gradients, twice) = results
    assert torch.equal(output, plain) and (once, twice) == (4, 8)
    assert gradients.keys() == expected.keys() and any(value.abs().max() > 0 for value in expected.values())
    for name, gradient in gradients.items():
        assert_same(gradient, expected[name], 1e-6)


def test_embedding_parameters(image_source, text_source):
    for encoder, names in (
        (
            image_encoder_from_checkpoint(image_source[1]),
            ["IMAGE.local_encoder.proj.weight", "IMAGE.local_encoder.proj.bias"],
        ),
        (text_encoder_from_checkpoint(text_source[1]), ["TEXT.local_encoder.embed_tokens.weight"]),
    ):
        own = dict(encoder.named_parameters())
        expected = [own[f"modality_encoders.{name}"] for name in names]
        assert list(map(id, encoder.embedding_parameters())) == list(map(id, expected))


def test_what_words_cannot_be():
    encoder = Data2Vec2TextEncoder(VOCABULARY, WIDTH, depth=1, num_heads=HEADS, max_positions=4)
    tokens = torch.zeros(1, 5, dtype=torch.long)
    for run in (encoder, encoder.embed):
        with pytest.raises(ValueError, match="5 tokens exceed the 4 positions"):
            run(tokens)
    with pytest.raises(ValueError, match="replaces no tokens"):
        encoder.embed(tokens[:, :3], torch.ones(1, 2, dtype=torch.bool), torch.zeros(WIDTH))
