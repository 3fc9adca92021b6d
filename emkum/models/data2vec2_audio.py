"""Data2Vec 2's audio encoder, built of fairseq's modules by the bridge of `data2vec2`."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.models.data2vec2 import Data2Vec2Encoder, block_factory
from emkum.models.data2vec2_sources import data2vec2_module

# Kernel and stride of each convolution over samples, as released: a frame of 25 ms every 20 ms.
KERNELS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))


def position_slopes(heads: int) -> list[float]:
    """How much each head's attention falls with each frame of distance (ALiBi, Press et al. 2022, section 3).

    Of a number n that is a power of 2, 2^(-8 i / n) for i = 1 ... n; of another, those of the next lower power, then
    every second one of the next higher.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return slopes if power == heads else slopes + position_slopes(2 * power)[::2][: heads - power]


class Data2Vec2AudioEncoder(Data2Vec2Encoder):
    """Data2Vec 2's audio encoder, without masking and decoder. The defaults are the released base model's, but for the
    CLS token, which that has not.

    Convolutions make frames of samples; further ones over the frames are added as positions (relative ones: what they
    make of a frame depends on the frames around it); attention falls with distance, by a learned factor a head. Nothing
    depends on how much padding a batch has: the convolutions over frames see zeros at padding, as behind the end of a
    sound that stands alone. fairseq's own model shows them what the first convolutions make of padding.

    Args:
        embed_dim: width D.
        depth: main blocks, as fairseq counts them.
        prenet_depth: blocks before them that belong to the modality encoder.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        conv_width: channels of the convolutions over samples.
        position_width: frames that each position depends on, about.
        position_groups: groups of those convolutions; they divide D.
        position_layers: how many of them follow one another.
        dropout: before the first block, after attention and after the MLP.
        attention_dropout: of the attention weights.
        drop_path: stochastic depth rate of the last block, growing linearly from 0.
        norm_eps: of the blocks' LayerNorm.
        fused_attention: use FusedAttention instead of fairseq's own module.
        own_positions: add the positions of frames, and let attention fall with distance.
        position_biases: False = attention does not fall with distance.
        cls_token: put a token before the frames; False = frames alone, as in the released models.

    Attributes:
        width: D. num_layers: prenet and main blocks. num_heads: as given.

    Raises:
        UserError: heads or groups do not divide the width.
    """

    modality = "AUDIO"
    slopes: Tensor

    def __init__(
        self,
        embed_dim: int = 768,
        depth: int = 12,
        prenet_depth: int = 0,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        conv_width: int = 512,
        position_width: int = 95,
        position_groups: int = 16,
        position_layers: int = 5,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        fused_attention: bool = True,
        own_positions: bool = True,
        position_biases: bool = True,
        cls_token: bool = True,
    ) -> None:
        super().__init__()
        if embed_dim % position_groups:
            raise UserError(f"{position_groups} groups of positions do not divide a width of {embed_dim}")
        audio = data2vec2_module("models.modalities.audio")
        norm_layer = partial(nn.LayerNorm, eps=norm_eps)
        make_block = block_factory(embed_dim, num_heads, mlp_ratio, dropout, attention_dropout, norm_layer)
        config = audio.D2vAudioConfig(
            feature_encoder_spec=str([(conv_width, kernel, stride) for kernel, stride in KERNELS]),
            conv_pos_width=position_width,
            conv_pos_groups=position_groups,
            conv_pos_depth=position_layers,
            prenet_depth=prenet_depth,
            prenet_dropout=dropout,
            num_extra_tokens=int(cls_token),
            init_extra_token_zero=False,
            use_alibi_encoder=own_positions and position_biases,
            learned_alibi_scale=True,
            learned_alibi_scale_per_head=True,
            num_alibi_heads=num_heads,
            model_depth=depth,
            decoder=None,
        )
        encoder = audio.AudioEncoder(config, embed_dim, make_block, norm_layer, False, {}, None)
        if not own_positions:
            encoder.relative_positional_encoder = None
        self._assemble(encoder, [make_block() for _ in range(depth)], drop_path, fused_attention)
        encoder.reset_parameters()
        self.register_buffer("slopes", torch.tensor(position_slopes(num_heads)), persistent=False)
        self.width = embed_dim
        self.num_heads = num_heads

    @property
    def _audio(self) -> nn.Module:
        return self.modality_encoders[self.modality]

    @property
    def _extra(self) -> int:
        """Tokens before the frames."""
        return 0 if self._audio.extra_tokens is None else 1

    def embed(self, inputs: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """(B, 1 + N, D) of samples: CLS token and frames; `encode` adds positions, which depend on padding.

        Args:
            inputs: (B, L) samples at 16 kHz, of mean 0 and variance 1 in each sound, 0 at padding.
            masked, mask_token: None; only patches of images are replaced.

        Raises:
            ValueError: the samples are too few for a frame, or `masked` is given.
        """
        if masked is not None:
            raise ValueError("an audio encoder replaces no tokens")
        if count_frames(inputs.shape[1]) < 1:
            raise ValueError(f"{inputs.shape[1]} samples are less than a frame; pad them to {FRAME}")
        frames = self._audio.local_features(inputs)
        if self._extra == 0:
            return frames
        return torch.cat([self._audio.extra_tokens.to(frames.dtype).expand(len(frames), -1, -1), frames], dim=1)

    def token_padding(self, padding_mask: Tensor | None) -> Tensor | None:
        """(B, 1 + N) of tokens from (B, L) of samples: a frame is padding where any of its samples is."""
        if padding_mask is None:
            return None
        frames = torch.arange(count_frames(padding_mask.shape[1]), device=padding_mask.device)
        hidden = frames >= count_frames((~padding_mask).sum(1, keepdim=True))
        return F.pad(hidden, (self._extra, 0))

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Those of the convolutions over samples and of the map from them to the width."""
        return [*self._audio.local_encoder.parameters(), *self._audio.project_features.parameters()]

    def _before_blocks(self, tokens: Tensor, padding_mask: Tensor | None) -> Tensor:
        if self._audio.relative_positional_encoder is not None:
            extra, frames = tokens[:, : self._extra], tokens[:, self._extra :]
            hidden = None if padding_mask is None else padding_mask[:, self._extra :]
            tokens = torch.cat([extra, frames + self._positions(frames, hidden)], dim=1)
        return super()._before_blocks(tokens, padding_mask)

    def _positions(self, frames: Tensor, hidden: Tensor | None) -> Tensor:
        """(B, N, D) that is added to frames; at padding it means nothing."""
        # The first and the last layer only exchange channels and frames.
        into_channels, *layers, back = self._audio.relative_positional_encoder
        x = into_channels(frames)
        for layer in layers:
            x = layer(x if hidden is None else x.masked_fill(hidden[:, None], 0))
        return back(x)

    def _position_bias(self, tokens: Tensor, padding_mask: Tensor | None) -> Tensor | None:
        if self._audio.alibi_scale is None:
            return None
        places = torch.arange(tokens.shape[1] - self._extra, device=tokens.device)
        distances = (places[:, None] - places).abs()
        bias = -self.slopes.float()[:, None, None] * distances * self._audio.alibi_scale.float().clamp_min(0)[0]
        # The CLS token is as near to each frame as to itself.
        bias = F.pad(bias, (self._extra, 0, self._extra, 0))
        return bias if padding_mask is None else bias.masked_fill(padding_mask[:, None, None], float("-inf"))


def count_frames(samples: int | Tensor) -> int | Tensor:
    """Frames that the convolutions make of so many samples, which may be a tensor of integers; below 1 = none."""
    for kernel, stride in KERNELS:
        samples = (samples - kernel) // stride + 1
    return samples


def _samples_of_a_frame() -> int:
    samples = 1
    for kernel, stride in reversed(KERNELS):
        samples = (samples - 1) * stride + kernel
    return samples


# Samples that a frame is made of.
FRAME = _samples_of_a_frame()
