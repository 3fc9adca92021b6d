"""The processes of `emkum teacher cache`: crops in, shards of targets out."""

import argparse
import multiprocessing
import multiprocessing.connection
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from emkum.commands.teacher_options import build_from
from emkum.data.decoding import BadImage
from emkum.data.image_text import ImageTextDataset
from emkum.data.mixture import open_mixture
from emkum.data.shards import available_splits
from emkum.data.transforms import ImageTransform, crop_rows, stack_crops
from emkum.data.worker_memory import hand_over
from emkum.errors import UserError
from emkum.teachers.base import Teacher, TeacherInput
from emkum.teachers.cached import CacheManifest, Shard, written_shard


@dataclass(frozen=True)
class Job:
    """What all processes need to know.

    Attributes:
        args: the command's options.
        manifest: of the cache.
        image_size: side of the teacher's crops in pixels.
        workers: decoding processes of each computing one.
        threads: of each computing process on a CPU.
    """

    args: argparse.Namespace
    manifest: CacheManifest
    image_size: int
    workers: int
    threads: int


def device_of(process: int) -> torch.device:
    """Where a process computes: on a GPU where there is one."""
    gpus = torch.cuda.device_count()
    return torch.device("cuda", process % gpus) if gpus else torch.device("cpu")


def open_datasets(args: argparse.Namespace, image_size: int) -> dict[str, ImageTextDataset]:
    """The crops that training will see, by the name of the split.

    Args:
        args: the command's options.
        image_size: side of the teacher's crops in pixels.

    Raises:
        UserError: there is no such folder or split.
    """
    folders = [folder for folder in args.data.split(os.pathsep) if folder] or ["(no folder)"]
    names = [name for name in args.splits.split(",") if name] or available_splits(folders[0])
    if not names:
        raise UserError(f"{folders[0]} holds no prepared split; make one with `emkum prepare`")
    datasets = {}
    for name in names:
        # As training does: on all folders, with random crops; validated on the first, with centered ones.
        training = name == "train"
        samples = open_mixture(folders if training else folders[:1], name, require_captions=False)
        views = args.views if training else 0
        transform = ImageTransform(image_size, *((args.min_scale, args.flip) if views > 0 else ()))
        datasets[name] = ImageTextDataset(samples, None, transform, seed=args.seed, num_views=views, split=name)
    return datasets


class CropBatches(Dataset):
    """Batches, one an item: the crops of some shards in their order. No batch crosses shards.

    Args:
        datasets: of each split.
        shards: what to crop.
        batch_size: images.
    """

    def __init__(self, datasets: Mapping[str, ImageTextDataset], shards: Sequence[Shard], batch_size: int) -> None:
        self.datasets = datasets
        self.shards = shards
        self.batch_size = batch_size
        self._first = [0, *accumulate(len(self.starts(shard)) for shard in shards)]

    def starts(self, shard: Shard) -> range:
        """The first sample of each of a shard's batches."""
        return range(shard.start, shard.stop, self.batch_size)

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, number: int) -> Tensor | UserError:
        """(B, 3, S, S) uint8. What is wrong with the data is returned, not raised: a data loader's process would end
        without handing it on."""
        position = bisect_right(self._first, number) - 1
        shard = self.shards[position]
        start = self.starts(shard)[number - self._first[position]]
        try:
            return self._crops(shard, range(start, min(start + self.batch_size, shard.stop)))
        except UserError as error:
            return error

    def _crops(self, shard: Shard, ids: range) -> Tensor:
        dataset = self.datasets[shard.split]
        dataset.set_epoch(shard.view + 1)
        crops = []
        for number, row in zip(ids, crop_rows(len(ids), dataset.transform.size), strict=True):
            sample = dataset.samples[number]
            try:
                crops.append(dataset.crops(number, sample.image, row)[0])
            except BadImage as error:
                raise UserError(
                    f"sample {number} ({sample.key}) of split {shard.split!r} has no usable image: {error}"
                ) from None
        return stack_crops(crops)


def compute(
    job: Job, shards: Sequence[Shard], teacher: Teacher, device: torch.device, report: Callable[[int], Any]
) -> None:
    """Write shards one after the other.

    Args:
        job: what to do.
        shards: which ones.
        teacher: a live one.
        device: where it runs.
        report: called with the number of images of each batch that is done.

    Raises:
        UserError: a sample is damaged, a target does not fit, or a file cannot be written.
    """
    crops = CropBatches(open_datasets(job.args, job.image_size), shards, job.args.batch_size)
    loaded = iter(DataLoader(crops, batch_size=None, collate_fn=hand_over, num_workers=job.workers))
    for shard in shards:
        with written_shard(job.args.out, job.manifest, shard) as write:
            for start in crops.starts(shard):
                images = next(loaded)
                if isinstance(images, UserError):
                    raise images
                ids = torch.arange(start, start + len(images))
                batch = TeacherInput(images.to(device), ids, torch.full_like(ids, shard.view), shard.split)
                write(teacher(batch), batch)
                report(len(images))


def run_processes(job: Job, shards: Sequence[Shard], processes: int, report: Callable[[int], Any]) -> None:
    """Compute shards side by side, process i the shards i, i + N, ...; end all when one fails.

    Args:
        job: what to do.
        shards: which ones.
        processes: how many, N.
        report: called with the number of images of each batch that is done.

    Raises:
        UserError: what a process met with, or that one was killed or failed otherwise.
    """
    # Fresh processes: forks could not use the GPU.
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, Any] = {}
    try:
        for number in range(processes):
            receiver, sender = context.Pipe(duplex=False)
            running[receiver] = context.Process(target=_work, args=(job, shards[number::processes], number, sender))
            running[receiver].start()
            # The process has its own end: when that is gone, there is nothing more to receive.
            sender.close()
        open_ends = set(running)
        while open_ends:
            for receiver in multiprocessing.connection.wait(open_ends):
                try:
                    message = receiver.recv()
                except EOFError:
                    open_ends.remove(receiver)
                    _assert_ended_well(running[receiver])
                    continue
                if isinstance(message, UserError):
                    raise message
                report(message)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


def _assert_ended_well(process: Any) -> None:
    process.join()
    if process.exitcode < 0:
        raise UserError(
            "a computing process was killed, perhaps for lack of memory: give the same command again, with fewer "
            "--processes or a smaller --batch-size; it goes on from there"
        )
    if process.exitcode > 0:
        raise UserError("a computing process failed; what it met with stands above")


def _work(job: Job, shards: Sequence[Shard], number: int, sender: Connection) -> None:
    """One computing process: sends numbers of images that are done, or the one mistake that ends it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    device = device_of(number)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(job.threads)
    try:
        compute(job, shards, build_from(job.args), device, sender.send)
    except UserError as error:
        sender.send(error)


def _end_with_parent() -> None:
    """Without this, processes of a killed run would go on computing beside those of the next one."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
