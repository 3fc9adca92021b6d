"""A run that is killed in mid-epoch goes on with the very samples, crops, captions and masks of one that was not."""

import hashlib
import json
import multiprocessing
import os
import signal
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from emkum.data.augment import AugmentConfig
from emkum.data.masking import BlockMasking, TextMaskingConfig
from emkum.data.order import OrderConfig
from emkum.data.transforms import CropConfig
from emkum.files import replaced_file

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

EPOCHS, BATCH = 3, 4
# 32 training images make 8 batches an epoch: in mid-epoch 2 for one device and for two.
KILLED_AFTER = {1: 11, 2: 5}


class PiecesWithMask:
    """The set's SentencePiece model with one more id, the mask."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = type(tokenizer.special)(**{**vars(tokenizer.special), "mask": tokenizer.vocab_size})
        self.vocab_size = tokenizer.vocab_size + 1
        self.word_starts = tokenizer.word_starts
        self.pieces = tokenizer.pieces


def make_task(data: str, order: OrderConfig) -> Any:
    """The real task with everything random switched on."""
    from fairseq.utils import import_user_module

    import_user_module(Namespace(user_dir="user_dir"))
    from fairseq.tasks import TASK_REGISTRY

    from user_dir.tasks.image_text import ImageTextConfig

    cfg = OmegaConf.structured(ImageTextConfig(data=data, seed=5, save_dir=os.devnull))
    task = TASK_REGISTRY["image_text"](cfg)
    task.record_run = lambda *_, **__: None
    task.image_size, task.order = 24, order
    task.crops = CropConfig(min_scale=0.4, flip=True)
    task.augment = AugmentConfig(color_jitter=0.4, rand_augment="rand-m9-mstd0.5-inc1", erasing_prob=0.25)
    task.captions.per_image = 2
    # The tokenizer is copied beside checkpoints, and there are none here.
    import user_dir.tasks.image_text as module

    module.copy_tokenizer = lambda *_: None
    task.load_dataset("train")
    dataset = task.datasets["train"].dataset
    dataset.tokenizer = PiecesWithMask(dataset.tokenizer)
    dataset.text_masking = TextMaskingConfig(prob=0.4, whole_word=True)
    dataset.patch_masking = BlockMasking((14, 14), 75)
    return task


def digest(*tensors: Any) -> str:
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(np.ascontiguousarray(tensor).tobytes())
    return content.hexdigest()[:16]


def describe(batch: dict[str, Any]) -> dict[str, Any]:
    net = batch["net_input"]
    return {
        "ids": batch["id"].tolist(),
        "crops": digest(net["image"]),
        "captions": digest(net["text"], net["caption_image"]),
        "masks": digest(batch["masked_text"], batch["masked_text_targets"], batch["patch_mask"]),
    }


def read(data: str, out: Path, order: OrderConfig, workers: int, device: int, devices: int, stop_after: int) -> None:
    """Read batches as fairseq's trainer does, a line each; go on from the state beside, and die after so many."""
    torch.set_num_threads(1)
    task, state = make_task(data, order), out.with_suffix(".state")
    saved = json.loads(state.read_text()) if state.is_file() else None
    batches = task.get_batch_iterator(
        task.datasets["train"],
        max_sentences=BATCH,
        seed=5,
        num_shards=devices,
        shard_id=device,
        num_workers=workers,
        # The trainer too asks for the iterator of the saved epoch, then restores it.
        epoch=saved["epoch"] if saved else 1,
        disable_iterator_cache=True,
    )
    if saved:
        batches.load_state_dict(saved)
    lines = len(out.read_text().splitlines()) if out.is_file() else 0
    with open(out, "a", buffering=1) as file:
        while batches.next_epoch_idx <= EPOCHS:
            for batch in batches.next_epoch_itr(shuffle=True):
                file.write(json.dumps({"epoch": batches.epoch, **describe(batch)}) + "\n")
                lines += 1
                with replaced_file(state) as temporary:
                    temporary.write_text(json.dumps(batches.state_dict()))
                if lines == stop_after:
                    os.kill(os.getpid(), signal.SIGKILL)


def sequence(tmp_path: Path, scenes: Path, order: OrderConfig, workers: int, devices: int, killed: bool) -> list[list]:
    """What each device read, over all epochs."""
    context = multiprocessing.get_context("fork")
    files = [tmp_path / f"{workers}-{devices}-{device}-{killed}.jsonl" for device in range(devices)]
    for stop_after in [KILLED_AFTER[devices], 0] if killed else [0]:
        children = []
        for device, file in enumerate(files):
            words = (str(scenes), file, order, workers, device, devices, stop_after)
            children.append(context.Process(target=read, args=words))
            children[-1].start()
        for child in children:
            child.join(timeout=120)
            assert child.exitcode == (-signal.SIGKILL if stop_after else 0)
        lines = KILLED_AFTER[devices] if stop_after else EPOCHS * 8 // devices
        assert [len(file.read_text().splitlines()) for file in files] == [lines] * devices
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


# Orders, and the numbers of (worker processes, devices) to try them with.
ORDERS = {
    "shuffle": (OrderConfig(), [(0, 1), (2, 1), (0, 2), (2, 2)]),
    "windows by length": (OrderConfig(window=4, by_length=True), [(2, 2)]),
}


@pytest.mark.parametrize(("order", "cases"), ORDERS.values(), ids=ORDERS)
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, scenes: Path, order: OrderConfig, cases: list) -> None:
    whole = sequence(tmp_path, scenes, order, workers=0, devices=1, killed=False)[0]
    assert [line["epoch"] for line in whole] == [1] * 8 + [2] * 8 + [3] * 8
    for start in (0, 8, 16):
        assert sorted(i for line in whole[start : start + 8] for i in line["ids"]) == list(range(32))
    assert whole[0]["ids"] != whole[8]["ids"]
    assert len({line[what] for line in whole for what in ("crops", "captions", "masks")}) == 3 * len(whole)
    for workers, devices in cases:
        parts = sequence(tmp_path, scenes, order, workers, devices, killed=True)
        # Devices take turns at the same batches.
        assert [line for turn in zip(*parts, strict=True) for line in turn] == whole


def test_the_comparison_sees_other_randomness(tmp_path: Path, scenes: Path) -> None:
    task = make_task(str(scenes), OrderConfig())
    dataset = task.datasets["train"]
    dataset.set_epoch(1)
    first = describe(dataset.collater([dataset[i] for i in range(4)]))
    assert first == describe(dataset.collater([dataset[i] for i in range(4)]))
    dataset.set_epoch(2)
    second = describe(dataset.collater([dataset[i] for i in range(4)]))
    assert all(first[what] != second[what] for what in ("crops", "captions", "masks"))
