"""An image encoder with a classification head as a fairseq model."""

from dataclasses import dataclass, field
from typing import Any, Optional

import torch.nn.functional as F
from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model
from torch import Tensor

from emkum.errors import UserError
from emkum.evaluation.classification import label_ranks
from emkum.layers.attention import prepare_attention
from emkum.layers.precision import AUTOCAST_HELP, Autocast, at_least_float32
from emkum.models.classification_head import PatchMeanHead
from emkum.models.encoder import Encoder
from emkum.models.encoder_sources import (
    IMAGE_FORMS,
    IMAGE_PARTS,
    LoadedEncoder,
    image_encoder_from_options,
    load_image_encoder,
)
from emkum.models.parameter_groups import LearningRateConfig, assign_overrides
from emkum.models.student import ImageNormalizer
from emkum.options import collect_parts
from emkum.weights import load_strictly

from ..config import flat_dataclass


@dataclass
class _Base(FairseqDataclass):
    init_from: Optional[str] = field(
        default=None,
        metadata={
            "help": f"image encoder to start from: {IMAGE_FORMS}. It brings its own architecture, whatever image and "
            "student options say of that; empty = as these say"
        },
    )
    init_weights: Optional[str] = field(
        default=None, metadata={"help": "of --init-from timm:NAME: a local file, or hub; empty = random"}
    )
    init_image_size: int = field(
        default=0, metadata={"help": "input of the --init-from encoder in pixels; 0 = as it was trained"}
    )
    init_layers: int = field(
        default=0, metadata={"help": "blocks of the --init-from encoder to keep, the first; 0 = all"}
    )
    autocast: Optional[str] = field(default=None, metadata={"help": AUTOCAST_HELP})


_PARTS = {**IMAGE_PARTS, "lr_scale": LearningRateConfig}
ImageClassifierConfig = flat_dataclass("ImageClassifierConfig", _PARTS, base=_Base)


@register_model("image_classifier", dataclass=ImageClassifierConfig)
class ImageClassifierModel(BaseFairseqModel):
    """Images to classes, with the losses by name that fairseq's criterion `model` takes.

    Args:
        encoder: with attributes `mean` and `std`, that images are normalized with.
        num_classes: C.
        autocast: see AUTOCAST_HELP.
        fused_attention: let the device choose among fused and plain attention.
    """

    # The parts by which learning rates are assigned: no text here.
    text_encoder = None

    def __init__(
        self, encoder: Encoder, num_classes: int, autocast: str | None = None, fused_attention: bool = True
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = PatchMeanHead(encoder.width, num_classes)
        self.normalize = ImageNormalizer(encoder.mean, encoder.std)
        self.autocast = Autocast(autocast)
        self.fused_attention = fused_attention

    @property
    def image_encoder(self) -> Encoder:
        return self.encoder

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "ImageClassifierModel":
        start: LoadedEncoder | None = task.start
        encoder = image_encoder_from_options(cfg, pretrained=start is None and task.load_pretrained)
        if start is not None:
            load_strictly(encoder, start.encoder.state_dict(), cfg.init_from)
        model = cls(encoder, len(task.class_names), cfg.autocast, cfg.student_attention == "fused")
        assign_overrides(model, model, collect_parts({"lr_scale": LearningRateConfig}, cfg)["lr_scale"])
        return model

    def forward(self, image: Tensor, labels: Tensor) -> dict[str, Any]:
        """The loss of B images, and at validation figures to add up.

        Args:
            image: (B, 3, S, S), pixels from 0 to 255, integers or floating point.
            labels: (B,) int64, or (B, C) shares of each class that sum to 1.

        Returns:
            losses: cross-entropy by name, the mean over the batch; at validation the sum over the images, whose number
            is sample_size. logs: at validation, how many images there are and of how many the right class is among
            the first one and the first five.
        """
        logits = at_least_float32(self.logits(image))
        if self.training:
            return {"losses": {"classification": F.cross_entropy(logits, labels)}}
        ranks = label_ranks(logits, labels)
        return {
            "losses": {"classification": F.cross_entropy(logits, labels, reduction="sum")},
            "sample_size": len(labels),
            "logs": {"_images": len(labels), "_top1": (ranks < 1).sum(), "_top5": (ranks < 5).sum()},
        }

    def logits(self, image: Tensor) -> Tensor:
        """(B, C) of images as `forward` takes them."""
        prepare_attention(self, self.autocast, image.device, self.fused_attention)
        with self.autocast.context(image.device, enabled=self.training):
            return self.head(self.encoder(self.normalize(image)))

    def max_positions(self) -> None:
        return None


def load_start(cfg: Any) -> LoadedEncoder | None:
    """Load the encoder that `--init-from` names, and let the options say what it is made of, so that checkpoints of the
    classifier can be read without it.

    Args:
        cfg: the model's flat options, changed in place.

    Returns:
        None where they name no encoder.

    Raises:
        UserError: the encoder cannot be read or described, or options of one stand without it.
    """
    if not cfg.init_from:
        for name in ("init_weights", "init_image_size", "init_layers"):
            if cfg[name]:
                raise UserError(
                    f"--{name.replace('_', '-')} {cfg[name]} is of the encoder that --init-from names: give it"
                )
        return None
    start = load_image_encoder(cfg.init_from, cfg.init_weights or "", cfg.init_image_size, cfg.init_layers)
    if not start.options:
        raise UserError(
            f"--init-from {cfg.init_from}: its image encoder needs what the student adds before it, such as positions "
            "of its own, so it cannot be fine-tuned alone"
        )
    for name, value in {**start.options, "image_weights": None}.items():
        cfg[name] = value
    return start
