"""Encoders out of runs and pretrained models."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from emkum.data.tokenizers import load_tokenizer
from emkum.errors import UserError
from emkum.models.beit3 import BEiT3
from emkum.models.builders import build_student
from emkum.models.data2vec2 import Data2Vec2ImageEncoder, Data2Vec2TextEncoder
from emkum.models.encoder_changes import WithAdditions
from emkum.models.encoder_sources import (
    LoadedEncoder,
    encoder_source_of_teacher,
    image_encoder_from_options,
    load_image_encoder,
    load_text_encoder,
    text_encoder_from_options,
)
from emkum.models.teacher_builders import build_teacher
from emkum.teachers.base import TeacherConfig
from emkum.weights import fingerprint

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(15))]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def randomized(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module.eval()


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    path = tmp_path / "words" / "vocab.txt"
    path.parent.mkdir()
    path.write_text("\n".join(WORDS) + "\n")
    return path


def run_of(folder: Path, name: str, state: dict[str, Tensor], model: dict[str, Any], tokenizer: Path | None) -> Path:
    """A run's folder as training leaves it."""
    folder.mkdir(exist_ok=True)
    if tokenizer is not None:
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.txt").write_bytes(tokenizer.read_bytes())
    task = {"data": "nowhere", "caption_tokenizer": None, "caption_max_tokens": 9}
    torch.save(
        {"cfg": {"model": {"_name": name, **model}, "task": task}, "model": state}, folder / "checkpoint_last.pt"
    )
    return folder


def assert_stands_alone(loaded: LoadedEncoder) -> None:
    """The options build an encoder that the weights fit, and that gives the same."""
    assert loaded.options and not any(key.endswith("_weights") for key in loaded.options)
    if loaded.max_tokens == 0:
        built = image_encoder_from_options(loaded.options)
        inputs = torch.randn(2, 3, loaded.encoder.image_size, loaded.encoder.image_size)
    else:
        tokenizer = loaded.tokenizer
        words = (20, 1) if tokenizer is None else (tokenizer.vocab_size, tokenizer.special.pad)
        built = text_encoder_from_options(loaded.options, *words)
        inputs = torch.randint(5, 20, (2, 7))
    built.load_state_dict(loaded.encoder.state_dict())
    with torch.no_grad():
        assert torch.equal(built.eval()(inputs).tokens, loaded.encoder(inputs).tokens)
    assert not any(module.training for module in loaded.encoder.modules())
    assert loaded.identity["weights_sha256"] == fingerprint(loaded.encoder)


# ----------------------------------------------------------------------------------------------------------------------
# Pretrained models
# ----------------------------------------------------------------------------------------------------------------------


def test_timm(tmp_path: Path) -> None:
    model = randomized(timm.create_model("test_vit", img_size=32, num_classes=0))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_image_encoder("timm:test_vit", str(tmp_path / "model.safetensors"), 32, layers=4)
    assert loaded.encoder.num_layers == loaded.options["image_layers"] == 4
    assert (loaded.tokenizer, loaded.max_tokens, loaded.identity["source"]) == (None, 0, "timm:test_vit")
    assert_stands_alone(loaded)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        patches = model.forward_intermediates(images, intermediates_only=True, output_fmt="NLC")[3]
        torch.testing.assert_close(loaded.encoder(images).tokens[:, 1:], patches, rtol=1e-5, atol=1e-5)
    assert load_image_encoder("timm:test_vit").encoder.image_size == 160, "what timm's model was trained with"
    network = load_image_encoder("timm:test_resnet", image_size=64)
    assert network.options["image_layers"] == 0 and network.encoder.image_size == 64
    assert_stands_alone(network)


