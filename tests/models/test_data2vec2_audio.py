"""The Data2Vec 2 audio encoder, held against fairseq's own model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.models.data2vec2 import data2vec2_module
from emkum.models.data2vec2_audio import FRAME, Data2Vec2AudioEncoder, count_frames, position_slopes
from emkum.models.data2vec2_checkpoints import (
    audio_encoder_from_checkpoint,
    encoder_arguments_from_checkpoint,
    image_encoder_from_checkpoint,
    load_data2vec2_weights,
)
from emkum.models.encoder import LayerChoice
from emkum.models.model_info import without_memory
from tests.models.test_data2vec2 import (
    CHOICES,
    HEADS,
    LAYERS,
    WIDTH,
    assert_same,
    block_outputs,
    blocks_of,
    features_with_layers,
    save,
)

CHANNELS, GROUPS = 8, 6
LENGTHS = (6000, 2500, 4321)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def source_model(prenet_depth: int = 0, extra_tokens: int = 0, **changes: Any) -> nn.Module:
    """fairseq's pretraining model in the layout of the released ones, every parameter random."""
    fork = data2vec2_module("models.data2vec2")
    kind = data2vec2_module("data.modality").Modality.AUDIO
    depth = LAYERS - prenet_depth
    cfg = fork.Data2VecMultiConfig(
        embed_dim=WIDTH, depth=depth, num_heads=HEADS, seed=1, max_update=10, ema_anneal_end_step=10,
        supported_modality=kind, norm_eps=1e-5, skip_ema=True,
    )  # fmt: skip
    for own in (cfg.modalities.audio, cfg.modalities.image, cfg.modalities.text):
        own.num_alibi_heads, own.model_depth, own.prenet_depth = HEADS, depth, prenet_depth
    audio = cfg.modalities.audio
    audio.decoder.decoder_dim, audio.decoder.decoder_groups, audio.decoder.decoder_layers = 16, 4, 1
    spec = f"[({CHANNELS}, 10, 5)] + [({CHANNELS}, 3, 2)] * 4 + [({CHANNELS},2,2)] + [({CHANNELS},2,2)]"
    released = {"use_alibi_encoder": True, "learned_alibi_scale": True, "learned_alibi_scale_per_head": True}
    own = {"feature_encoder_spec": spec, "conv_pos_groups": GROUPS, "num_extra_tokens": extra_tokens}
    for name, value in (released | own | changes).items():
        setattr(audio, name, value)
    model = fork.Data2VecMultiModel(cfg, [kind], skip_ema=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.fixture(
    scope="module",
    params=[(0, 0, {}), (2, 1, {}), (1, 1, {"use_alibi_encoder": False}), (0, 1, {"learned_alibi_scale_per_head": 0})],
    ids=["released", "prenet_cls", "no_biases", "one_bias"],
)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = source_model(*request.param[:2], **request.param[2])
    return model, save(model, tmp_path_factory.mktemp("audio") / "checkpoint.pt")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(source_model(), tmp_path_factory.mktemp("released") / "checkpoint.pt")


def sound_batch(longest: int = max(LENGTHS)) -> tuple[Tensor, Tensor]:
    """Sounds of LENGTHS, silent at padding, and their padding mask."""
    padding = torch.arange(longest) >= torch.tensor(LENGTHS)[:, None]
    return torch.randn(len(LENGTHS), longest).masked_fill(padding, 0), padding


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stock"])
def test_features_of_the_source(source: tuple[nn.Module, Path], fused: bool) -> None:
    model, path = source
    encoder = Data2Vec2AudioEncoder(**encoder_arguments_from_checkpoint(path, "AUDIO"), fused_attention=fused).eval()
    load_data2vec2_weights(encoder, path)
    extra = model.modality_encoders["AUDIO"].modality_cfg.num_extra_tokens
    # Several of one length, a batch of one, and another length.
    for sounds in (torch.randn(3, 6000), torch.randn(1, 6000), torch.randn(2, 3333)):
        outputs, expected = block_outputs(model, source=sounds)
        with torch.no_grad():
            encoded = encoder(sounds)
            assert_same(encoded.tokens, expected["x"])
            for actual, output in zip(encoder.hidden_states(sounds, end_of_block=True), outputs, strict=True):
                assert_same(actual, output)
        assert encoded.tokens.shape == (len(sounds), extra + count_frames(sounds.shape[1]), WIDTH)
    assert (encoder.width, encoder.num_heads, encoder.num_layers) == (WIDTH, HEADS, LAYERS)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stock"])
def test_each_sound_of_a_padded_batch_is_that_of_the_source_alone(source: tuple[nn.Module, Path], fused: bool) -> None:
    model, path = source
    encoder = Data2Vec2AudioEncoder(**encoder_arguments_from_checkpoint(path, "AUDIO"), fused_attention=fused).eval()
    load_data2vec2_weights(encoder, path)
    for longest in (max(LENGTHS), 9000):
        sounds, padding = sound_batch(longest)
        with torch.no_grad():
            encoded = encoder(sounds, padding)
            states = encoder.hidden_states(sounds, padding, end_of_block=True)
        for row, length in enumerate(LENGTHS):
            outputs, alone = block_outputs(model, source=sounds[row : row + 1, :length])
            shown = ~encoded.padding_mask[row]
            assert_same(encoded.tokens[row, shown], alone["x"][0])
            assert_same(states[3][row, shown], outputs[3][0])


def test_a_padded_batch_of_the_source(source: tuple[nn.Module, Path]) -> None:
    """The one difference is what its positions see of padding; told to see nothing there, it gives the same."""
    model, path = source
    encoder = audio_encoder_from_checkpoint(path).eval()
    sounds, padding = sound_batch()
    with torch.no_grad():
        encoded = encoder(sounds, padding)
        features = model.extract_features(sounds, padding_mask=padding, remove_extra_tokens=False)
        assert torch.equal(encoded.padding_mask, features["padding_mask"])
        extra = model.modality_encoders["AUDIO"].modality_cfg.num_extra_tokens
        hidden = encoded.padding_mask[:, extra:, None]
        positions = model.modality_encoders["AUDIO"].relative_positional_encoder
        hooks = [
            layer.register_forward_pre_hook(lambda _, inputs: inputs[0].masked_fill(hidden.transpose(1, 2), 0))
            for layer in list(positions)[1:-1]
        ]
        same = model.extract_features(sounds, padding_mask=padding, remove_extra_tokens=False)["x"]
        for hook in hooks:
            hook.remove()
    shown = ~encoded.padding_mask
    assert_same(encoded.tokens[shown], same[shown])
    assert_same(encoded.tokens[0], features["x"][0])
    assert not torch.allclose(encoded.tokens[shown], features["x"][shown], atol=1e-3)


def test_gradients_are_those_of_the_source(released: Path) -> None:
    model = source_model()
    model.load_state_dict(torch.load(released, weights_only=True)["model"])
    encoder = audio_encoder_from_checkpoint(released).eval()
    sounds, weight = torch.randn(2, 3000), torch.randn(2, count_frames(3000), WIDTH)
    (model.extract_features(sounds)["x"] * weight).sum().backward()
    (encoder(sounds).tokens * weight).sum().backward()
    expected = dict(model.named_parameters())
    compared = [name for name, parameter in encoder.named_parameters() if parameter.grad is not None]
    assert compared == [name for name, _ in encoder.named_parameters()]
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("choice", "layers"), CHOICES)
def test_chosen_layers(source: tuple[nn.Module, Path], choice: LayerChoice, layers: list[int]) -> None:
    model, path = source
    encoder = audio_encoder_from_checkpoint(path, choice).eval()
    sounds = torch.randn(2, 2000)
    with torch.no_grad():
        assert_same(encoder(sounds).tokens, features_with_layers(model, layers, source=sounds))
        assert_same(encoder(sounds[:1]).tokens, features_with_layers(model, layers, source=sounds[:1]))
    assert encoder.num_layers == len(layers) == len(blocks_of(encoder))


