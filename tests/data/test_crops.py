"""Centered crops in batches: the transform's own, in the order asked for, without a draw."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from emkum.data.crops import centered_crops
from emkum.data.shards import ShardedSamples, open_split
from emkum.data.transforms import ImageTransform
from emkum.errors import UserError
from tests.small_classes import write_class_folders


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, run_prepare: Callable[..., None]) -> ShardedSamples:
    root = tmp_path_factory.mktemp("classes")
    run_prepare(
        "image-folder",
        "--images",
        write_class_folders(root / "raw", {"train": 1, "valid": 1}, 5),
        "--out",
        root / "data",
    )
    return open_split(root / "data", "train", require_captions=False)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("positions", [None, [4, 1, 2]])
def test_crops_are_the_transforms_own(samples: ShardedSamples, workers: int, positions: list[int] | None) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches = list(centered_crops(samples, 16, 2, workers, positions))
    assert torch.equal(torch.get_rng_state(), before)
    wanted = [ImageTransform(16)(samples[position].image) for position in positions or range(5)]
    assert [len(batch) for batch in batches] == ([2, 2, 1] if positions is None else [2, 1])
    assert batches[0].dtype == torch.uint8 and torch.equal(torch.cat(batches), torch.stack(wanted))


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_is_one_line(samples: ShardedSamples, tmp_path: Path, workers: int) -> None:
    shutil.copytree(samples.directory, tmp_path / "train")
    shard = tmp_path / "train" / samples.manifest.names[0]
    content = bytearray(shard.read_bytes())
    content[600:700] = bytes(100)
    shard.write_bytes(content)
    with pytest.raises(UserError, match="is damaged at sample 0"):
        list(centered_crops(ShardedSamples(tmp_path / "train"), 16, 2, workers))
