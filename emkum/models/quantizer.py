"""The image quantizer: a frozen teacher's image feature as one of J codes, from which it can be rebuilt.

The feature becomes a code of few channels, and a decoder of one block rebuilds it from that code and a few of the
image's patches. What the patches do not tell about the image as a whole must be in the code.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from emkum.distributed import row_offset, world_size
from emkum.errors import UserError
from emkum.layers.precision import normalized
from emkum.layers.shared_encoders import initialize_weights
from emkum.models.codebook import Codebook
from emkum.outputs import TeacherOutput


@dataclass
class QuantizerConfig:
    codes: int = field(default=1024, metadata={"help": "codes J"})
    code_width: int = field(default=8, metadata={"help": "channels S of a code"})
    decay: float = field(default=0.99, metadata={"help": "how much of a code's moving averages stays at an update"})
    mask: float = field(default=0.9, metadata={"help": "part of the patches that the decoder does not see"})
    revive_below: float = field(
        default=0.05,
        metadata={"help": "a code is put elsewhere where its usage is below this part of the mean one; 0 = never"},
    )
    window: int = field(default=100, metadata={"help": "updates over which codes count as used, in the log"})


@dataclass
class QuantizerOutput:
    """Scalars of a batch.

    Attributes:
        rebuild_loss: 1 - cosine similarity of the rebuilt feature and the feature.
        commitment_loss: squared distance between vector and code.
        figures: see `Codebook.figures`; and `rebuilt`, the mean cosine in percent.
    """

    rebuild_loss: Tensor
    commitment_loss: Tensor
    figures: dict[str, Tensor]


def draw_mask(rows: int, patches: int, part: float, device: torch.device, training: bool) -> Tensor:
    """(rows, patches) bool, True at so many patches of each row as `part` says, drawn evenly.

    In training all ranks draw for all rows from generators in the same state (fairseq seeds them so at each update) and
    take their own; the result does not depend on how many ranks there are. Otherwise it is the same at each call.
    """
    if training:
        noise = torch.rand(rows * world_size(), patches, device=device)[row_offset(rows) :][:rows]
    else:
        noise = torch.rand(rows, patches, generator=torch.Generator(device).manual_seed(0), device=device)
    return noise.argsort(1).argsort(1) < round(part * patches)


class ImageQuantizer(nn.Module):
    """Codes for a teacher's features.

    Args:
        config: sizes and rates.
        width: channels D of the teacher's feature.
        patch_width: channels of its patches.

    Raises:
        UserError: an option is out of its range.
    """

    def __init__(self, config: QuantizerConfig, width: int, patch_width: int) -> None:
        super().__init__()
        _check(config)
        self.mask = config.mask
        self.project = nn.Linear(width, config.code_width)
        self.codebook = Codebook(config.codes, config.code_width, config.decay, config.revive_below, config.window)
        self.unproject = nn.Linear(config.code_width, width)
        self.patch_projection = nn.Identity() if patch_width == width else nn.Linear(patch_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        norm = partial(nn.LayerNorm, eps=1e-6)
        heads = next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)
        self.decoder = Block(width, heads, qkv_bias=True, norm_layer=norm)
        self.head = nn.Sequential(norm(width), nn.Linear(width, width))
        self.apply(initialize_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def begin_update(self, num_updates: int) -> None:
        """To be called before each batch with the number of updates done: the codes move once an update."""
        self.codebook.begin_update(num_updates)

    def codes_of(self, features: Tensor) -> Tensor:
        """(B,) int64, codes of features (B, D)."""
        return self.codebook.nearest(normalized(self.project(features.to(self.project.weight.dtype))))

    def forward(self, teacher: TeacherOutput) -> QuantizerOutput:
        """Losses of a batch of a teacher's features and patches."""
        # The parameters may be of half precision, which the codebook is not.
        kind = self.project.weight.dtype
        features = teacher.features.to(kind)
        vectors = normalized(self.project(features))
        codes = self.codebook(vectors)
        # The value is the code's, the gradient goes to the vector.
        passed = vectors + (codes - vectors).detach()
        rebuilt = self.head(self._decode(self.unproject(passed.to(kind)), teacher.patches.to(kind)))
        cosine = (normalized(rebuilt) * normalized(teacher.features)).sum(1).mean()
        commitment = (vectors - codes).square().sum(1).mean()
        figures = {"rebuilt": cosine.detach() * 100} | self.codebook.figures()
        return QuantizerOutput(1 - cosine, commitment, figures)

    def _decode(self, feature: Tensor, patches: Tensor) -> Tensor:
        """(B, D) out of the first token, (B, D), and patches (B, N, D_p) of which most are masked."""
        masked = draw_mask(*patches.shape[:2], self.mask, patches.device, self.training)
        visible = torch.where(masked[..., None], self.mask_token, self.patch_projection(patches))
        return self.decoder(torch.cat([feature[:, None], visible], dim=1))[:, 0]


def _check(config: QuantizerConfig) -> None:
    for name, least in (("codes", 2), ("code_width", 1), ("window", 1)):
        if getattr(config, name) < least:
            raise UserError(f"--quantizer-{name.replace('_', '-')} {getattr(config, name)}: want {least} or more")
    if not 0 <= config.decay < 1:
        raise UserError(f"--quantizer-decay {config.decay:g}: want 0 to below 1")
    if not 0 <= config.mask <= 1:
        raise UserError(f"--quantizer-mask {config.mask:g}: want 0 (none) to 1 (all)")
    if not 0 <= config.revive_below < 1:
        raise UserError(f"--quantizer-revive-below {config.revive_below:g}: want 0 (never) to below 1")
