"""What a model consists of and what it costs, told without its weights: all of it runs on the meta device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

# Batch sizes at which the memory of activations is measured; a batch of one broadcasts where others do not.
_MEASURED = (2, 4)
_FLOAT32 = 4


class _StayOnMeta(TorchFunctionMode):
    """Some initializations go by way of the CPU, where a tensor without memory cannot go."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cpu and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_memory() -> Iterator[None]:
    """Within it, modules are made with parameters on the meta device, which have shapes alone."""
    with _StayOnMeta(), torch.device("meta"):
        yield


# ----------------------------------------------------------------------------------------------------------------------
# Parameters
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of a model.

    Attributes:
        name: in words.
        parameters: how many.
        trainable: how many of them learn.
        kind: class of the module; empty where it is torch's own or a group of parameters.
        parts: what it consists of; empty where it is not taken apart.
    """

    name: str
    parameters: int
    trainable: int
    kind: str = ""
    parts: tuple["Part", ...] = ()

    @property
    def frozen(self) -> int:
        """How many parameters do not learn."""
        return self.parameters - self.trainable


def part_tree(module: nn.Module, name: str, levels: int = 2) -> Part:
    """Parameters of a module and of its parts; a part without parameters is left out.

    Encoders, which are what has `all_blocks`, are taken apart into embedding, blocks and the rest; other modules into
    their children, but for layers in a row.

    Args:
        module: on any device.
        name: of the whole.
        levels: down to which the parts of parts are told.
    """
    if hasattr(module, "all_blocks"):
        parts = _encoder_parts(module)
    elif levels > 0 and any(True for _ in module.children()) and not isinstance(module, nn.Sequential):
        own = ((name, [parameter]) for name, parameter in module.named_parameters(recurse=False))
        parts = [_group(name.replace("_", " "), parameters) for name, parameters in own]
        parts += [part_tree(child, key.replace("_", " "), levels - 1) for key, child in module.named_children()]
    else:
        parts = []
    whole = _group(name, list(module.parameters()))
    kept = tuple(part for part in parts if part.parameters)
    kind = "" if type(module).__module__.startswith("torch.") else type(module).__name__
    return Part(name, whole.parameters, whole.trainable, kind, kept)


def _group(name: str, parameters: Sequence[nn.Parameter]) -> Part:
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return Part(name, sum(parameter.numel() for parameter in parameters), trainable)


def _encoder_parts(encoder: Any) -> list[Part]:
    """Consecutive blocks that have as many parameters and learn alike are told together."""
    embedding, blocks = list(encoder.embedding_parameters()), encoder.all_blocks()
    known = {id(p) for p in embedding} | {id(p) for block in blocks for p in block.parameters()}
    others = [parameter for parameter in encoder.parameters() if id(parameter) not in known]
    parts = [_group("embedding", embedding), _group("positions, tokens, norms", others)]
    numbered = ((number, _group("", list(block.parameters()))) for number, block in enumerate(blocks, start=1))
    for _, run in groupby(numbered, key=lambda item: item[1]):
        members = list(run)
        first, last = members[0][0], members[-1][0]
        name = f"block {first}" if first == last else f"blocks {first} to {last}"
        sums = (sum(getattr(part, key) for _, part in members) for key in ("parameters", "trainable"))
        parts.append(Part(name, *sums))
    return parts


# ----------------------------------------------------------------------------------------------------------------------
# Operations
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InputSizes:
    """What a student reads.

    Attributes:
        image_size: side of an image in pixels.
        tokens: of a caption, special ones included.
        captions: of an image.
        samples: of a sound; 0 = none is heard.
    """

    image_size: int
    tokens: int
    captions: int = 1
    samples: int = 0

    def images(self, count: int) -> Tensor:
        """(count, 3, S, S) uint8 on the meta device."""
        return torch.empty(count, 3, self.image_size, self.image_size, dtype=torch.uint8, device="meta")

    def texts(self, count: int) -> Tensor:
        """(count, L) ids on the meta device; nothing is padded."""
        return torch.empty(count, self.tokens, dtype=torch.int64, device="meta")

    def sounds(self, count: int) -> Tensor:
        """(count, L) int16 on the meta device; nothing is padded."""
        return torch.empty(count, self.samples, dtype=torch.int16, device="meta")


def count_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products and convolutions in whatever `run` does; a multiplication and an
    addition count as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def student_flops(student: nn.Module, sizes: InputSizes) -> dict[str, int]:
    """Operations of a forward of one `image`, one `caption` and, where it hears, one `sound`, through both encoders and
    the heads.

    Args:
        student: on the meta device; has `encode_image`, `encode_text` and, where sounds are heard, `encode_audio`.
        sizes: of its input.
    """
    found = {
        "image": count_flops(lambda: student.encode_image(sizes.images(1))),
        "caption": count_flops(lambda: student.encode_text(sizes.texts(1))),
    }
    return found | ({"sound": count_flops(lambda: student.encode_audio(sizes.sounds(1)))} if sizes.samples else {})


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes, in float32.

    Attributes:
        weights: parameters.
        buffers: the rest of a model's state, such as banks of features.
        gradients: of what is trainable.
        moments: Adam's two.
        activations: what a batch's forward pass keeps for the backward pass.
    """

    weights: int
    buffers: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.buffers + self.gradients + self.moments + self.activations


