"""BERT (Devlin et al. 2019) as text encoder.

Parameters are named as in transformers' BertModel. What follows the last layer there (the pooler, and heads for
particular tasks) is left out.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from emkum.layers.shared_encoders import initialize_weights
from emkum.models.encoder import Encoder


class _Embeddings(nn.Module):
    def __init__(self, rows: tuple[int, int, int], width: int, dropout: float, norm_eps: float) -> None:
        super().__init__()
        words, positions, types = rows
        self.word_embeddings = nn.Embedding(words, width)
        self.position_embeddings = nn.Embedding(positions, width) if positions else None
        self.token_type_embeddings = nn.Embedding(types, width)
        self.LayerNorm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        # All of a text is its first segment.
        x = self.word_embeddings(tokens) + self.token_type_embeddings.weight[0]
        if self.position_embeddings is None:
            return x
        return x + self.position_embeddings.weight[: tokens.shape[1]]


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )  # (B, heads, N, D / heads) each
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, visible, dropout).transpose(1, 2).flatten(2)


class _Output(nn.Module):
    """Projection of what a part of the layer computed, residual, norm."""

    def __init__(self, width_in: int, width: int, dropout: float, norm_eps: float, drop_path: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, width)
        self.LayerNorm = nn.LayerNorm(width, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.drop_path(self.dropout(self.dense(x))))


class _Layer(nn.Module):
    def __init__(
        self,
        width: int,
        heads: int,
        ffn_width: int,
        dropout: float,
        attention_dropout: float,
        norm_eps: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        attention = _SelfAttention(width, heads, attention_dropout)
        output = _Output(width, width, dropout, norm_eps, drop_path)
        self.attention = nn.ModuleDict({"self": attention, "output": output})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, ffn_width)})
        self.output = _Output(ffn_width, width, dropout, norm_eps, drop_path)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, visible), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class BertEncoder(Encoder):
    """BERT without pooler and heads. The defaults are the released base models.

    Args:
        vocab_size: rows of the word embedding, special tokens included.
        width: D.
        layers: how many.
        heads: attention heads.
        ffn_width: hidden width of the feed-forward part.
        max_positions: longest input in tokens.
        token_types: rows of the embedding of segments, of which the first alone is used.
        dropout: after embedding, attention and feed-forward part.
        attention_dropout: of the attention weights.
        norm_eps: of every LayerNorm.
        drop_path: stochastic depth rate of the last layer, growing linearly from 0.
        own_positions: False = no table of positions; then any length is read.

    Attributes:
        vocab_size, width, ffn_width, max_positions, token_types, norm_eps: as given. num_layers, num_heads: likewise.

    Raises:
        ValueError: `width` is no multiple of `heads`.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        ffn_width: int = 3072,
        max_positions: int = 512,
        token_types: int = 2,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        norm_eps: float = 1e-12,
        drop_path: float = 0.0,
        own_positions: bool = True,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        rows = (vocab_size, max_positions if own_positions else 0, token_types)
        self.embeddings = _Embeddings(rows, width, dropout, norm_eps)
        blocks = nn.ModuleList(
            _Layer(width, heads, ffn_width, dropout, attention_dropout, norm_eps, float(rate))
            for rate in np.linspace(0, drop_path, layers)
        )
        self.encoder = nn.ModuleDict({"layer": blocks})
        self.apply(_initialize)
        self.vocab_size = vocab_size
        self.width = width
        self.num_layers = layers
        self.num_heads = heads
        self.ffn_width = ffn_width
        self.max_positions = max_positions
        self.token_types = token_types
        self.norm_eps = norm_eps

    def embed(self, inputs: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """(B, L, D), the sum of word, segment and position embeddings of (B, L) token ids, `[CLS]` first.

        Raises:
            ValueError: L exceeds `max_positions`, or `masked` is given.
        """
        if masked is not None:
            raise ValueError("a text is masked by its token ids")
        if self.embeddings.position_embeddings is not None and inputs.shape[1] > self.max_positions:
            raise ValueError(f"{inputs.shape[1]} tokens exceed the {self.max_positions} positions of the text encoder")
        return self.embeddings(inputs)

    def hidden_states(self, tokens: Tensor, padding_mask: Tensor | None = None) -> list[Tensor]:
        """(B, L, D) behind every layer; arguments as of `forward`."""
        return list(self._run(self.embed(tokens), padding_mask))[1:]

    def all_blocks(self) -> list[nn.Module]:
        """The layers in their order."""
        return list(self.encoder["layer"])

    def embedding_parameters(self) -> list[nn.Parameter]:
        """The table of words."""
        return [self.embeddings.word_embeddings.weight]

    def block_state(self, index: int) -> dict[str, Tensor]:
        """See Encoder. BERT's norms follow the residual that in timm's block they precede a branch of."""
        layer = self.encoder["layer"][index]
        attention, projections = layer.attention["output"], layer.attention["self"]
        parts = {
            "norm1": attention.LayerNorm,
            "attn.proj": attention.dense,
            "norm2": layer.output.LayerNorm,
            "mlp.fc1": layer.intermediate["dense"],
            "mlp.fc2": layer.output.dense,
        }
        state = {f"{name}.{kind}": getattr(part, kind) for name, part in parts.items() for kind in ("weight", "bias")}
        for kind in ("weight", "bias"):
            three = [
                getattr(projection, kind) for projection in (projections.query, projections.key, projections.value)
            ]
            state[f"attn.qkv.{kind}"] = torch.cat(three)
        return {name: value.detach() for name, value in state.items()}

    def drop_last_blocks(self, count: int) -> None:
        """Take the last layers off; those that are left keep their rates of stochastic depth."""
        self.num_layers -= count
        self.encoder["layer"] = self.encoder["layer"][: self.num_layers]

    def _run(self, tokens: Tensor, padding_mask: Tensor | None) -> Iterator[Tensor]:
        """What goes into the first layer, then what each layer gives."""
        visible = None if padding_mask is None else ~padding_mask[:, None, None].bool()
        x = self.embeddings.dropout(self.embeddings.LayerNorm(tokens))
        yield x
        for layer in self.encoder["layer"]:
            x = self._call(layer, x, visible)
            yield x


def _initialize(module: nn.Module) -> None:
    initialize_weights(module)
    if isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
