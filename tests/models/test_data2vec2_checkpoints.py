"""Checkpoints of Data2Vec 2 that do not fit, in one way or another."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emkum.errors import UserError
from emkum.models.data2vec2 import Data2Vec2Encoder, Data2Vec2ImageEncoder, Data2Vec2TextEncoder
from emkum.models.data2vec2_checkpoints import (
    image_encoder_from_checkpoint,
    load_data2vec2_weights,
    text_encoder_from_checkpoint,
)
from emkum.models.encoder import LayerChoice

WIDTH, HEADS, VOCABULARY = 24, 4, 20
WORDS = "modality_encoders.TEXT.local_encoder.embed_tokens.weight"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def image_encoder(**options: Any) -> Data2Vec2ImageEncoder:
    arguments = {"embed_dim": WIDTH, "depth": 3, "prenet_depth": 2, "num_heads": HEADS}
    return Data2Vec2ImageEncoder(**arguments | {"input_size": 16, "patch_size": 8} | options)


def text_encoder(vocab_size: int = VOCABULARY, **options: Any) -> Data2Vec2TextEncoder:
    return Data2Vec2TextEncoder(vocab_size, **{"embed_dim": WIDTH, "depth": 3, "num_heads": HEADS} | options)


def save(encoder: Data2Vec2Encoder, path: Path, changes: dict[str, Tensor] | None = None, **options: Any) -> Path:
    stored = {"num_heads": encoder.num_heads, "norm_eps": 1e-6} | options
    torch.save({"cfg": {"model": stored}, "model": encoder.state_dict() | (changes or {})}, path)
    return path


def message_of(caught: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in caught.value.message
    return caught.value.message


# ----------------------------------------------------------------------------------------------------------------------
# Released models
# ----------------------------------------------------------------------------------------------------------------------

BLOCK = [
    f"{part}.{kind}"
    for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]


def on_meta(monkeypatch, build):
    """Build without memory: fairseq's initialization cannot work on the meta device."""
    monkeypatch.setattr("fairseq.modules.transformer_sentence_encoder.init_bert_params", lambda module: None)
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in build().state_dict().items()}


def test_names_and_shapes_of_the_released_base_image_model(monkeypatch):
    shapes = on_meta(monkeypatch, Data2Vec2ImageEncoder)
    prefix = "modality_encoders.IMAGE."
    names = {
        f"{prefix}extra_tokens": (1, 1, 768),
        f"{prefix}local_encoder.proj.weight": (768, 3, 16, 16),
        f"{prefix}local_encoder.proj.bias": (768,),
        f"{prefix}fixed_positional_encoder.positions": (1, 14 * 14, 768),
        f"{prefix}context_encoder.norm.weight": (768,),
        f"{prefix}context_encoder.norm.bias": (768,),
    }
    assert names.items() <= shapes.items()
    blocks = [f"{prefix}context_encoder.blocks.{i}." for i in range(2)] + [f"blocks.{i}." for i in range(10)]
    assert set(shapes) == {*names, *(block + name for block in blocks for name in BLOCK)}
    assert shapes["blocks.9.attn.qkv.weight"] == (2304, 768) and shapes["blocks.9.mlp.fc1.weight"] == (3072, 768)


def test_names_and_shapes_of_the_released_base_text_model(monkeypatch):
    shapes = on_meta(monkeypatch, lambda: Data2Vec2TextEncoder(50265))
    prefix = "modality_encoders.TEXT.local_encoder."
    names = {
        f"{prefix}embed_tokens.weight": (50265, 768),
        f"{prefix}embed_positions.weight": (514, 768),
        f"{prefix}layernorm_embedding.weight": (768,),
        f"{prefix}layernorm_embedding.bias": (768,),
    }
    assert names.items() <= shapes.items()
    assert set(shapes) == {*names, *(f"blocks.{i}.{name}" for i in range(12) for name in BLOCK)}


# ----------------------------------------------------------------------------------------------------------------------
# Layers, widths, vocabularies
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (LayerChoice(9), "has 5 layers; 9 cannot be kept"),
        (LayerChoice(0), "has 5 layers; 0 cannot be kept"),
        (LayerChoice(5, further=1), "has 5 layers; 5 cannot be kept and 1 behind them"),
        (LayerChoice(4, every_second=True), "has 3 by taking every second one; 4 cannot be kept"),
    ],
)
def test_more_layers_than_the_source_has(tmp_path: Path, choice: LayerChoice, expected: str) -> None:
    path = save(image_encoder(), tmp_path / "five.pt")
    with pytest.raises(UserError) as caught:
        image_encoder_from_checkpoint(path, choice=choice)
    assert expected in message_of(caught) and "five.pt" in message_of(caught)
    with pytest.raises(UserError) as caught:
        load_data2vec2_weights(image_encoder(depth=7), path, choice)
    assert expected in message_of(caught)


def test_without_a_choice_an_encoder_with_more_layers_is_refused(tmp_path: Path) -> None:
    path = save(image_encoder(), tmp_path / "five.pt")
    with pytest.raises(UserError, match="five.pt has 5 layers; 7 cannot be kept"):
        load_data2vec2_weights(image_encoder(depth=5), path)


def test_an_encoder_has_as_many_blocks_as_are_chosen(tmp_path: Path) -> None:
    path = save(image_encoder(), tmp_path / "five.pt")
    with pytest.raises(ValueError, match="4 layers are chosen for an encoder that has 3"):
        load_data2vec2_weights(image_encoder(depth=1), path, LayerChoice(3, further=1))


