"""How batches come from worker processes: each in one piece of shared memory, and pieces are used again.

Left to itself, PyTorch takes new shared memory for every tensor of every batch. Its pages cost the worker as much as a
part of the decoding (0.7 microseconds a KB), and each tensor's handshake half a millisecond. Here a worker keeps the
pieces that it made; a piece's first byte says whether its batch is still in use, and the receiving process clears it
when the last tensor of the batch is gone. A batch that is kept keeps its piece: nothing is overwritten.
"""

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

# Tensors begin at multiples of a cache line; the first line of a piece holds its flag.
_LINE = 64
# A worker keeps this many pieces: more than a consumer holds that reads ahead. Others are freed after use.
_MOST_KEPT = 24


def empty_bytes(count: int) -> Tensor:
    """(count,) uint8, not initialized; in a worker process, in the memory that its next batch will travel in.

    What is written where it is to travel needs no copy. There is one such tensor a batch: a second call, before
    `hand_over`, gives up the first one's place.
    """
    if get_worker_info() is None:
        return torch.empty(count, dtype=torch.uint8)
    return _this_worker().begin(count)


def hand_over(batch: Any) -> Any:
    """What a worker process is to return for a batch; elsewhere the batch itself.

    Args:
        batch: dicts, lists and tuples of CPU tensors and anything else. The receiver gets the same structure, whose
            tensors share one piece of memory and keep their strides.
    """
    if get_worker_info() is None:
        return batch
    return _this_worker().finish(batch)


@dataclass(frozen=True)
class _Place:
    """Where a tensor is in a piece of memory."""

    begin: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]

    def tensor(self, memory: Tensor) -> Tensor:
        return torch.empty(0, dtype=self.dtype).set_(
            memory.untyped_storage(),
            (memory.storage_offset() + self.begin) // self.dtype.itemsize,
            self.shape,
            self.strides,
        )


class _Piece:
    """Shared memory of at least `size` bytes behind the line that holds the flag."""

    def __init__(self, size: int) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(_LINE + size))
        self.size = size
        self._flag = self.memory.numpy()[:1]

    @property
    def in_use(self) -> bool:
        return bool(self._flag[0])

    def use(self) -> "_Piece":
        self._flag[0] = 1
        return self

    def offset(self, tensor: Tensor) -> int | None:
        """Where a tensor without gaps begins in this piece, in bytes; None for another one."""
        elsewhere = tensor.untyped_storage().data_ptr() != self.memory.data_ptr()
        if elsewhere or tensor.stride() != _dense_strides(tensor):
            return None
        return tensor.storage_offset() * tensor.itemsize


class _Worker:
    """The pieces of one worker process."""

    def __init__(self) -> None:
        self.pieces: list[_Piece] = []
        self.begun: _Piece | None = None
        # What batches needed beside the bytes that were begun.
        self.extra = 0

    def begin(self, count: int) -> Tensor:
        self._forget(self.begun)
        self.begun = self._take(_aligned(count) + self.extra)
        return self.begun.memory[_LINE : _LINE + count]

    def finish(self, batch: Any) -> Any:
        tensors: list[Tensor] = []
        _map(batch, Tensor, tensors.append)
        if not tensors:
            return batch
        begun, self.begun = self.begun, None
        there = [None if begun is None else begun.offset(tensor) for tensor in tensors]
        size = sum(_aligned(tensor.nbytes) for at, tensor in zip(there, tensors, strict=True) if at is None)
        self.extra = max(self.extra, size)
        end = max((_aligned(at + t.nbytes) for at, t in zip(there, tensors, strict=True) if at is not None), default=0)
        piece = begun
        if end == 0 or end + size > begun.memory.nbytes:
            self._forget(begun)
            there = [None] * len(tensors)
            end = _LINE
            piece = self._take(sum(_aligned(tensor.nbytes) for tensor in tensors))
        places = []
        for at, tensor in zip(there, tensors, strict=True):
            if at is None:
                place = _Place(end, tensor.dtype, tensor.shape, _dense_strides(tensor))
                place.tensor(piece.memory).copy_(tensor)
                end += _aligned(tensor.nbytes)
            else:
                place = _Place(at, tensor.dtype, tensor.shape, tensor.stride())
            places.append(place)
        following = iter(places)
        return _Parcel(piece.memory, _map(batch, Tensor, lambda _: next(following)))

    def _take(self, size: int) -> _Piece:
        free = [piece for piece in self.pieces if not piece.in_use]
        for piece in free:
            if piece.size >= size:
                return piece.use()
        # An eighth more, so that the next batch, with somewhat longer captions, fits as well.
        piece = _Piece(size + size // 8)
        # Those that have become too small go.
        self.pieces = [kept for kept in self.pieces if kept not in free]
        if len(self.pieces) < _MOST_KEPT:
            self.pieces.append(piece)
        return piece.use()

    def _forget(self, piece: _Piece | None) -> None:
        """Never use a piece again of which no batch came: whoever began it may have its tensor still."""
        self.pieces = [kept for kept in self.pieces if kept is not piece]


_worker: _Worker | None = None


def _this_worker() -> _Worker:
    # Worker processes alone come here, and a process that has none of its own never has a `_worker` to inherit.
    global _worker
    if _worker is None:
        _worker = _Worker()
    return _worker


class _Parcel:
    """A batch on its way: pickled, it becomes the batch itself."""

    def __init__(self, memory: Tensor, batch: Any) -> None:
        self.memory = memory
        self.batch = batch

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (self.memory, self.batch)


def _receive(memory: Tensor, batch: Any) -> Any:
    """The batch, with tensors for places; when the last of them is gone the piece is free again."""
    whole = memory.numpy()
    # The tensors' common storage keeps this array alive, and nothing else does.
    watched = whole[:]
    finalizer = weakref.finalize(watched, _release, whole[:1], os.getpid())
    finalizer.atexit = False
    common = torch.from_numpy(watched)
    return _map(batch, _Place, lambda place: place.tensor(common))


def _release(flag: np.ndarray, process: int) -> None:
    # A forked process has copies of the batches that its parent holds; their end means nothing.
    if os.getpid() == process:
        flag[0] = 0


def _map(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """The same structure with `function` applied to each value of a kind, in order."""
    if isinstance(value, kind):
        return function(value)
    if type(value) is dict:
        return {key: _map(item, kind, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map(item, kind, function) for item in value)
    return value


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's own where it has no gaps, else such as have none."""
    return torch.empty_like(tensor, device="meta").stride()


def _aligned(size: int) -> int:
    return -(-size // _LINE) * _LINE
