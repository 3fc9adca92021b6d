"""Distillation of what a teacher makes of a whole image, which the student predicts from it and from its captions."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emkum.distributed import all_gather, row_offset
from emkum.errors import UserError
from emkum.layers.feature_queue import FeatureQueue
from emkum.layers.precision import at_least_float32, normalized
from emkum.layers.shared_encoders import initialize_weights
from emkum.layers.temperature import LogitScale
from emkum.objectives.base import Objective, Requirements, Setting
from emkum.outputs import Batch, ObjectiveOutput, StudentOutput, TeacherOutput

# ----------------------------------------------------------------------------------------------------------------------
# What all of the family have in common
# ----------------------------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """Loss of one modality, and how well it predicts in percent; scalars."""

    loss: Tensor
    figure: Tensor


def summed(figure: str, image: Scored, text: Scored | None) -> ObjectiveOutput:
    """Half the images' loss plus half the captions', or the images' alone where there are no captions' losses.

    Args:
        figure: what the figures are called, such as "accuracy".
    """
    modalities = {"image": image} if text is None else {"image": image, "text": text}
    metrics = {}
    for name, scored in modalities.items():
        metrics[f"{name}_loss"], metrics[f"{name}_{figure}"] = scored.loss.detach(), scored.figure.detach()
    return ObjectiveOutput(image.loss if text is None else 0.5 * (image.loss + text.loss), metrics)


class PredictionHead(nn.Sequential):
    """LayerNorm and Linear, from a student's tokens (..., width) to what they are to predict (..., target_width).

    It computes in the type of its parameters, whatever autocast made of the tokens.
    """

    def __init__(self, width: int, target_width: int) -> None:
        super().__init__(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, target_width))
        self.apply(initialize_weights)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.to(self[1].weight.dtype))


def chosen(option: str, value: str, choices: tuple[str, ...]) -> str:
    """The value of an option that must be one of several.

    Raises:
        UserError: it is none of them.
    """
    if value not in choices:
        raise UserError(f"{option} {value!r} is unknown; choose from {', '.join(choices)}")
    return value


# ----------------------------------------------------------------------------------------------------------------------
# Regression of a feature (KD-MSE)
# ----------------------------------------------------------------------------------------------------------------------

REGRESSION_LOSSES = ("mse", "smooth_l1", "cosine")


@dataclass
class RegressionDistillationConfig:
    whiten: bool = field(
        default=False, metadata={"help": "LayerNorm without parameters on the target (feature whitening)"}
    )
    loss: str = field(
        default="mse",
        metadata={
            "help": "mse (mean squared error), smooth_l1 (the same below a distance of 1, absolute beyond), cosine "
            "(1 - cosine similarity)"
        },
    )
    image_only: bool = field(default=False, metadata={"help": "only images predict the target, captions do not"})


def whitened(target: Tensor) -> Tensor:
    """Each target (..., D) to mean 0 and variance 1 over its channels, in the precision of losses."""
    return F.layer_norm(at_least_float32(target), target.shape[-1:])


def regression_loss(prediction: Tensor, target: Tensor, loss: str = "mse") -> Tensor:
    """Scalar, mean over all rows (and, of mse and smooth_l1, channels), of float32 at least.

    Args:
        prediction, target: (..., D).
        loss: one of REGRESSION_LOSSES.
    """
    if loss == "cosine":
        return 1 - (normalized(prediction) * normalized(target)).sum(-1).mean()
    function = F.smooth_l1_loss if loss == "smooth_l1" else F.mse_loss
    return function(at_least_float32(prediction), at_least_float32(target))


@torch.no_grad()
def mean_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean cosine similarity of rows (..., D), in percent."""
    return (normalized(prediction) * normalized(target)).sum(-1).mean() * 100


class RegressionDistillation(Objective):
    """KD-MSE: half the images' error plus half the captions'; agreement is the mean cosine with the target."""

    requires = Requirements(prediction=True)

    def __init__(self, config: RegressionDistillationConfig, setting: Setting) -> None:
        super().__init__()
        self.loss = chosen("--kd-mse-loss", config.loss, REGRESSION_LOSSES)
        self.whiten = config.whiten
        self.image_only = config.image_only

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        image = self._scored(student.image.prediction, teacher.features)
        if self.image_only:
            return summed("agreement", image, None)
        text = self._scored(student.text.prediction, teacher.of_captions(batch.caption_image))
        return summed("agreement", image, text)

    def _scored(self, prediction: Tensor, target: Tensor) -> Scored:
        target = whitened(target) if self.whiten else target
        return Scored(regression_loss(prediction, target, self.loss), mean_cosine(prediction, target))


