"""Where pretrained weights come from: a local file first, a hub second, a clear error third. Nothing is unpickled."""

import argparse
import hashlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emkum.errors import UserError

HUB = "hub"


def read_checkpoint(path: str | Path) -> Any:
    """Read a `.safetensors` file, or a `torch.save` file under `weights_only=True`, to the CPU.

    Raises:
        UserError: the file is missing, truncated, or holds code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # Old fairseq checkpoints hold their options as a Namespace, which is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is refused: it holds more than tensors and plain data, or is no checkpoint") from None
    except Exception as error:  # the readers raise a dozen types for damaged files
        raise UserError(f"{path} cannot be read as a checkpoint: {_first_line(error)}") from None


def timm_model(name: str, weights: str = "", **arguments: Any) -> nn.Module:
    """Create a timm model, with weights loaded strictly by timm itself.

    Args:
        name: timm's model name, such as `deit_tiny_patch16_224`.
        weights: a local file, `hub` to download timm's pretrained weights, or empty for random initialization.
        arguments: passed to `timm.create_model`.

    Raises:
        UserError: unknown name, missing file, weights of another model, or no way to the hub.
        TypeError: the architecture does not know one of the arguments.
    """
    import timm

    if not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise UserError(f"timm has no model {name!r}" + (f"; close ones: {', '.join(near)}" if near else ""))
    try:
        if not weights:
            return timm.create_model(name, **arguments)
        if weights == HUB:
            return timm.create_model(name, pretrained=True, **arguments)
        # Read once under our own rules: timm then loads the same bytes.
        read_checkpoint(weights)
        return _timm_model_from_file(name, weights, **arguments)
    except (UserError, TypeError):
        raise
    except Exception as error:  # timm and the hub raise a dozen types
        if not weights:
            raise UserError(f"timm cannot make {name!r}: {_first_line(error)}") from None
        if weights == HUB:
            raise UserError(_hub_message(name, error)) from None
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{weights} does not hold the weights of timm's {name}: {reason}") from None


def _timm_model_from_file(name: str, weights: str, **arguments: Any) -> nn.Module:
    """timm is strict only about a model with its pretrained classifier: into one without a classifier it would load
    what fits by name, and of another model's file nothing. So the classifier is taken out of the file instead."""
    import timm

    state = timm.models.load_state_dict(weights)
    overlay: dict[str, Any] = {"state_dict": state}
    if arguments.get("num_classes") == 0:
        classifier = timm.models.get_pretrained_cfg(name).classifier or ()
        names = (classifier,) if isinstance(classifier, str) else classifier
        overlay["state_dict"] = {k: v for k, v in state.items() if k.rpartition(".")[0] not in names}
        overlay["num_classes"] = 0
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    model.pretrained_cfg["state_dict"] = None
    return model


def _hub_message(name: str, error: Exception) -> str:
    return (
        f"weights of timm's {name} could not be downloaded ({_first_line(error)[:120]}); download the model's "
        "model.safetensors elsewhere and give its path instead of 'hub'"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of all parameters and persistent buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
