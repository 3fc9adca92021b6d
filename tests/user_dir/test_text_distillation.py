"""Masked language modeling from scratch, and distillation of the teacher that it makes, through the real commands."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

# These register.
import user_dir.models.masked_language_model
import user_dir.models.unimodal_student
import user_dir.tasks.text_distillation
import user_dir.tasks.text_pretraining  # noqa: F401
from emkum.errors import UserError
from emkum.models.beit3 import BEiT3
from emkum.models.data2vec2 import Data2Vec2ImageEncoder
from emkum.models.encoder_sources import load_text_encoder
from emkum.models.teacher_builders import build_teacher
from emkum.teachers.base import TeacherInput
from tests.integration.in_process import Run, make_run
from tests.user_dir.distillation_runs import assert_resumes, content, logged, train

UPDATES = 24
WORDS = [f"{kind}{number}" for kind in ("noun", "verb", "place") for number in range(8)]
SMALL = {"student_size": "tiny", "text_encoder": "bert", "student_width": 32, "text_max_positions": 16}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def prepare(run_prepare: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that makes a set of regular sentences, whose blocks are of so many tokens (0 = a sentence each)."""
    raw = tmp_path_factory.mktemp("raw")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (raw / "vocab.txt").write_text("\n".join(special + WORDS) + "\n")
    rng = np.random.default_rng(0)
    for name, number in (("train", 300), ("valid", 24)):
        lines = []
        for _ in range(number):
            first = int(rng.integers(8))
            sentence = [f"noun{first}", f"verb{first}", f"place{first}"] * int(rng.integers(1, 4))
            lines.append(" ".join(sentence))
        (raw / f"{name}.txt").write_text("\n".join(lines) + "\n")

    def make(block_size: int) -> Path:
        folder = raw / f"blocks{block_size}"
        inputs = [f"--input={name}={raw / name}.txt" for name in ("train", "valid")]
        sizes = ["--block-size", block_size, "--max-tokens", 16]
        run_prepare("text", *inputs, "--tokenizer", raw / "vocab.txt", *sizes, "--out", folder)
        return folder

    return make


@pytest.fixture(scope="module")
def blocks(prepare: Any) -> Path:
    return prepare(16)


