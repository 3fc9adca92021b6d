"""Features that may be larger than memory: tensors, or arrays that are mapped from files."""

import numpy as np
import torch
from torch import Tensor

Array = Tensor | np.ndarray


def take(array: Array, rows: slice | np.ndarray, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Some rows on a device, as a copy.

    Args:
        array: (n, ...).
        rows: a slice, or positions (m,) in ascending order, which is how files are read fastest.
        device, dtype: of the result.
    """
    if isinstance(array, Tensor):
        index = rows if isinstance(rows, slice) else torch.from_numpy(rows).to(array.device)
        return array[index].to(device, dtype, copy=True)
    # A copy before torch sees it: torch warns of memory that cannot be written.
    return torch.from_numpy(np.array(array[rows])).to(device, dtype)
