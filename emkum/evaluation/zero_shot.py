"""Zero-shot classification: images by the class whose texts are most similar to them.

After Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 3.1.4: a
class is described by many texts (each of its names in each of several templates such as "a photo of a {}."), its
feature is the mean of their unit features, normalized once more, and an image belongs to the class of the largest
cosine.

n images, T texts, C classes, D channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emkum.evaluation.arrays import Array, take
from emkum.evaluation.classification import label_ranks, top_k_accuracy
from emkum.evaluation.pair_scores import cosines
from emkum.evaluation.ranks import TIE
from emkum.layers.precision import at_least_float32, normalized


@dataclass(frozen=True)
class Classified:
    """How the images of a set were classified.

    Attributes:
        ranks: (n,) int64, as `label_ranks` gives them; 0 = right.
        predicted: (n,) int64, the right class where the rank is 0, else the most similar wrong one.
    """

    ranks: Tensor
    predicted: Tensor


@dataclass(frozen=True)
class Confusion:
    """One class taken for another.

    Attributes:
        true, predicted: labels.
        images: how many of class `true` were taken for `predicted`.
        percent: of all images of class `true`.
    """

    true: int
    predicted: int
    images: int
    percent: float


def class_features(text_features: Array, text_class: Array | Sequence[int], num_classes: int) -> Tensor:
    """(C, D) unit vectors: of each class the mean of its texts' unit features, normalized again.

    Args:
        text_features: (T, D), normalized here.
        text_class: (T,) integers in 0..C-1, the class of each text.
        num_classes: C.

    Raises:
        ValueError: shapes that do not fit each other, a class out of range, or one without a text.
    """
    texts, owner = torch.as_tensor(text_features), torch.as_tensor(text_class)
    if texts.ndim != 2 or owner.shape != texts.shape[:1]:
        raise ValueError(f"want texts (T, D) and classes (T,), not {tuple(texts.shape)} and {tuple(owner.shape)}")
    owner = owner.to(texts.device, torch.int64)
    if len(owner) and not 0 <= int(owner.min()) <= int(owner.max()) < num_classes:
        raise ValueError(f"classes of texts must be in 0..{num_classes - 1}")
    counts = torch.bincount(owner, minlength=num_classes)
    if int(counts.min()) == 0:
        raise ValueError(f"class {int(counts.argmin())} has no text")
    units = normalized(texts)
    sums = units.new_zeros(num_classes, units.shape[1]).index_add_(0, owner, units)
    return normalized(sums / counts[:, None])


def classify(image_features: Array, classes: Tensor, labels: Array | Sequence[int], block: int = 1024) -> Classified:
    """Classify images by cosine.

    Ties count against the model, as do classes or images that hold NaN; see `label_ranks`.

    Args:
        image_features: (n, D), normalized here; may be mapped from a file.
        classes: (C, D) unit vectors, as `class_features` gives them.
        labels: (n,) integers in 0..C-1.
        block: images compared at once; bounds the memory and leaves the result alone.

    Raises:
        ValueError: fewer than two classes, shapes that do not fit each other, or a label out of range.
    """
    truth = torch.as_tensor(labels).to(classes.device, torch.int64)
    if len(classes) < 2 or image_features.shape != (len(truth), classes.shape[1]):
        raise ValueError(
            f"want images (n, D), labels (n,) and two or more classes (C, D), not {tuple(image_features.shape)}, "
            f"{tuple(truth.shape)} and {tuple(classes.shape)}"
        )
    ranks, predicted = [truth[:0]], [truth[:0]]
    for start in range(0, len(truth), block):
        rows = slice(start, start + block)
        images = normalized(take(image_features, rows, classes.device, classes.dtype))
        logits = cosines(images, at_least_float32(classes))
        ranks.append(label_ranks(logits, truth[rows], TIE))
        predicted.append(_predictions(logits, truth[rows], ranks[-1]))
    return Classified(torch.cat(ranks), torch.cat(predicted))


def _predictions(logits: Tensor, labels: Tensor, ranks: Tensor) -> Tensor:
    # NaN above all, but below the mask, so that the right class is never the most similar wrong one.
    wrong = logits.nan_to_num(nan=torch.finfo(logits.dtype).min).scatter(1, labels[:, None], -torch.inf)
    return torch.where(ranks == 0, labels, wrong.argmax(dim=1))


def zero_shot_metrics(ranks: Tensor, labels: Array | Sequence[int], num_classes: int) -> dict[str, Any]:
    """Figures of a classified set, in percent.

    Args:
        ranks: (n,) of `Classified`.
        labels: (n,) integers in 0..C-1.
        num_classes: C.

    Returns:
        `top_1`, `top_5`: percentage of images whose right class is among the first k.
        `mean_per_class`: mean of the classes' own top-1, over classes with images.
        `chance_top_1`, `chance_top_5`: what is expected where all orders of the classes are equally likely.
        `num_images` (n), `num_classes` (C).

    Raises:
        ValueError: there are no images.
    """
    figures: dict[str, Any] = top_k_accuracy(ranks)
    own = per_class_accuracy(ranks, labels, num_classes)
    figures["mean_per_class"] = own[~own.isnan()].mean().item()
    figures |= {f"chance_top_{k}": 100.0 * min(k, num_classes) / num_classes for k in (1, 5)}
    return figures | {"num_images": len(ranks), "num_classes": num_classes}


def per_class_accuracy(ranks: Tensor, labels: Array | Sequence[int], num_classes: int, k: int = 1) -> Tensor:
    """(C,) float64, of each class the percentage of its images for which it is among the first k; NaN without images.

    Args:
        ranks, labels, num_classes: as for `zero_shot_metrics`.
        k: how many classes a prediction may name.
    """
    truth = torch.as_tensor(labels).to(ranks.device, torch.int64)
    hits = torch.bincount(truth[ranks < k], minlength=num_classes)
    return 100.0 * hits.double() / torch.bincount(truth, minlength=num_classes)


def confusion_matrix(predicted: Tensor, labels: Array | Sequence[int], num_classes: int) -> Tensor:
    """(C, C) int64, images of class [row] that were taken for class [column].

    Args:
        predicted: (n,) of `Classified`. labels, num_classes: as for `zero_shot_metrics`.
    """
    truth = torch.as_tensor(labels).to(predicted.device, torch.int64)
    pairs = torch.bincount(truth * num_classes + predicted, minlength=num_classes**2)
    return pairs.view(num_classes, num_classes)


def most_confused(
    predicted: Tensor, labels: Array | Sequence[int], num_classes: int, count: int | None = None
) -> list[Confusion]:
    """Pairs of different classes with the most images, falling; of as many images, the greater percentage first.

    Args:
        predicted, labels, num_classes: as for `confusion_matrix`, which is not made for it.
        count: how many pairs at most; None = all that have an image.
    """
    truth = torch.as_tensor(labels).to(predicted.device, torch.int64)
    sizes = torch.bincount(truth, minlength=num_classes).tolist()
    wrong = predicted != truth
    codes, images = torch.unique(truth[wrong] * num_classes + predicted[wrong], return_counts=True)
    pairs = [
        Confusion(*divmod(code, num_classes), number, 100.0 * number / sizes[code // num_classes])
        for code, number in zip(codes.tolist(), images.tolist(), strict=True)
    ]
    return sorted(pairs, key=lambda pair: (-pair.images, -pair.percent, pair.true, pair.predicted))[:count]
