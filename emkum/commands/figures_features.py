"""`emkum figures map` and `emkum figures clusters`: features of a whole split."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emkum.commands.arguments import assert_at_least
from emkum.commands.figures_inputs import add_student_arguments, draw_samples, open_samples, report_files
from emkum.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from emkum.data.shards import ShardedSamples
    from emkum.evaluation.map_figure import Plane
    from emkum.objectives.target_codes import FittedTable
    from emkum.teachers.base import Teacher

PCA, UMAP = "pca", "umap"
_BATCH = 64


def add_parsers(kinds: Any) -> None:
    plane = kinds.add_parser(
        "map",
        help="images and captions in one map, and the gap between them",
        description="Features of images and of their first captions in two dimensions, some pairs joined, with the "
        "modality gap: the distance of the mean image and the mean caption.",
        epilog="example: emkum figures map --checkpoint runs/flickr8k --data data/flickr8k --out figures/map",
    )
    add_student_arguments(plane, 1000, "images, drawn where there are more")
    plane.add_argument(
        "--method",
        choices=(PCA, UMAP),
        default=PCA,
        help="principal components, or UMAP where umap-learn is installed (default: %(default)s)",
    )
    plane.add_argument("--pairs", type=int, default=8, metavar="N", help="pairs that are joined (default: %(default)s)")
    plane.set_defaults(run=run_map)
    clusters = kinds.add_parser(
        "clusters",
        help="images by their codes, and how much each code is used",
        description="Images of the most used codes of a trained image quantizer, or of the centroids that `emkum "
        "fit-clusters` found, and a histogram of how many images each code has.",
        epilog="example: emkum figures clusters runs/quantizer --data data/flickr8k --out figures/clusters",
    )
    clusters.add_argument("codes", type=Path, metavar="RUN_OR_FILE", help="run of a quantizer, or NAME.safetensors")
    clusters.add_argument("--data", required=True, help="folder made by `emkum prepare`")
    clusters.add_argument("--split", default="valid", help="split whose images are shown (default: %(default)s)")
    clusters.add_argument("--out", required=True, type=Path, metavar="FILE", help="picture to write, NAME or NAME.png")
    clusters.add_argument(
        "--rows", type=int, default=8, metavar="N", help="codes that are shown (default: %(default)s)"
    )
    clusters.add_argument("--columns", type=int, default=8, metavar="N", help="images of each (default: %(default)s)")
    clusters.add_argument("--seed", type=int, default=1, help="that draws the images (default: %(default)s)")
    clusters.add_argument(
        "--limit", type=int, default=0, metavar="N", help="images read, drawn by the seed; 0 = all (default)"
    )
    clusters.add_argument(
        "--teacher",
        default="",
        metavar="SPEC",
        help="teacher whose features have codes, as of training (default: the one that the quantizer's run had)",
    )
    clusters.add_argument(
        "--teacher-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of that teacher, such as weights=FILE or pooling=cls; may be given several times",
    )
    clusters.set_defaults(run=run_clusters)


# ----------------------------------------------------------------------------------------------------------------------
# Map
# ----------------------------------------------------------------------------------------------------------------------


def run_map(args: argparse.Namespace) -> None:
    assert_at_least(args, examples=2, pairs=0)
    reducer = _umap_or_error(args.seed) if args.method == UMAP else None
    import torch

    from emkum.checkpoint import load
    from emkum.data.decoding import decode
    from emkum.evaluation.map_figure import feature_map, modality_gap

    samples = open_samples(args.data, args.split)
    rows = draw_samples(samples, args.examples, args.seed)
    model = load(args.checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    parts = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
    images = torch.cat([model.encode_image([decode(samples[row].image) for row in part]) for part in parts]).numpy()
    texts = model.encode_text([samples[row].captions[0] for row in rows]).numpy()
    plane, name = _plane(images, texts, reducer)
    gap = modality_gap(images, texts)
    joined = draw_pairs(len(rows), args.pairs, args.seed)
    files = feature_map(args.out, plane, gap, joined, name)
    facts = {"checkpoint": str(args.checkpoint), "split": args.split, "seed": args.seed, "images": len(rows)}
    # NaN, of one pair, is no JSON.
    numbers = {key: value if value == value else None for key, value in asdict(gap).items()}
    keys = [samples[rows[place]].key for place in joined]
    report_files(
        files, facts | {"method": args.method, "modality_gap": numbers, "shares": plane.shares, "joined": keys}
    )
    others = "" if numbers["others"] is None else f", of others {gap.others:.3f}"
    print(f"modality gap {gap.distance:.3f}; mean cosine of pairs {gap.pairs:.3f}{others}")


def draw_pairs(total: int, count: int, seed: int) -> "np.ndarray":
    """(count,) rows, drawn by the seed, ascending; all where there are no more."""
    import numpy as np

    return np.sort(np.random.default_rng(seed).permutation(total)[:count])


def _plane(images: "np.ndarray", texts: "np.ndarray", reducer: Any) -> "tuple[Plane, str]":
    """Features in two dimensions, and what the axes are called."""
    import numpy as np

    from emkum.evaluation.map_figure import Plane, principal_plane

    if reducer is None:
        return principal_plane(images, texts), "component"
    points = reducer.fit_transform(np.concatenate([images, texts]))
    return Plane(points[: len(images)], points[len(images) :], None), "UMAP"


def _umap_or_error(seed: int) -> Any:
    try:
        from umap import UMAP as Reducer
    except ImportError:
        raise UserError("--method umap needs umap-learn: pip install 'emkum[umap]'; or choose pca") from None
    # With a seed it takes one thread, and says so.
    return Reducer(n_components=2, metric="cosine", random_state=seed, n_jobs=1)


# ----------------------------------------------------------------------------------------------------------------------
# Clusters
# ----------------------------------------------------------------------------------------------------------------------


def run_clusters(args: argparse.Namespace) -> None:
    assert_at_least(args, rows=1, columns=1, limit=0)
    from emkum.data.decoding import decode
    from emkum.evaluation.clusters_figure import cluster_figure, code_usage, draw_members

    samples = open_samples(args.data, args.split, require_captions=False)
    fitted, teacher = _open_codes(args)
    rows = draw_samples(samples, args.limit or len(samples), args.seed)
    codes = find_codes(fitted, teacher, samples, rows)
    usage = code_usage(codes, fitted.count)
    shown = usage.order[: min(args.rows, usage.used)]
    members = draw_members(codes, shown, args.columns, args.seed)
    chosen = sorted({place for places in members.values() for place in places})
    images = {place: decode(samples[rows[place]].image) for place in chosen}
    files = cluster_figure(args.out, usage, members, images, args.columns)
    keys = {code: [samples[rows[place]].key for place in places] for code, places in members.items()}
    facts = {"codes": str(args.codes), "split": args.split, "seed": args.seed, "images": len(rows), "shown": keys}
    numbers = {"used": usage.used, "perplexity": usage.perplexity, "counts": usage.counts.tolist()}
    report_files(files, facts | numbers)
    print(f"{usage.used} of {fitted.count} codes used by {len(rows):,} images; perplexity {usage.perplexity:.1f}")


def _open_codes(args: argparse.Namespace) -> "tuple[FittedTable, Teacher]":
    """The codes and the teacher whose features have them.

    Raises:
        UserError: either cannot be had, or they do not belong together.
    """
    from emkum.checkpoint import find_checkpoint
    from emkum.models.teacher_builders import assert_reads_images, build_teacher
    from emkum.objectives.target_codes import assert_same_teacher, read_centroids, read_quantizer
    from emkum.options import collect_parts
    from emkum.teachers.base import TeacherConfig
    from emkum.weights import read_checkpoint

    is_centroids = args.codes.suffix == ".safetensors"
    path = args.codes if is_centroids else find_checkpoint(args.codes)
    fitted = read_centroids(path) if is_centroids else read_quantizer(path)
    options = {} if is_centroids else dict(read_checkpoint(path)["cfg"]["task"])
    spec = args.teacher or options.get("teacher") or ""
    if not spec or spec.startswith("cached:"):
        what = "a cache holds what a teacher made of other crops" if spec else f"{path} does not say which"
        raise UserError(f"--teacher: name the teacher whose features the codes are of, such as timm:NAME; {what}")
    given = _teacher_options(args.teacher_option)
    kept = {} if args.teacher else options
    config = collect_parts({"teacher": TeacherConfig}, kept | given)["teacher"]
    teacher = build_teacher(spec, config)
    assert_reads_images(teacher, spec)
    if fitted.width != teacher.width:
        raise UserError(f"{path} is of features of {fitted.width} channels; those of {spec} have {teacher.width}")
    assert_same_teacher(str(path), fitted.teacher, teacher.identity, spec)
    return fitted, teacher


def _teacher_options(words: list[str]) -> dict[str, Any]:
    """Options of training from words without their prefix.

    Raises:
        UserError: no such option.
    """
    from dataclasses import fields

    from emkum.recipe import parse_overrides
    from emkum.teachers.base import TeacherConfig

    options = parse_overrides(words)
    names = [field.name for field in fields(TeacherConfig)]
    if unknown := [name for name in options if name not in names]:
        raise UserError(f"--teacher-option {unknown[0]}: choose from {', '.join(names)}")
    return {f"teacher_{name}": value for name, value in options.items()}


def find_codes(fitted: "FittedTable", teacher: "Teacher", samples: "ShardedSamples", rows: list[int]) -> "np.ndarray":
    """(n,) code of each image of some rows, of centered crops; shows its progress."""
    import torch
    from tqdm import tqdm

    from emkum.data.crops import centered_crops
    from emkum.layers.nearest_code import NearestCentroid, NearestCode
    from emkum.teachers.base import TeacherInput

    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = (NearestCentroid if "centroids" in fitted.tensors else NearestCode)(fitted.count, fitted.width)
    table.fill(**fitted.tensors)
    table.to(device)
    found = []
    with tqdm(total=len(rows), desc="codes", unit="image", disable=None) as progress:
        for crops in centered_crops(samples, teacher.image_size, _BATCH, positions=rows):
            numbers = torch.arange(len(crops), device=device)
            batch = TeacherInput(crops.to(device), numbers, torch.full_like(numbers, -1), "figures")
            found.append(table(teacher(batch).features.to(device)).cpu())
            progress.update(len(crops))
    return torch.cat(found).numpy()
