"""A codebook on the unit sphere that follows its vectors by moving averages instead of gradients.

Van den Oord et al. 2017, "Neural Discrete Representation Learning", appendix A.1, with cosine in place of distance as
in BEiT-2 (Peng et al. 2022, section 3.1).
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from emkum.distributed import all_gather, is_distributed
from emkum.layers.feature_queue import EMPTY, FeatureQueue
from emkum.layers.nearest_code import nearest_by_cosine
from emkum.layers.precision import at_least_float32, normalized

# Vectors for each code that k-means starts with.
START_ROWS_PER_CODE = 4
START_ITERATIONS = 10
# Codes of less usage keep their direction: that of a sum which has nearly decayed away means nothing.
_LEAST_USAGE = 1e-8


@torch.no_grad()
def spherical_kmeans(vectors: Tensor, count: int, iterations: int, generator: torch.Generator) -> Tensor:
    """(count, S) unit vectors: means of clusters by cosine.

    Args:
        vectors: (n, S) unit vectors, n at least `count`.
        count: clusters.
        iterations: of Lloyd's algorithm.
        generator: draws the vectors that it starts with.
    """
    centers = vectors[torch.randperm(len(vectors), generator=generator)[:count]]
    for _ in range(iterations):
        members = F.one_hot(nearest_by_cosine(vectors, centers), count).to(vectors.dtype)
        # An empty cluster keeps its center.
        centers = torch.where(members.sum(0)[:, None] > 0, normalized(members.T @ vectors), centers)
    return centers


class Codebook(nn.Module):
    """J unit vectors of S channels as checkpointed, rank-identical state.

    Until enough vectors were seen for k-means there are no codes and vectors pass as they are. From then on each is
    replaced by its nearest code. What the batches of an update bring is summed up, over ranks too, and moves the codes
    once, in `begin_update`. A code whose usage has fallen too low is put on one of the latest vectors.

    Args:
        count: codes J.
        width: channels S.
        decay: how much of a code's averages stays at an update.
        revive_below: a code is revived where its usage is below this part of the mean one; 0 = never.
        window: updates over which codes count as used.
    """

    codes: Tensor
    usage: Tensor
    sums: Tensor
    new_counts: Tensor
    new_sums: Tensor
    last_used: Tensor
    started: Tensor
    updates: Tensor

    def __init__(self, count: int, width: int, decay: float, revive_below: float, window: int) -> None:
        super().__init__()
        self.decay, self.revive_below, self.window = decay, revive_below, window
        self.register_buffer("codes", torch.zeros(count, width))
        # Moving averages: part of the vectors that a code gets, and their sum divided by the number of all vectors.
        self.register_buffer("usage", torch.zeros(count))
        self.register_buffer("sums", torch.zeros(count, width))
        # What the batches since the last update brought.
        self.register_buffer("new_counts", torch.zeros(count))
        self.register_buffer("new_sums", torch.zeros(count, width))
        self.register_buffer("last_used", torch.full((count,), -window, dtype=torch.int64))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.latest = FeatureQueue(START_ROWS_PER_CODE * count, width)
        # What `started`, `updates` and the queue's ids say, on the host, where asking costs nothing; -1 = not known.
        self._started = False
        self._updates = self._seen = -1

    def __len__(self) -> int:
        return len(self.codes)

    def is_started(self) -> bool:
        """Whether there are codes; the device is asked until there are."""
        if not self._started:
            self._started = bool(self.started)
        return self._started

    def nearest(self, vectors: Tensor) -> Tensor:
        """(B,) int64, each vector's code."""
        return nearest_by_cosine(vectors, self.codes)

    def forward(self, vectors: Tensor) -> Tensor:
        """Each unit vector's code (B, S), or the vectors themselves where there are no codes yet; without gradient.

        In training, what the vectors bring is kept for the next update.

        Args:
            vectors: (B, S) unit vectors, equally many on every rank in training.
        """
        vectors = vectors.detach()
        if not self.is_started():
            if self.training:
                self._keep(vectors)
            return vectors
        codes = self.nearest(vectors)
        if self.training:
            self._count(vectors, codes)
            self._keep(vectors)
        return self.codes.to(vectors.dtype)[codes]

    @torch.no_grad()
    def _keep(self, vectors: Tensor) -> None:
        vectors = all_gather(vectors)
        self._seen = min(self._rows_seen() + len(vectors), len(self.latest))
        self.latest.push(vectors, torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device))

    def _rows_seen(self) -> int:
        """Rows of the queue that are filled."""
        if self._seen < 0:
            self._seen = int((self.latest.ids != EMPTY).sum())
        return self._seen

    @torch.no_grad()
    def _count(self, vectors: Tensor, codes: Tensor) -> None:
        # A vector that is not finite counts for nothing: it would spoil its code for good.
        finite = vectors.isfinite().all(1, keepdim=True)
        members = F.one_hot(codes, len(self)).to(self.sums.dtype) * finite
        brought = torch.cat([members.sum(0)[:, None], members.T @ vectors.nan_to_num().to(self.sums.dtype)], dim=1)
        if is_distributed():
            dist.all_reduce(brought)
        self.new_counts += brought[:, 0]
        self.new_sums += brought[:, 1:]

    @torch.no_grad()
    def begin_update(self, num_updates: int) -> None:
        """Move the codes by what the last update's batches brought.

        Args:
            num_updates: updates done; a number that is not above the last one moves nothing. A lower one is that of a
                run that starts anew from a checkpoint.
        """
        if self._updates < 0:
            self._updates = int(self.updates)
        last, self._updates = self._updates, num_updates
        if num_updates == last:
            return
        self.updates.fill_(num_updates)
        if num_updates < last:
            return
        if not self.is_started():
            if self._rows_seen() == len(self.latest):
                self._start()
            return
        self._move()
        if self.revive_below > 0:
            self._revive(num_updates)

    def _start(self) -> None:
        # On the CPU, where sums come out the same on every rank.
        vectors = self.latest.features.cpu()
        codes = spherical_kmeans(vectors, len(self), START_ITERATIONS, torch.Generator().manual_seed(len(self)))
        members = F.one_hot(nearest_by_cosine(vectors, codes), len(self)).to(vectors.dtype)
        self.usage.copy_(members.mean(0))
        self.sums.copy_(members.T @ vectors / len(vectors))
        self.codes.copy_(codes)
        self._point_codes()
        self.started.fill_(True)
        self._started = True

    def _move(self) -> None:
        total = self.new_counts.sum()
        # Without a batch, nothing moves.
        weight = (1 - self.decay) * (total > 0).to(total.dtype)
        self.usage.lerp_(self.new_counts / total.clamp(min=1), weight)
        self.sums.lerp_(self.new_sums / total.clamp(min=1), weight)
        self._point_codes()
        self.last_used.copy_(torch.where(self.new_counts > 0, self.updates, self.last_used))
        self.new_counts.zero_()
        self.new_sums.zero_()

    def _point_codes(self) -> None:
        self.codes.copy_(torch.where(self.usage[:, None] > _LEAST_USAGE, normalized(self.sums), self.codes))

    def _revive(self, num_updates: int) -> None:
        """Put codes of too low usage on vectors out of the latest J, each on another one, as if of mean usage."""
        count, mean = len(self), 1 / len(self)
        generator = torch.Generator(self.codes.device).manual_seed(num_updates)
        back = torch.randperm(count, generator=generator, device=self.codes.device)
        vectors = self.latest.features[(self.latest.position - 1 - back) % len(self.latest)].to(self.codes.dtype)
        # A row of zeros was not finite.
        dead = (self.usage < self.revive_below * mean) & (vectors.square().sum(1) > 0.5)
        self.codes.copy_(torch.where(dead[:, None], vectors, self.codes))
        self.sums.copy_(torch.where(dead[:, None], vectors * mean, self.sums))
        self.usage.masked_fill_(dead, mean)

    @torch.no_grad()
    def figures(self) -> dict[str, Tensor]:
        """`codes_used`, part of the codes that some vector had within the window, in percent, and `perplexity`, the
        number of codes that would be as hard to guess if all were equally frequent."""
        is_used = self.updates - self.last_used < self.window
        frequency = self.usage / self.usage.sum().clamp(min=1e-12)
        entropy = torch.special.entr(frequency).sum()
        return {"codes_used": is_used.float().mean() * 100, "perplexity": entropy.exp()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Codebook":
        # Averages of half precision would stand still, whatever `--fp16` makes of the parameters.
        return super()._apply(lambda t: at_least_float32(fn(t)) if t.is_floating_point() else fn(t), recurse)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._started, self._updates, self._seen = False, -1, -1
