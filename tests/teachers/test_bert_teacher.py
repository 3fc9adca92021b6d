"""BERT as teacher of texts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emkum.data.tokenizers import encode, load_tokenizer
from emkum.errors import UserError
from emkum.models.bert import BertEncoder
from emkum.teachers.base import FrozenTeacher, TeacherInput
from emkum.teachers.bert_teacher import bert_teacher
from emkum.weights import fingerprint

PAD = 0


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def encoder() -> BertEncoder:
    model = BertEncoder(40, width=32, layers=3, heads=4, ffn_width=48, max_positions=12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def batch(text: Tensor, padding_mask: Tensor | None) -> TeacherInput:
    ids = torch.arange(len(text))
    return TeacherInput(None, ids, torch.full_like(ids, -1), "train", text, padding_mask)


def teacher_of(model: BertEncoder, **options: Any) -> FrozenTeacher:
    return bert_teacher(model, {"teacher": "bert:x"}, Path("vocab.txt"), **options)


TEXT = torch.tensor([[2, 7, 8, 9, 3], [2, 11, 3, PAD, PAD]])
HIDDEN = TEXT == PAD


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_what_it_declares() -> None:
    model = encoder()
    teacher = teacher_of(model, max_tokens=8, pooling="mean")
    assert (teacher.modalities, teacher.image_size, teacher.grid, teacher.num_classes) == (("text",), 0, None, 0)
    assert (teacher.width, teacher.patch_width, teacher.max_tokens) == (32, 32, 8)
    assert teacher.tokenizer == Path("vocab.txt")
    known = {"teacher": "bert:x", "pooling": "mean", "weights_sha256": fingerprint(model)}
    assert teacher.identity.items() >= known.items()
    assert teacher_of(model).max_tokens == 12
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_poolings_tokens_and_layers(layers: bool, padded: bool) -> None:
    model = encoder()
    hidden = HIDDEN if padded else None
    with torch.no_grad():
        states = model.hidden_states(TEXT, hidden)
    tokens = states[-1]
    rows = [row[~mask] if padded else row for row, mask in zip(tokens, HIDDEN, strict=True)]
    mean = torch.stack([row.mean(0) for row in rows])
    for pooling, expected in (("default", tokens[:, 0]), ("cls", tokens[:, 0]), ("mean", mean)):
        output = teacher_of(model, pooling=pooling, layers=layers)(batch(TEXT, hidden))
        assert_same(output.features, expected)
        assert_same(output.patches, tokens)
        assert output.text_features is None and output.logits is None
        assert (output.layers is None) == (not layers)
        for actual, state in zip(output.layers or states, states, strict=True):
            assert_same(actual, state)


def test_padding_changes_no_feature() -> None:
    model = encoder()
    for pooling in ("cls", "mean"):
        teacher = teacher_of(model, pooling=pooling)
        together = teacher(batch(TEXT, HIDDEN)).features
        assert_same(together[1:], teacher(batch(TEXT[1:, :3], None)).features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "--teacher-pooling 'max': bert knows default, cls, mean"),
        ({"max_tokens": 13}, "bert reads texts of up to 12 tokens, not of 13"),
        ({"target": "own"}, "needs a teacher that reads images and text; bert:x does not"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        teacher_of(encoder(), **options)
    with pytest.raises(UserError, match="needs the vocab.txt of its model"):
        bert_teacher(encoder(), {}, None)


def test_real_vocabulary(shared_data: Path) -> None:
    path = shared_data / "tokenizers" / "bert-base-uncased-vocab.txt"
    tokenizer = load_tokenizer(path)
    model = BertEncoder(tokenizer.vocab_size, width=32, layers=1, heads=4, ffn_width=48)
    teacher = bert_teacher(model, {}, path)
    ids = torch.tensor([encode(load_tokenizer(teacher.tokenizer), "A brown dog runs.", teacher.max_tokens)])
    assert ids.shape == (1, 7) and ids.max() < tokenizer.vocab_size == 30_522
    assert teacher(batch(ids, None)).features.shape == (1, 32)
