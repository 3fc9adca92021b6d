"""An exponential moving average of a module (Tarvainen and Valpola 2017)."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from emkum.layers.precision import at_least_float32


class EmaCopy(nn.Module):
    """A copy of a module that follows it slowly, always in eval mode and without gradients.

    It moves once an update of the optimizer, however many batches an update has: whoever trains calls `follow` with
    the number of updates done. Parameters and floating-point buffers move; other buffers are taken over.

    Args:
        module: is copied; its copy is `self.module`.
        decay: how much of the copy stays at each update.
    """

    updates: Tensor

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.decay = decay
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        # The same on the host, where asking costs nothing; -1 = not known yet.
        self._updates = -1
        self.eval()

    def train(self, mode: bool = True) -> "EmaCopy":
        return super().train(False)

    @torch.no_grad()
    def follow(self, module: nn.Module, num_updates: int, decay: float | None = None) -> None:
        """Move towards the module, where an update was done since the last call.

        Args:
            module: what was copied.
            num_updates: updates done; a number that is not above the last one moves nothing. A lower one is that of a
                run that starts anew from a checkpoint.
            decay: of this update; None = the copy's own.
        """
        if self._updates < 0:
            self._updates = int(self.updates)
        last, self._updates = self._updates, num_updates
        if num_updates == last:
            return
        self.updates.fill_(num_updates)
        if num_updates < last:
            return
        own, new = self.module.state_dict(), module.state_dict()
        moving = [name for name, value in own.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [own[name] for name in moving],
            [new[name].to(own[name].dtype) for name in moving],
            1 - (self.decay if decay is None else decay),
        )
        for name in own.keys() - set(moving):
            own[name].copy_(new[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EmaCopy":
        # An average of half precision would stand still: its steps are smaller than what that can hold.
        return super()._apply(lambda t: at_least_float32(fn(t)) if t.is_floating_point() else fn(t), recurse)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._updates = -1


def cosine_decay(start: float, end: float, progress: float) -> float:
    """A decay that goes from `start` to `end` along half a cosine, as in BYOL and DINO.

    Args:
        progress: part of the run that is done, from 0 to 1; beyond, `end`.
    """
    return end - (end - start) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
