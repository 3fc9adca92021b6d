"""Exact large batches on one device: encode in chunks without graph, then replay each with its features' gradients.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache), as one function
of the parameters: whatever losses are computed of the outputs, their gradients arrive here, and each chunk runs once
more with a graph of its own, in the random state of its first run.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emkum.outputs import ModalityOutput

# The part of a batch that a chunk is, and what it gives.
Encode = Callable[..., ModalityOutput]
_FIELDS = tuple(item.name for item in fields(ModalityOutput) if item.name != "padding_mask")


def encode_in_chunks(
    encode: Encode,
    chunks: Sequence[tuple[Any, ...]],
    module: nn.Module,
    length: int = 0,
    keep_tokens: bool = True,
    padding_mask: Tensor | None = None,
) -> ModalityOutput:
    """What `encode` gives for all chunks, with the gradients that one run of the whole would have.

    Args:
        encode: arguments of one chunk to its output.
        chunks: arguments of each chunk, in the order of rows.
        module: has the parameters that `encode` uses.
        length: N, tokens of the longest rows, to which those of shorter chunks are padded; 0 = all are of one length.
        keep_tokens: give all tokens, not the CLS tokens alone.
        padding_mask: (R, N) of all rows, handed on with the tokens.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    names: list[str] = []

    def run(arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        output = encode(*arguments)
        # A view would keep all tokens of a chunk in memory.
        tokens = output.tokens if keep_tokens else output.tokens[:, :1].clone()
        if length and tokens.shape[1] > 1:
            tokens = F.pad(tokens, (0, 0, 0, length - tokens.shape[1]))
        attention = output.cls_attention if keep_tokens else None
        if length and attention is not None:
            attention = F.pad(attention, (0, length - attention.shape[1]))
        found = {name: getattr(output, name) for name in _FIELDS} | {"tokens": tokens, "cls_attention": attention}
        names[:] = [name for name, value in found.items() if value is not None]
        return tuple(found[name] for name in names)

    values = _Replayed.apply(run, chunks, *parameters)
    found = dict(zip(names, values, strict=True))
    has_all = found["tokens"].shape[1] > 1
    return ModalityOutput(**found, padding_mask=padding_mask if has_all else None)


def pieces_of_groups(groups: Sequence[tuple[int, int]], chunk: int) -> list[tuple[slice, int]]:
    """Rows and length of each chunk, for rows that come in groups of (rows, length); at most `chunk` rows each."""
    pieces, start = [], 0
    for rows, length in groups:
        for first in range(start, start + rows, chunk):
            pieces.append((slice(first, min(first + chunk, start + rows)), length))
        start += rows
    return pieces


class _Replayed(torch.autograd.Function):
    """run(chunk) for each chunk, as a function of the parameters."""

    @staticmethod
    def forward(ctx: Any, run: Callable, chunks: Sequence[tuple], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.chunks, ctx.parameters = run, chunks, parameters
        # What no loss looks at gets no gradient, instead of zeros.
        ctx.set_materialize_grads(False)
        ctx.random_states, outputs = [], []
        for chunk in chunks:
            ctx.random_states.append(_random_state())
            outputs.append(run(chunk))
        ctx.rows = [output[0].shape[0] for output in outputs]
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        total: list[Tensor | None] = [None] * len(ctx.parameters)
        present, start = _random_state(), 0
        for chunk, state, rows in zip(ctx.chunks, ctx.random_states, ctx.rows, strict=True):
            _set_random_state(state)
            with torch.enable_grad():
                outputs = ctx.run(chunk)
            learned = [
                (output, gradient[start : start + rows])
                for output, gradient in zip(outputs, gradients, strict=True)
                if gradient is not None and output.requires_grad
            ]
            start += rows
            if not learned:
                continue
            output_parts, gradient_parts = zip(*learned, strict=True)
            found = torch.autograd.grad(output_parts, ctx.parameters, gradient_parts, allow_unused=True)
            for index, gradient in enumerate(found):
                if gradient is not None:
                    total[index] = gradient if total[index] is None else total[index].add_(gradient)
        _set_random_state(present)
        return None, None, *total


def _random_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
