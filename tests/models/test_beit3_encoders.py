"""Encoders made of BEiT-3's layers against torchscale, with files of random weights that it wrote."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import DropPath
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.models.beit3_checkpoints import load_beit3_weights
from emkum.models.beit3_encoders import BEiT3Encoder, BEiT3ImageEncoder, BEiT3TextEncoder
from emkum.models.encoder import Encoder, LayerChoice
from tests.models.beit3_source import (
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

LAYERS, HEADS, HIDDEN, PATCHES = 12, 2, 4 * WIDTH, (SIDE // PATCH) ** 2
SIZES = {"width": WIDTH, "heads": HEADS, "ffn_width": HIDDEN}
POSITION_TABLE = "encoder.embed_positions.A.weight"
KINDS = ("image", "text")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def torchscale() -> Callable[..., nn.Module]:
    make = torchscale_maker()
    return lambda **changes: make(encoder_ffn_embed_dim=HIDDEN, **({"encoder_layers": LAYERS} | changes))


@pytest.fixture(scope="module")
def source(torchscale: Callable[..., nn.Module]) -> nn.Module:
    """Twelve layers."""
    return torchscale()


@pytest.fixture(scope="module")
def file(source: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(source.state_dict(), tmp_path_factory.mktemp("beit3"))


def empty(kind: str, layers: int = 2, **changes: Any) -> BEiT3Encoder:
    """An encoder of random weights."""
    if kind == "image":
        return BEiT3ImageEncoder(**SIZES, layers=layers, **({"image_size": SIDE, "patch_size": PATCH} | changes)).eval()
    sizes = {"vocab_size": VOCABULARY, "max_positions": POSITIONS}
    return BEiT3TextEncoder(**SIZES, layers=layers, **(sizes | changes)).eval()


def loaded(kind: str, file: Path, choice: LayerChoice | None = None, layers: int = 2, **changes: Any) -> BEiT3Encoder:
    encoder = empty(kind, layers, **changes)
    load_beit3_weights(encoder, file, choice)
    return encoder


def inputs(side: int = SIDE) -> tuple[Tensor, Tensor, Tensor]:
    images, text = torch.randn(3, 3, side, side), torch.randint(4, VOCABULARY, (3, 9))
    text[1, 6:] = PAD
    text[2, 3:] = PAD
    return images, text, text.eq(PAD)


def inputs_of(encoder: Encoder) -> tuple[Tensor, Tensor | None]:
    images, text, hidden = inputs()
    return (images, None) if encoder.modality == "image" else (text, hidden)


def one_line(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_states(images: BEiT3Encoder, texts: BEiT3Encoder, source: nn.Module, side: int = SIDE) -> None:
    """All layers' outputs are those of torchscale's first layers, of padded batches and of one row too."""
    pixels, text, hidden = inputs(side)
    for encoder, own, its in (
        (images, (pixels,), {"visual_tokens": pixels}),
        (images, (pixels[:1],), {"visual_tokens": pixels[:1]}),
        (texts, (text,), {"textual_tokens": text}),
        (texts, (text[:1],), {"textual_tokens": text[:1]}),
        (texts, (text, hidden), {"textual_tokens": text, "text_padding_position": hidden}),
    ):
        _, states = source_outputs(source, **its)
        with torch.no_grad():
            ours, encoded = encoder.hidden_states(*own), encoder(*own)
        visible = ~own[1] if len(own) > 1 else torch.ones(ours[0].shape[:2], dtype=torch.bool)
        assert len(ours) == encoder.num_layers <= len(states)
        last = states[len(ours) - 1]
        # Values of order 1, not of nearly equal tokens.
        assert last.std() > 0.3 and (last[0, 0] - last[0, 1]).abs().max() > 0.1
        for actual, wanted in zip(ours, states, strict=False):
            torch.testing.assert_close(actual[visible], wanted[visible], rtol=1e-5, atol=1e-5)
        assert torch.equal(encoded.tokens, ours[-1])


# ----------------------------------------------------------------------------------------------------------------------
# Features
# ----------------------------------------------------------------------------------------------------------------------

CHOICES = {
    "first": (LayerChoice(6), [0, 1, 2, 3, 4, 5]),
    "every_second": (LayerChoice(6, every_second=True), [0, 2, 4, 6, 8, 10]),
    "further": (LayerChoice(3, every_second=True, further=1), [0, 2, 4, 6]),
    "no_choice": (None, [0, 1]),
}


@pytest.mark.parametrize("name", CHOICES)
def test_chosen_layers_give_the_features_of_torchscale(source: nn.Module, file: Path, name: str) -> None:
    choice, kept = CHOICES[name]
    images, texts = (loaded(kind, file, choice, len(kept)) for kind in KINDS)
    halved = copy.deepcopy(source)
    halved.encoder.layers = nn.ModuleList(halved.encoder.layers[index] for index in kept)
    assert_same_states(images, texts, halved)


@pytest.mark.parametrize("side", [16, 48])
def test_another_image_size(torchscale: Callable[..., nn.Module], source: nn.Module, file: Path, side: int) -> None:
    state = dict(source.state_dict())
    state[POSITION_TABLE] = positions_of_another_size(state[POSITION_TABLE], SIDE // PATCH, side // PATCH)
    other = torchscale(img_size=side)
    other.load_state_dict(state)
    images = loaded("image", file, layers=6, image_size=side)
    assert_same_states(images, loaded("text", file, layers=6), other, side)
    resized = loaded("image", file, layers=6)
    resized.resize(side, "a file")
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(resized(pixels).tokens, images(pixels).tokens)
    assert all(parameter.requires_grad for parameter in resized.parameters())
    assert "images of 30 pixels are no multiple of the 8-pixel patches of a file" in one_line(
        lambda: resized.resize(30, "a file")
    )


def test_masked_patches(source: nn.Module, file: Path) -> None:
    images, masked = inputs()[0], torch.rand(3, PATCHES) < 0.4
    _, states = source_outputs(source, visual_tokens=images, vision_masked_position=masked)
    encoder = loaded("image", file)
    with torch.no_grad():
        tokens = encoder.encode(encoder.embed(images, masked, source.vision_embed.mask_token[0, 0]))
        assert not torch.allclose(tokens, encoder(images).tokens)
    torch.testing.assert_close(tokens, states[1], rtol=0, atol=1e-5)


def test_names_are_those_of_the_released_files(source: nn.Module) -> None:
    theirs = {name: value.shape for name, value in source.state_dict().items()}
    own = [{name: value.shape for name, value in empty(kind, LAYERS).state_dict().items()} for kind in KINDS]
    assert own[0].keys().isdisjoint(own[1])
    left_out = {f"encoder.layer_norm.{way}.{kind}" for way in "AB" for kind in ("weight", "bias")}
    assert own[0] | own[1] == {
        name: shape for name, shape in theirs.items() if name not in left_out | {"vision_embed.mask_token"}
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_padding_or_its_neighbors(file: Path, kind: str) -> None:
    encoder = loaded(kind, file).double()
    batch, hidden = inputs_of(encoder)
    batch = batch.double() if kind == "image" else batch
    with torch.no_grad():
        tokens = encoder(batch, hidden).tokens
        assert torch.equal(encoder(batch, hidden).tokens, tokens)
        for row in range(3):
            length = tokens.shape[1] if hidden is None else int((~hidden[row]).sum())
            one = batch[row : row + 1] if hidden is None else batch[row : row + 1, :length]
            torch.testing.assert_close(encoder(one).tokens[0], tokens[row, :length], rtol=0, atol=1e-6)
        if hidden is not None:
            longer = encoder(F.pad(batch, (0, 4), value=PAD), F.pad(hidden, (0, 4), value=True)).tokens[:, :9]
            torch.testing.assert_close(longer[~hidden], tokens[~hidden], rtol=0, atol=1e-6)


def test_without_positions_order_means_nothing(file: Path) -> None:
    images, texts = (loaded(kind, file, own_positions=False) for kind in KINDS)
    assert not any("positions" in name for encoder in (images, texts) for name in encoder.state_dict())
    pixels, text, _ = inputs()
    with torch.no_grad():
        swapped = torch.cat([pixels[..., 8:16], pixels[..., :8], pixels[..., 16:]], dim=-1)
        torch.testing.assert_close(images(swapped).cls, images(pixels).cls, rtol=0, atol=1e-5)
        assert not torch.allclose(loaded("image", file)(swapped).cls, loaded("image", file)(pixels).cls, atol=1e-3)
        order = torch.tensor([0, 2, 1, *range(3, 9)])
        torch.testing.assert_close(texts(text[:, order]).cls, texts(text).cls, rtol=0, atol=1e-5)
        assert texts(text.repeat(1, 4)).tokens.shape == (3, 36, WIDTH)


# ----------------------------------------------------------------------------------------------------------------------
# Blocks
# ----------------------------------------------------------------------------------------------------------------------


def naive_block(state: Mapping[str, Tensor], x: Tensor, hidden: Tensor) -> Tensor:
    """Pre-norm block with norms before the last projections, head by head, from its parameters by timm's names."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    query, key, value = linear("attn.qkv", norm("norm1", x)).split(WIDTH, dim=-1)
    heads = []
    for part in torch.arange(WIDTH).chunk(HEADS):
        logits = query[..., part] @ key[..., part].transpose(1, 2) / len(part) ** 0.5
        heads.append(logits.masked_fill(hidden[:, None], float("-inf")).softmax(-1) @ value[..., part])
    x = x + linear("attn.proj", norm("attn.norm", torch.cat(heads, dim=-1)))
    grown = linear("mlp.fc1", norm("norm2", x))
    active = grown * 0.5 * (1 + torch.erf(grown / 2**0.5))
    return x + linear("mlp.fc2", norm("mlp.norm", active))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_computes_what_its_state_tells(file: Path, kind: str, fused: bool) -> None:
    encoder = loaded(kind, file, fused_attention=fused).double()
    batch, hidden = inputs_of(encoder)
    batch = batch.double() if kind == "image" else batch
    hidden = torch.zeros(3, PATCHES + 1, dtype=torch.bool) if hidden is None else hidden
    x = [encoder.embed(batch).detach().requires_grad_() for _ in range(2)]
    tokens = encoder.encode(x[0], hidden)[~hidden]
    expected = naive_block(encoder.block_state(1), naive_block(encoder.block_state(0), x[1], hidden), hidden)[~hidden]
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-6)
    for result in (tokens, expected):
        result.sin().sum().backward()
    torch.testing.assert_close(x[0].grad, x[1].grad, rtol=0, atol=1e-6)
    assert x[0].grad.abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_with_recomputed_activations_too(file: Path, kind: str) -> None:
    rates = {"dropout": 0.2, "attention_dropout": 0.2, "drop_path": 0.2}
    gradients = []
    for recompute in (False, True):
        encoder = loaded(kind, file, **rates).train()
        encoder.checkpoint_activations = recompute
        batch, hidden = inputs_of(encoder)
        torch.manual_seed(1)
        encoder(batch, hidden).tokens.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in encoder.named_parameters()})
        torch.manual_seed(0)
    for name, gradient in gradients[0].items():
        # Of keys' biases it is zero but for rounding.
        assert gradient is not None and (gradient.abs().max() > 1e-7 or "k_proj" in name), name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_other_ways_to_compute_the_same(file: Path, kind: str) -> None:
    encoder = loaded(kind, file)
    batch, hidden = inputs_of(encoder)
    visible = slice(None) if hidden is None else ~hidden
    with torch.no_grad():
        tokens = encoder(batch, hidden).tokens[visible]
        plain = loaded(kind, file, fused_attention=False)(batch, hidden).tokens[visible]
        torch.testing.assert_close(plain, tokens, rtol=0, atol=1e-5)
        torch._dynamo.reset()
        compiled = torch.compile(encoder, backend="aot_eager")(batch, hidden).tokens[visible]
        torch.testing.assert_close(compiled, tokens, rtol=0, atol=1e-5)
        for fused in (True, False):
            low = loaded(kind, file, fused_attention=fused)
            with torch.autocast("cpu", torch.bfloat16):
                coarse = low(batch, hidden).tokens[visible].float()
            assert F.cosine_similarity(coarse, tokens, dim=-1).min() > 1 - 1e-3


