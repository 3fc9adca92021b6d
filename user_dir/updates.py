"""What models do once an update, and how their moving averages slow down over a run."""

from collections.abc import Callable
from typing import Any

from fairseq.models import BaseFairseqModel

from emkum.errors import UserError
from emkum.layers.ema import cosine_decay


class UpdatingModel(BaseFairseqModel):
    """A model that is told of each update once, before its first batch, also after it is restored."""

    def __init__(self) -> None:
        super().__init__()
        self.num_updates = 0
        # Of which update it has been told last.
        self._begun = -1
        self.register_load_state_dict_post_hook(_begin_again)

    def begin_update(self, num_updates: int) -> None:
        """Called once for each number of updates done."""
        raise NotImplementedError

    def set_num_updates(self, num_updates: int) -> None:
        """fairseq calls this before each batch and before it restores a checkpoint, with the number of updates done."""
        super().set_num_updates(num_updates)
        self.num_updates = num_updates
        if num_updates != self._begun:
            self._begun = num_updates
            self.begin_update(num_updates)

    def max_positions(self) -> None:
        return None


def _begin_again(model: UpdatingModel, incompatible: Any) -> None:
    """What a checkpoint brought has not begun its next update, whatever this model has."""
    model._begun = -1


def average_decay(decay: float, end_decay: float, max_update: int) -> Callable[[int], float]:
    """A moving average's decay from the number of updates done.

    Args:
        decay: at the beginning; 0 = no average is kept.
        end_decay: at the end of the run, along half a cosine; 0 = constant.
        max_update: updates of the run.

    Raises:
        UserError: a number out of range, or a run whose length is not known.
    """
    if not 0 <= decay < 1:
        raise UserError(f"--average-decay {decay}: want a number from 0 (no average) to below 1")
    if not 0 <= end_decay <= 1:
        raise UserError(f"--average-end-decay {end_decay}: want a number from 0 (constant decay) to 1")
    if end_decay == 0 or decay == 0:
        return lambda num_updates: decay
    if max_update < 1:
        raise UserError(f"--average-end-decay {end_decay} is reached at the end of the run: give --max-update")
    return lambda num_updates: cosine_decay(decay, end_decay, num_updates / max_update)
