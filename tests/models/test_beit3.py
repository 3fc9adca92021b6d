"""BEiT-3 against torchscale, with files of random weights that it wrote."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.models.beit3 import BEiT3
from emkum.models.beit3_checkpoints import beit3_from_checkpoint
from emkum.weights import fingerprint
from tests.models.beit3_source import (
    LAYERS,
    PAD,
    PATCH,
    POSITIONS,
    SIDE,
    VOCABULARY,
    WIDTH,
    positions_of_another_size,
    save,
    source_outputs,
    torchscale_maker,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def torchscale() -> Callable[..., nn.Module]:
    return torchscale_maker()


@pytest.fixture(scope="module")
def source(torchscale: Callable[..., nn.Module]) -> nn.Module:
    return torchscale()


@pytest.fixture(scope="module")
def file(source: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(source.state_dict(), tmp_path_factory.mktemp("beit3"))


def one_line(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith("emkum: error: ") and "\n" not in message
    return message


def inputs(ids: int = VOCABULARY, side: int = SIDE) -> tuple[Tensor, Tensor, Tensor]:
    images, text = torch.randn(3, 3, side, side), torch.randint(4, ids, (3, 9))
    text[1, 6:] = PAD
    text[2, 3:] = PAD
    return images, text, text.eq(PAD)


def assert_same_outputs(model: BEiT3, source: nn.Module, ids: int = VOCABULARY, side: int = SIDE) -> None:
    model.eval()
    images, text, hidden = inputs(ids, side)
    count = 1 + (side // PATCH) ** 2
    all_hidden = torch.cat([torch.zeros(3, count, dtype=torch.bool), hidden], dim=1)
    nothing = torch.zeros(3, count, dtype=torch.bool)
    for own, its, padding in (
        ((images,), {"visual_tokens": images}, nothing),
        ((None, text), {"textual_tokens": text}, torch.zeros_like(hidden)),
        ((None, text, hidden), {"textual_tokens": text, "text_padding_position": hidden}, hidden),
        (
            (images, text, hidden),
            {"visual_tokens": images, "textual_tokens": text, "text_padding_position": hidden},
            all_hidden,
        ),
        ((images, text), {"visual_tokens": images, "textual_tokens": text}, torch.zeros_like(all_hidden)),
    ):
        expected, states = source_outputs(source, **its)
        with torch.no_grad():
            encoded, own_states = model(*own), model.hidden_states(*own)
        visible = ~padding
        # Values of order 1, not of nearly equal tokens.
        assert expected[visible].std() > 0.5 and (expected[0, 0] - expected[0, 1]).abs().max() > 0.1
        for actual, wanted in zip([*own_states, encoded.tokens], [*states, expected], strict=True):
            assert actual.shape == wanted.shape
            torch.testing.assert_close(actual[visible], wanted[visible], rtol=0, atol=1e-5)
        assert torch.equal(encoded.cls, encoded.tokens[:, 0])
        if padding.any():
            assert torch.equal(encoded.padding_mask, padding)
        else:
            assert encoded.padding_mask is None


# outputs --------------------------------------------------------------------------------------------------------------


def test_all_outputs_are_torchscales(source: nn.Module, file: Path) -> None:
    model = beit3_from_checkpoint(file)
    assert_same_outputs(model, source)
    assert (model.width, model.num_layers, model.num_heads, model.image_size) == (WIDTH, LAYERS, 2, SIDE)
    assert (model.patch_size, model.max_positions) == (PATCH, POSITIONS)
    names = {name: value.shape for name, value in source.state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == names
    for example in (
        "vision_embed.mask_token",
        "encoder.embed_positions.B.weight",
        "encoder.layers.2.self_attn.inner_attn_ln.A.bias",
        "encoder.layers.0.ffn.B.ffn_layernorm.weight",
        "encoder.layer_norm.A.weight",
    ):
        assert example in names


def test_two_layers_more_and_one_head(torchscale: Callable[..., nn.Module], tmp_path: Path) -> None:
    sizes = {"encoder_layers": 5, "encoder_embed_dim": 64, "encoder_attention_heads": 1}
    source = torchscale(**sizes)
    assert_same_outputs(beit3_from_checkpoint(save(source.state_dict(), tmp_path)), source)


@pytest.mark.parametrize("form", ["no prefix", "safetensors", "parameters alone"])
def test_other_forms_of_the_file(source: nn.Module, file: Path, form: str, tmp_path: Path) -> None:
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    state = dict(source.state_dict())
    if form == "safetensors":
        save_file({f"beit3.{name}": value for name, value in state.items()}, path)
    else:
        torch.save(state if form == "parameters alone" else {"model": state}, path)
    assert fingerprint(beit3_from_checkpoint(path)) == fingerprint(beit3_from_checkpoint(file))


def test_masked_patches(source: nn.Module, file: Path) -> None:
    model = beit3_from_checkpoint(file).eval()
    images, text, hidden = inputs()
    masked = torch.rand(3, (SIDE // PATCH) ** 2) < 0.4
    expected, states = source_outputs(source, visual_tokens=images, vision_masked_position=masked)
    with torch.no_grad():
        torch.testing.assert_close(model(images, masked=masked).tokens, expected, rtol=0, atol=1e-5)
        first = model.hidden_states(images, masked=masked)[0]
        assert not torch.allclose(first, model.hidden_states(images)[0])
    torch.testing.assert_close(first, states[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [1, 2])
def test_the_first_layers(source: nn.Module, file: Path, kept: int) -> None:
    model = beit3_from_checkpoint(file, num_layers=kept).eval()
    assert model.num_layers == kept == len(model.encoder.layers)
    images, text, hidden = inputs()
    _, states = source_outputs(source, visual_tokens=images, textual_tokens=text, text_padding_position=hidden)
    count = 1 + (SIDE // PATCH) ** 2
    # torchscale's own modules still know where the text begins.
    with torch.no_grad():
        expected = source.encoder.layer_norm(states[kept - 1])
        encoded, own = model(images, text, hidden), model.hidden_states(images, text, hidden)
    visible = ~encoded.padding_mask
    assert len(own) == kept
    torch.testing.assert_close(own[-1][visible], states[kept - 1][visible], rtol=0, atol=1e-5)
    torch.testing.assert_close(encoded.tokens[visible], expected[visible], rtol=0, atol=1e-5)
    assert torch.equal(encoded.tokens, model.norm(own[-1], count))


def test_padding_changes_nothing(file: Path) -> None:
    model = beit3_from_checkpoint(file).eval()
    images, text, hidden = inputs()
    count = 1 + (SIDE // PATCH) ** 2
    with torch.no_grad():
        texts, pairs = model(None, text, hidden).tokens, model(images, text, hidden).tokens
        for row, mask in enumerate(hidden):
            ids, length = text[row, ~mask][None], int((~mask).sum())
            alone = model(text=ids).tokens[0]
            torch.testing.assert_close(texts[row, :length], alone, rtol=0, atol=1e-5)
            alone = model(images[row : row + 1], ids).tokens[0]
            torch.testing.assert_close(pairs[row, : count + length], alone, rtol=0, atol=1e-5)


def test_gradients_reach_what_was_used_alone(file: Path) -> None:
    model = beit3_from_checkpoint(file)
    images, text, _ = inputs()
    model(images).tokens.square().sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    # Biases of keys too, whose gradient is zero but for rounding.
    used = {name for name in model.state_dict() if ".B." not in name} - {"text_embed.weight"}
    assert with_gradient == used - {"vision_embed.mask_token"}
    model.zero_grad()
    model(text=text).tokens.square().sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name in model.state_dict() if ".A." not in name and "vision" not in name}


def test_a_new_encoder() -> None:
    model = BEiT3(VOCABULARY, width=64, layers=1, heads=2, ffn_width=96, image_size=16, patch_size=8, max_positions=5)
    for weights in (model.text_embed.weight, model.encoder.layers[0].ffn.B.fc1.weight, model.vision_embed.cls_token):
        assert weights.std().item() == pytest.approx(0.02, rel=0.25)
    images = torch.zeros(1, 3, 16, 16)
    assert model(images, torch.zeros(1, 5, dtype=torch.int64)).tokens.shape == (1, 5 + 5, 64)
    with pytest.raises(ValueError, match="6 tokens exceed the 5 positions"):
        model(text=torch.zeros(1, 6, dtype=torch.int64))
    # A smaller one would get the positions of other places.
    with pytest.raises(ValueError, match=r"images are \(8, 16\); the encoder has positions for 16"):
        model(torch.zeros(1, 3, 8, 16))
    with pytest.raises(ValueError, match="there is neither"):
        model()
    with pytest.raises(ValueError, match="not whole"):
        BEiT3(VOCABULARY, width=64, heads=5)


def test_shapes_of_the_released_base_model() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in BEiT3(64_010).state_dict().items()}
    assert shapes["encoder.embed_positions.A.weight"] == (2 + 1 + 14 * 14, 768)
    assert shapes["encoder.embed_positions.B.weight"] == (1024, 768)
    assert shapes["encoder.layers.11.ffn.A.fc1.weight"] == (3072, 768)
    assert shapes["encoder.layers.11.ffn.B.ffn_layernorm.weight"] == (3072,)
    assert shapes["vision_embed.proj.weight"] == (768, 3, 16, 16)


# sizes that differ from the file's ------------------------------------------------------------------------------------


def test_the_released_vocabulary_is_trimmed(
    source: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = dict(source.state_dict())
    rows = torch.zeros(64_010 - VOCABULARY, WIDTH)
    path = save(state | {"text_embed.weight": torch.cat([state["text_embed.weight"], rows])}, tmp_path)
    with caplog.at_level(logging.INFO, logger="emkum"):
        model = beit3_from_checkpoint(path)
    expected = f"{path}: text embedding of 64010 rows trimmed to the 64002 of the vocabulary"
    assert [record.getMessage() for record in caplog.records] == [expected]
    assert model.text_embed.weight.shape == (64_002, WIDTH)
    assert_same_outputs(model, source)
    assert beit3_from_checkpoint(path, vocab_size=64_010).text_embed.weight.shape == (64_010, WIDTH)


def test_a_vocabulary_of_any_size(source: nn.Module, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="emkum"):
        assert beit3_from_checkpoint(file, vocab_size=VOCABULARY).text_embed.weight.shape == (VOCABULARY, WIDTH)
        assert not caplog.records
        model = beit3_from_checkpoint(file, vocab_size=40)
    assert len(caplog.records) == 1 and model.text_embed.weight.shape == (40, WIDTH)
    assert_same_outputs(model, source, ids=40)
    message = one_line(lambda: beit3_from_checkpoint(file, vocab_size=64_002))
    assert message.endswith("has a text embedding of 60 rows; the vocabulary needs 64002")


@pytest.mark.parametrize("side", [16, 48])
def test_positions_of_another_image_size(
    torchscale: Callable[..., nn.Module], source: nn.Module, file: Path, side: int
) -> None:
    state = dict(source.state_dict())
    name = "encoder.embed_positions.A.weight"
    expected = positions_of_another_size(state[name], SIDE // PATCH, side // PATCH)
    other = torchscale(img_size=side)
    other.load_state_dict(state | {name: expected})
    model = beit3_from_checkpoint(file, image_size=side)
    assert model.image_size == side
    torch.testing.assert_close(model.encoder.embed_positions.A.weight, expected, rtol=0, atol=1e-6)
    assert_same_outputs(model, other, side=side)


def test_the_same_image_size_changes_no_bit(file: Path) -> None:
    assert fingerprint(beit3_from_checkpoint(file, image_size=SIDE)) == fingerprint(beit3_from_checkpoint(file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 30}, "image size 30 is no multiple of the patch size 8 of"),
        ({"image_size": 0}, "image size 0 is no multiple of the patch size 8 of"),
        ({"num_layers": 4}, "has 3 layers; 4 cannot be kept"),
        ({"num_layers": 0}, "has 3 layers; 0 cannot be kept"),
        ({"vocab_size": 0}, "the vocabulary needs 0"),
    ],
)
def test_sizes_that_cannot_be(file: Path, options: dict[str, int], message: str) -> None:
    error = one_line(lambda: beit3_from_checkpoint(file, **options))
    assert message in error and str(file) in error


# other parameters -----------------------------------------------------------------------------------------------------


def test_heads_are_left_out(source: nn.Module, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heads = {
        name: torch.ones(2)
        for name in (
            *("language_head.weight", "vision_head.weight", "logit_scale", "mlm_head.weight", "mlm_head.bias"),
            *("mim_head.weight", "pooler.norm.weight", "pooler.dense.bias", "head.0.weight", "fc_norm.weight"),
        )
    }
    path = save(dict(source.state_dict()), tmp_path, **heads)
    with caplog.at_level(logging.INFO, logger="emkum"):
        model = beit3_from_checkpoint(path)
    names = "fc_norm, head, language_head, logit_scale, mim_head, mlm_head, pooler, vision_head"
    expected = f"{path}: left out {names}, which the encoder does not have"
    assert [record.getMessage() for record in caplog.records] == [expected]
    assert fingerprint(model) == fingerprint(beit3_from_checkpoint(file))


def test_missing_and_unexpected_parameters(source: nn.Module, tmp_path: Path) -> None:
    state = dict(source.state_dict())
    del state["encoder.layer_norm.B.bias"], state["encoder.layers.2.ffn.A.fc2.bias"]
    state["encoder.layers.0.gate.weight"] = torch.ones(2)
    path = save(state, tmp_path, **{"decoder.weight": torch.ones(2)})
    message = one_line(lambda: beit3_from_checkpoint(path))
    assert f"{path} does not fit BEiT-3; " in message
    assert "missing: encoder.layer_norm.B.bias, encoder.layers.2.ffn.A.fc2.bias; " in message
    assert message.endswith("unexpected: decoder.weight, encoder.layers.0.gate.weight")
    allowed = "decoder.*,*.gate.weight,encoder.layer_norm.B.bias,encoder.layers.2.ffn.A.fc2.bias"
    assert beit3_from_checkpoint(path, allowed=allowed).num_layers == LAYERS
    # A layer that is left out is not asked for.
    message = one_line(lambda: beit3_from_checkpoint(path, num_layers=2, allowed="decoder.*,*.gate.weight"))
    assert message.endswith("missing: encoder.layer_norm.B.bias")


def test_files_without_final_norm(torchscale: Callable[..., nn.Module], tmp_path: Path) -> None:
    source = torchscale(normalize_output=False)
    path = save(source.state_dict(), tmp_path, **{"fc_norm.weight": torch.ones(2), "head.weight": torch.ones(2)})
    assert "missing: encoder.layer_norm.A.bias, encoder.layer_norm.A.weight, " in one_line(
        lambda: beit3_from_checkpoint(path)
    )
    model = beit3_from_checkpoint(path, allowed="encoder.layer_norm.*").eval()
    images, _, _ = inputs()
    expected, _ = source_outputs(source, visual_tokens=images)
    with torch.no_grad():
        torch.testing.assert_close(model(images).tokens, F.layer_norm(expected, (WIDTH,)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"text_embed.weight": None}, "is no checkpoint of BEiT-3: it lacks text_embed.weight"),
        (
            {"vision_embed.proj.weight": torch.ones(WIDTH, 3)},
            "lacks vision_embed.proj.weight or has other shapes of it",
        ),
        ({"encoder.embed_positions.A.weight": torch.ones(21, WIDTH)}, "has 18 rows for patches, which make no square"),
        ({"encoder.embed_positions.A.weight": torch.ones(2, WIDTH)}, "rows for patches, which make no square"),
        ({"encoder.layers.0.ffn.A.fc1.weight": torch.ones(192, 96)}, "a width of 96 is no multiple of 64"),
        ({"text_embed.weight": torch.ones(VOCABULARY, 64)}, "text_embed.weight (60, 64) instead of (60, 128)"),
        ({"encoder.embed_positions.B.weight": torch.ones(1, WIDTH)}, "embed_positions.B.weight has 1 rows, too few"),
    ],
)
def test_shapes_of_another_model(
    source: nn.Module, change: dict[str, Tensor | None], expected: str, tmp_path: Path
) -> None:
    state = {name: value for name, value in (source.state_dict() | change).items() if value is not None}
    path = save(state, tmp_path)
    message = one_line(lambda: beit3_from_checkpoint(path))
    assert expected in message and str(path) in message


def test_weights_of_another_model(tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(2, 3).state_dict()}, tmp_path / "linear.pth")
    message = one_line(lambda: beit3_from_checkpoint(tmp_path / "linear.pth"))
    assert "linear.pth is no checkpoint of BEiT-3: it lacks text_embed.weight, vision_embed.proj.weight, " in message
    torch.save([1, 2], tmp_path / "list.pth")
    assert "list.pth is no checkpoint of BEiT-3" in one_line(lambda: beit3_from_checkpoint(tmp_path / "list.pth"))
    assert "no such file: " in one_line(lambda: beit3_from_checkpoint(tmp_path / "absent.pth"))


def test_half_a_download(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    assert str(tmp_path / "half.pth") in one_line(lambda: beit3_from_checkpoint(tmp_path / "half.pth"))


class Exploit:
    """Unpickling this makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_code_is_refused_and_not_run(source: nn.Module, tmp_path: Path) -> None:
    path, target = tmp_path / "beit3.pth", tmp_path / "made_by_the_file"
    torch.save({"model": source.state_dict(), "optimizer": Exploit(target)}, path)
    assert f"{path} is refused: it holds more than tensors" in one_line(lambda: beit3_from_checkpoint(path))
    assert not target.exists()