def test_rates_grow_to_the_last_layer_and_dropout_is_as_given() -> None:
    encoder = empty("text", 3, dropout=0.3, attention_dropout=0.2, drop_path=0.4)
    rates = [
        [part.drop_prob for part in block.modules() if isinstance(part, DropPath)] for block in encoder.all_blocks()
    ]
    assert rates == [[pytest.approx(0.0)], [pytest.approx(0.2)], [pytest.approx(0.4)]]
    assert {module.p for module in encoder.modules() if isinstance(module, nn.Dropout)} == {0.3}
    assert {block.self_attn.dropout for block in encoder.all_blocks()} == {0.2}
    encoder.drop_last_blocks(1)
    assert encoder.num_layers == len(encoder.all_blocks()) == 2
    batch = inputs()[1]
    dropped = {float(encoder.train()(batch).tokens.detach().sum()) for _ in range(3)}
    kept = {float(encoder.eval()(batch).tokens.detach().sum()) for _ in range(3)}
    assert len(dropped) == 3 and len(kept) == 1


def test_a_new_encoder() -> None:
    images, texts = (empty(kind) for kind in KINDS)
    for weights in (
        texts.text_embed.weight,
        images.vision_embed.cls_token,
        images.encoder["embed_positions"].A.weight,
        texts.encoder["layers"][0].ffn.B.fc1.weight,
    ):
        assert weights.std().item() == pytest.approx(0.02, rel=0.25)
    assert {parameter.shape for parameter in images.embedding_parameters()} == {(WIDTH, 3, PATCH, PATCH), (WIDTH,)}
    assert [parameter.shape for parameter in texts.embedding_parameters()] == [(VOCABULARY, WIDTH)]
    assert images.mean == images.std == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"images of \(16, 32\) pixels, not 32 by 32"):
        images(torch.zeros(1, 3, 16, 32))
    with pytest.raises(ValueError, match="23 tokens exceed the 22 positions"):
        texts(torch.zeros(1, 23, dtype=torch.int64))
    with pytest.raises(ValueError, match="masked by its token ids"):
        texts.embed(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="no multiple"):
        BEiT3ImageEncoder(image_size=30)
    with pytest.raises(ValueError, match="128 is no multiple of 3 heads"):
        BEiT3TextEncoder(VOCABULARY, width=128, heads=3)


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "parameters alone", "without final norm"])
def test_other_forms_of_the_file(source: nn.Module, file: Path, form: str, tmp_path: Path) -> None:
    path, state = tmp_path / "weights.pth", dict(source.state_dict())
    if form == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file({f"beit3.{name}": value for name, value in state.items()}, path)
    else:
        if form == "without final norm":
            state = {name: value for name, value in state.items() if "encoder.layer_norm." not in name}
        torch.save(state, path)
    for kind in KINDS:
        ours, expected = loaded(kind, path).state_dict(), loaded(kind, file).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in ours.items())