PRETRAINING = SMALL | {
    "task": "text_pretraining", "arch": "masked_language_model", "text_layers": 4, "lr": 0.01,
    "batch_size": 12, "max_update": UPDATES, "text_mask_prob": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(blocks: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and log of a run of pretraining."""
    save_dir = tmp_path_factory.mktemp("teacher") / "checkpoints"
    return save_dir, train(blocks, save_dir, PRETRAINING)


@pytest.fixture(scope="module")
def options(teacher: tuple) -> dict[str, Any]:
    return {
        "task": "text_distillation", "arch": "text_student", "teacher": f"checkpoint:{teacher[0]}", "text_layers": 2,
        "lr": 0.001, "batch_size": 12, "max_update": UPDATES,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(blocks: Path, options: dict, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    save_dir = tmp_path_factory.mktemp("run") / "checkpoints"
    return save_dir, train(blocks, save_dir, options)


def in_process(data: Path, options: dict[str, Any], tmp_path: Path, **changes: Any) -> Run:
    shared = {"criterion": "model", "optimizer": "grouped_adamw"}
    return make_run(data, tmp_path / "save", shared | options, **changes)


def layers_of(run: Run) -> tuple[list[Tensor], tuple[Tensor, ...], Tensor | None]:
    """Of a batch: the student's layers in eval mode, the teacher's, and the padding mask."""
    inputs, ids = run.batch(0, 4)["net_input"], torch.arange(4)
    text, padding = inputs["text"], inputs["padding_mask"]
    with torch.no_grad():
        student = run.model.eval().encoder.hidden_states(text, padding)
    seen = TeacherInput(None, ids, torch.full_like(ids, -1), "train", text, padding)
    return student, run.task.teacher(seen).layers, padding


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining
# ----------------------------------------------------------------------------------------------------------------------


def test_pretraining_learns(teacher: tuple) -> None:
    records = logged(teacher[1])
    losses = [float(record["loss"]) for record in records]
    assert losses[-1] < losses[0] - 0.1, losses
    assert 0 <= float(records[-1]["accuracy"]) <= 100
    assert {"valid_loss", "valid_accuracy"} <= logged(teacher[1], "valid")[-1].keys()


def test_pretraining_resumes(teacher: tuple, blocks: Path, tmp_path: Path) -> None:
    assert_resumes(blocks, teacher[0], tmp_path / "resumed", PRETRAINING)


def test_the_encoder_is_a_teacher(teacher: tuple) -> None:
    loaded = load_text_encoder(str(teacher[0]))
    assert loaded.encoder.num_layers == 4 and loaded.tokenizer.vocab_size == 5 + len(WORDS)
    found = build_teacher(f"checkpoint:{teacher[0]}", layers=True)
    text = torch.randint(5, 20, (2, 9))
    ids = torch.arange(2)
    layers = found(TeacherInput(None, ids, ids - 1, "train", text)).layers
    with torch.no_grad():
        expected = loaded.encoder.hidden_states(text)
    assert len(layers) == 4
    for one, other in zip(layers, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_an_update_of_several_batches_counts_every_target_alike(prepare: Any, tmp_path: Path) -> None:
    data = prepare(0)
    still = {"text_dropout": 0.0, "text_attention_dropout": 0.0}
    whole = in_process(data, PRETRAINING | still, tmp_path)
    parts = in_process(data, PRETRAINING | still, tmp_path)
    parts.model.load_state_dict(whole.model.state_dict())
    sizes = whole.backward(whole.batch(0, 12), 0)["sample_size"]
    pieces = [parts.backward(parts.batch(start, stop), 0)["sample_size"] for start, stop in ((0, 3), (3, 12))]
    assert sum(pieces) == sizes
    for name, gradient in whole.gradients().items():
        torch.testing.assert_close(parts.gradients()[name], gradient, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Distillation
# ----------------------------------------------------------------------------------------------------------------------


def test_at_first_the_student_is_the_teachers_first_layers(blocks: Path, options: dict, tmp_path: Path) -> None:
    run = in_process(blocks, options, tmp_path)
    student, teacher, padding = layers_of(run)
    assert len(student) == 2 and len(teacher) == 4 and padding is None, "all blocks are equally long"
    for own, theirs in zip(student, teacher, strict=False):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)
    cfg = run.task.cfg._get_root().model
    assert (cfg.text_encoder, cfg.student_width, cfg.text_max_positions, cfg.text_layers) == ("bert", 32, 16, 2)
    second = in_process(blocks, options, tmp_path, text_layer_choice="every_second")
    theirs = load_text_encoder(options["teacher"]).encoder.all_blocks()
    for own, index in zip(second.model.encoder.all_blocks(), (0, 2), strict=True):
        state = theirs[index].state_dict()
        assert all(torch.equal(value, state[name]) for name, value in own.state_dict().items())


def test_the_loss_is_that_of_the_definition(prepare: Any, options: dict, tmp_path: Path) -> None:
    """On texts of several lengths: means over a text's own tokens, and every token of the batch counts alike."""
    run = in_process(prepare(0), options, tmp_path, text_dropout=0.0, text_attention_dropout=0.0)
    student, teacher, padding = layers_of(run)
    lengths = (~padding).sum(1).tolist()
    assert len(set(lengths)) > 1

    def tokens(layers: Any, row: int) -> Tensor:
        normed = []
        for layer in layers:
            own = layer[row, : lengths[row]].double()
            centered = own - own.mean(0)
            normed.append(centered / (centered.square().mean(0) + 1e-8).sqrt())
        return sum(normed) / len(normed)

    errors = [(tokens(student, row) - tokens(teacher, row)).square().mean(-1).sum() for row in range(4)]
    run.model.train()
    log = run.backward(run.batch(0, 4), 0)
    assert log["sample_size"] == sum(lengths)
    assert float(log["loss"]) == pytest.approx(float(sum(errors)), rel=1e-4) and float(log["loss"]) > 0.01


def test_distillation_lowers_the_loss(run: tuple) -> None:
    losses = [float(record["loss"]) for record in logged(run[1])]
    valid = [float(record["valid_loss"]) for record in logged(run[1], "valid")]
    assert losses[-1] < 0.9 * losses[0] and valid[-1] < losses[0], (losses, valid)


def test_distillation_resumes(run: tuple, blocks: Path, options: dict, tmp_path: Path) -> None:
    assert_resumes(blocks, run[0], tmp_path / "resumed", options)


def test_checkpoint_stands_alone(run: tuple, teacher: tuple) -> None:
    state = content(run[0])
    assert all(name.startswith("encoder.") for name in state["model"]), "the teacher is not saved"
    loaded = load_text_encoder(str(run[0] / "checkpoint_last.pt"))
    assert loaded.encoder.num_layers == 2 and loaded.max_tokens == 16
    weights = loaded.encoder.state_dict()
    assert all(torch.equal(value, weights[name.removeprefix("encoder.")]) for name, value in state["model"].items())


def test_a_released_bert(blocks: Path, options: dict, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128}
    # More rows than words.
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=16, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_bytes((blocks / "vocab.txt").read_bytes())
    run = in_process(blocks, options, tmp_path, teacher=f"bert:{tmp_path / 'bert'}")
    student, teacher, _ = layers_of(run)
    assert len(student) == 2 and len(teacher) == 4
    for own, theirs in zip(student, teacher, strict=False):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)
    (tmp_path / "bert" / "vocab.txt").write_text((blocks / "vocab.txt").read_text() + "further\n")
    with pytest.raises(UserError, match="have different tokenizers: prepare the text with the same one"):
        in_process(blocks, options, tmp_path, teacher=f"bert:{tmp_path / 'bert'}")


def test_beit3(blocks: Path, run_prepare: Any, options: dict, tmp_path: Path) -> None:
    """What it makes of text alone, on sentences of several lengths."""
    raw = blocks.parent
    tokenizer = ["--vocab-size", 60, "--layout", "sentencepiece"]
    run_prepare("tokenizer", "--input", raw / "train.txt", *tokenizer, "--out", tmp_path / "spm")
    inputs = [f"--input={name}={raw / name}.txt" for name in ("train", "valid")]
    sizes = ["--block-size", 0, "--max-tokens", 16]
    run_prepare(
        "text", *inputs, "--tokenizer", tmp_path / "spm" / "tokenizer.model", *sizes, "--out", tmp_path / "data"
    )
    model = BEiT3(70, width=64, layers=4, heads=1, ffn_width=256, image_size=16, patch_size=8, max_positions=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    torch.save({"model": model.state_dict()}, tmp_path / "beit3.pth")
    changes = {"teacher": f"beit3:{tmp_path / 'beit3.pth'}", "text_dropout": 0.0, "text_attention_dropout": 0.0}
    with pytest.raises(UserError, match="beit3: a teacher of text needs beit3.spm beside"):
        in_process(tmp_path / "data", options, tmp_path, **changes)
    (tmp_path / "beit3.spm").write_bytes((tmp_path / "spm" / "tokenizer.model").read_bytes())
    run = in_process(tmp_path / "data", options, tmp_path, **changes)
    student, teacher, padding = layers_of(run)
    assert len(student) == 2 and len(teacher) == 4 and padding.any()
    text = run.batch(0, 4)["net_input"]["text"]
    with torch.no_grad():
        whole = model.eval().hidden_states(None, text, padding)
    for own, theirs, expected in zip(student, teacher, whole, strict=False):
        torch.testing.assert_close(own[~padding], expected[~padding], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs[~padding], expected[~padding], rtol=1e-5, atol=1e-5)
    run.model.train()
    assert float(run.backward(run.batch(0, 4), 0)["loss"]) > 0.01
    # Neither the words that the vocabulary lacks nor positions beyond the longest sentence are asked for.
    assert run.gradients().keys() == {name for name, _ in run.model.named_parameters()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": False}, "distillation needs --teacher: timm:NAME"),
        ({"text_layers": 5}, "has 4 layers; 5 cannot be kept"),
        ({"text_encoder": "data2vec2"}, None),
        ({"student_width": 64}, "--student-width 64: --init-from teacher has 32; leave --student-width out"),
        ({"text_weights": "x"}, "--text-weights beside --init-from teacher: give one"),
        ({"init_from": "none"}, "have 32 channels, the student's 768"),
        ({"arch": "image_student", "text_layers": False}, "task text_distillation trains --arch text_student alone"),
    ],
)
def test_mistakes(blocks: Path, options: dict, tmp_path: Path, changes: dict, message: str | None) -> None:
    if message is None:
        # The default, which a source may replace.
        assert in_process(blocks, options, tmp_path, **changes).model.encoder.num_layers == 2
        return
    with pytest.raises(UserError) as caught:
        in_process(blocks, options, tmp_path, **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_teacher_of_images(blocks: Path, options: dict, tmp_path: Path) -> None:
    encoder = Data2Vec2ImageEncoder(24, depth=2, prenet_depth=0, num_heads=4, input_size=16, patch_size=8)
    torch.save({"cfg": {"model": {"num_heads": 4}}, "model": encoder.state_dict()}, tmp_path / "d2v.pt")
    with pytest.raises(UserError, match="gives no layers of text; choose a teacher that reads text alone"):
        in_process(blocks, options, tmp_path, teacher=f"data2vec2:{tmp_path / 'd2v.pt'}")


def test_blocks_that_are_too_long(prepare: Any, options: dict, tmp_path: Path) -> None:
    longer = prepare(32)
    for given in (options, PRETRAINING):
        with pytest.raises(UserError, match="has blocks of 32 tokens, but the model reads 16 at most: prepare"):
            in_process(longer, given, tmp_path)
    with pytest.raises(UserError, match="task text_pretraining trains --arch masked_language_model alone"):
        in_process(longer, PRETRAINING, tmp_path, arch="text_student")