def test_another_width_is_one_short_line(tmp_path: Path) -> None:
    path = save(image_encoder(embed_dim=32), tmp_path / "wide.pt")
    with pytest.raises(UserError) as caught:
        load_data2vec2_weights(image_encoder(), path)
    assert message_of(caught) == f"{path} is 32 wide, but the IMAGE encoder 24"
    path = save(text_encoder(embed_dim=32), tmp_path / "wide_text.pt")
    with pytest.raises(UserError) as caught:
        load_data2vec2_weights(text_encoder(), path)
    assert message_of(caught) == f"{path} is 32 wide, but the TEXT encoder 24"


@pytest.mark.parametrize("option", ["num_heads", "d2v_num_heads"])
def test_other_heads_are_refused_though_all_shapes_fit(tmp_path: Path, option: str) -> None:
    encoder = image_encoder()
    path = tmp_path / "heads.pt"
    torch.save({"cfg": {"model": {option: 6}}, "model": encoder.state_dict()}, path)
    with pytest.raises(UserError, match="heads.pt has 6 attention heads, but the IMAGE encoder 4"):
        load_data2vec2_weights(encoder, path)


def test_rows_beyond_the_vocabulary_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = text_encoder(25)
    path = save(source, tmp_path / "more.pt")
    encoder = text_encoder()
    with caplog.at_level(logging.INFO, "emkum"):
        load_data2vec2_weights(encoder, path)
    (record,) = caplog.records
    assert "more.pt has embeddings of 25 words; the first 20" in record.getMessage()
    assert torch.equal(encoder.state_dict()[WORDS], source.state_dict()[WORDS][:20])
    caplog.clear()
    load_data2vec2_weights(text_encoder(25), path)
    assert caplog.records == []


def test_a_vocabulary_that_does_not_fit_its_embedding(tmp_path: Path) -> None:
    path = save(text_encoder(19), tmp_path / "few.pt")
    with pytest.raises(UserError) as caught:
        load_data2vec2_weights(text_encoder(), path)
    assert "few.pt has embeddings of 19 words, but the vocabulary has 20" in message_of(caught)


def test_text_of_a_prenet_needs_one(tmp_path: Path) -> None:
    """The prenet of text brings a norm, which is not to be lost without a word."""
    path = save(text_encoder(prenet_depth=2), tmp_path / "prenet.pt")
    with pytest.raises(UserError, match=r"unexpected: modality_encoders\.TEXT\.context_encoder\.norm\."):
        load_data2vec2_weights(text_encoder(), path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layer_norm_first": True}, "layer_norm_first are not supported"),
        ({"modalities": {"image": {"use_alibi_encoder": True}}}, "use_alibi_encoder"),
    ],
)
def test_kinds_of_encoder_that_are_not_supported(tmp_path: Path, options: dict[str, Any], expected: str) -> None:
    path = save(image_encoder(), tmp_path / "kind.pt", **options)
    for load in (image_encoder_from_checkpoint, lambda path: load_data2vec2_weights(image_encoder(), path)):
        with pytest.raises(UserError, match=expected):
            load(path)


# ----------------------------------------------------------------------------------------------------------------------
# Wrong files
# ----------------------------------------------------------------------------------------------------------------------


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save({"model": {"modality_encoders.IMAGE.extra_tokens": _Payload(tmp_path / "ran")}}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="evil.pt"):
        image_encoder_from_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_truncated_file(tmp_path: Path) -> None:
    content = save(image_encoder(), tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError) as caught:
        image_encoder_from_checkpoint(tmp_path / "cut.pt")
    assert "cut.pt" in message_of(caught)


@pytest.mark.parametrize("content", [{"model": {"head.weight": torch.zeros(2)}}, torch.zeros(2), {"model": 3}, [1]])
def test_file_of_another_model(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt is not a Data2Vec 2 checkpoint"):
        image_encoder_from_checkpoint(tmp_path / "other.pt")


def test_other_modality_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no TEXT encoder; it is a Data2Vec 2 checkpoint of IMAGE"):
        text_encoder_from_checkpoint(save(image_encoder(), tmp_path / "image.pt"))


def test_keys_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    encoder = image_encoder()
    changes = {"surprise": torch.zeros(1), "blocks.0.norm1.bias": torch.zeros(WIDTH + 1)}
    path = save(encoder, tmp_path / "wrong.pt", changes)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["model"]["blocks.1.norm1.bias"]
    torch.save(checkpoint, path)
    with pytest.raises(UserError) as caught:
        load_data2vec2_weights(encoder, path)
    message = message_of(caught)
    assert "missing: blocks.1.norm1.bias" in message and "unexpected: surprise" in message
    assert f"blocks.0.norm1.bias ({WIDTH + 1},) instead of ({WIDTH},)" in message


def test_a_file_without_blocks(tmp_path: Path) -> None:
    path = save(image_encoder(depth=0, prenet_depth=0), tmp_path / "empty.pt")
    with pytest.raises(UserError, match=r"empty.pt lacks blocks\.\*"):
        image_encoder_from_checkpoint(path)
    with pytest.raises(UserError, match="empty.pt has 0 layers; 5 cannot be kept"):
        load_data2vec2_weights(image_encoder(), path)
