"""Image-text retrieval over a whole evaluation set: recall, its chance level, and nearest neighbors.

N images, T captions, D channels; `caption_image` holds for each caption the row of its image.

Recall@k, after Karpathy & Fei-Fei (2015), "Deep Visual-Semantic Alignments for Generating Image Descriptions",
section 4.1: the percentage of queries for which something right stands among the first k candidates of the whole
set. Image to text, the best ranked of the image's own captions (five in Flickr and COCO) counts; text to image, the
caption's one image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Cosines of equal pairs differ by some units of the last place, depending on where in a matrix product they stand.
# What is closer than this is a tie, so that a collapsed model scores 0 and blocks of any size give one result.
TIE = 1e-6

Array = Tensor | np.ndarray


@dataclass
class Nearest:
    """Candidates by falling similarity.

    Attributes:
        image_to_text: (N, k) int64, rows of captions for each image.
        text_to_image: (T, k) int64, rows of images for each caption.
    """

    image_to_text: Tensor
    text_to_image: Tensor


def recall_metrics(
    image_features: Array,
    text_features: Array,
    caption_image: Array | Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
    block: int = 1024,
) -> dict[str, float]:
    """Recall@k both ways over one evaluation set.

    Ties count against the model: the rank of the right candidate is the number of wrong ones that are at least as
    similar. A query or a right candidate that holds NaN is a miss, and a wrong candidate that holds NaN is one more
    ahead of the right one. Images without a caption stand among the candidates of
    text-to-image retrieval but are no queries of image-to-text retrieval.

    Args:
        image_features: (N, D), normalized here.
        text_features: (T, D), normalized here.
        caption_image: (T,) integers in 0..N-1, the row of each caption's image.
        ks: how many candidates a query may look at.
        block: queries compared at once; bounds the memory and leaves the result alone.

    Returns:
        `i2t_r{k}`, `t2i_r{k}` for each k and `mean_recall`, their plain mean, in percent; `num_images` (N),
        `num_captions` (T).

    Raises:
        ValueError: nothing to evaluate, or shapes that do not fit one another.
    """
    image, text, owner = _prepare(image_features, text_features, caption_image)
    rows = torch.arange(len(image), device=image.device)
    has_caption = torch.zeros(len(image), dtype=torch.bool, device=image.device)
    has_caption[owner] = True
    image_ranks = _ranks(image[has_caption], text, rows[has_caption], owner, block)
    text_ranks = _ranks(text, image, owner, rows, block)
    recalls = {f"i2t_r{k}": _percent_below(image_ranks, k) for k in ks}
    recalls |= {f"t2i_r{k}": _percent_below(text_ranks, k) for k in ks}
    return _with_summary(recalls, len(image), len(text))


def chance_recall(
    num_images: int, caption_image: Array | Sequence[int], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """What `recall_metrics` is expected to give, exactly, where all rankings are equally likely.

    Text to image k / N. Image to text, for an image with c of the T captions, 1 - C(T - c, k) / C(T, k): all but the
    rankings whose first k hold captions of other images alone.

    Args:
        num_images: N.
        caption_image: (T,) integers in 0..N-1, the row of each caption's image.
        ks: as for `recall_metrics`.

    Returns:
        The keys of `recall_metrics`.

    Raises:
        ValueError: nothing to evaluate, or a row out of range.
    """
    owner = _as_owner(caption_image, num_images)
    total = len(owner)
    own_counts, images_with = torch.unique(torch.bincount(owner, minlength=num_images), return_counts=True)
    groups = [(c, n) for c, n in zip(own_counts.tolist(), images_with.tolist(), strict=True) if c > 0]
    queries = sum(n for _, n in groups)
    recalls = {}
    for k in ks:
        seen = min(k, total)
        missed = sum(n * (comb(total - c, seen) / comb(total, seen)) for c, n in groups) / queries
        recalls[f"i2t_r{k}"] = 100.0 * (1.0 - missed)
    recalls |= {f"t2i_r{k}": 100.0 * min(k, num_images) / num_images for k in ks}
    return _with_summary(recalls, num_images, total)


def nearest(image_features: Array, text_features: Array, k: int = 5, block: int = 1024) -> Nearest:
    """The k most similar candidates of every image and every caption, for pictures and error analysis.

    Args:
        image_features: (N, D), normalized here.
        text_features: (T, D), normalized here.
        k: length of the lists; cut to the number of candidates.
        block: queries compared at once.

    Returns:
        Lists by falling similarity; candidates whose features are not finite come last.

    Raises:
        ValueError: nothing to compare, or shapes that do not fit one another.
    """
    image, text, _ = _prepare(image_features, text_features, None)
    return Nearest(_top(image, text, k, block), _top(text, image, k, block))


def _prepare(
    image_features: Array, text_features: Array, caption_image: Array | Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked inputs on the images' device: (N, D) and (T, D) of unit length in float32, and (T,) int64."""
    image, text = torch.as_tensor(image_features).detach(), torch.as_tensor(text_features).detach()
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(f"features must be (N, D) and (T, D), not {tuple(image.shape)} and {tuple(text.shape)}")
    if len(image) == 0 or len(text) == 0:
        raise ValueError(f"retrieval needs images and captions; got {len(image)} and {len(text)}")
    text = text.to(image.device)
    owner = torch.zeros(len(text), dtype=torch.int64) if caption_image is None else _as_owner(caption_image, len(image))
    if len(owner) != len(text):
        raise ValueError(f"{len(text)} captions but {len(owner)} entries in caption_image")
    return _normalized(image), _normalized(text), owner.to(image.device)


