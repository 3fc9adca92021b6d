"""What a result was made with, as JSON beside it."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from emkum.files import replaced_file

_PACKAGES = ("torch", "torchvision", "timm", "fairseq-fixed", "sentencepiece", "tokenizers", "ftfy", "numpy", "pillow")


def package_versions() -> dict[str, str]:
    """Versions of Python, this package and what numbers depend on."""
    import emkum

    found = {"python": platform.python_version(), "emkum": emkum.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe_machine() -> dict[str, Any]:
    """What figures are measured on: processor, cores, load, GPU (None without one) and package versions."""
    # On call: reading records takes no PyTorch.
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": package_versions(),
    }


def machine_in_words(machine: Mapping[str, Any], packages: Sequence[str]) -> str:
    """What `describe_machine` gave, in one line, with the versions of some packages."""
    versions = machine["versions"]
    parts = [f"{machine['cores']} cores of {machine['processor']}", machine["gpu"], f"Python {versions['python']}"]
    return ", ".join([*filter(None, parts), *(f"{name} {versions[name]}" for name in packages if name in versions)])


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ, those that one of both lacks among them, sorted."""
    return sorted(key for key in {**one, **other} if one.get(key) != other.get(key))


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the whole new one."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
