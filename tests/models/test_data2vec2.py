"""The bridge to fairseq's Data2Vec 2, held against fairseq's own model."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.models import data2vec2
from emkum.models.data2vec2 import Data2Vec2ImageEncoder, Data2Vec2TextEncoder, data2vec2_module
from emkum.models.data2vec2_checkpoints import (
    encoder_arguments_from_checkpoint,
    image_encoder_from_checkpoint,
    load_data2vec2_weights,
    text_encoder_from_checkpoint,
)

WIDTH, HEADS, DEPTH, PAD = 24, 4, 3, 1
SIDE, PATCH, VOCABULARY = 24, 8, 20


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def source_model(modality: str, prenet_depth: int) -> nn.Module:
    """fairseq's pretraining model, EMA copy and decoder included, with every parameter random."""
    fork = data2vec2_module("models.data2vec2")
    kind = data2vec2_module("data.modality").Modality[modality]
    cfg = fork.Data2VecMultiConfig(
        embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, seed=1, max_update=10, ema_anneal_end_step=10,
        supported_modality=kind, norm_eps=1e-6 if modality == "IMAGE" else 1e-5, recon_loss=1.0,
    )  # fmt: skip
    for own in (cfg.modalities.audio, cfg.modalities.image, cfg.modalities.text):
        own.num_alibi_heads, own.model_depth, own.prenet_depth = HEADS, DEPTH, prenet_depth
        own.decoder.decoder_dim, own.decoder.decoder_groups, own.decoder.decoder_layers = 16, 4, 1
    cfg.modalities.image.num_extra_tokens = 1
    cfg.modalities.image.input_size, cfg.modalities.image.patch_size = SIDE, PATCH
    cfg.modalities.image.embed_dim = WIDTH
    dictionary = SimpleNamespace(pad=lambda: PAD)
    task = SimpleNamespace(source_dictionary=_Sized(dictionary, VOCABULARY))
    model = fork.Data2VecMultiModel(cfg, [kind], task=task)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("positions"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


class _Sized:
    def __init__(self, dictionary: SimpleNamespace, size: int) -> None:
        self.pad, self.size = dictionary.pad, size

    def __len__(self) -> int:
        return self.size


def save(model: nn.Module, path: Path) -> Path:
    """As fairseq's trainer does."""
    options = OmegaConf.to_container(OmegaConf.structured(model.cfg), resolve=False, enum_to_str=True)
    state = {"args": None, "cfg": {"model": options}, "model": model.state_dict(), "extra_state": {"epoch": 1}}
    torch.save(state, path)
    return path


@pytest.fixture(scope="module", params=[0, 2], ids=["no_prenet", "prenet"])
def image_source(request, tmp_path_factory) -> tuple[nn.Module, Path]:
    model = source_model("IMAGE", request.param)
    return model, save(model, tmp_path_factory.mktemp("image") / "checkpoint.pt")


@pytest.fixture(scope="module", params=[0, 2], ids=["no_prenet", "prenet"])
def text_source(request, tmp_path_factory) -> tuple[nn.Module, Path]:
    model = source_model("TEXT", request.param)
    return model, save(model, tmp_path_factory.mktemp("text") / "checkpoint.pt")


def text_batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(4, VOCABULARY, (3, 9))
    tokens[:, 0] = 0
    tokens[1, 6:] = PAD
    tokens[2, 3:] = PAD
    return tokens, tokens.eq(PAD)


def block_outputs(model: nn.Module, **inputs) -> tuple[list[Tensor], dict]:
    """The source's features after each prenet and main block, and what `extract_features` returns."""
    (encoder,) = model.modality_encoders.values()
    outputs: list[Tensor] = []
    blocks = [*encoder.context_encoder.blocks, *model.blocks]
    hooks = [block.register_forward_hook(lambda *arguments: outputs.append(arguments[-1][0])) for block in blocks]
    with torch.no_grad():
        features = model.extract_features(remove_extra_tokens=False, **inputs)
    for hook in hooks:
        hook.remove()
    return outputs, features


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# loader ---------------------------------------------------------------------------------------------------------------


def test_loading_twice_gives_the_same_modules():
    first = data2vec2_module("models.data2vec2")
    assert data2vec2_module("models.data2vec2") is first
    assert data2vec2_module("models.modalities.images").ImageEncoder is first.ImageEncoder
    assert data2vec2_module("data.modality").Modality is first.Modality
    assert not any(name.startswith("examples.data2vec") for name in sys.modules)
    assert data2vec2._RewritingFinder not in sys.meta_path


def test_import_beside_a_project_with_its_own_examples(tmp_path):
    (tmp_path / "examples" / "data2vec").mkdir(parents=True)
    (tmp_path / "examples" / "__init__.py").write_text("mine = True\n")
    (tmp_path / "examples" / "data2vec" / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    script = """
import examples, os, sys, warnings
warnings.filterwarnings("error", "Importing from timm")
from emkum.models.data2vec2 import (data2vec2_module)
from fairseq.models import MODEL_REGISTRY
from fairseq.examples.data2vec.data.modality import Modality
images = data2vec2_module("models.modalities.images")
assert "mae" in MODEL_REGISTRY and "data2vec_multi" not in MODEL_REGISTRY
multi = data2vec2_module("models.data2vec2")
assert MODEL_REGISTRY["data2vec_multi"] is multi.Data2VecMultiModel
assert multi.ImageEncoder is images.ImageEncoder and images.Modality is Modality
assert sys.modules["examples"] is examples and examples.mine and os.path.samefile(examples.__path__[0], "examples")
assert not [name for name in sys.modules if name.startswith("examples.")]
files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
files = [file for file in files if file and "data2vec" in file and "fairseq" in file and "examples" in file]
assert len(files) == len(set(files)), files
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(data2vec2.__file__).parents[2])}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_other_sources_are_refused(monkeypatch):
    monkeypatch.setitem(data2vec2.REWRITES, "models.utils", (("text of another version", "", 1),))
    with pytest.raises(UserError, match=r"models/utils\.py holds 'text of another version' 0 times, not 1"):
        data2vec2_module("models.utils")
    assert "fairseq.examples.data2vec.models.utils" not in sys.modules


@pytest.mark.parametrize("name", sorted(data2vec2.REWRITES))
def test_every_rewrite_is_needed_and_complete(name):
    module = data2vec2_module(name)
    source = Path(module.__file__).read_text()
    for text, replacement, count in data2vec2.REWRITES[name]:
        assert source.count(text) == count
        source = source.replace(text, replacement)
    assert "from examples." not in source and "np.float)" not in source and "Config()\n" not in source


def test_missing_module_is_named():
    with pytest.raises(UserError, match=r"fairseq\.examples\.data2vec\.models\.none"):
        data2vec2_module("models.none")


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
        close(encoded.tokens, source["x"])
        for actual, expected in zip(encoder.hidden_states(images, end_of_block=True), outputs, strict=True):
            close(actual, expected)
        for actual, expected in zip(encoder.hidden_states(images)[-DEPTH:], source["layer_results"], strict=True):
            close(actual, expected)
    assert encoded.tokens.shape == (2, 1 + (SIDE // PATCH) ** 2, WIDTH) and encoded.padding_mask is None
    assert (encoder.width, encoder.num_heads, encoder.image_size) == (WIDTH, HEADS, SIDE)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stock"])
def test_text_features_of_the_source(text_source, fused):
    model, path = text_source
    encoder = Data2Vec2TextEncoder(**encoder_arguments_from_checkpoint(path, "TEXT"), fused_attention=fused).eval()
    load_data2vec2_weights(encoder, path)
    tokens, padding_mask = text_batch()
    _, padded = block_outputs(model, source=tokens, padding_mask=padding_mask)
    _, full = block_outputs(model, source=tokens[:1])
    with torch.no_grad():
        encoded = encoder(tokens, padding_mask)
        close(encoded.tokens[~padding_mask], padded["x"][~padding_mask])
        close(encoder(tokens[:1]).tokens, full["x"])
    assert encoded.padding_mask is padding_mask
    assert (encoder.width, encoder.max_positions) == (WIDTH, 512)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_first_image_blocks(image_source, kept):
    model, path = image_source
    encoder = image_encoder_from_checkpoint(path, num_layers=kept).eval()
    images = torch.randn(2, 3, SIDE, SIDE)
    outputs, _ = block_outputs(model, source=images)
    with torch.no_grad():
        close(encoder(images).tokens, outputs[kept - 1])
    assert encoder.num_layers == kept == len(encoder.hidden_states(images))


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_first_text_blocks(text_source, kept):
    model, path = text_source
    encoder = text_encoder_from_checkpoint(path, num_layers=kept).eval()
    tokens, padding_mask = text_batch()
    outputs, _ = block_outputs(model, source=tokens, padding_mask=padding_mask)
    with torch.no_grad():
        close(encoder(tokens, padding_mask).tokens[~padding_mask], outputs[kept - 1][~padding_mask])


def test_padding_changes_nothing(text_source):
    encoder = text_encoder_from_checkpoint(text_source[1]).eval()
    tokens, padding_mask = text_batch()
    with torch.no_grad():
        together = encoder(tokens, padding_mask).tokens
        for row, (ids, mask) in enumerate(zip(tokens, padding_mask, strict=True)):
            alone = encoder(ids[~mask][None]).tokens[0]
            close(together[row, ~mask], alone, 1e-6)


def test_another_input_size_computes_its_positions(image_source):
    encoder = image_encoder_from_checkpoint(image_source[1], input_size=2 * SIDE)
    positions = encoder.modality_encoders["IMAGE"].fixed_positional_encoder.positions
    fresh = Data2Vec2ImageEncoder(WIDTH, depth=1, prenet_depth=0, num_heads=HEADS, input_size=2 * SIDE, patch_size=8)
    assert torch.equal(positions, fresh.modality_encoders["IMAGE"].fixed_positional_encoder.positions)
    assert encoder(torch.randn(1, 3, 2 * SIDE, 2 * SIDE)).tokens.shape == (1, 37, WIDTH)


def test_safetensors(image_source, tmp_path):
    from safetensors.torch import save_file

    model, path = image_source
    state = {name: value for name, value in model.state_dict().items() if name != "_ema"}
    save_file(state, tmp_path / "weights.safetensors")
    arguments = encoder_arguments_from_checkpoint(path, "IMAGE")
    encoder = Data2Vec2ImageEncoder(**arguments).eval()
    load_data2vec2_weights(encoder, tmp_path / "weights.safetensors")
    images = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        close(encoder(images).tokens, model.extract_features(images, remove_extra_tokens=False)["x"])
    with pytest.raises(UserError, match="attention heads"):
        image_encoder_from_checkpoint(tmp_path / "weights.safetensors")


# attention ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [True, False])
def test_fused_attention_agrees_in_value_and_gradient(padded):
    stock = data2vec2_module("models.modalities.modules").AltAttention(WIDTH, HEADS, qkv_bias=True).double()
    fused = data2vec2.FusedAttention(stock)
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 0, 1, 1]], dtype=torch.bool) if padded else None
    parameters = [x, *stock.parameters()]
    weight = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    outputs = [attention(x, mask) for attention in (stock, fused)]
    close(outputs[1], outputs[0], 1e-6)  # the stock module takes its softmax in float32
    gradients = [torch.autograd.grad((output * weight).sum(), parameters) for output in outputs]
    for actual, expected in zip(gradients[1], gradients[0], strict=True):
        close(actual, expected, 1e-6)
    assert fused.state_dict().keys() == stock.state_dict().keys()


def test_fused_attention_under_bfloat16():
    stock = data2vec2_module("models.modalities.modules").AltAttention(WIDTH, HEADS, qkv_bias=True)
    fused = data2vec2.FusedAttention(stock)
    x = torch.randn(3, 5, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        output = fused(x)
    assert output.dtype == torch.bfloat16
    close(output.float(), stock(x), 0.02)


def test_fused_attention_drops_attention_in_training():
    stock = data2vec2_module("models.modalities.modules").AltAttention(WIDTH, HEADS, attn_drop=0.5)
    fused = data2vec2.FusedAttention(stock)
    x = torch.randn(1, 5, WIDTH)
    assert not torch.equal(fused(x), fused(x))
    fused.eval()
    assert torch.equal(fused(x), fused(x))
    with pytest.raises(ValueError, match="fused_attention=False"):
        fused(x, alibi_bias=torch.zeros(1, HEADS, 5, 5))


# released models ------------------------------------------------------------------------------------------------------

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


def test_drop_path_grows_over_the_kept_blocks():
    encoder = Data2Vec2ImageEncoder(
        WIDTH, depth=3, prenet_depth=2, num_heads=HEADS, input_size=16, patch_size=8, num_layers=4, drop_path=0.3
    )
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in encoder.all_blocks()]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


# wrong files ----------------------------------------------------------------------------------------------------------


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"model": {"modality_encoders.IMAGE.extra_tokens": _Payload(tmp_path / "ran")}}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="evil.pt"):
        image_encoder_from_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_truncated_file(image_source, tmp_path):
    content = image_source[1].read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cut.pt") as caught:
        image_encoder_from_checkpoint(tmp_path / "cut.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{"model": {"head.weight": torch.zeros(2)}}, torch.zeros(2), {"model": 3}, [1]])
def test_file_of_another_model(content, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt is not a Data2Vec 2 checkpoint"):
        image_encoder_from_checkpoint(tmp_path / "other.pt")


def test_other_modality_is_named(image_source):
    with pytest.raises(UserError, match="no TEXT encoder; it is a Data2Vec 2 checkpoint of IMAGE"):
        text_encoder_from_checkpoint(image_source[1])


def test_keys_that_do_not_fit_are_listed(image_source, tmp_path):
    model, path = image_source
    encoder = image_encoder_from_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["model"]
    del state["blocks.1.norm1.bias"]
    state["surprise"] = torch.zeros(1)
    state["blocks.0.norm1.bias"] = torch.zeros(WIDTH + 1)
    torch.save(checkpoint, tmp_path / "wrong.pt")
    with pytest.raises(UserError) as caught:
        load_data2vec2_weights(encoder, tmp_path / "wrong.pt")
    message = str(caught.value)
    assert "missing: blocks.1.norm1.bias" in message and "unexpected: surprise" in message
    assert f"blocks.0.norm1.bias ({WIDTH + 1},) instead of ({WIDTH},)" in message


def test_prenet_blocks_are_never_skipped_over(tmp_path):
    path = save(source_model("IMAGE", 2), tmp_path / "prenet.pt")
    arguments = encoder_arguments_from_checkpoint(path, "IMAGE") | {"prenet_depth": 0}
    with pytest.raises(UserError, match=r"unexpected: .*context_encoder\.blocks\.[01]\."):
        load_data2vec2_weights(Data2Vec2ImageEncoder(**arguments), path)


def test_too_many_layers(image_source):
    with pytest.raises(UserError, match="blocks; 9 cannot be kept"):
        image_encoder_from_checkpoint(image_source[1], num_layers=9)
    with pytest.raises(ValueError, match="num_layers is 0"):
        Data2Vec2ImageEncoder(num_layers=0)


def test_too_many_tokens():
    encoder = Data2Vec2TextEncoder(VOCABULARY, WIDTH, depth=1, num_heads=HEADS, max_positions=4)
    with pytest.raises(ValueError, match="5 tokens exceed the 4 positions"):
        encoder(torch.zeros(1, 5, dtype=torch.long))
