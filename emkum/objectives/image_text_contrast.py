"""Image-text contrast (ITC): InfoNCE between images and captions, both ways (CLIP, Radford et al. 2021)."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emkum.distributed import all_gather, all_gather_with_gradient, row_offset
from emkum.errors import UserError
from emkum.layers.precision import normalized
from emkum.layers.temperature import LogitScale
from emkum.objectives.base import Objective, Requirements, Setting
from emkum.outputs import Batch, ModalityOutput, ObjectiveOutput, StudentOutput, TeacherOutput

# Attributes of `ModalityOutput` that can be compared.
LAYERS = ("features", "hidden", "prediction", "logits")
POSITIVES = ("all", "own")
GATHERS = ("local", "full")

SCALE_HELP = "initial scale of the logits (1 / temperature), learned within [1, 100]"


@dataclass
class ImageTextContrastConfig:
    initial_scale: float = field(default=1 / 0.07, metadata={"help": SCALE_HELP})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "part of the target mass spread evenly over the batch; 0 = none"}
    )
    layers: str = field(
        default="features",
        metadata={
            "help": f"what of images and captions is compared, separated by commas, each with a scale of its own: "
            f"{', '.join(LAYERS)}; SHRe compares hidden,features,logits"
        },
    )
    positives: str = field(
        default="all",
        metadata={
            "help": "all: every caption of an equal image is a positive; own: only captions that stand with the image, "
            "as in CLIP, even where the batch holds the image twice"
        },
    )
    gather: str = field(
        default="local",
        metadata={
            "help": "local: each device compares its own rows with those of all devices; full: each compares all rows "
            "with all, which takes more memory for the same gradients"
        },
    )


@dataclass
class Pairs:
    """Features of images and captions, and whose they are.

    Attributes:
        images: (B, D), not normalized.
        texts: (T, D), likewise.
        image_ids: (B,) int64; captions and images with equal ids are positives.
        text_ids: (T,) int64.
    """

    images: Tensor
    texts: Tensor
    image_ids: Tensor
    text_ids: Tensor

    def gathered(self) -> "Pairs":
        """Those of all ranks in rank order, features with gradient; ranks have equally many rows."""
        return Pairs(
            all_gather_with_gradient(self.images),
            all_gather_with_gradient(self.texts),
            all_gather(self.image_ids),
            all_gather(self.text_ids),
        )


def parse_layers(layers: str) -> list[str]:
    """Split the option `layers`.

    Raises:
        UserError: one is unknown or named twice, or there is none.
    """
    chosen = [layer.strip() for layer in layers.split(",") if layer.strip()]
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(LAYERS):
        raise UserError(f"--itc-layers {layers!r}: give each of your choice of {', '.join(LAYERS)} once")
    return chosen


def contrast(queries: Tensor, keys: Tensor, positives: Tensor, scale: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of scale * cos(query, key) against evenly weighted positives, mean over queries.

    Args:
        queries: (Q, D). keys: (K, D).
        positives: (Q, K) bool, at least one True a row.
        scale: scalar.
        label_smoothing: target mass spread over all keys.

    Returns:
        scalar, of float32 at least.
    """
    logits = scale * normalized(queries) @ normalized(keys).T
    targets = positives.to(logits.dtype)
    return F.cross_entropy(logits, targets / targets.sum(1, keepdim=True), label_smoothing=label_smoothing)


@torch.no_grad()
def top1_accuracy(queries: Tensor, keys: Tensor, positives: Tensor) -> Tensor:
    """Part of the queries whose most similar key is a positive one, in percent."""
    best = (normalized(queries) @ normalized(keys).T).argmax(1, keepdim=True)
    return positives.gather(1, best).float().mean() * 100


class ImageTextContrast(Objective):
    """Contrast of images with all ranks' captions and of captions with all ranks' images, mean over ways and layers.

    With `gather` "local" the queries are this rank's rows. With "full" they are all ranks' rows, so that every rank has
    the loss L of the whole batch. Its gradients are the same after averaging over P ranks: the backward of gathering
    sums what all P ranks hold for a row, which is P * dL/drow, and the average over ranks takes the factor away again;
    of the scale every rank has dL/dscale.
    """

    def __init__(self, config: ImageTextContrastConfig, setting: Setting) -> None:
        super().__init__()
        for option, value, choices in (
            ("positives", config.positives, POSITIVES),
            ("gather", config.gather, GATHERS),
        ):
            if value not in choices:
                raise UserError(f"--itc-{option} {value!r} is unknown; choose from {', '.join(choices)}")
        self.scales = nn.ModuleDict({layer: LogitScale(config.initial_scale) for layer in parse_layers(config.layers)})
        self.label_smoothing = config.label_smoothing
        self.own_positives = config.positives == "own"
        self.full = config.gather == "full"

    @classmethod
    def requires_of(cls, config: ImageTextContrastConfig) -> Requirements:
        layers = parse_layers(config.layers)
        return Requirements(prediction="prediction" in layers, logits="logits" in layers, hidden="hidden" in layers)

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        image_ids = batch.image_ids
        if self.own_positives:
            # Rows of the gathered batch stand for images.
            rows = len(image_ids)
            image_ids = torch.arange(rows, device=image_ids.device) + (row_offset(rows) if self.training else 0)
        text_ids = image_ids[batch.caption_image]
        outputs = {}
        for layer, scale in self.scales.items():
            images, texts = _layer_of(student.image, layer), _layer_of(student.text, layer)
            outputs[layer] = self._contrast(Pairs(images, texts, image_ids, text_ids), scale())
        loss = torch.stack([output.loss for output in outputs.values()]).mean()
        metrics = {}
        for layer, output in outputs.items():
            prefix = f"{layer}_" if len(outputs) > 1 else ""
            metrics |= {prefix + name: value for name, value in output.metrics.items()}
        return ObjectiveOutput(loss, metrics)

    def _contrast(self, own: Pairs, scale: Tensor) -> ObjectiveOutput:
        # Validation batches may differ in size between ranks; there the loss is each rank's own.
        keys = own.gathered() if self.training else own
        queries = keys if self.full else own
        to_texts = queries.image_ids[:, None] == keys.text_ids[None]
        to_images = queries.text_ids[:, None] == keys.image_ids[None]
        i2t = contrast(queries.images, keys.texts, to_texts, scale, self.label_smoothing)
        t2i = contrast(queries.texts, keys.images, to_images, scale, self.label_smoothing)
        metrics = {
            "i2t_loss": i2t.detach(),
            "t2i_loss": t2i.detach(),
            "i2t_accuracy": top1_accuracy(queries.images, keys.texts, to_texts),
            "t2i_accuracy": top1_accuracy(queries.texts, keys.images, to_images),
            "scale": scale.detach(),
        }
        return ObjectiveOutput(0.5 * (i2t + t2i), metrics)


def _layer_of(output: ModalityOutput, layer: str) -> Tensor:
    value = getattr(output, layer)
    if value is None:
        given = ", ".join(name for name in LAYERS if getattr(output, name) is not None)
        raise UserError(f"--itc-layers: this student gives no {layer}; choose from {given}")
    return value
