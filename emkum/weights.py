"""Where pretrained weights come from: a local file first, a hub second, a clear error third. Nothing is unpickled."""

import argparse
import hashlib
import logging
import pickle
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emkum.errors import UserError

HUB = "hub"

logger = logging.getLogger(__name__)


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
        raise UserError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from None


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], source: str | Path, allowed: str = "", what: str = ""
) -> list[str]:
    """Load parameters and buffers by name: all must be there, nothing beside, everything of the right shape.

    Args:
        module: receives them.
        state: by the module's own names.
        source: file that they come from, for messages.
        allowed: names that may be missing or too many, separated by commas; `*` stands for anything.
        what: the module in words, for messages.

    Returns:
        What was missing or too many and allowed, sorted.

    Raises:
        UserError: something is missing, unexpected or of another shape.
    """
    own = module.state_dict()
    passed_over = sorted(filter(_matcher(allowed), own.keys() ^ state.keys()))
    problems = {
        "missing": sorted(own.keys() - state.keys() - set(passed_over)),
        "unexpected": sorted(state.keys() - own.keys() - set(passed_over)),
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in sorted(own.keys() & state.keys())
            if state[name].shape != own[name].shape
        ],
    }
    if any(problems.values()):
        listing = "; ".join(f"{kind}: {_shortened(names)}" for kind, names in problems.items() if names)
        raise UserError(f"{source} does not fit {what or type(module).__name__}; {listing}")
    module.load_state_dict({name: state[name] for name in own.keys() & state.keys()}, strict=False)
    return passed_over


def _matcher(allowed: str) -> Callable[[str], bool]:
    """Whether a name is one of `allowed`: names separated by commas, in which `*` stands for anything."""
    patterns = [pattern.strip() for pattern in allowed.split(",") if pattern.strip()]
    return lambda name: any(fnmatchcase(name, pattern) for pattern in patterns)


def _shortened(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def timm_model(name: str, weights: str = "", allowed: str = "", **arguments: Any) -> nn.Module:
    """Create a timm model, with weights loaded strictly.

    Args:
        name: timm's model name, such as `deit_tiny_patch16_224`.
        weights: a local file, `hub` to download timm's pretrained weights, or empty for random initialization. A file
            may be timm's own or an official one of BEiT, BEiT-2, DINO or DINOv2; without a classifier it makes a model
            that has none.
        allowed: see `load_strictly`; of local files alone.
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
        return _timm_model_from_file(name, weights, allowed, **arguments)
    except (UserError, TypeError):
        raise
    except Exception as error:  # timm and the hub raise a dozen types
        if not weights:
            raise UserError(f"timm cannot make {name!r}: {first_line(error)}") from None
        if weights == HUB:
            raise UserError(_hub_message(name, error)) from None
        raise UserError(f"{weights} does not hold the weights of timm's {name}: {_listing(error)}") from None


def _timm_model_from_file(name: str, weights: str, allowed: str, **arguments: Any) -> nn.Module:
    """timm is strict only about a model with its pretrained classifier: into one without a classifier it would load
    what fits by name, and of another model's file nothing. So the classifier is taken out of the file instead."""
    import timm

    state = official_state(read_checkpoint(weights))
    if not state:
        raise UserError(f"{weights} does not hold the weights of timm's {name}: it has no parameters by name")
    config = timm.models.get_pretrained_cfg(name)
    classifier = config.classifier or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    if config.num_classes and names and not any(f"{part}.weight" in state for part in names):
        logger.info("%s holds no classifier: %s has no logits", weights, name)
        arguments = {"num_classes": 0} | arguments
    if arguments.get("num_classes") == 0:
        state = {key: value for key, value in state.items() if key.rpartition(".")[0] not in names}
        # BEiT's mean is normed after pooling; the files of its pretraining have the norm of the CLS token instead.
        if name.startswith("beit") and "norm.weight" in state:
            arguments = {"global_pool": "token"} | arguments
    if "rel_pos_bias.relative_position_bias_table" in state or allowed:
        state = _fitted(timm.create_model(name, **arguments).state_dict(), state, allowed)
    overlay: dict[str, Any] = {"state_dict": state}
    if arguments.get("num_classes") == 0:
        overlay["num_classes"] = 0
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    model.pretrained_cfg["state_dict"] = None
    return model


# What holds the parameters in official files, best first; what precedes their names; and what only pretraining needs.
_CONTAINERS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.", "backbone.")
_PRETRAINING_ALONE = ("lm_head.", "cls_pt_layers.")


def official_state(checkpoint: Any) -> dict[str, Tensor]:
    """Parameters of a checkpoint by the model's own names, whatever holds them and precedes their names.

    Of a model with parts beside its backbone, such as DINO's heads, the backbone is kept; of BEiT-2's pretraining the
    heads that predict visual tokens are left out.
    """
    state = checkpoint if isinstance(checkpoint, Mapping) else {}
    while (inner := next((key for key in _CONTAINERS if isinstance(state.get(key), Mapping)), None)) is not None:
        state = state[inner]
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if any(name.startswith(_PRETRAINING_ALONE) for name in tensors):
        # Its token for masked patches goes with them.
        tensors = {
            name: value
            for name, value in tensors.items()
            if name != "mask_token" and not name.startswith(_PRETRAINING_ALONE)
        }
    return tensors


def _fitted(own: Mapping[str, Tensor], state: dict[str, Tensor], allowed: str) -> dict[str, Tensor]:
    """A table of relative positions that all blocks share, given to each; what may be missing or too many, made so."""
    shared = "rel_pos_bias.relative_position_bias_table"
    if shared in state and shared not in own:
        tables = [name for name in own if name.endswith(".attn.relative_position_bias_table")]
        state = {name: value for name, value in state.items() if not name.startswith("rel_pos_bias.")} | {
            name: state[shared] for name in tables
        }
    may_differ = _matcher(allowed)
    kept = {name: value for name, value in state.items() if name in own or not may_differ(name)}
    filled = {name: value for name, value in own.items() if name not in state and may_differ(name)}
    if len(kept) < len(state) or filled:
        passed_over = sorted([*filled, *(state.keys() - kept.keys())])
        logger.warning("missing or left out, as allowed: %s", _shortened(passed_over))
    return kept | filled


def _listing(error: Exception) -> str:
    """torch's message about parameters that do not fit, on one line with the first few of each kind."""
    head, *kinds = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    mismatches = [line for line in kinds if line.startswith("size mismatch")]
    parts = [head] + ([_shortened(mismatches, 2)] if mismatches else [])
    for line in kinds:
        kind, colon, names = line.partition(": ")
        if colon and line not in mismatches:
            parts.append(f"{kind}: {_shortened(names.rstrip('. ').replace(chr(34), '').split(', '), 3)}")
    return "; ".join(parts)


def _hub_message(name: str, error: Exception) -> str:
    return (
        f"weights of timm's {name} could not be downloaded ({first_line(error)[:120]}); download the model's "
        "model.safetensors elsewhere and give its path instead of 'hub'"
    )


def first_line(error: Exception) -> str:
    """An error's message without what follows its first line."""
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
