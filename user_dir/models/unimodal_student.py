"""Students of one modality, distilled layer by layer, as fairseq models."""

from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model
from torch import Tensor

from emkum.layers.attention import prepare_attention
from emkum.layers.precision import AUTOCAST_HELP, Autocast
from emkum.models.data2vec2 import Data2Vec2Encoder
from emkum.models.encoder import Encoder
from emkum.models.encoder_sources import (
    IMAGE_PARTS,
    TEXT_PARTS,
    image_encoder_from_options,
    text_encoder_from_options,
)
from emkum.models.parameter_groups import LearningRateConfig, assign_overrides
from emkum.models.student import ImageNormalizer
from emkum.objectives.patch_distillation import patch_distillation

from ..config import flat_dataclass
from ..layer_distillation import NONE, TEACHER, starts_alone


@dataclass
class _Base(FairseqDataclass):
    init_from: str = field(
        default=TEACHER,
        metadata={
            "help": f"what the student takes its layers from, sizes included: {TEACHER}, another run or pretrained "
            f"model of its kind, or {NONE} (the encoder's options alone say what it is and starts from)"
        },
    )
    autocast: Optional[str] = field(default=None, metadata={"help": AUTOCAST_HELP})


ImageStudentConfig = flat_dataclass("ImageStudentConfig", IMAGE_PARTS, base=_Base)
TextStudentConfig = flat_dataclass("TextStudentConfig", TEXT_PARTS, base=_Base)


class _LayerStudent(BaseFairseqModel):
    """An encoder whose layers follow a teacher's, with the loss by name that fairseq's criterion `model` takes.

    Args:
        encoder: gives `hidden_states`.
        autocast: see AUTOCAST_HELP.
        fused_attention: let the device choose among fused and plain attention.
    """

    # The parts by which learning rates are assigned.
    image_encoder: Encoder | None = None
    text_encoder: Encoder | None = None

    def __init__(self, encoder: Encoder, autocast: str | None = None, fused_attention: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        self.autocast = Autocast(autocast)
        self.fused_attention = fused_attention
        if isinstance(encoder, Data2Vec2Encoder):
            # Of its blocks what the MLP gives is compared: the last norm would get no gradient, which distributed
            # training does not take.
            encoder.all_blocks()[-1].norm2.requires_grad_(False)
        assign_overrides(self, self, LearningRateConfig())

    def _layers(self, inputs: Tensor, padding_mask: Tensor | None = None) -> list[Tensor]:
        prepare_attention(self, self.autocast, inputs.device, self.fused_attention)
        with self.autocast.context(inputs.device, enabled=self.training):
            return self.encoder.hidden_states(inputs, padding_mask)

    def max_positions(self) -> None:
        return None


@register_model("image_student", dataclass=ImageStudentConfig)
class ImageStudentModel(_LayerStudent):
    """An image encoder; its tokens go through LayerNorm before they are compared."""

    def __init__(self, encoder: Encoder, autocast: str | None = None, fused_attention: bool = True) -> None:
        super().__init__(encoder, autocast, fused_attention)
        self.normalize = ImageNormalizer(encoder.mean, encoder.std)

    @property
    def image_encoder(self) -> Encoder:
        return self.encoder

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "ImageStudentModel":
        encoder = image_encoder_from_options(cfg, pretrained=task.load_pretrained and starts_alone(cfg))
        return cls(encoder, cfg.autocast, cfg.student_attention == "fused")

    def forward(self, image: Tensor, targets: Tensor) -> dict[str, Any]:
        """The loss of (B, 3, S, S) uint8 images, for the teacher's tokens (B, N, D); a mean."""
        return {"losses": {"kd_patch": patch_distillation(self._layers(self.normalize(image)), targets)}}


@register_model("text_student", dataclass=TextStudentConfig)
class TextStudentModel(_LayerStudent):
    """A text encoder; its tokens are compared as they are."""

    @property
    def text_encoder(self) -> Encoder:
        return self.encoder

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "TextStudentModel":
        pretrained = task.load_pretrained and starts_alone(cfg)
        tokenizer = task.tokenizer
        encoder = text_encoder_from_options(cfg, tokenizer.vocab_size, tokenizer.special.pad, pretrained)
        return cls(encoder, cfg.autocast, cfg.student_attention == "fused")

    def forward(self, text: Tensor, padding_mask: Tensor | None, targets: Tensor, num_tokens: int) -> dict[str, Any]:
        """The loss of texts, summed over tokens, so that every token counts alike in an update of several batches.

        Args:
            text: (B, L) ids.
            padding_mask: (B, L), True at padding; None where nothing is padded.
            targets: (B, L, D), the teacher's tokens.
            num_tokens: tokens that are no padding.
        """
        layers = self._layers(text, padding_mask)
        loss = patch_distillation(layers, targets, padding_mask, norm_channels=False)
        return {"losses": {"kd_patch": num_tokens * loss}, "sample_size": num_tokens}
