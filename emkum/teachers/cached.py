"""Teacher targets computed once, then read from a memory-mapped file: training needs no teacher in memory."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emkum.errors import UserError
from emkum.outputs import TeacherOutput
from emkum.provenance import write_json
from emkum.teachers.base import Teacher, TeacherInput

_MANIFEST = "cache.json"


class CachedTeacher:
    """Global features of every image of some splits, in float16.

    A cache holds either the centered crop of each image (`views` 0), whatever crop the student sees, or the first K
    repeating random crops, which the student must then replay: same seed, scale and flip.

    Args:
        directory: what `write_cache` made.
    """

    image_size = 0

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        try:
            manifest = json.loads((self.directory / _MANIFEST).read_text())
            self.identity: dict[str, Any] = manifest["teacher"]
            self.width: int = manifest["width"]
            self.splits: dict[str, dict[str, Any]] = manifest["splits"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"no teacher cache at {self.directory} ({_MANIFEST} is missing or damaged); make one with "
                "`emkum teacher cache`"
            ) from None
        self._features: dict[str, np.ndarray] = {}

    def open_split(self, split: str, data_hash: str, crops: dict[str, Any]) -> None:
        if split not in self.splits:
            raise UserError(f"teacher cache {self.directory} has no split {split!r}, only {', '.join(self.splits)}")
        cached = self.splits[split]
        if cached["data_hash"] != data_hash:
            raise UserError(f"teacher cache {self.directory} was made of other data than the split {split!r} in use")
        for name, value in cached["crops"].items():
            if cached["crops"]["views"] > 0 and crops.get(name) != value:
                raise UserError(
                    f"teacher cache {self.directory} holds {split!r} crops with {name} = {value}, "
                    f"training uses {crops.get(name)}"
                )
        path = self.directory / f"{split}.npy"
        try:
            self._features[split] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise UserError(f"{path} is missing or damaged; make the teacher cache again") from None

    def __call__(self, batch: TeacherInput) -> TeacherOutput:
        features = self._features[batch.split]
        view = np.maximum(batch.views.cpu().numpy(), 0) % features.shape[0]
        rows = features[view, batch.ids.cpu().numpy()]
        return TeacherOutput(torch.from_numpy(rows.astype(np.float32)).to(batch.images.device))


def write_cache(
    directory: str | Path,
    teacher: Teacher,
    splits: dict[str, tuple[str, dict[str, Any], tuple[int, int], Iterable[TeacherInput]]],
) -> None:
    """Run a teacher over all crops and publish the cache in one step.

    Args:
        directory: must not exist yet.
        teacher: any teacher that looks at pixels.
        splits: name to (content hash of the split, what its crops depend on, (views, samples), batches). `crops` needs
            the key `views`, 0 for the centered crop.
    """
    directory = Path(directory)
    if directory.exists():
        raise UserError(f"{directory} exists already; remove it or choose another --out")
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        manifest: dict[str, Any] = {"teacher": teacher.identity, "width": teacher.width, "splits": {}}
        for split, (data_hash, crops, (views, samples), batches) in splits.items():
            features = np.lib.format.open_memmap(
                temporary / f"{split}.npy", mode="w+", dtype=np.float16, shape=(views, samples, teacher.width)
            )
            for batch in batches:
                features[batch.views.numpy(), batch.ids.numpy()] = teacher(batch).features.cpu().numpy()
            features.flush()
            manifest["splits"][split] = {"data_hash": data_hash, "crops": crops}
        write_json(temporary / _MANIFEST, manifest)
        temporary.replace(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