def test_data2vec2_images(tmp_path: Path) -> None:
    sizes = {"embed_dim": 24, "num_heads": 4, "input_size": 16, "patch_size": 8}
    encoder = randomized(Data2Vec2ImageEncoder(depth=3, prenet_depth=1, **sizes))
    torch.save({"cfg": {"model": {"num_heads": 4}}, "model": encoder.state_dict()}, tmp_path / "d2v.pt")
    loaded = load_image_encoder(f"data2vec2:{tmp_path / 'd2v.pt'}")
    assert_stands_alone(loaded)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encoder(images).tokens, encoder(images).tokens, rtol=0, atol=1e-6)
    larger = load_image_encoder(f"data2vec2:{tmp_path / 'd2v.pt'}", image_size=32, layers=3)
    assert (larger.encoder.image_size, larger.encoder.num_layers) == (32, 3)
    assert_stands_alone(larger)
    # A run of pretraining says so by its name; the rest is the same.
    run = run_of(tmp_path / "run", "data2vec2_image", encoder.state_dict(), {"d2v_num_heads": 4}, None)
    again = load_image_encoder(str(run))
    assert again.identity["weights_sha256"] == loaded.identity["weights_sha256"]


def test_data2vec2_text(tmp_path: Path) -> None:
    encoder = randomized(Data2Vec2TextEncoder(20, 24, depth=3, num_heads=4, max_positions=12))
    torch.save({"cfg": {"model": {"num_heads": 4}}, "model": encoder.state_dict()}, tmp_path / "d2v.pt")
    loaded = load_text_encoder(f"data2vec2:{tmp_path / 'd2v.pt'}")
    assert loaded.tokenizer is None and loaded.max_tokens == loaded.options["text_max_positions"] == 12
    assert_stands_alone(loaded)
    text = torch.randint(5, 20, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(loaded.encoder(text).tokens, encoder(text).tokens, rtol=0, atol=1e-6)


@pytest.fixture
def beit3(tmp_path: Path) -> tuple[Path, BEiT3]:
    sizes = {"width": 64, "layers": 3, "heads": 1, "ffn_width": 256, "max_positions": 12}
    model = randomized(BEiT3(20, **sizes, image_size=16, patch_size=8))
    torch.save({"model": model.state_dict()}, tmp_path / "beit3.pth")
    return tmp_path / "beit3.pth", model


def test_beit3(beit3: tuple[Path, BEiT3], run_prepare: Any) -> None:
    file, model = beit3
    images, text = torch.randn(2, 3, 16, 16), torch.randint(5, 20, (2, 7))
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    both = load_image_encoder(f"beit3:{file}"), load_text_encoder(f"beit3:{file}")
    with torch.no_grad():
        got = [both[0].encoder(images).tokens, both[1].encoder(text, padding).tokens]
        expected = [model.hidden_states(images)[-1], model.hidden_states(None, text, padding)[-1]]
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1][~padding], expected[1][~padding], rtol=0, atol=1e-5)
    for loaded in both:
        assert_stands_alone(loaded)
    assert both[1].tokenizer is None and both[1].max_tokens == both[1].options["text_max_positions"] == 12
    larger = load_image_encoder(f"beit3:{file}", image_size=32, layers=2)
    assert (larger.encoder.image_size, larger.encoder.num_layers) == (32, 2)
    assert_stands_alone(larger)
    # The vocabulary beside the file, which may have fewer ids than the file has rows.
    (file.parent / "captions.txt").write_text("\n".join("abcde fgh" for _ in range(50)))
    vocabulary = ["--vocab-size", 14, "--layout", "sentencepiece"]
    run_prepare("tokenizer", "--input", file.parent / "captions.txt", *vocabulary, "--out", file.parent / "spm")
    (file.parent / "spm" / "tokenizer.model").rename(file.parent / "beit3.spm")
    found = load_text_encoder(f"beit3:{file}")
    words = found.encoder.embedding_parameters()[0]
    assert 10 < found.tokenizer.vocab_size == len(words) < 20
    assert torch.equal(words, model.text_embed.weight[: len(words)])
    torch.save({"model": nn.Linear(2, 3).state_dict()}, file.parent / "linear.pth")
    for load in (load_image_encoder, load_text_encoder):
        with pytest.raises(UserError, match="linear.pth is no checkpoint of BEiT-3"):
            load(f"beit3:{file.parent / 'linear.pth'}")


