"""DINO on images alone (Caron et al. 2021): a way to make a self-supervised image teacher from scratch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.models import register_model
from omegaconf import II
from torch import Tensor, nn

from emkum.layers.attention import prepare_attention
from emkum.layers.ema import EmaCopy
from emkum.layers.precision import AUTOCAST_HELP, Autocast
from emkum.models.encoder import Encoder
from emkum.models.encoder_sources import IMAGE_PARTS, image_encoder_from_options
from emkum.models.parameter_groups import LearningRateConfig, assign_overrides
from emkum.models.student import ImageNormalizer
from emkum.objectives import Setting
from emkum.objectives.self_distillation import SelfDistillation, SelfDistillationConfig
from emkum.options import collect_parts
from emkum.outputs import Batch, ModalityOutput, StudentOutput

from ..config import flat_dataclass
from ..updates import UpdatingModel, average_decay


@dataclass
class DinoAverageConfig:
    decay: float = field(
        default=0.996, metadata={"help": "decay an update of the moving average, which is the teacher"}
    )
    end_decay: float = field(default=1.0, metadata={"help": "the same at the end of the run, along half a cosine"})


@dataclass
class _Base(FairseqDataclass):
    autocast: Optional[str] = field(default=None, metadata={"help": AUTOCAST_HELP})
    max_update: int = II("optimization.max_update")


_PARTS = {**IMAGE_PARTS, "dino": SelfDistillationConfig, "average": DinoAverageConfig}
DinoImageConfig = flat_dataclass("DinoImageConfig", _PARTS, base=_Base)


@register_model("dino_image", dataclass=DinoImageConfig)
class DinoImageModel(UpdatingModel):
    """An image encoder that learns from its moving average, which sees other crops of the same image.

    Of a run's checkpoint, `emkum.models.encoder_sources` takes the average.

    Args:
        encoder: of images.
        objective: compares views; what it calls captions are the second crops.
        decay: of the average, from the number of updates done.
        autocast: see AUTOCAST_HELP.
        fused_attention: let the device choose among fused and plain attention.
    """

    # The parts by which learning rates are assigned: no text here.
    text_encoder = None

    def __init__(
        self,
        encoder: Encoder,
        objective: SelfDistillation,
        decay: Callable[[int], float],
        autocast: str | None = None,
        fused_attention: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        # timm's encoders end without a norm.
        self.norm = nn.LayerNorm(encoder.width, eps=1e-6)
        self.normalize = ImageNormalizer(encoder.mean, encoder.std)
        self.objective = objective
        self.average = EmaCopy(self._backbone(), decay(0))
        self.decay = decay
        self.autocast = Autocast(autocast)
        self.fused_attention = fused_attention
        assign_overrides(self, self, LearningRateConfig())

    @property
    def image_encoder(self) -> Encoder:
        return self.encoder

    def _backbone(self) -> nn.ModuleDict:
        return nn.ModuleDict({"encoder": self.encoder, "norm": self.norm})

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "DinoImageModel":
        parts = collect_parts({"dino": SelfDistillationConfig, "average": DinoAverageConfig}, cfg)
        average = parts["average"]
        encoder = image_encoder_from_options(cfg, pretrained=task.load_pretrained)
        setting = Setting(encoder.width, encoder.width, vocab_size=0, num_images=0, max_updates=max(0, cfg.max_update))
        objective = SelfDistillation(parts["dino"], setting)
        decay = average_decay(average.decay, average.end_decay, cfg.max_update)
        return cls(encoder, objective, decay, cfg.autocast, cfg.student_attention == "fused")

    def forward(self, views: list[Tensor]) -> dict[str, Any]:
        """The loss of a batch.

        Args:
            views: (B, 3, S, S) uint8 each, crops of the same B images; the average sees the first two alone.

        Returns:
            losses: cross-entropy by name, a mean over pairs of views. logs: accuracy, how many of the student's first
            and further views are nearest to the average's second view of their image, among those of the batch
            (percent), and the entropy of what the average gives.
        """
        images = len(views[0])
        prepare_attention(self, self.autocast, views[0].device, self.fused_attention)
        pixels = self.normalize(torch.cat(views))
        with self.autocast.context(pixels.device, enabled=self.training):
            with torch.no_grad():
                average = _features(self.average.module, pixels[: 2 * images])
            student = _features(self._backbone(), pixels)
        rows = torch.arange(images, device=pixels.device)
        output = self.objective(_output(student, images, _output(average, images)), None, Batch(rows, rows))
        logs = {"accuracy": output.metrics["image_accuracy"], "teacher_entropy": output.metrics["teacher_entropy"]}
        return {"losses": {"dino": output.loss}, "logs": logs}

    def begin_update(self, num_updates: int) -> None:
        """Let the average follow, and the objective move what moves once an update."""
        decay = self.decay(num_updates)
        self.average.follow(self._backbone(), num_updates, decay)
        self.objective.begin_update(num_updates, decay)


def _features(backbone: nn.ModuleDict, pixels: Tensor) -> Tensor:
    """(R, 1, D), the normed CLS tokens of R crops."""
    return backbone["norm"](backbone["encoder"](pixels).tokens[:, :1])


def _output(features: Tensor, images: int, average: StudentOutput | None = None) -> StudentOutput:
    """Views one behind the other, as the objective takes them: first, second and further ones."""
    first, second, further = features[:images], features[images : 2 * images], features[2 * images :]
    crops = ModalityOutput(further) if len(further) > 0 else None
    return StudentOutput(ModalityOutput(first), ModalityOutput(second), average=average, crops=crops)
