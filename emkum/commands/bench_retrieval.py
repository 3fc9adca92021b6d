"""Time and peak memory of scoring retrieval, ours and others': `emkum bench retrieval`.

Each variant runs in a fresh interpreter, `python -m emkum.commands.bench_retrieval VARIANT IMAGES CAPTIONS DIM`, so
that its peak is its own.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from emkum.commands.bench_index import peak_bytes
from emkum.evaluation.pair_scores import cosine_scores
from emkum.evaluation.ranks import find_ranks

K = 10
# Standard deviation in each channel of what captions differ from their image by: cosines of about 3 standard deviations
# of those of other pairs, so that recalls are neither 0 nor 100.
_NOISE = 1 / 3
_CHUNK = 1000
SEED = 1

Found = dict[str, float]
NOTHING, OURS, TOPK, FAISS = "features alone", "emkum", "topk of all", "faiss flat"


def measure(images: int, captions: int, dim: int) -> list[dict[str, Any]]:
    """Run each variant once, one after the other.

    Returns:
        For each its "name"; "seconds"; "peak_bytes" of resident memory; "threads" of PyTorch; and "recalls" at 10 in
        percent.
    """
    figures = []
    for name in VARIANTS:
        if name == FAISS and find_spec("faiss") is None:
            continue
        command = [sys.executable, "-m", "emkum.commands.bench_retrieval", name, str(images), str(captions), str(dim)]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        figures.append({"name": name, **json.loads(output)})
    return figures


def make_features(images: int, captions: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of images (N, D) and captions (T, D) scattered around them, and the row of each caption's image."""
    generator = torch.Generator().manual_seed(SEED)
    owner = torch.arange(captions) * images // captions
    image, text = torch.empty(images, dim), torch.empty(captions, dim)
    # In place, so that no temporary copy hides what scoring takes.
    for part in image.split(_CHUNK):
        part.normal_(generator=generator)
        part /= part.norm(dim=1, keepdim=True)
    for part, rows in zip(text.split(_CHUNK), owner.split(_CHUNK), strict=True):
        part.normal_(0, _NOISE, generator=generator).add_(image[rows])
        part /= part.norm(dim=1, keepdim=True)
    return image, text, owner


def nothing(image: Tensor, text: Tensor, owner: Tensor) -> Found:
    """What the interpreter, the imports and the features alone take."""
    return {}


def by_blocks(image: Tensor, text: Tensor, owner: Tensor) -> Found:
    """The way of `emkum evaluate retrieval`, which gives the rank of every query."""
    ranks = find_ranks(cosine_scores(image, text), owner, len(image))
    return _recalls(ranks.images < K, ranks.captions < K)


def by_topk(image: Tensor, text: Tensor, owner: Tensor) -> Found:
    """The best 10 both ways of the whole matrix of similarities."""
    similarity = image @ text.T
    return _recalls_of_lists(similarity.topk(K, dim=1).indices, similarity.topk(K, dim=0).indices.T, owner)


def by_faiss(image: Tensor, text: Tensor, owner: Tensor) -> Found:
    """The best 10 both ways of faiss's exact search for the largest inner products."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    lists = []
    for query, candidate in ((image, text), (text, image)):
        index = faiss.IndexFlatIP(candidate.shape[1])
        index.add(candidate.numpy())
        lists.append(torch.from_numpy(index.search(query.numpy(), K)[1]))
    return _recalls_of_lists(*lists, owner)


VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Found]] = {
    NOTHING: nothing,
    OURS: by_blocks,
    TOPK: by_topk,
    FAISS: by_faiss,
}


def _recalls_of_lists(captions: Tensor, images: Tensor, owner: Tensor) -> Found:
    """Of the best captions (N, K) of each image and the best images (T, K) of each caption."""
    rows = torch.arange(len(captions))[:, None]
    return _recalls((owner[captions] == rows).any(1), (images == owner[:, None]).any(1))


def _recalls(images: Tensor, captions: Tensor) -> Found:
    return {"i2t_r10": 100 * images.double().mean().item(), "t2i_r10": 100 * captions.double().mean().item()}


def format_report(
    figures: Sequence[Mapping[str, Any]], machine: Mapping[str, Any], images: int, captions: int, dim: int
) -> str:
    """What was measured, where, and a table of it.

    Args:
        figures: from `measure`.
        machine: "processor", "cores" and "load".
        images, captions, dim: as of `measure`.
    """
    threads = figures[0]["threads"]
    place = f"{machine['processor']}, {machine['cores']} cores, load {machine['load'][0]:.1f}; threads: {threads}"
    heading = f"{images:,} images, {captions:,} captions, {dim} channels"
    lines = [f"on {place}", "", f"{heading:<45} seconds  peak memory  above first  R@10 i2t, t2i"]
    for row in figures:
        recalls = ", ".join(f"{value:.2f}" for value in row["recalls"].values()) or "-"
        peak, above = row["peak_bytes"] / 1e6, (row["peak_bytes"] - figures[0]["peak_bytes"]) / 1e6
        lines.append(f"{row['name']:<45} {row['seconds']:>7.2f}  {peak:>8,.0f} MB  {above:>8,.0f} MB  {recalls}")
    return "\n".join(lines)


if __name__ == "__main__":
    variant, *sizes = sys.argv[1:]
    features = make_features(*map(int, sizes))
    if variant == FAISS:
        import faiss  # noqa: F401

    begin = time.perf_counter()
    recalls = VARIANTS[variant](*features)
    seconds = time.perf_counter() - begin
    found = {"seconds": seconds, "peak_bytes": peak_bytes(), "threads": torch.get_num_threads(), "recalls": recalls}
    print(json.dumps(found))