def test_bert(tmp_path: Path, vocabulary: Path) -> None:
    transformers = pytest.importorskip("transformers")
    # More words than the vocabulary: released tables are padded so.
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=24, max_position_embeddings=12, **sizes))
    randomized(model).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_bytes(vocabulary.read_bytes())
    loaded = load_text_encoder(f"bert:{tmp_path / 'bert'}", layers=2)
    assert (loaded.encoder.num_layers, loaded.encoder.vocab_size, loaded.max_tokens) == (2, 20, 12)
    assert_stands_alone(loaded)
    text, padding = torch.randint(5, 20, (2, 7)), torch.arange(7) >= torch.tensor([[7], [4]])
    with torch.no_grad():
        expected = model(text, attention_mask=(~padding).long(), output_hidden_states=True).hidden_states[2]
        got = loaded.encoder(text, padding).tokens
    torch.testing.assert_close(got[~padding], expected[~padding], rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="reads text; give a run's folder or checkpoint, timm:NAME"):
        load_image_encoder(f"bert:{tmp_path / 'bert'}")


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------

SMALL = {
    "student_width": 32, "student_heads": 4, "image_size": 32, "image_patch_size": 8, "image_layers": 3,
    "text_layers": 2, "text_encoder": "bert", "text_max_positions": 12, "image_weights": None, "text_weights": None,
}  # fmt: skip


def student_run(folder: Path, vocabulary: Path, **changes: Any) -> tuple[Path, nn.Module]:
    options = SMALL | changes
    student = randomized(build_student(options, len(WORDS), pretrained=False, pad_index=0))
    state = {f"student.{key}": value for key, value in student.state_dict().items()}
    return run_of(folder, "image_text_student", state, options, vocabulary), student


@pytest.mark.parametrize("encoder", ["data2vec2", "beit3:absent.pth", "timm:test_vit"])
def test_encoders_of_an_image_text_student(tmp_path: Path, vocabulary: Path, encoder: str) -> None:
    run, student = student_run(tmp_path / "run", vocabulary, image_encoder=encoder)
    images, text = load_image_encoder(str(run)), load_text_encoder(str(run / "checkpoint_last.pt"))
    for loaded, own in ((images, student.image_encoder), (text, student.text_encoder)):
        assert_stands_alone(loaded)
        state = loaded.encoder.state_dict()
        assert own.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in own.state_dict().items())
    assert text.tokenizer.vocab_size == len(WORDS) and text.max_tokens == 12
    larger = load_image_encoder(str(run), image_size=48)
    assert larger.encoder.image_size == 48
    assert_stands_alone(larger)


def test_what_a_student_adds_before_its_encoders_stays_with_them(tmp_path: Path, vocabulary: Path) -> None:
    run, student = student_run(
        tmp_path / "run", vocabulary, position_kind="learned", position_place="before", token_type_place="before"
    )
    loaded = load_image_encoder(str(run))
    assert isinstance(loaded.encoder, WithAdditions) and loaded.options == {}
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = student.image_encoder.embed(images)
        for addition in student.before.values():
            tokens = addition(tokens, 0)
        assert torch.equal(loaded.encoder(images).tokens, student.image_encoder.encode(tokens))
    with pytest.raises(UserError, match="its positions are for images of 32 pixels alone"):
        load_image_encoder(str(run), image_size=48)
    after, _ = student_run(tmp_path / "after", vocabulary, position_kind="sincos", position_place="after")
    assert load_text_encoder(str(after)).options == {}


MODELS = {
    "image_student": "image",
    "image_classifier": "image",
    "dino_image": "image",
    "text_student": "text",
    "masked_language_model": "text",
}


