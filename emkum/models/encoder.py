"""What the encoders of all modalities have in common, and which layers of a pretrained model they keep."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emkum.errors import UserError
from emkum.outputs import Encoded


@dataclass(frozen=True)
class LayerChoice:
    """Which layers of a pretrained model make an encoder.

    Attributes:
        count: how many; None = as many as the rule gives.
        every_second: the 1st, 3rd, 5th ... instead of the first ones.
        further: that many more by the same rule, behind those that are kept (what a shared encoder can start from).
    """

    count: int | None = None
    every_second: bool = False
    further: int = 0

    def indices(self, total: int, source: Any) -> list[int]:
        """The chosen layers of a model that has `total`, counted from 0.

        Args:
            total: layers of the model.
            source: where it comes from, for messages.

        Raises:
            UserError: the model has fewer layers.
        """
        given = list(range(0, total, 2 if self.every_second else 1))
        count = len(given) - self.further if self.count is None else self.count
        if count < 1 or count + self.further > len(given):
            rule = f"{len(given)} by taking every second one" if self.every_second else f"{total} layers"
            behind = f" and {self.further} behind them for the shared encoder" if self.further else ""
            raise UserError(f"{source} has {rule}; {count} cannot be kept{behind}")
        return given[: count + self.further]


def renumbered_layers(state: Mapping[str, Tensor], prefix: str, kept: Sequence[int], total: int) -> dict[str, Tensor]:
    """Parameters of a model with the layers of `kept` alone, counted anew.

    Those of layers from `total` on keep their names: what has a gap in its layers is refused by these.

    Args:
        state: parameters; those of layers are called PREFIX, the layer's number, a point, and the rest.
        prefix: ends with a point.
        kept: layers of the model, counted from 0.
        total: how many layers there are.
    """
    places = {index: place for place, index in enumerate(kept)}
    renamed = {}
    for name, value in state.items():
        number, _, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix) or not number.isdigit() or int(number) >= total:
            renamed[name] = value
        elif int(number) in places:
            renamed[f"{prefix}{places[int(number)]}.{rest}"] = value
    return renamed


class Encoder(nn.Module):
    """Tokens of one modality, in two steps, so that something can be added to the tokens before the first block.

    Attributes:
        width: channels D. num_layers, num_heads: of its blocks.
        checkpoint_activations: recompute each block in the backward pass instead of keeping what it computed.
    """

    width: int
    num_layers: int
    num_heads: int
    checkpoint_activations = False

    def embed(self, inputs: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """(B, N, D) tokens before the first block, the CLS token first, with the encoder's own positions if it has any.

        Args:
            inputs: normalized (B, 3, S, S) images, (B, L) token ids, or normalized (B, L) samples of sounds.
            masked: (B, N - 1) bool, True at patches that `mask_token` replaces before positions are added; of images.
            mask_token: (D,).
        """
        raise NotImplementedError

    def encode(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, N, D) from `embed` through all blocks; `padding_mask` (B, N) is True at padding."""
        last = tokens
        for state in self._run(tokens, padding_mask):
            last = state
        return last

    def _run(self, tokens: Tensor, padding_mask: Tensor | None) -> Iterator[Tensor]:
        """(B, N, D) behind one block after the other; arguments as of `encode`."""
        raise NotImplementedError

    def token_padding(self, padding_mask: Tensor | None) -> Tensor | None:
        """The padding mask (B, N) of tokens from that of inputs (B, L); the same unless tokens stand for several."""
        return padding_mask

    def forward(self, inputs: Tensor, padding_mask: Tensor | None = None) -> Encoded:
        """Both steps: inputs and their padding mask (B, L), True at padding. At padding the tokens mean nothing."""
        padding_mask = self.token_padding(padding_mask)
        return Encoded(self.encode(self.embed(inputs), padding_mask), padding_mask)

    def all_blocks(self) -> list[nn.Module]:
        """The blocks in their order."""
        raise NotImplementedError

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Those of the patch or word embedding alone, without positions, CLS token and norms."""
        raise NotImplementedError

    def block_state(self, index: int) -> dict[str, Tensor]:
        """Parameters of a block by the names of timm's ViT block: norm1, attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2.

        Of blocks with a norm before each last projection, as BEiT-3's, attn.norm and mlp.norm too. Whatever scales a
        block's output is part of its weights here.
        """
        raise NotImplementedError

    def drop_last_blocks(self, count: int) -> None:
        """Take the last blocks off."""
        raise NotImplementedError

    def _call(self, block: Callable[..., Any], *arguments: Any) -> Any:
        """Run a block, in the way that `checkpoint_activations` says."""
        if self.checkpoint_activations and self.training and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)
