"""Samples a second of the loader, of its stages, and of others that do the same work: `emkum bench data`."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from emkum.commands.data import spread
from emkum.data.decoding import decode
from emkum.data.foreign_tars import IMAGE_SUFFIXES
from emkum.data.image_text import CaptionConfig, ImageTextDataset, ImageTextItem, collate
from emkum.data.shards import ShardedSamples, open_split
from emkum.data.tokenizers import Tokenizer, encode, load_tokenizer
from emkum.data.transforms import CropConfig, ImageTransform, to_tensor
from emkum.data.worker_memory import hand_over
from emkum.errors import UserError

BARE_LOOP = "bare loop: decode, transform"
SEED = 1
# Samples that `webdataset` shuffles within, and decoded images that are held for the stage `transform`.
SHUFFLE_BUFFER = 1000
MOST_DECODED = 256


@dataclass(frozen=True)
class Work:
    """What is done to every sample, by whatever reads it.

    Attributes:
        samples: the split.
        held: encoded images in memory.
        captions: those of each held image.
        tokenizer: caption to ids.
        transform: random crop and resize.
        batch_size: images.
    """

    samples: ShardedSamples
    held: Sequence[bytes]
    captions: Sequence[tuple[str, ...]]
    tokenizer: Tokenizer
    transform: ImageTransform
    batch_size: int

    def item(self, number: int, image: Tensor, captions: Sequence[str], rng: np.random.Generator) -> ImageTextItem:
        """What the loader makes of a cropped image and its captions: one of them is drawn."""
        ids = encode(self.tokenizer, captions[int(rng.integers(len(captions)))], CaptionConfig.max_tokens)
        return ImageTextItem(number, "train", number, -1, image, [ids])

    def collate(self, items: list[ImageTextItem]) -> dict[str, Any]:
        """As training does."""
        return hand_over(collate(items, num_groups=CaptionConfig.groups, pad=self.tokenizer.special.pad))


def open_work(data: Path, split: str, tokenizer: str, image_size: int, batch_size: int, images: int) -> Work:
    """Open a split and hold `images` evenly spread images of it in memory.

    Args:
        data: folder that `emkum prepare` made.
        split: name.
        tokenizer: file or folder; empty = the data's own.
        image_size: side of the crops in pixels.
        batch_size: images.
        images: how many to hold.
    """
    samples = open_split(data, split)
    chosen = [samples[position] for position in spread(len(samples), images)]
    return Work(
        samples,
        [sample.image for sample in chosen],
        [sample.captions for sample in chosen],
        load_tokenizer(tokenizer or data),
        ImageTransform(image_size, CropConfig.min_scale),
        batch_size,
    )


# What is measured: a function that starts it and gives, step by step, how many samples are done.
Run = Callable[[], Iterator[int]]


@contextmanager
def runs(work: Work, workers: Sequence[int], against: Sequence[str]) -> Iterator[dict[str, Run]]:
    """Everything that is to be measured, by name; files that it needs are there within the block.

    Args:
        work: what is done.
        workers: numbers of processes.
        against: "webdataset", "folder".

    Raises:
        UserError: `webdataset` is not installed, or there are fewer shards than workers for it.
    """
    if "webdataset" in against:
        _assert_webdataset(len(work.samples.manifest.names), max(workers))
    with tempfile.TemporaryDirectory(prefix="emkum-bench-") as folder, _one_thread():
        started = _stages(work)
        files = _extract(work, Path(folder)) if "folder" in against else []
        for count in workers:
            suffix = f"{count} worker{'' if count == 1 else 's'}"
            started[f"loader, {suffix}"] = partial(_loader, work, count)
            if "webdataset" in against:
                started[f"webdataset, {suffix}"] = partial(_webdataset, work, count)
            if "folder" in against:
                started[f"folder, {suffix}"] = partial(_batches, work, FolderImages(files, work), count)
        yield started


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch uses one thread, as it does in worker processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(started: Mapping[str, Run], seconds: float, rounds: int) -> dict[str, list[float]]:
    """Samples a second of each run in every round. A round goes through all runs, so that what slows the machine for a
    while slows all of them.

    Args:
        started: the runs by name; each begins anew every time, and its first step is not measured: it holds the start.
        seconds: least time of a measurement.
        rounds: how often.
    """
    rates: dict[str, list[float]] = {name: [] for name in started}
    for _ in range(rounds):
        for name, run in started.items():
            steps = run()
            next(steps)
            count, begin = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - begin) < seconds:
                count += next(steps)
            rates[name].append(count / elapsed)
            steps.close()
    return rates


def format_rates(rates: Mapping[str, Sequence[float]]) -> str:
    """A table of medians, and of the medians of the ratios to the bare loop of the same round."""
    width = max(map(len, rates))
    lines = [f"{'':<{width}}  samples/s  of the bare loop"]
    for name, values in rates.items():
        ratio = median(value / bare for value, bare in zip(values, rates[BARE_LOOP], strict=True))
        lines.append(f"{name:<{width}}  {median(values):>9,.0f}  {100 * ratio:>14,.0f} %")
    return "\n".join(lines)


def _stages(work: Work) -> dict[str, Run]:
    """The parts of the loader's work, one by one in this process, and the bare loop."""
    rng = np.random.default_rng(SEED)
    order = rng.permutation(len(work.samples)).tolist()
    decoded = [decode(data) for data in work.held[:MOST_DECODED]]
    sizes = (work.transform.size,)

    def stage(step: Callable[[Any], Any], inputs: Sequence[Any]) -> Iterator[int]:
        for value in cycle(inputs):
            step(value)
            yield 1

    return {
        "read": partial(stage, work.samples.__getitem__, order),
        "decode": partial(stage, decode, work.held),
        "transform": partial(stage, lambda image: to_tensor(work.transform.crop(image, sizes, rng)[0]), decoded),
        BARE_LOOP: partial(stage, lambda data: work.transform(data, rng), work.held),
    }


