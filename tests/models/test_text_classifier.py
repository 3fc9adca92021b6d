"""The classifier of texts: its head, losses and predictions, and how it is loaded."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from emkum.errors import UserError
from emkum.models.encoder_sources import load_text_encoder
from emkum.models.text_classifier import (
    NO_CLASS,
    ClassifierHead,
    TextClassifier,
    build_text_classifier,
    load_text_classifier,
)
from tests.glue_cases import OPTIONS, write_source, write_vocabulary

VOCABULARY, PAD = 70, 0


def built(num_classes: int = 3, **options: object) -> TextClassifier:
    torch.manual_seed(0)
    return build_text_classifier(OPTIONS | options, VOCABULARY, PAD, num_classes).eval()


def texts(rows: int = 4, length: int = 9) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def test_head_by_hand() -> None:
    torch.manual_seed(0)
    head = ClassifierHead(5, 3, 0.0).double()
    head.dense.bias.data.normal_()
    cls = torch.randn(2, 5, dtype=torch.float64)
    expected = torch.empty(2, 3, dtype=torch.float64)
    for row in range(2):
        inner = [
            math.tanh(sum((head.dense.weight[i, j] * cls[row, j]).item() for j in range(5)) + head.dense.bias[i].item())
            for i in range(5)
        ]
        for output in range(3):
            expected[row, output] = sum(head.out.weight[output, i].item() * inner[i] for i in range(5))
    torch.testing.assert_close(head(cls), expected + head.out.bias.detach())


def test_outputs_are_the_heads_of_the_first_token() -> None:
    classifier = built()
    tokens = texts()
    outputs = classifier(tokens)
    assert outputs.shape == (4, 3)
    torch.testing.assert_close(outputs, classifier.head(classifier.encoder(tokens).tokens[:, 0]))
    assert built(0)(tokens).shape == (4, 1)


def test_padding_changes_nothing() -> None:
    classifier = built().double()
    tokens = texts()
    padded = F.pad(tokens, (0, 6), value=PAD)
    padding = torch.arange(15).expand(4, 15) >= 9
    torch.testing.assert_close(classifier(padded, padding), classifier(tokens))


def test_loss_of_classes() -> None:
    classifier = built()
    outputs = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2, 1, 1, 0])
    expected = -sum(math.log(math.exp(row[label]) / sum(map(math.exp, row))) for row, label in zip(
        outputs.tolist(), labels.tolist(), strict=True
    )) / 5  # fmt: skip
    loss = classifier.loss(outputs, labels)
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    loss.backward()
    gradient = (outputs.softmax(dim=1) - F.one_hot(labels, 3)) / 5
    torch.testing.assert_close(outputs.grad, gradient.detach())
    assert classifier.loss(outputs.bfloat16(), labels).dtype == torch.float32


def test_loss_and_predictions_of_scores() -> None:
    classifier = built(0)
    outputs = torch.tensor([[0.1], [0.9], [1.2]], dtype=torch.float64)
    scores = torch.tensor([0.5, 4.0, 5.0])
    expected = ((0.1 - 0.1) ** 2 + (0.9 - 0.8) ** 2 + (1.2 - 1.0) ** 2) / 3
    assert classifier.loss(outputs, scores).item() == pytest.approx(expected)
    assert classifier.predictions(outputs).tolist() == pytest.approx([0.5, 4.5, 6.0])


def test_predictions_of_classes() -> None:
    outputs = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, math.nan], [math.inf, 0.0, 0.0], [5.0, 4.0, 3.0]])
    assert built().predictions(outputs).tolist() == [1, NO_CLASS, NO_CLASS, 0]


def test_dropout_of_the_head() -> None:
    classifier = built(text_dropout=0.0, text_attention_dropout=0.0, classifier_dropout=0.5)
    tokens = texts()
    assert torch.equal(classifier(tokens), classifier(tokens))
    classifier.train()
    assert not torch.equal(classifier(tokens), classifier(tokens))
    with pytest.raises(UserError, match="--classifier-dropout 1.0: want 0 to below 1"):
        built(classifier_dropout=1.0)


def save(folder: Path, classifier: TextClassifier, name: str = "text_classifier") -> Path:
    vocabulary = write_vocabulary(folder / "tokenizer")
    assert len(vocabulary.read_text().split()) == len(classifier.encoder.embeddings.word_embeddings.weight)
    cfg = {"model": {"_name": name, **OPTIONS}, "task": {"glue_max_tokens": 32}}
    torch.save({"cfg": cfg, "model": classifier.state_dict()}, folder / "checkpoint_best.pt")
    return folder


def test_a_checkpoint_gives_the_classifier_back(tmp_path: Path) -> None:
    rows = len(write_vocabulary(tmp_path / "tokenizer").read_text().split())
    torch.manual_seed(4)
    classifier = build_text_classifier(OPTIONS, rows, PAD, 3).eval()
    folder = save(tmp_path, classifier)
    found = load_text_classifier(folder, 3)
    assert found.max_tokens == 32 and not found.classifier.training
    tokens = texts() % rows
    assert torch.equal(found.classifier(tokens), classifier(tokens))
    # The fine-tuned encoder is a source like any other.
    encoder = load_text_encoder(str(folder)).encoder
    assert torch.equal(encoder(tokens).tokens, classifier.encoder(tokens).tokens)
    with pytest.raises(UserError, match="does not fit a classifier of 2 classes; of another shape: head.out"):
        load_text_classifier(folder, 2)
    with pytest.raises(UserError, match="is a checkpoint of other, not of text_classifier"):
        load_text_classifier(save(tmp_path, classifier, "other"), 3)


def test_the_small_source_of_the_tests_is_one(tmp_path: Path) -> None:
    loaded = load_text_encoder(str(write_source(tmp_path / "run")))
    assert loaded.options == OPTIONS and loaded.tokenizer is not None
