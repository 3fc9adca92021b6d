"""What a result was made with, as JSON beside it."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "torchvision", "timm", "fairseq-fixed", "sentencepiece", "numpy", "pillow")


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


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    temporary.replace(path)
