"""Image-text contrast (ITC): InfoNCE between images and captions, both ways (CLIP, Radford et al. 2021)."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from emkum.distributed import all_gather, all_gather_with_gradient
from emkum.layers.temperature import LogitScale
from emkum.objectives.base import Objective
from emkum.outputs import Batch, ObjectiveOutput, StudentOutput, TeacherOutput


@dataclass
class ImageTextContrastConfig:
    initial_scale: float = field(
        default=1 / 0.07, metadata={"help": "initial scale of the logits (1 / temperature), learned within [1, 100]"}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "part of the target mass spread evenly over the batch; 0 = none"}
    )


def contrast(queries: Tensor, keys: Tensor, positives: Tensor, scale: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of scale * cos(query, key) against evenly weighted positives, mean over queries.

    Args:
        queries: (Q, D). keys: (K, D).
        positives: (Q, K) bool, at least one True a row.
        scale: scalar.
        label_smoothing: target mass spread over all keys.

    Returns:
        float32 scalar.
    """
    logits = scale * F.normalize(queries.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).T
    targets = positives.float()
    return F.cross_entropy(logits, targets / targets.sum(1, keepdim=True), label_smoothing=label_smoothing)


@torch.no_grad()
def top1_accuracy(queries: Tensor, keys: Tensor, positives: Tensor) -> Tensor:
    """Part of the queries whose most similar key is a positive one, in percent."""
    best = (F.normalize(queries.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).T).argmax(1, keepdim=True)
    return positives.gather(1, best).float().mean() * 100


class ImageTextContrast(Objective):
    """Contrast of this rank's images with all ranks' captions, and of its captions with all ranks' images.

    Captions and images with equal image ids are positives of one another, wherever in the batch they stand.
    """

    def __init__(self, config: ImageTextContrastConfig, target_width: int | None = None) -> None:
        super().__init__()
        self.scale = LogitScale(config.initial_scale)
        self.label_smoothing = config.label_smoothing

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        images, texts = student.image_features, student.text_features
        image_ids = batch.image_ids
        text_ids = image_ids[batch.caption_image]
        # Validation batches may differ in size between ranks; there the loss is each rank's own.
        if self.training:
            all_images, all_texts = all_gather_with_gradient(images), all_gather_with_gradient(texts)
            all_image_ids, all_text_ids = all_gather(image_ids), all_gather(text_ids)
        else:
            all_images, all_texts, all_image_ids, all_text_ids = images, texts, image_ids, text_ids
        to_texts = image_ids[:, None] == all_text_ids[None]
        to_images = text_ids[:, None] == all_image_ids[None]
        scale = self.scale()
        loss = 0.5 * (
            contrast(images, all_texts, to_texts, scale, self.label_smoothing)
            + contrast(texts, all_images, to_images, scale, self.label_smoothing)
        )
        metrics = {
            "i2t_accuracy": top1_accuracy(images, all_texts, to_texts),
            "t2i_accuracy": top1_accuracy(texts, all_images, to_images),
            "scale": scale.detach(),
        }
        return ObjectiveOutput(loss, metrics)
