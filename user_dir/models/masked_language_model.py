"""A text encoder with BERT's head for masked language modeling, as a fairseq model."""

from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model
from torch import Tensor

from emkum.layers.precision import AUTOCAST_HELP, Autocast
from emkum.models.encoder import Encoder
from emkum.models.encoder_sources import TEXT_PARTS, text_encoder_from_options
from emkum.models.masked_language_model import MaskedLanguageHead, masked_language_modeling
from emkum.models.parameter_groups import LearningRateConfig, assign_overrides

from ..config import flat_dataclass


@dataclass
class _Base(FairseqDataclass):
    autocast: Optional[str] = field(default=None, metadata={"help": AUTOCAST_HELP})


MaskedLanguageModelConfig = flat_dataclass("MaskedLanguageModelConfig", TEXT_PARTS, base=_Base)


@register_model("masked_language_model", dataclass=MaskedLanguageModelConfig)
class MaskedLanguageModel(BaseFairseqModel):
    """An encoder trained by itself; `emkum.models.encoder_sources` reads it out of checkpoints.

    Args:
        encoder: of texts.
        vocab_size: of its tokenizer.
        autocast: see AUTOCAST_HELP.
    """

    # The parts by which learning rates are assigned: no images here.
    image_encoder = None

    def __init__(self, encoder: Encoder, vocab_size: int, autocast: str | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = MaskedLanguageHead(encoder.width, vocab_size)
        self.autocast = Autocast(autocast)
        assign_overrides(self, self, LearningRateConfig())

    @property
    def text_encoder(self) -> Encoder:
        return self.encoder

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "MaskedLanguageModel":
        tokenizer = task.tokenizer
        encoder = text_encoder_from_options(cfg, tokenizer.vocab_size, tokenizer.special.pad, task.load_pretrained)
        return cls(encoder, tokenizer.vocab_size, cfg.autocast)

    def forward(self, text: Tensor, padding_mask: Tensor | None, targets: Tensor, num_targets: int) -> dict[str, Any]:
        """Loss, summed over the tokens to predict, whose number is the sample size, and their accuracy in percent.

        Args are those of `emkum.models.masked_language_model.masked_language_modeling`.
        """
        with self.autocast.context(text.device, enabled=self.training):
            output = masked_language_modeling(self.encoder, self.head, text, targets, num_targets, padding_mask)
        # There may be none in a batch of few short texts.
        count = max(1, num_targets)
        return {
            "losses": {"masked_language": output.loss_sum},
            "sample_size": count,
            "logs": {"accuracy": 100.0 * output.correct / count},
        }

    def max_positions(self) -> None:
        return None
