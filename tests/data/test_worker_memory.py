"""Batches from worker processes come as they were made, whatever becomes of the memory they came in."""

import gc
import os

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from emkum.data.transforms import crop_rows, stack_crops
from emkum.data.worker_memory import _MOST_KEPT, empty_bytes, hand_over

SIZE = 16


class Crops(Dataset):
    """Crops and other things that follow from the numbers of the samples alone.

    Args:
        length: samples.
        begin: write the crops where they are to travel.
    """

    def __init__(self, length: int, begin: bool = True) -> None:
        self.length = length
        self.begin = begin

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, torch.Tensor]]:
        crops = [torch.full((SIZE, SIZE, 3), index % 251, dtype=torch.uint8) for index in indices]
        if self.begin:
            rows = crop_rows(len(indices), SIZE)
            for row, crop in zip(rows, crops, strict=True):
                row.array[...] = crop.numpy()
            crops = [row.tensor.permute(1, 2, 0) for row in rows]
        return [(index, crop.permute(2, 0, 1)) for index, crop in zip(indices, crops, strict=True)]


def make(items: list[tuple[int, torch.Tensor]]) -> dict:
    """A batch with the kinds of values that batches have; the text grows and shrinks from batch to batch."""
    numbers = torch.tensor([number for number, _ in items])
    return {
        "id": numbers,
        "split": "train",
        "nothing": None,
        "image": stack_crops([crop for _, crop in items]),
        "nested": {"groups": [(2, 5), (1, 7)], "views": [numbers.float().view(-1, 1) / 3, numbers % 2 == 0]},
        "text": numbers[:, None].repeat(1, 1 + 100 * (int(numbers[0]) % 7)),
        "count": len(items),
        "scalar": torch.tensor(float(numbers[0])),
        "empty": torch.zeros(0, 4),
        "gaps": torch.arange(12.0).view(3, 4)[:, ::2],
    }


def gather(items: list[tuple[int, torch.Tensor]]) -> dict:
    return hand_over(make(items))


def where(batch: dict) -> int:
    return batch["image"].untyped_storage().data_ptr()


def assert_same(batch: dict, wanted: dict) -> None:
    assert list(batch) == list(wanted)
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(batch[name], value, rtol=0, atol=0)
    for name in ("split", "nothing", "count"):
        assert batch[name] == wanted[name]
    assert batch["nested"]["groups"] == wanted["nested"]["groups"]
    for got, view in zip(batch["nested"]["views"], wanted["nested"]["views"], strict=True):
        torch.testing.assert_close(got, view, rtol=0, atol=0)


@pytest.mark.parametrize("begin", [True, False], ids=["begun", "copied"])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_same_batches_however_many_workers(workers, begin):
    dataset = Crops(200, begin)
    loader = DataLoader(dataset, batch_size=8, num_workers=workers, collate_fn=gather)
    batches = list(loader)  # All of them at once: more than a worker keeps pieces for.
    for number, batch in enumerate(batches):
        items = dataset.__getitems__(list(range(8 * number, min(200, 8 * number + 8))))
        assert_same(batch, make(items))
        assert batch["image"].stride() == make(items)["image"].stride()


def test_batches_that_are_kept_are_not_overwritten_while_others_are_dropped():
    kept, wanted = [], []
    for number, batch in enumerate(DataLoader(Crops(900), batch_size=3, num_workers=1, collate_fn=gather)):
        if number % 9 == 0:
            # Of some a single tensor, whose storage is the whole batch's.
            kept.append(batch["image"] if number % 2 else batch["nested"]["views"][0])
            wanted.append(kept[-1].clone())
    assert len(kept) > _MOST_KEPT
    for now, then in zip(kept, wanted, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)


def test_memory_is_used_again():
    places = [where(batch) for batch in DataLoader(Crops(4000), batch_size=40, num_workers=1, collate_fn=inodes)]
    assert len(places) == 100
    assert len(set(places)) <= 8


def inodes(items):
    """The memory that a batch came in, by its file: addresses say nothing across processes."""
    return _Inode(gather(items))


class _Inode:
    def __init__(self, parcel):
        self.parcel = parcel

    def __reduce__(self):
        return _with_inode, (self.parcel,)


def _with_inode(batch):
    return {"image": _Storage(batch["image"])}


class _Storage:
    def __init__(self, image):
        self.image = image

    def untyped_storage(self):
        return self

    def data_ptr(self):
        address = self.image.untyped_storage().data_ptr()
        with open("/proc/self/maps") as maps:
            for line in maps:
                begin, end = (int(part, 16) for part in line.split()[0].split("-"))
                if begin <= address < end:
                    return int(line.split()[4])
        raise AssertionError("not mapped")


def test_all_tensors_of_a_batch_are_in_one_piece():
    batch = next(iter(DataLoader(Crops(8), batch_size=8, num_workers=1, collate_fn=gather)))
    views = batch["nested"]["views"]
    assert len({t.untyped_storage().data_ptr() for t in (batch["image"], batch["id"], batch["text"], *views)}) == 1


def test_tensors_can_be_written_without_touching_others():
    batch = next(iter(DataLoader(Crops(8), batch_size=8, num_workers=1, collate_fn=gather)))
    wanted = make(Crops(8).__getitems__(list(range(8))))
    batch["image"].zero_()
    batch["text"].fill_(-1)
    wanted["image"].zero_()
    wanted["text"].fill_(-1)
    assert_same(batch, wanted)


def test_forked_process_does_not_free_its_parents_batches():
    loader = iter(DataLoader(Crops(3000), batch_size=10, num_workers=1, collate_fn=gather))
    held = [next(loader) for _ in range(3)]
    wanted = [make(Crops(3000).__getitems__(list(range(10 * i, 10 * i + 10)))) for i in range(3)]
    child = os.fork()
    if child == 0:
        held.clear()
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    for _ in loader:
        pass
    for batch, expected in zip(held, wanted, strict=True):
        assert_same(batch, expected)


class GivenUp(Crops):
    """Begins rows twice for each batch, and once for none."""

    def __getitems__(self, indices):
        first = super().__getitems__(indices)
        second = super().__getitems__(indices)
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))
        return first if indices[0] % 20 == 0 else second


def test_rows_that_were_given_up_still_hold_what_was_written():
    for number, batch in enumerate(DataLoader(GivenUp(300), batch_size=10, num_workers=1, collate_fn=gather)):
        assert_same(batch, make(Crops(300).__getitems__(list(range(10 * number, 10 * number + 10)))))


def test_in_the_main_process_nothing_changes():
    batch = make(Crops(4).__getitems__([0, 1, 2, 3]))
    assert hand_over(batch) is batch
    assert empty_bytes(5).shape == (5,)
    assert not empty_bytes(5).is_shared()
    assert get_worker_info() is None


def test_without_tensors_a_batch_is_itself():
    assert list(DataLoader(Crops(4), batch_size=2, num_workers=1, collate_fn=nothing)) == [{}, {}]


def nothing(items):
    return hand_over({})


def test_pinned_by_numpy():
    """An array of a tensor keeps the batch's memory as well."""
    loader = iter(DataLoader(Crops(2000), batch_size=4, num_workers=1, collate_fn=gather))
    array = next(loader)["image"].numpy()
    for _ in loader:
        pass
    np.testing.assert_array_equal(array[:, 0, 0, 0], [0, 1, 2, 3])
