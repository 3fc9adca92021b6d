"""`emkum teacher`: work with a frozen teacher before training."""

import argparse
from collections.abc import Iterator
from typing import Any

from emkum.errors import UserError


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("teacher", help="prepare a teacher's targets")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    cache = kinds.add_parser(
        "cache",
        help="compute a teacher's targets once",
        description="Store a teacher's global features of all images, for training with teacher=cached:DIR. Without "
        "--views the target is that of the centered crop, whatever crop the student sees; with --views K the first K "
        "random crops are stored, which training replays with the same crop_views, crop_min_scale, crop_flip and seed.",
        epilog="example: emkum teacher cache timm:deit_tiny_patch16_224 --weights model.safetensors "
        "--data data/flickr8k --out data/flickr8k-deit",
    )
    cache.add_argument("teacher", help="timm:NAME or data2vec2:FILE")
    cache.add_argument("--weights", default="hub", help="timm only: a local file, or 'hub' (default)")
    cache.add_argument("--image-size", type=int, default=0, help="side of the teacher's crops in pixels; 0 = its own")
    cache.add_argument("--data", required=True, help="folder made by `emkum prepare`")
    cache.add_argument("--out", required=True, help="folder to make")
    cache.add_argument("--splits", default="", help="separated by commas; empty = all")
    cache.add_argument("--views", type=int, default=0, help="random training crops to store; 0 = the centered one")
    cache.add_argument("--min-scale", type=float, default=0.9, help="smallest part of the area that a crop keeps")
    cache.add_argument("--flip", action="store_true", help="mirror half of the crops")
    cache.add_argument("--seed", type=int, default=1, help="seed of the training run whose crops these are")
    cache.add_argument("--batch-size", type=int, default=64, help="images run at once (default: %(default)s)")
    cache.set_defaults(run=run_cache)


def run_cache(args: argparse.Namespace) -> None:
    from emkum.data.image_text import ImageTextDataset
    from emkum.data.shards import available_splits, open_split
    from emkum.data.transforms import ImageTransform
    from emkum.models.builders import build_teacher
    from emkum.teachers.cached import write_cache

    names = [name for name in args.splits.split(",") if name] or available_splits(args.data)
    if not names:
        raise UserError(f"{args.data} holds no prepared split; make one with `emkum prepare`")
    samples = {name: open_split(args.data, name) for name in names}
    teacher = build_teacher(args.teacher, args.weights, args.image_size)
    if not teacher.image_size:
        raise UserError(f"{args.teacher} does not look at images; give timm:NAME or data2vec2:FILE")
    splits = {}
    for name, split in samples.items():
        views = args.views if name == "train" else 0
        crop = (args.min_scale, args.flip) if views else ()
        dataset = ImageTextDataset(
            split, None, ImageTransform(teacher.image_size, *crop), seed=args.seed, num_views=views, split=name
        )
        shape = (max(views, 1), len(split))
        splits[name] = (split.content_hash(), dataset.describe_crops(), shape, _batches(dataset, shape[0], args))
    write_cache(args.out, teacher, splits)
    print(f"wrote {args.out}: {', '.join(f'{name} {len(split):,}' for name, split in samples.items())} images")


def _batches(dataset: Any, views: int, args: argparse.Namespace) -> Iterator[Any]:
    """Crops of every view and sample, one batch a time."""
    import torch
    from tqdm import tqdm

    from emkum.teachers.base import TeacherInput

    device = "cuda" if torch.cuda.is_available() else "cpu"
    starts = range(0, len(dataset), args.batch_size)
    with tqdm(total=views * len(dataset), desc=f"teacher on {dataset.split}", unit="image") as progress:
        for view in range(views):
            dataset.set_epoch(view + 1)
            for start in starts:
                ids = range(start, min(start + args.batch_size, len(dataset)))
                crops = torch.stack([dataset.crops(i, dataset.samples[i].image)[0] for i in ids])
                yield TeacherInput(
                    crops.to(device), torch.tensor(ids), torch.full((len(ids),), view), split=dataset.split
                )
                progress.update(len(ids))