def test_padding_changes_nothing() -> None:
    encoder = Data2Vec2AudioEncoder(WIDTH, 3, 0, HEADS, conv_width=CHANNELS, position_groups=GROUPS).eval().double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        for longest in (6000, 6100, 12_000):
            sounds, padding = (part.double() if part.is_floating_point() else part for part in sound_batch(longest))
            # What stands at padding is never looked at.
            noisy = torch.where(padding, torch.randn_like(sounds), sounds)
            encoded = encoder(noisy, padding)
            for row, length in enumerate(LENGTHS):
                alone = encoder(sounds[row : row + 1, :length]).tokens[0]
                assert_same(encoded.tokens[row, ~encoded.padding_mask[row]], alone, 1e-9)


def test_a_sound_shorter_than_a_frame_is_its_cls_token() -> None:
    encoder = Data2Vec2AudioEncoder(WIDTH, 1, 0, HEADS, conv_width=CHANNELS, position_groups=GROUPS).eval()
    sounds, padding = torch.randn(2, 1000), torch.arange(1000) >= torch.tensor([[1000], [FRAME - 1]])
    encoded = encoder(sounds, padding)
    assert encoded.padding_mask[1].tolist() == [False] + [True] * count_frames(1000)
    assert encoded.tokens[:, 0].isfinite().all()
    assert (count_frames(FRAME), count_frames(FRAME - 1), FRAME) == (1, 0, 400)
    with pytest.raises(ValueError, match="399 samples are less than a frame; pad them to 400"):
        encoder(sounds[:, :399])
    with pytest.raises(ValueError, match="replaces no tokens"):
        encoder.embed(sounds, torch.ones(2, 1, dtype=torch.bool), torch.zeros(WIDTH))


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16])
def test_slopes_are_those_of_the_source(heads: int) -> None:
    expected = -data2vec2_module("models.modalities.base").get_alibi(2, heads)[:, 0, 1]
    assert_same(torch.tensor(position_slopes(heads)), expected, 1e-7)