def test_fewer_words_and_positions_than_the_file_has(source: nn.Module, file: Path) -> None:
    encoder = loaded("text", file, vocab_size=40, max_positions=9)
    assert torch.equal(encoder.text_embed.weight, source.text_embed.weight[:40])
    text = torch.randint(4, 40, (2, 9))
    with torch.no_grad():
        assert torch.equal(encoder(text).tokens, loaded("text", file)(text).tokens)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("image", {"layers": 13}, "has 12 layers; 13 cannot be kept"),
        ("text", {"layers": 7, "choice": LayerChoice(7, every_second=True)}, "6 by taking every second one; 7 cannot"),
        ("image", {"layers": 3, "choice": LayerChoice(2)}, "2 layers of .* are chosen for an encoder of 3"),
        ("text", {"vocab_size": 61}, "has a text embedding of 60 rows; the vocabulary needs 61"),
        ("text", {"max_positions": 23}, "has positions for 22 tokens of text, not for 23 .--text-max-positions."),
        ("image", {"patch_size": 16}, "does not fit the image encoder: its patch size is 8, not 16"),
        ("text", {"width": 64, "heads": 1}, "does not fit the text encoder: its width is 128, not 64"),
        ("image", {"heads": 4}, "its number of attention heads is 2, not 4"),
        ("image", {"ffn_width": 192}, "its feed-forward width is 512, not 192"),
    ],
)
def test_sizes_that_do_not_fit(
    file: Path, kind: str, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = dict(changes)
    for name in SIZES.keys() & changes.keys():
        monkeypatch.setitem(SIZES, name, changes.pop(name))
    error = one_line(lambda: loaded(kind, file, **changes))
    assert str(file) in error
    with pytest.raises(UserError, match=message):
        loaded(kind, file, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_another_kind_and_damaged_ones(source: nn.Module, tmp_path: Path, kind: str) -> None:
    torch.save({"model": nn.Linear(2, 3).state_dict()}, tmp_path / "linear.pth")
    assert "linear.pth is no checkpoint of BEiT-3: it lacks" in one_line(lambda: loaded(kind, tmp_path / "linear.pth"))
    assert "no such file" in one_line(lambda: loaded(kind, tmp_path / "absent.pth"))
    state = dict(source.state_dict())
    way = "A" if kind == "image" else "B"
    lacking = f"encoder.layers.1.ffn.{way}.fc2.bias"
    path = save({name: value for name, value in state.items() if name != lacking}, tmp_path, extra=torch.ones(1))
    message = one_line(lambda: loaded(kind, path))
    assert message.endswith(f"{path} does not fit BEiT-3's layers; missing: {lacking}; unexpected: extra")


def test_a_gap_in_the_layers_is_refused(source: nn.Module, tmp_path: Path) -> None:
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("encoder.layers.3.")}
    message = one_line(lambda: loaded("image", save(state, tmp_path), layers=6))
    assert "missing: encoder.layers.3." in message and "unexpected: encoder.layers.11." in message


def test_sizes_of_the_halves_of_the_released_base_model() -> None:
    """A layer has ViT's 7,087,872 parameters and 7,680 more: norms of 768 and 3,072 channels before the last
    projections. To the six of images come 590,592 of patches, a CLS token and 199 rows of positions, two of which are
    never used; to those of text 64,002 words and 1,024 rows."""
    with torch.device("meta"):
        images, texts = BEiT3ImageEncoder(layers=6), BEiT3TextEncoder(64_002, layers=6)
    layers = 6 * (7_087_872 + 7_680)
    counts = [sum(parameter.numel() for parameter in encoder.parameters()) for encoder in (images, texts)]
    assert counts[0] == layers + 590_592 + 768 + 199 * 768 == 43_317_504
    assert counts[1] == layers + 64_002 * 768 + 1_024 * 768
    assert sum(counts) / 1e6 == pytest.approx(135.83, abs=0.01)