def estimate_memory(model: nn.Module, student: nn.Module, sizes: InputSizes, batch_size: int) -> MemoryEstimate:
    """Memory of training a student.

    Args:
        model: all that is trained and kept, the student included; on the meta device.
        student: has `encode_image` and `encode_text`.
        sizes: of its input.
        batch_size: images.
    """
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return MemoryEstimate(
        weights=sum(parameter.nbytes for parameter in model.parameters()),
        buffers=sum(buffer.nbytes for buffer in model.buffers()),
        gradients=_FLOAT32 * trainable,
        moments=2 * _FLOAT32 * trainable,
        activations=activation_bytes(student, sizes, batch_size),
    )


def activation_bytes(student: nn.Module, sizes: InputSizes, batch_size: int) -> int:
    """Bytes that a training forward of `batch_size` images with captions and sounds keeps for the backward pass,
    extrapolated linearly from two small batches.

    Attention through `scaled_dot_product_attention` counts as a fused kernel, which keeps no attention matrix.
    """

    def run(count: int) -> None:
        student.encode_image(sizes.images(count))
        student.encode_text(sizes.texts(count * sizes.captions))
        if sizes.samples:
            student.encode_audio(sizes.sounds(count))

    mode = student.training
    student.train()
    few, more = (saved_bytes(student, lambda count=count: run(count)) for count in _MEASURED)
    student.train(mode)
    slope = (more - few) / (_MEASURED[1] - _MEASURED[0])
    return round(few + slope * (batch_size - _MEASURED[0]))


def saved_bytes(module: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that the backward pass of whatever `run` does needs: each storage once, without the module's own
    parameters and buffers."""
    own = {_storage(tensor) for tensor in (*module.parameters(), *module.buffers())}
    # Tensors are held, so that no storage takes the place of an earlier one.
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept.setdefault(_storage(tensor), tensor)
        return tensor

    with _FusedKernels(), saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _FusedKernels(TorchFunctionMode):
    """On the meta device, scaled_dot_product_attention is made of matrix products, which keep attention matrices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            return _FusedAttention.apply(*args[:3], mask)
        return func(*args, **kwargs)


class _FusedAttention(torch.autograd.Function):
    """Keeps what fused kernels keep (Dao et al. 2022, "FlashAttention", algorithm 4), and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = torch.empty_like(query)
        log_sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, mask, output, log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, *_ = ctx.saved_tensors
        return (*(torch.empty_like(tensor) for tensor in (query, key, value)), None)


# ----------------------------------------------------------------------------------------------------------------------
# Values
# ----------------------------------------------------------------------------------------------------------------------


def describe_values(values: Tensor) -> dict[str, float]:
    """Mean, standard deviation (of the population), least and greatest of some values, and the same of their absolute
    values, by names that begin with `absolute_`."""
    found = {}
    for prefix, part in (("", values.double()), ("absolute_", values.double().abs())):
        figures = {"mean": part.mean(), "std": part.std(correction=0), "min": part.min(), "max": part.max()}
        found |= {prefix + name: figure.item() for name, figure in figures.items()}
    return found
