"""The zero-shot classifier against its definition, open_clip's, and cases by hand; the picture of what is confused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from open_clip import build_zero_shot_classifier
from torch import Tensor, nn

from emkum.evaluation.confusion_figure import MOST_CLASSES, confusion_picture
from emkum.evaluation.zero_shot import (
    class_features,
    classify,
    confusion_matrix,
    most_confused,
    per_class_accuracy,
    zero_shot_metrics,
)
from tests.figure_checks import assert_readable, shown_texts

CLASSES, TEXTS, IMAGES, WIDTH = 9, 4, 120, 6


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make_case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[int], Tensor, Tensor]:
    """(T, D) texts in any order, their classes, (n, D) images near their class, and labels."""
    centers = torch.randn(CLASSES, WIDTH, dtype=dtype)
    # Class c has 1 + c % TEXTS texts, of any length.
    owners = [label for label in range(CLASSES) for _ in range(1 + label % TEXTS)]
    owners = [owners[i] for i in torch.randperm(len(owners)).tolist()]
    texts = centers[owners] + 0.3 * torch.randn(len(owners), WIDTH, dtype=dtype)
    texts *= torch.rand(len(owners), 1, dtype=dtype) * 5 + 0.1
    labels = torch.randint(0, CLASSES - 1, (IMAGES,))
    return texts, owners, 3 * (centers[labels] + 2.5 * torch.randn(IMAGES, WIDTH, dtype=dtype)), labels


def naive_classes(texts: np.ndarray, owners: list[int]) -> np.ndarray:
    found = []
    for label in range(CLASSES):
        units = [
            text / np.sqrt(sum(x * x for x in text)) for text, own in zip(texts, owners, strict=True) if own == label
        ]
        mean = sum(units) / len(units)
        found.append(mean / np.sqrt(sum(x * x for x in mean)))
    return np.array(found)


def test_everything_equals_its_definition() -> None:
    texts, owners, images, labels = make_case()
    expected = naive_classes(texts.numpy(), owners)
    classes = class_features(texts, owners, CLASSES)
    torch.testing.assert_close(classes, torch.from_numpy(expected), rtol=0, atol=1e-12)
    result = classify(images, classes, labels, block=7)
    hits, own, table = {1: 0, 5: 0}, np.zeros((CLASSES, 2)), np.zeros((CLASSES, CLASSES), dtype=int)
    for image, label in zip(images.numpy(), labels.tolist(), strict=True):
        cosines = [image @ one / np.linalg.norm(image) for one in expected]
        order = sorted(range(CLASSES), key=lambda c, cosines=cosines: -cosines[c])
        for k in hits:
            hits[k] += label in order[:k]
        own[label] += [order[0] == label, 1]
        table[label, order[0]] += 1
    assert 0 < hits[1] < hits[5] < IMAGES
    metrics = zero_shot_metrics(result.ranks, labels, CLASSES)
    accuracy = [100 * right / total for right, total in own if total > 0]
    assert len(accuracy) == CLASSES - 1, "one class has no image"
    assert metrics == pytest.approx(
        {
            "top_1": 100 * hits[1] / IMAGES,
            "top_5": 100 * hits[5] / IMAGES,
            "mean_per_class": sum(accuracy) / len(accuracy),
            "chance_top_1": 100 / CLASSES,
            "chance_top_5": 500 / CLASSES,
            "num_images": IMAGES,
            "num_classes": CLASSES,
        }
    )
    per_class = per_class_accuracy(result.ranks, labels, CLASSES)
    assert per_class[:-1].tolist() == pytest.approx(accuracy) and per_class[-1].isnan()
    assert confusion_matrix(result.predicted, labels, CLASSES).tolist() == table.tolist()


def test_float32_gives_the_same_classes_and_blocks_change_nothing() -> None:
    texts, owners, images, labels = make_case()
    exact = classify(images, class_features(texts, owners, CLASSES), labels)
    classes = class_features(texts.float().numpy(), owners, CLASSES)
    assert classes.dtype == torch.float32
    for block in (1, 50, 1000):
        found = classify(images.float().numpy(), classes, labels.numpy(), block)
        assert torch.equal(found.ranks, exact.ranks) and torch.equal(found.predicted, exact.predicted)


class GivenTexts(nn.Module):
    """What open_clip calls a model: its features of texts are rows of a table."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features

    def encode_text(self, rows: Tensor, normalize: bool = False) -> Tensor:
        return nn.functional.normalize(self.features[rows], dim=-1) if normalize else self.features[rows]


