"""Which precision a model's forward runs in."""

import torch
import torch.nn.functional as F

from emkum.errors import UserError

AUTOCAST_HELP = (
    "run the model under torch.autocast: auto (bfloat16 where the device computes in it, else float32), bfloat16, "
    "float16; empty = off"
)
_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Autocast:
    """An option's value made into a context for a forward.

    Args:
        name: one of AUTOCAST_HELP; None or empty = off.

    Raises:
        UserError: any other value.
    """

    def __init__(self, name: str | None) -> None:
        if name and name != "auto" and name not in _TYPES:
            raise UserError(f"--autocast {name!r} is unknown; choose from auto, {', '.join(_TYPES)}")
        self.name = name

    def dtype(self, device: torch.device) -> torch.dtype | None:
        """What matrix products are computed in on this device; None = as the parameters are."""
        if self.name == "auto":
            return torch.bfloat16 if computes_in_bfloat16(device) else None
        return _TYPES[self.name] if self.name else None

    def context(self, device: torch.device, enabled: bool = True) -> torch.autocast:
        """The context to run a forward in."""
        dtype = self.dtype(device) if enabled else None
        return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 arithmetic; emulated, it is many times slower than float32 on a CPU."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The precision of losses and softmax: float32, or float64 where the input has it."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def normalized(features: torch.Tensor) -> torch.Tensor:
    """Unit vectors (..., D) in the precision of losses."""
    return F.normalize(at_least_float32(features), dim=-1)