def _normalized(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=1)


def _as_owner(caption_image: Array | Sequence[int], num_images: int) -> Tensor:
    owner = torch.as_tensor(caption_image).cpu()
    if owner.ndim != 1 or len(owner) == 0:
        raise ValueError(f"caption_image must be (T,) with T > 0, not {tuple(owner.shape)}")
    if owner.is_floating_point() or owner.dtype == torch.bool:
        raise ValueError(f"caption_image must hold integers, not {owner.dtype}")
    owner = owner.to(torch.int64)
    low, high = int(owner.min()), int(owner.max())
    if low < 0 or high >= num_images:
        raise ValueError(f"caption_image must lie in 0..{num_images - 1}; it spans {low}..{high}")
    return owner


def _similarity(query: Tensor, candidate: Tensor) -> Tensor:
    """(Q, C) cosines in float32, also where validation runs under autocast."""
    with torch.autocast(query.device.type, enabled=False):
        return query @ candidate.T


def _ranks(query: Tensor, candidate: Tensor, query_image: Tensor, candidate_image: Tensor, block: int) -> Tensor:
    """(Q,) number of wrong candidates at least as similar as the best right one; C where none is comparable.

    A candidate is right where it belongs to the query's image.
    """
    ranks = []
    for rows, image in zip(query.split(block), query_image.split(block), strict=True):
        similarity = _similarity(rows, candidate)
        right = image[:, None] == candidate_image[None, :]
        best = similarity.masked_fill(~right | similarity.isnan(), -torch.inf).amax(dim=1)
        # Written as "not clearly below", so that NaN, which compares as False, counts against the model.
        wrong = ~(similarity < best[:, None] - TIE) & ~right
        ranks.append(wrong.sum(dim=1).masked_fill(best.isinf(), torch.iinfo(torch.int64).max))
    return torch.cat(ranks)


def _percent_below(ranks: Tensor, k: int) -> float:
    return 100.0 * (ranks < k).double().mean().item()


def _top(query: Tensor, candidate: Tensor, k: int, block: int) -> Tensor:
    k = min(k, len(candidate))
    lists = []
    for rows in query.split(block):
        similarity = torch.nan_to_num(_similarity(rows, candidate), nan=-torch.inf)
        lists.append(similarity.topk(k, dim=1).indices)
    return torch.cat(lists)


def _with_summary(recalls: dict[str, float], num_images: int, num_captions: int) -> dict[str, Any]:
    mean = sum(recalls.values()) / len(recalls)
    return recalls | {"mean_recall": mean, "num_images": num_images, "num_captions": num_captions}
