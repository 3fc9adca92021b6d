"""Self-distillation between views (DINO, Caron et al. 2021), where a caption counts as a view of its image."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emkum.distributed import all_gather
from emkum.errors import UserError
from emkum.layers.ema import EmaCopy
from emkum.layers.precision import normalized
from emkum.objectives.base import Objective, Requirements, Setting
from emkum.outputs import Batch, ObjectiveOutput, StudentOutput, TeacherOutput


@dataclass
class SelfDistillationConfig:
    prototypes: int = field(default=65536, metadata={"help": "classes K that views are assigned to"})
    hidden: int = field(default=2048, metadata={"help": "width of the head's two hidden layers"})
    bottleneck: int = field(default=256, metadata={"help": "channels that are compared with the prototypes"})
    crops: bool = field(
        default=False, metadata={"help": "the student also sees further crops, --multi-crop-number of each image"}
    )
    temperature: float = field(default=0.1, metadata={"help": "temperature of the student's softmax"})
    teacher_temperature: float = field(default=0.07, metadata={"help": "of the average's softmax, after its warm-up"})
    first_teacher_temperature: float = field(default=0.04, metadata={"help": "the same at the beginning"})
    warmup_updates: int = field(
        default=1000, metadata={"help": "updates between both, along a straight line; 0 = no warm-up"}
    )
    center_decay: float = field(default=0.9, metadata={"help": "decay an update of the center of the average's logits"})
    frozen_updates: int = field(
        default=0, metadata={"help": "updates at the beginning that leave the prototypes as they are; 0 = none"}
    )


@dataclass
class ViewTargets:
    """What each of S student views is to be like.

    Attributes:
        sums: (S, K) sum of the teacher's distributions over the other views of its image.
        pairs: (S,) how many these are.
    """

    sums: Tensor
    pairs: Tensor


def teacher_distributions(logits: Tensor, center: Tensor, temperature: Tensor) -> Tensor:
    """Centered and sharpened softmax (DINO, section 3.1): (R, K) of logits (R, K), a center (K,) and a scalar."""
    return ((logits - center.to(logits.dtype)) / temperature.to(logits.dtype)).softmax(1)


def targets_of_views(distributions: Tensor, owners: Tensor, images: int) -> ViewTargets:
    """Sum of the teacher's distributions over all views of the same image but the student's own.

    DINO adds up the cross-entropy over all pairs of a teacher's and a student's view that differ. Cross-entropy is
    linear in the teacher's distribution, so that the sum of them gives all pairs of a student's view at once.

    Args:
        distributions: (R, K) the teacher's, of views that the student sees too, in the same order.
        owners: (S,) int64, the image of each of the student's views, the first R of which the teacher sees.
        images: number of images.
    """
    rows = len(distributions)
    sums = distributions.new_zeros(images, distributions.shape[1]).index_add_(0, owners[:rows], distributions)[owners]
    pairs = distributions.new_zeros(images).index_add_(0, owners[:rows], distributions.new_ones(rows))[owners]
    sums[:rows] -= distributions
    pairs[:rows] -= 1
    return ViewTargets(sums, pairs)


@torch.no_grad()
def nearest_distributions(logits: Tensor, distributions: Tensor, candidates: Tensor) -> Tensor:
    """(S,) int64, for each of the student's views the candidate with the smallest KL divergence to it.

    That is D_KL(distribution || view), what the cross-entropy exceeds its minimum by. Where views are all alike,
    whatever they are, the nearest one is no better than chance.

    Args:
        logits: (S, K) of the student's views.
        distributions: (R, K) the teacher's.
        candidates: (S, R) bool.
    """
    # Left out is the logsumexp of a view's logits, the same for all distributions.
    scores = logits @ distributions.T + torch.special.entr(distributions).sum(1)
    return scores.masked_fill(~candidates, float("-inf")).argmax(1)


class PrototypeHead(nn.Module):
    """DINO's head: a 3-layer MLP, unit length, then cosines to K prototypes (a linear map whose rows have unit norm).

    Args:
        width: channels D of the input.
        hidden: of the two hidden layers.
        bottleneck: channels of the prototypes.
        prototypes: K.
    """

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.layers[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        # Only their direction counts, and a normal distribution has no preferred one.
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck) * 0.02)

    def forward(self, features: Tensor, freeze_prototypes: bool = False) -> Tensor:
        """(R, K) of features (R, D); frozen prototypes get a gradient of zero."""
        prototypes = normalized(self.prototypes)
        if freeze_prototypes and prototypes.requires_grad:
            # Not without one: wrappers of several devices wait for every parameter's.
            prototypes.register_hook(torch.zeros_like)
        return normalized(self.layers(features.to(self.layers[0].weight.dtype))) @ prototypes.T


class SelfDistillation(Objective):
    """DINO: each view of the student predicts what its moving average makes of the other views of the same image.

    The average sees the image and its captions; the student sees these and the image's further crops. The loss is the
    mean over all pairs of an average's and a student's view of one image that are not the same view. The average has a
    head of its own, which follows the student's, and the center of its logits over all ranks, both once an update.

    Accuracies are across modalities, where no view meets itself: how many of the student's images and crops are nearest
    to what the average makes of a caption of theirs, among all captions, and how many captions to that of their image.
    These are of this rank's batch, as distributions are too large to be gathered.
    """

    center: Tensor
    pending: Tensor
    teacher_temperature: Tensor

    def __init__(self, config: SelfDistillationConfig, setting: Setting) -> None:
        super().__init__()
        for option in ("temperature", "teacher_temperature", "first_teacher_temperature"):
            if getattr(config, option) <= 0:
                name = option.replace("_", "-")
                raise UserError(f"--dino-{name} {getattr(config, option)}: want a number above 0")
        if not 0 <= config.center_decay <= 1:
            raise UserError(f"--dino-center-decay {config.center_decay}: want a number from 0 to 1")
        self.config = config
        self.head = PrototypeHead(setting.width, config.hidden, config.bottleneck, config.prototypes)
        self.average_head = EmaCopy(self.head, decay=0.0)
        self.register_buffer("center", torch.zeros(config.prototypes))
        # Sum of the logits of this update's batches so far, and behind it their number.
        self.register_buffer("pending", torch.zeros(config.prototypes + 1))
        self.register_buffer("teacher_temperature", torch.tensor(self._teacher_temperature_at(0)))
        self._frozen = config.frozen_updates > 0

    @classmethod
    def requires_of(cls, config: SelfDistillationConfig) -> Requirements:
        return Requirements(average=True, crops=config.crops)

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        images = len(batch.image_ids)
        own_rows = torch.arange(images, device=batch.image_ids.device)
        views, owners = [student.image.cls, student.text.cls], [own_rows, batch.caption_image]
        # Validation may do without crops.
        if self.config.crops and student.crops is not None:
            views.append(student.crops.cls)
            owners.append(own_rows.repeat(len(student.crops.cls) // images))
        with torch.no_grad():
            seen = torch.cat([student.average.image.cls, student.average.text.cls])
            teacher_logits = self.average_head.module(seen)
            distributions = teacher_distributions(teacher_logits, self.center, self.teacher_temperature)
            targets = targets_of_views(distributions, torch.cat(owners), images)
            view_ids = batch.image_ids[torch.cat(owners)]
        logits = self.head(torch.cat(views), freeze_prototypes=self._frozen) / self.config.temperature
        losses = F.cross_entropy(logits, targets.sums, reduction="none")
        if self.training:
            self._add_to_center(teacher_logits)
        loss = losses.sum() / targets.pairs.sum().clamp(min=1)
        metrics = self._metrics(logits.detach(), losses.detach(), targets.pairs, distributions, view_ids, images)
        return ObjectiveOutput(loss, metrics)

    def begin_update(self, num_updates: int, decay: float) -> None:
        self.average_head.follow(self.head, num_updates, decay)
        self._frozen = num_updates < self.config.frozen_updates
        self.teacher_temperature.fill_(self._teacher_temperature_at(num_updates))
        total, count = self.pending[:-1], self.pending[-1]
        # Nothing moves where no batch has come since the last call.
        step = (count > 0).to(total.dtype) * (1 - self.config.center_decay)
        self.center.lerp_(total / count.clamp(min=1), step)
        self.pending.zero_()

    def _teacher_temperature_at(self, num_updates: int) -> float:
        first, last = self.config.first_teacher_temperature, self.config.teacher_temperature
        warmup = self.config.warmup_updates
        return first + (last - first) * min(1.0, num_updates / warmup) if warmup > 0 else last

    @torch.no_grad()
    def _add_to_center(self, logits: Tensor) -> None:
        """Logits (R, K) of this rank's views, of which those that are not finite count as 0."""
        rows = torch.nan_to_num(logits, nan=0.0, posinf=0.0, neginf=0.0)
        own = torch.cat([rows.sum(0), rows.new_full((1,), len(rows))])
        self.pending += all_gather(own[None]).sum(0)

    @staticmethod
    def _metrics(
        logits: Tensor, losses: Tensor, pairs: Tensor, distributions: Tensor, view_ids: Tensor, images: int
    ) -> dict[str, Tensor]:
        """Losses of pairs and accuracies of the student's images and crops, and of its captions.

        Args:
            logits: (S, K), first of images, then of captions up to R, then of crops.
            losses: (S,), summed over pairs. pairs: (S,).
            distributions: (R, K), of images, then of captions.
            view_ids: (S,), whose image each view is of.
        """
        seen = len(distributions)
        is_text = torch.zeros_like(view_ids, dtype=torch.bool)
        is_text[images:seen] = True
        candidates = is_text[:, None] != is_text[None, :seen]
        positives = candidates & (view_ids[:, None] == view_ids[None, :seen])
        right = positives.gather(1, nearest_distributions(logits, distributions, candidates)[:, None])[:, 0]
        metrics = {"teacher_entropy": torch.special.entr(distributions).sum(1).mean()}
        for name, chosen in (("image", ~is_text), ("text", is_text)):
            metrics[f"{name}_loss"] = (chosen * losses).sum() / (chosen * pairs).sum().clamp(min=1)
            # An image without captions cannot be right.
            metrics[f"{name}_accuracy"] = 100 * (chosen & right).sum() / (chosen & positives.any(1)).sum().clamp(min=1)
        return metrics
