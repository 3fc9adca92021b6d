"""The image quantizer as a fairseq model."""

from dataclasses import dataclass
from typing import Any

from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model

from emkum.models.quantizer import ImageQuantizer, QuantizerConfig
from emkum.options import collect_parts
from emkum.outputs import TeacherOutput

from ..config import flat_dataclass


@dataclass
class _Base(FairseqDataclass):
    pass


ImageQuantizerConfig = flat_dataclass("ImageQuantizerConfig", {"quantizer": QuantizerConfig}, base=_Base)


@register_model("image_quantizer", dataclass=ImageQuantizerConfig)
class ImageQuantizerModel(BaseFairseqModel):
    """`emkum.models.quantizer.ImageQuantizer` with its losses by name, as fairseq's criterion `model` takes them."""

    def __init__(self, quantizer: ImageQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "ImageQuantizerModel":
        config = collect_parts({"quantizer": QuantizerConfig}, cfg)["quantizer"]
        model = cls(ImageQuantizer(config, task.teacher.width, task.teacher.patch_width))
        for path, parameter in model.quantizer.named_parameters():
            parameter.optim_overrides = {
                "optimizer": {"lr_scale": 1.0, "weight_decay_scale": 0.0 if parameter.ndim < 2 else 1.0},
                "part": path.partition(".")[0].replace("_", " "),
            }
        return model

    def forward(self, targets: TeacherOutput) -> dict[str, Any]:
        """Losses of a batch, and figures for the log."""
        output = self.quantizer(targets)
        losses = {"rebuild": output.rebuild_loss, "commitment": output.commitment_loss}
        return {"losses": losses, "logs": output.figures}

    def set_num_updates(self, num_updates: int) -> None:
        """fairseq calls this before each batch and before it restores a checkpoint, with the number of updates done."""
        super().set_num_updates(num_updates)
        self.quantizer.begin_update(num_updates)

    def max_positions(self) -> None:
        return None
