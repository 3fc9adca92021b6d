"""Which precision a forward runs in, by option and device."""

import pytest
import torch

from emkum.errors import UserError
from emkum.layers import precision
from emkum.layers.precision import Autocast

CPU = torch.device("cpu")


def product(autocast: Autocast, **options: bool) -> torch.dtype:
    """Type of a matrix product within the context."""
    with autocast.context(CPU, **options):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.mark.parametrize(
    ("name", "wanted"),
    [(None, torch.float32), ("", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_named_types(name: str | None, wanted: torch.dtype) -> None:
    assert product(Autocast(name)) == wanted
    assert product(Autocast(name), enabled=False) == torch.float32
    assert Autocast(name).dtype(CPU) == (None if wanted == torch.float32 else wanted)


@pytest.mark.parametrize(("native", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_where_the_device_has_it(
    native: bool, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "computes_in_bfloat16", lambda device: native)
    assert product(Autocast("auto")) == wanted


def test_auto_agrees_with_the_processors_own_flags() -> None:
    try:
        flags = open("/proc/cpuinfo").read()
    except OSError:
        pytest.skip("no /proc/cpuinfo here")
    assert precision.computes_in_bfloat16(CPU) == ("avx512_bf16" in flags or "amx_tile" in flags)


def test_other_names_are_refused() -> None:
    with pytest.raises(UserError, match="--autocast 'half' is unknown; choose from auto, bfloat16, float16"):
        Autocast("half")
