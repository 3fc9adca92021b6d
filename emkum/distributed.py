"""Collectives that losses need, each also right on one process."""

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether more than one process trains together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


class _AllGather(torch.autograd.Function):
    """Concatenate over ranks; the gradient of each rank's slice is the sum over all ranks' losses."""

    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:
        ctx.rows = local.shape[0]
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # all_reduce and slice instead of reduce_scatter: gloo has no reduce_scatter.
        grad = grad.contiguous()
        dist.all_reduce(grad)
        start = dist.get_rank() * ctx.rows
        return grad[start : start + ctx.rows]


def all_gather_with_gradient(local: Tensor) -> Tensor:
    """Gather (B, ...) of every rank into (B * P, ...) in rank order.

    The backward sums over ranks. Where each rank's loss is the mean over its own rows and gradients are averaged over
    ranks (as DDP does), parameters get exactly the gradient of the mean over all B * P rows.

    Args:
        local: (B, ...), the same shape on every rank.
    """
    return _AllGather.apply(local) if is_distributed() else local


@torch.no_grad()
def all_gather(local: Tensor) -> Tensor:
    """Gather (B, ...) of every rank without gradient, in rank order; the same shape on every rank."""
    if not is_distributed():
        return local
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def all_gather_rows(local: Tensor) -> list[Tensor]:
    """Every rank's rows, one tensor a rank, where ranks may hold different numbers of rows (validation)."""
    if not is_distributed():
        return [local]
    counts = all_gather(torch.tensor([local.shape[0]], device=local.device)).tolist()
    padded = local.new_zeros(max(counts), *local.shape[1:])
    padded[: local.shape[0]] = local
    blocks = all_gather(padded).split(max(counts))
    return [block[:count] for block, count in zip(blocks, counts, strict=True)]


def row_offset(rows: int) -> int:
    """First row of this rank's part in a gathered tensor of `rows` rows a rank."""
    return rank() * rows