@pytest.mark.parametrize("name", [*MODELS, "text_classifier"])
def test_runs_of_one_encoder(tmp_path: Path, vocabulary: Path, name: str) -> None:
    """Whatever has the encoder among further parts, by a named size."""
    is_image = MODELS.get(name) == "image"
    options = {**SMALL, "student_width": 0, "student_heads": 0, "student_size": "tiny", "image_layers": 0}
    encoder = image_encoder_from_options(options) if is_image else text_encoder_from_options(options, len(WORDS), 0)
    place = "average.module.encoder." if name == "dino_image" else "encoder."
    state = {f"{place}{key}": value for key, value in randomized(encoder).state_dict().items()}
    state |= {"head.weight": torch.zeros(3)}
    run = run_of(tmp_path / "run", name, state, options, None if is_image else vocabulary)
    loaded = load_image_encoder(str(run)) if is_image else load_text_encoder(str(run))
    assert_stands_alone(loaded)
    assert loaded.options["student_width"] == 128 and loaded.identity["weights_sha256"] == fingerprint(encoder)
    assert loaded.options["image_layers" if is_image else "text_layers"] == (3 if is_image else 2)
    teacher = build_teacher(f"checkpoint:{run}", layers=True)
    assert teacher.modalities == ("image",) if is_image else teacher.modalities == ("text",)
    assert teacher.patch_width == 128
    if is_image:
        assert teacher.grid == (4, 4)
        assert build_teacher(f"checkpoint:{run}", TeacherConfig(image_size=48)).grid == (6, 6)
    else:
        assert load_tokenizer(teacher.tokenizer).vocab_size == 20 and teacher.max_tokens == 12
    wrong = load_text_encoder if is_image else load_image_encoder
    with pytest.raises(UserError, match=f"is a checkpoint of {name}, which has no (text|image) encoder to use; give"):
        wrong(str(run))


def test_a_convolutional_classifier_gives_no_layers(tmp_path: Path) -> None:
    options = {"image_encoder": "timm:test_resnet", "image_size": 64, "image_layers": 0}
    state = {f"encoder.{key}": value for key, value in image_encoder_from_options(options).state_dict().items()}
    run = run_of(tmp_path / "run", "image_classifier", state, options, None)
    assert_stands_alone(load_image_encoder(str(run)))
    assert build_teacher(f"checkpoint:{run}").grid == (2, 2)
    with pytest.raises(UserError, match="is a convolutional network, which gives no layers"):
        build_teacher(f"checkpoint:{run}", layers=True)


def test_mistakes(tmp_path: Path, vocabulary: Path) -> None:
    run, _ = student_run(tmp_path / "run", vocabulary)
    cases = {
        "no such checkpoint: nowhere": lambda: load_image_encoder("nowhere"),
        "has 3 layers; 4 cannot be kept": lambda: load_image_encoder(str(run), layers=4),
        "has 2 layers; -1 cannot be kept": lambda: load_text_encoder(str(run), layers=-1),
        "weights x are for timm:NAME": lambda: load_image_encoder(str(run), "x"),
        "sees images; give a run's folder": lambda: load_text_encoder("timm:test_vit"),
        "no tokenizer at": lambda: load_text_encoder(str(run), str(tmp_path / "absent")),
        "timm has no model": lambda: load_image_encoder("timm:vit_of_nobody"),
        "has no layers that a student could start from": lambda: encoder_source_of_teacher("openclip:ViT-B-32"),
    }
    for message, call in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert encoder_source_of_teacher("checkpoint:x") == "checkpoint:x"
    torch.save({"cfg": {"model": {"_name": "image_student", **SMALL}, "task": {}}, "model": {}}, tmp_path / "empty.pt")
    with pytest.raises(UserError, match="does not fit the encoder that its own options describe; missing"):
        load_image_encoder(str(tmp_path / "empty.pt"))