def test_a_released_layout_gets_a_cls_token(released: Path) -> None:
    """Frames that do not see the new token are as they were; released models have none."""
    arguments = encoder_arguments_from_checkpoint(released, "AUDIO")
    assert not arguments["cls_token"] and arguments["position_biases"] and arguments["conv_width"] == CHANNELS
    encoder = Data2Vec2AudioEncoder(**arguments | {"cls_token": True}).eval()
    token = encoder.modality_encoders["AUDIO"].extra_tokens.detach().clone()
    load_data2vec2_weights(encoder, released)
    assert torch.equal(encoder.modality_encoders["AUDIO"].extra_tokens, token)
    plain = audio_encoder_from_checkpoint(released).eval()
    sounds = torch.randn(2, 3000)
    with torch.no_grad():
        assert_same(encoder.embed(sounds)[:, 1:], plain.embed(sounds), 1e-6)
        assert encoder(sounds).tokens.shape[1] == 1 + plain(sounds).tokens.shape[1]


def test_without_positions_frames_have_no_order(released: Path) -> None:
    encoder = Data2Vec2AudioEncoder(**encoder_arguments_from_checkpoint(released, "AUDIO"), own_positions=False).eval()
    load_data2vec2_weights(encoder, released)
    assert not [name for name in encoder.state_dict() if "position" in name or "alibi" in name]
    frames, order = encoder.embed(torch.randn(1, 3000)), torch.randperm(count_frames(3000))
    with torch.no_grad():
        assert_same(encoder.encode(frames[:, order]), encoder.encode(frames)[:, order])


def test_recomputed_activations_give_the_same_gradients() -> None:
    encoder = Data2Vec2AudioEncoder(WIDTH, 2, 1, HEADS, conv_width=CHANNELS, position_groups=GROUPS, drop_path=0.3)
    sounds, padding = sound_batch()
    results = []
    for encoder.checkpoint_activations in (False, True):
        encoder.zero_grad()
        torch.manual_seed(1)
        encoder(sounds, padding).tokens[:, 0].square().sum().backward()
        results.append({name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None})
    for name, gradient in results[1].items():
        torch.testing.assert_close(gradient, results[0][name], rtol=1e-4, atol=1e-6)


def test_parameters_of_the_released_base_model() -> None:
    with without_memory():
        whole, half = Data2Vec2AudioEncoder(cls_token=False), Data2Vec2AudioEncoder(depth=6)
    count = {encoder: sum(p.numel() for p in encoder.parameters()) for encoder in (whole, half)}
    assert count == {whole: 93_163_532, half: 50_637_068}
    assert sum(p.numel() for p in half.embedding_parameters()) == 4_601_600


def test_what_cannot_be_made_or_loaded(released: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="5 attention heads do not divide a width of 24"):
        Data2Vec2AudioEncoder(WIDTH, 1, 0, 5, position_groups=GROUPS)
    with pytest.raises(UserError, match="16 groups of positions do not divide a width of 24"):
        Data2Vec2AudioEncoder(WIDTH, 1, 0, HEADS)
    with pytest.raises(UserError, match="has 12 layers; 13 cannot be kept"):
        audio_encoder_from_checkpoint(released, LayerChoice(13))
    with pytest.raises(UserError, match="no IMAGE encoder; it is a Data2Vec 2 checkpoint of AUDIO"):
        image_encoder_from_checkpoint(released)
    wide = Data2Vec2AudioEncoder(48, 1, 0, HEADS, conv_width=CHANNELS, position_groups=GROUPS)
    with pytest.raises(UserError, match="is 24 wide, but the AUDIO encoder 48"):
        load_data2vec2_weights(wide, released)
    checkpoint = torch.load(released, weights_only=True)
    checkpoint["cfg"]["model"]["modalities"]["audio"]["conv_pos_pre_ln"] = True
    torch.save(checkpoint, tmp_path / "other.pt")
    with pytest.raises(UserError, match="conv_pos_pre_ln are not supported"):
        audio_encoder_from_checkpoint(tmp_path / "other.pt")
