"""Distillation of a teacher's global image feature, which the student predicts from the image and from its captions."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from emkum.distributed import all_gather, row_offset
from emkum.layers.feature_queue import FeatureQueue
from emkum.layers.temperature import LogitScale
from emkum.objectives.base import Objective, Requirements
from emkum.outputs import Batch, ObjectiveOutput, StudentOutput, TeacherOutput


@dataclass
class RegressionDistillationConfig:
    whiten: bool = field(
        default=False, metadata={"help": "LayerNorm without parameters on the target (feature whitening)"}
    )


def regression_loss(prediction: Tensor, target: Tensor, whiten: bool = False) -> Tensor:
    """KD-MSE: mean squared error in float32.

    Args:
        prediction, target: (B, D).
        whiten: normalize each target over its channels first.
    """
    target = target.float()
    if whiten:
        target = F.layer_norm(target, target.shape[-1:])
    return F.mse_loss(prediction.float(), target)


class RegressionDistillation(Objective):
    """KD-MSE: half the image's error plus half the captions'."""

    requires = Requirements(teacher=True)

    def __init__(self, config: RegressionDistillationConfig, target_width: int | None = None) -> None:
        super().__init__()
        self.whiten = config.whiten

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        image = regression_loss(student.image_prediction, teacher.features, self.whiten)
        text = regression_loss(student.text_prediction, teacher.of_captions(batch.caption_image), self.whiten)
        return ObjectiveOutput(0.5 * (image + text), {"image_loss": image.detach(), "text_loss": text.detach()})


@dataclass
class ContrastiveDistillationConfig:
    bank_size: int = field(
        default=0, metadata={"help": "earlier teacher targets kept as further negatives, in rows; 0 = none"}
    )
    initial_scale: float = field(
        default=1 / 0.07, metadata={"help": "initial scale of the logits (1 / temperature), learned within [1, 100]"}
    )


def target_contrast(prediction: Tensor, targets: Tensor, labels: Tensor, excluded: Tensor, scale: Tensor) -> Tensor:
    """KD-contrastive: every teacher target is one class; (Q, K) logits in float32.

    Args:
        prediction: (Q, D). targets: (K, D).
        labels: (Q,) row of each prediction's own target.
        excluded: (Q, K) bool, targets that do not count as classes for a prediction.
        scale: scalar.

    Returns:
        logits (Q, K), -inf where excluded.
    """
    logits = scale * F.normalize(prediction.float(), dim=-1) @ F.normalize(targets.float(), dim=-1).T
    own = F.one_hot(labels, targets.shape[0]).bool()
    return logits.masked_fill(excluded & ~own, float("-inf"))


class ContrastiveDistillation(Objective):
    """KD-contrastive with an optional bank of earlier targets: half the images' cross-entropy plus half the captions'.

    The teacher is frozen, so earlier targets stay valid. A target of the same image (an earlier crop in the bank, or a
    second copy in the batch) is no negative and is left out. The bank is pushed after the loss, once for each training
    batch.
    """

    requires = Requirements(teacher=True)

    def __init__(self, config: ContrastiveDistillationConfig, target_width: int | None = None) -> None:
        super().__init__()
        self.scale = LogitScale(config.initial_scale)
        self.bank = FeatureQueue(config.bank_size, target_width) if config.bank_size > 0 else None

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        gather = all_gather if self.training else _identity
        current, current_ids = gather(teacher.features), gather(batch.image_ids)
        targets, ids = current, current_ids
        if self.bank is not None:
            targets = torch.cat([current, self.bank.features.to(current.dtype)])
            ids = torch.cat([current_ids, self.bank.ids])
        captions = batch.caption_image
        image = self._contrast(student.image_prediction, batch.image_ids, self._own_rows(batch.image_ids), targets, ids)
        if teacher.text_features is None:
            own = self._own_rows(batch.image_ids)[captions]
            text = self._contrast(student.text_prediction, batch.image_ids[captions], own, targets, ids)
        else:
            # Captions have targets of their own, which the bank does not hold.
            own_ids = batch.image_ids[captions]
            own = self._own_rows(own_ids)
            texts, text_ids = gather(teacher.text_features), gather(own_ids)
            text = self._contrast(student.text_prediction, own_ids, own, texts, text_ids)
        metrics = {"scale": self.scale().detach()}
        for name, (loss, accuracy) in (("image", image), ("text", text)):
            metrics[f"{name}_loss"], metrics[f"{name}_accuracy"] = loss.detach(), accuracy
        if self.bank is not None and self.training:
            self.bank.push(current, current_ids)
        return ObjectiveOutput(0.5 * (image[0] + text[0]), metrics)

    def _own_rows(self, ids: Tensor) -> Tensor:
        """Of each of this device's rows, the place among the gathered ones."""
        rows = torch.arange(len(ids), device=ids.device)
        return rows + (row_offset(len(ids)) if self.training else 0)

    def _contrast(
        self, prediction: Tensor, image_ids: Tensor, own: Tensor, targets: Tensor, target_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and accuracy in percent.

        Args:
            prediction: (Q, D). image_ids: (Q,), whose image each is of.
            own: (Q,) row of each one's target. targets: (K, D). target_ids: (K,), negative where a row is empty.
        """
        excluded = (target_ids[None] == image_ids[:, None]) | (target_ids[None] < 0)
        logits = target_contrast(prediction, targets, own, excluded, self.scale())
        return F.cross_entropy(logits, own), (logits.detach().argmax(1) == own).float().mean() * 100


def _identity(tensor: Tensor) -> Tensor:
    return tensor
