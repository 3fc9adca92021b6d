"""Classification by the nearest neighbors in a set of labeled features.

The protocol of DINO (Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", section 4.1),
which is that of Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section
3.4: the k rows of the memory with the largest cosine s vote for their classes with weight exp(s / temperature).

Q queries, M rows of the memory, D channels, C classes. Results depend neither on the sizes of blocks nor on the order
in which a device adds: cosines and votes are rounded to integers before they are compared and summed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emkum.evaluation.arrays import Array, take
from emkum.evaluation.classification import label_ranks, top_k_accuracy

# Of cosines; those that are closer are a tie. Far more than float64 arithmetic errs by, so that rows that are equal
# tie wherever they stand in a matrix product.
STEP = 2.0**-30
# Of votes, whose largest is 1; the sum of two million of them fits an integer of 64 bits.
_VOTE_STEP = 2.0**-40
# A key holds a rounded cosine in its upper and the row in its lower half.
_ROW_BITS = 32
_LAST_ROW = 2**_ROW_BITS - 1

QUERY_BLOCK = 512
MEMORY_BLOCK = 8192


@dataclass(frozen=True)
class Neighbors:
    """The rows of the memory that are nearest to each query, nearest first.

    Attributes:
        cosine: (Q, k) float64, rounded to STEP.
        row: (Q, k) int64.
    """

    cosine: Tensor
    row: Tensor


def nearest_neighbors(queries: Tensor, memory: Array, count: int, block: int = MEMORY_BLOCK) -> Neighbors:
    """The nearest rows by cosine; of rows that tie, those with lower numbers.

    Args:
        queries: (Q, D) finite, normalized here in float64.
        memory: (M, D) finite, normalized likewise; read block by block.
        count: k.
        block: rows of the memory that are compared at once; bounds the memory in use and leaves the result alone.

    Raises:
        ValueError: the memory has fewer than `count` rows.
    """
    if not 0 < count <= len(memory):
        raise ValueError(f"{count} neighbors out of {len(memory)} rows")
    queries = F.normalize(queries.double(), dim=1)
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(memory), block):
        rows = take(memory, slice(start, start + block), queries.device, torch.float64)
        cosine = queries @ F.normalize(rows, dim=1).T
        numbers = torch.arange(start, start + len(rows), device=queries.device)
        # No two keys are equal: which of them are largest is never left to chance.
        keys = (cosine / STEP).round().long() * 2**_ROW_BITS + (_LAST_ROW - numbers)
        best = torch.cat([best, keys], dim=1)
        best = best.topk(min(count, best.shape[1]), dim=1).values
    return Neighbors((best >> _ROW_BITS).double() * STEP, _LAST_ROW - (best & _LAST_ROW))


def class_votes(neighbors: Neighbors, labels: Tensor, k: int, temperature: float, num_classes: int) -> Tensor:
    """(Q, C) int64, what the k nearest neighbors say of each class, on a scale on which the nearest one's vote is 2^40.

    Args:
        neighbors: at least k.
        labels: (M,) int64 of the memory's rows.
        k: how many vote.
        temperature: of the weights, exp(cosine / temperature).
        num_classes: C.
    """
    cosine = neighbors.cosine[:, :k]
    # Less the largest: the ratios are the same, and low temperatures do not overflow.
    weights = ((cosine - cosine[:, :1]) / temperature).exp()
    votes = torch.zeros(len(cosine), num_classes, dtype=torch.int64, device=cosine.device)
    return votes.scatter_add_(1, labels[neighbors.row[:, :k]], (weights / _VOTE_STEP).round().long())


def knn_ranks(
    memory: Array,
    memory_labels: Array,
    queries: Array,
    query_labels: Array,
    num_classes: int,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
    query_block: int = QUERY_BLOCK,
    memory_block: int = MEMORY_BLOCK,
    report: Callable[[int], Any] = lambda count: None,
) -> dict[int, Tensor]:
    """For each k and query how many wrong classes have at least as many votes as the right one, (Q,) int64.

    Args:
        memory: (M, D) finite features. memory_labels: (M,) integers in 0..C-1.
        queries: (Q, D). query_labels: (Q,).
        num_classes: C.
        ks: how many neighbors vote.
        temperature: of their weights.
        device: where to compute.
        query_block, memory_block: rows that are compared at once.
        report: called with the number of queries of each block that is done.

    Raises:
        ValueError: nothing to evaluate, fewer rows than neighbors, no positive temperature, or a label out of range.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: want more than 0")
    if len(memory_labels) != len(memory) or len(query_labels) != len(queries):
        raise ValueError("want a label for each row")
    known = take(memory_labels, slice(None), device, torch.int64)
    if len(queries) == 0:
        raise ValueError("accuracy needs queries")
    if len(known) == 0 or not 0 <= int(known.min()) <= int(known.max()) < num_classes:
        raise ValueError(f"labels must be in 0..{num_classes - 1}")
    ranks: dict[int, list[Tensor]] = {k: [] for k in ks}
    for start in range(0, len(queries), query_block):
        rows = slice(start, start + query_block)
        found = nearest_neighbors(take(queries, rows, device, torch.float64), memory, max(ks), memory_block)
        right = take(query_labels, rows, device, torch.int64)
        for k in ks:
            votes = class_votes(found, known, k, temperature, num_classes)
            ranks[k].append(label_ranks(votes, right).cpu())
        report(len(right))
    return {k: torch.cat(ranks[k]) for k in ks}


def knn_metrics(*arguments: Any, **options: Any) -> dict[str, float]:
    """Accuracy of the vote over an evaluation set. Classes that tie with the right one count against the model.

    Args:
        arguments, options: of `knn_ranks`.

    Returns:
        `k{k}_top_1` and `k{k}_top_5` for each k, in percent.
    """
    accuracy = {k: top_k_accuracy(ranks) for k, ranks in knn_ranks(*arguments, **options).items()}
    return {f"k{k}_{name}": value for k, figures in accuracy.items() for name, value in figures.items()}