def test_it_is_the_classifier_of_open_clip() -> None:
    names, templates = [f"name{label}" for label in range(CLASSES)], ["a {}.", "the {}", "{} here"]
    texts = [template.format(name) for name in names for template in templates]
    features, images = torch.randn(len(texts), WIDTH), torch.randn(IMAGES, WIDTH)
    labels = torch.randint(0, CLASSES, (IMAGES,))

    def tokenize(asked: list[str]) -> Tensor:
        return torch.tensor([texts.index(text) for text in asked])

    theirs = build_zero_shot_classifier(GivenTexts(features), tokenize, names, templates, num_classes_per_batch=4)
    classes = class_features(features, [label for label in range(CLASSES) for _ in templates], CLASSES)
    torch.testing.assert_close(classes.T, theirs, rtol=0, atol=1e-6)
    logits = 100.0 * nn.functional.normalize(images, dim=-1) @ theirs
    result = classify(images, classes, labels)
    assert torch.equal(result.predicted, logits.argmax(dim=1))
    metrics = zero_shot_metrics(result.ranks, labels, CLASSES)
    for k in (1, 5):
        # As in open_clip's training code.
        right = logits.topk(k, dim=1).indices.T.eq(labels[None]).any(dim=0).sum().item()
        assert 0 < right < IMAGES
        assert metrics[f"top_{k}"] == pytest.approx(100 * right / IMAGES, abs=1e-9)


def test_ties_count_against_the_model_and_appear_as_confusions() -> None:
    classes = torch.eye(3)[[0, 0, 1, 2]]
    # As rounding leaves them.
    classes[1] = nn.functional.normalize(classes[1] + torch.tensor([0.0, 4e-4, 0.0]), dim=0)
    images, labels = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 1]]), torch.tensor([0, 1, 2, 3])
    result = classify(images, classes, labels)
    assert result.ranks.tolist() == [1, 1, 0, 1]
    assert result.predicted.tolist() == [1, 0, 2, 2]
    collapsed = classify(torch.ones(3, 5), torch.full((6, 5), 5**-0.5), torch.tensor([0, 3, 5]))
    assert zero_shot_metrics(collapsed.ranks, [0, 3, 5], 6)["top_5"] == 0.0


def test_nan_is_never_right() -> None:
    images, labels = torch.eye(3), torch.tensor([0, 1, 2])
    images[0, 0] = torch.nan
    classes = torch.eye(3)
    result = classify(images, classes, labels)
    assert (result.ranks == 0).tolist() == [False, True, True] and result.predicted[0] != 0
    classes[1] = torch.nan
    result = classify(torch.eye(3), classes, labels)
    assert (result.ranks == 0).tolist() == [False] * 3
    assert (result.predicted != labels).all()


def test_chance_of_few_classes_and_unequal_classes_by_hand() -> None:
    ranks, labels = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 1, 1])
    metrics = zero_shot_metrics(ranks, labels, 2)
    assert (metrics["top_1"], metrics["mean_per_class"], metrics["chance_top_5"]) == (25.0, 50.0, 100.0)
    assert per_class_accuracy(ranks, labels, 2, k=2).tolist() == [100.0, 100.0]


def test_most_confused_pairs() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    predicted = torch.tensor([1, 1, 2, 0, 0, 0, 2, 0, 1])
    pairs = [
        (pair.true, pair.predicted, pair.images, pair.percent) for pair in most_confused(predicted, labels, 3, count=3)
    ]
    assert pairs == [(1, 0, 2, 100.0), (0, 1, 2, 50.0), (2, 0, 1, pytest.approx(100 / 3))]
    assert len(most_confused(predicted, labels, 3)) == 5
    assert most_confused(labels, labels, 3) == []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: class_features(torch.ones(2, 3), [0, 2], 3), "class 1 has no text"),
        (lambda: class_features(torch.ones(2, 3), [0, 3], 3), "in 0..2"),
        (lambda: class_features(torch.ones(2, 3), [0], 1), "want texts"),
        (lambda: classify(torch.ones(2, 3), torch.ones(2, 4), [0, 1]), "want images"),
        (lambda: classify(torch.ones(2, 3), torch.ones(2, 3), [0]), "want images"),
        (lambda: classify(torch.ones(2, 3), torch.ones(1, 3), [0, 0]), "two or more classes"),
        (lambda: classify(torch.ones(2, 3), torch.ones(2, 3), [0, 2]), "labels must be in"),
        (lambda: zero_shot_metrics(torch.zeros(0, dtype=torch.int64), [], 2), "needs images"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


LONG = "a_rather_long $name of a <class>, with synonyms, "


@pytest.mark.parametrize(("number", "name"), [(2, LONG), (10, "cat"), (MOST_CLASSES, LONG), (MOST_CLASSES + 1, LONG)])
def test_the_picture_is_readable(tmp_path: Path, drawn: list[Figure], number: int, name: str) -> None:
    labels = torch.randint(0, number, (2000,))
    predicted = torch.where(torch.rand(2000) < 0.5, labels, torch.randint(0, number, (2000,)))
    written = confusion_picture(tmp_path / "confusion.png", predicted, labels, [f"{name}{i}" for i in range(number)])
    assert [path.suffix for path in written] == [".png", ".svg"] and "<svg" in written[1].read_text(encoding="utf-8")
    assert_readable(drawn[0])
    assert len(shown_texts(drawn[0])) >= 2 * min(number, 24)


def test_a_perfect_classifier_of_many_classes_has_a_picture_too(tmp_path: Path) -> None:
    labels = torch.arange(50)
    written = confusion_picture(tmp_path / "perfect", labels, labels, [str(label) for label in range(50)])
    assert "None of 50 images" in written[1].read_text(encoding="utf-8") or written[0].stat().st_size > 1000