class EndlessBatches:
    """Batches of sample numbers, (B,) int64, in an order that is drawn anew whenever all have been visited."""

    def __init__(self, length: int, batch_size: int) -> None:
        self.length = length
        self.batch_size = min(batch_size, length)

    def __iter__(self) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(SEED)
        while True:
            order = rng.permutation(self.length)
            for start in range(0, self.length - self.batch_size + 1, self.batch_size):
                yield order[start : start + self.batch_size]


def _batches(work: Work, dataset: torch.utils.data.Dataset, workers: int) -> Iterator[int]:
    batches = EndlessBatches(len(dataset), work.batch_size)
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, collate_fn=work.collate, pin_memory=False
    )
    for batch in loader:
        yield batch["nsentences"]


def _loader(work: Work, workers: int) -> Iterator[int]:
    """The loader that training uses."""
    return _batches(work, ImageTextDataset(work.samples, work.tokenizer, work.transform, seed=SEED), workers)


class FolderImages(torch.utils.data.Dataset):
    """Image files that are opened one by one, as torchvision's ImageFolder does, with captions that are in memory."""

    def __init__(self, files: Sequence[Path], work: Work) -> None:
        self.files = files
        self.work = work
        self.rng = np.random.default_rng(SEED)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> ImageTextItem:
        transform = self.work.transform
        with open(self.files[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        crop = to_tensor(transform.crop(image, (transform.size,), self.rng)[0])
        return self.work.item(int(index), crop, self.work.captions[index], self.rng)


def _extract(work: Work, folder: Path) -> list[Path]:
    """The held images as files."""
    files = [folder / f"{number:08d}.jpg" for number in range(len(work.held))]
    for file, data in zip(files, work.held, strict=True):
        file.write_bytes(data)
    return files


class FromWebDataset:
    """What the loader makes of a sample as `webdataset` gives it: a dict of its members' bytes by suffix."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.rng = np.random.default_rng(SEED)

    def __call__(self, members: Mapping[str, Any]) -> ImageTextItem:
        image = next(members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members)
        described = json.loads(members["json"]) if "json" in members else {}
        captions = described.get("captions") or [members["txt"].decode() if "txt" in members else described["caption"]]
        return self.work.item(0, self.work.transform(image, self.rng), captions, self.rng)


def _assert_webdataset(shards: int, workers: int) -> None:
    try:
        import webdataset  # noqa: F401
    except ImportError:
        raise UserError("--against webdataset needs that package: pip install webdataset") from None
    if workers > shards:
        raise UserError(f"--against webdataset: it gives each of {workers} workers its own shards, but has {shards}")


def _webdataset(work: Work, workers: int) -> Iterator[int]:
    import webdataset

    manifest = work.samples.manifest
    shards = [str(work.samples.directory / manifest.folder / name) for name in manifest.names]
    pipeline = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=SEED).shuffle(SHUFFLE_BUFFER)
    pipeline = pipeline.map(FromWebDataset(work)).batched(work.batch_size, collation_fn=work.collate, partial=False)
    for batch in webdataset.WebLoader(pipeline.repeat(), batch_size=None, num_workers=workers):
        yield batch["nsentences"]
