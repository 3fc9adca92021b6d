"""`emkum fit-clusters`: k-means on a teacher's cached features, for cluster distillation (objective kd_cluster)."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from emkum.errors import UserError

if TYPE_CHECKING:
    from emkum.teachers.cached import CachedTeacher

# More rows a cluster than this make k-means slower, not better (the limit that faiss has by itself).
ROWS_PER_CLUSTER = 256


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "fit-clusters",
        help="find clusters of a teacher's cached features",
        description="Run k-means (faiss) on the features that `emkum teacher cache` stored, and write the centroids "
        "for --objectives kd_cluster. It works on at most "
        f"{ROWS_PER_CLUSTER} features a cluster, drawn by the seed.",
        epilog="example: emkum fit-clusters data/flickr8k-deit --clusters 1000 --out data/flickr8k-deit.safetensors",
    )
    parser.add_argument("cache", type=Path, metavar="CACHE_DIR", help="folder that `emkum teacher cache` wrote")
    parser.add_argument("--clusters", type=int, default=1000, metavar="K", help="clusters (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write, NAME.safetensors")
    parser.add_argument("--split", default="train", help="split whose features are used (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the rows drawn and of the start (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=20, metavar="N", help="of k-means (default: %(default)s)")
    parser.add_argument(
        "--spherical", action="store_true", help="compare by cosine: features and centroids have length 1"
    )
    parser.set_defaults(run=run)


class Fit(NamedTuple):
    """What k-means found.

    Attributes:
        centroids: (K, D) float32.
        error: mean squared distance of a row to its centroid.
        sizes: (K,) rows of each cluster.
    """

    centroids: np.ndarray
    error: float
    sizes: np.ndarray


def run(args: argparse.Namespace) -> None:
    _check(args)
    import torch

    from emkum.objectives.target_codes import write_centroids
    from emkum.teachers.cached import CachedTeacher

    teacher = CachedTeacher(args.cache)
    features = read_features(teacher, args.split, args.clusters * ROWS_PER_CLUSTER, args.seed)
    if args.clusters > len(features):
        raise UserError(
            f"--clusters {args.clusters:,}: split {args.split!r} of {args.cache} has {len(features):,} features alone"
        )
    fit = fit_centroids(features, args.clusters, args.iterations, args.seed, args.spherical)
    write_centroids(args.out, torch.from_numpy(fit.centroids), teacher.identity)
    print(
        f"wrote {args.out}: {args.clusters:,} centroids of {len(features):,} features of {args.cache} ({args.split}); "
        f"mean squared distance {fit.error:.4g}, {fit.sizes.min():,} to {fit.sizes.max():,} features a cluster; train "
        f"with --kd-cluster-centroids {args.out} --kd-cluster-clusters {args.clusters}"
    )


def _check(args: argparse.Namespace) -> None:
    for name in ("clusters", "iterations"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: want 1 or more")
    if args.out.suffix != ".safetensors":
        raise UserError(f"--out {args.out}: the name must end in .safetensors")
    try:
        import faiss  # noqa: F401
    except ImportError:
        raise UserError("fit-clusters needs faiss: pip install 'emkum[clusters]', or faiss-cpu") from None


def read_features(teacher: "CachedTeacher", split: str, most: int, seed: int) -> np.ndarray:
    """Features of a split in all its views, (n, D) float32; of more than `most` that many, drawn by the seed.

    Raises:
        UserError: the cache has no such split.
    """
    from emkum.teachers.cached import FEATURES, shard_path

    if split not in teacher.splits:
        raise UserError(f"--split {split!r}: {teacher.directory} has {', '.join(teacher.splits)}")
    shards = [shard for shard in teacher.manifest.shards() if shard.split == split]
    ends = np.cumsum([shard.stop - shard.start for shard in shards])
    total = int(ends[-1])
    rows = np.arange(total)
    if total > most:
        rows = np.sort(np.random.default_rng(seed).choice(total, most, replace=False))
    features = np.empty((len(rows), teacher.width), np.float32)
    for shard, end in zip(shards, ends, strict=True):
        first = end - (shard.stop - shard.start)
        begin, stop = np.searchsorted(rows, (first, end))
        stored = np.load(shard_path(teacher.directory, FEATURES, shard), mmap_mode="r")
        features[begin:stop] = stored[rows[begin:stop] - first]
    return features


def fit_centroids(features: np.ndarray, clusters: int, iterations: int, seed: int, spherical: bool) -> Fit:
    """k-means with faiss.

    Args:
        features: (n, D) float32, n at least the number of clusters.
        clusters: K.
        iterations: of Lloyd's algorithm.
        seed: of the rows that it starts with.
        spherical: compare by cosine.
    """
    import faiss

    if spherical:
        features = features.copy()
        faiss.normalize_L2(features)
    means = faiss.Kmeans(
        features.shape[1],
        clusters,
        niter=iterations,
        seed=seed,
        spherical=spherical,
        # Rows are drawn already, and few are no reason for a warning on the standard output.
        max_points_per_centroid=len(features),
        min_points_per_centroid=1,
    )
    means.train(features)
    index = faiss.IndexFlatL2(features.shape[1])
    index.add(means.centroids)
    distances, nearest = index.search(features, 1)
    return Fit(means.centroids, float(distances.mean()), np.bincount(nearest[:, 0], minlength=clusters))