# ----------------------------------------------------------------------------------------------------------------------
# Class probabilities (KD-KL)
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class ClassDistillationConfig:
    temperature: float = field(
        default=1.0,
        metadata={"help": "divides the logits of student and teacher; the loss is multiplied by its square"},
    )


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * D_KL(softmax(teacher / T) || softmax(student / T)), mean over rows, of float32 at least.

    The factor keeps the size of gradients the same at any temperature T (Hinton et al. 2015, section 2).

    Args:
        student_logits, teacher_logits: (B, C).
        temperature: T > 0.
    """
    student, teacher = (
        F.log_softmax(at_least_float32(logits) / temperature, dim=-1) for logits in (student_logits, teacher_logits)
    )
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


@torch.no_grad()
def argmax_agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Part of the rows of which both have the same largest logit, in percent."""
    return (student_logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean() * 100


class ClassDistillation(Objective):
    """KD-KL: half the divergence of the images' class probabilities from the teacher's, plus half the captions'.

    What a caption is to predict is what the teacher makes of its image (SHRe, Aytar et al. 2017).

    Raises:
        UserError: the temperature is not above 0.
    """

    requires = Requirements(logits=True)

    def __init__(self, config: ClassDistillationConfig, setting: Setting) -> None:
        super().__init__()
        if not config.temperature > 0:
            raise UserError(f"--kd-kl-temperature {config.temperature:g}: want more than 0")
        self.temperature = config.temperature

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        image = self._scored(student.image.logits, teacher.logits)
        text = self._scored(student.text.logits, teacher.logits[batch.caption_image])
        return summed("agreement", image, text)

    def _scored(self, student: Tensor, teacher: Tensor) -> Scored:
        return Scored(kl_divergence(student, teacher, self.temperature), argmax_agreement(student, teacher))


# ----------------------------------------------------------------------------------------------------------------------
# Contrast of targets (KD-contrastive)
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class ContrastiveDistillationConfig:
    bank_size: int = field(
        default=0, metadata={"help": "earlier teacher targets kept as further negatives, in rows; 0 = none"}
    )
    initial_scale: float = field(
        default=1 / 0.07, metadata={"help": "initial scale of the logits (1 / temperature), learned within [1, 100]"}
    )


@dataclass
class Targets:
    """What predictions are compared with: (K, D) features, and the ids (K,) of their images, negative where empty."""

    features: Tensor
    ids: Tensor

    def gathered(self) -> "Targets":
        """Those of all ranks, in rank order; without gradient."""
        return Targets(all_gather(self.features), all_gather(self.ids))

    def before(self, bank: FeatureQueue) -> "Targets":
        """These, then a bank's rows."""
        earlier = bank.features.to(self.features.dtype)
        return Targets(torch.cat([self.features, earlier]), torch.cat([self.ids, bank.ids]))


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
    logits = scale * normalized(prediction) @ normalized(targets).T
    return logits.masked_fill(excluded.scatter(1, labels[:, None], False), float("-inf"))


def classify_targets(prediction: Tensor, ids: Tensor, own: Tensor, targets: Targets, scale: Tensor) -> Scored:
    """Cross-entropy of each prediction's own target among all, and how often that is the most similar one.

    Targets of the same image are no negatives and are left out.

    Args:
        prediction: (Q, D).
        ids: (Q,), whose image each one is of.
        own: (Q,), row of each one's target.
        targets: K of them.
        scale: scalar.
    """
    excluded = (targets.ids[None] == ids[:, None]) | (targets.ids[None] < 0)
    logits = target_contrast(prediction, targets.features, own, excluded, scale)
    return Scored(F.cross_entropy(logits, own), (logits.detach().argmax(1) == own).float().mean() * 100)


def own_rows(count: int, gathered: bool, device: torch.device) -> Tensor:
    """(count,), of each of this rank's rows its place among all ranks' rows, where they are gathered."""
    return torch.arange(count, device=device) + (row_offset(count) if gathered else 0)


def contrast_captions(
    prediction: Tensor, own_targets: Tensor | None, targets: Targets, batch: Batch, scale: Tensor, gathered: bool
) -> Scored:
    """`classify_targets` of captions.

    Args:
        prediction: (T, D).
        own_targets: (T, D) of the captions; None = each has the target of its image.
        targets: of the images, this rank's or all ranks', possibly with more behind them.
        batch: whose captions they are.
        scale: scalar.
        gathered: whether `targets` are all ranks'.
    """
    ids = batch.caption_ids
    if own_targets is None:
        own = own_rows(len(batch.image_ids), gathered, ids.device)[batch.caption_image]
        return classify_targets(prediction, ids, own, targets, scale)
    texts = Targets(own_targets, ids)
    own = own_rows(len(ids), gathered, ids.device)
    return classify_targets(prediction, ids, own, texts.gathered() if gathered else texts, scale)


class ContrastiveDistillation(Objective):
    """KD-contrastive with an optional bank of earlier targets: half the images' cross-entropy plus half the captions'.

    The teacher is frozen, so earlier targets stay valid. A target of the same image (an earlier crop in the bank, or a
    second copy in the batch) is no negative and is left out. Where captions have targets of their own, the bank holds
    none of these. It is pushed after the loss, once for each training batch.
    """

    requires = Requirements(prediction=True)

    def __init__(self, config: ContrastiveDistillationConfig, setting: Setting) -> None:
        super().__init__()
        self.scale = LogitScale(config.initial_scale)
        self.bank = FeatureQueue(config.bank_size, setting.target_width) if config.bank_size > 0 else None

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        # Validation batches may differ in size between ranks; there the loss is each rank's own.
        gathered = self.training
        current = Targets(teacher.features, batch.image_ids)
        current = current.gathered() if gathered else current
        targets = current if self.bank is None else current.before(self.bank)
        scale, own = self.scale(), own_rows(len(batch.image_ids), gathered, batch.image_ids.device)
        image = classify_targets(student.image.prediction, batch.image_ids, own, targets, scale)
        text = contrast_captions(student.text.prediction, teacher.text_features, targets, batch, scale, gathered)
        output = summed("accuracy", image, text)
        output.metrics["scale"] = scale.detach()
        if self.bank is not None and self.training:
            self.bank.push(current.features, current.ids)
        return output
