"""EMKUM: small image-text models out of pretrained unimodal ones, distilled from unimodal teachers."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]


def load(checkpoint: str, device: str = "cpu") -> Any:
    """Load a trained student for use; see `emkum.checkpoint.load`."""
    # Imported on call: `import emkum` stays quick and free of fairseq.
    from emkum.checkpoint import load as load_checkpoint

    return load_checkpoint(checkpoint, device=device)
