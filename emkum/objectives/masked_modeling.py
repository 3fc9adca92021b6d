"""Masked data modeling: tokens of a caption (MLM) and patches of an image (MIM) predicted from what is left of them."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emkum.distributed import all_gather, row_offset, world_size
from emkum.errors import UserError
from emkum.layers.precision import at_least_float32, normalized
from emkum.layers.temperature import LogitScale
from emkum.objectives.base import Objective, Requirements, Setting
from emkum.objectives.image_text_contrast import SCALE_HELP
from emkum.outputs import Batch, ObjectiveOutput, StudentOutput, TeacherOutput

# Of `Batch.text_targets`, where nothing is to be predicted.
IGNORE = -100
LOSSES = ("regression", "in_batch")


def masked_places(masked: Tensor, most: int | None) -> Tensor:
    """Places of the masked positions in their order, then as many others as fill up a fixed number.

    Indexing by a mask would make the host wait for the device, which alone knows how many there are. A bound that the
    host knows gives a fixed number of rows instead; nothing masked is left out, and what fills up counts for nothing.

    Args:
        masked: (R, N) bool.
        most: at least the number of masked positions; None = not known, all R * N places.

    Returns:
        (M,) int64 places among the R * N, M = min(most, R * N).
    """
    flat = masked.flatten()
    count = len(flat) if most is None else min(most, len(flat))
    return flat.to(torch.uint8).argsort(descending=True, stable=True)[:count]


def even_weights(counted: Tensor, dtype: torch.dtype, gather: bool) -> Tensor:
    """(M,) weights of rows; weighted sums, averaged over ranks, are means over the counted rows of all ranks.

    Ranks may count different numbers of rows.

    Args:
        counted: (M,) bool, which of this rank's rows count.
        gather: whether there are other ranks' rows to count.
    """
    total, ranks = counted.sum(), 1
    if gather:
        total, ranks = all_gather(total[None]).sum(), world_size()
    return counted.to(dtype) * ranks / total.clamp(min=1)


# ----------------------------------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class MaskedLanguageConfig:
    pass


class MaskedLanguageModeling(Objective):
    """MLM (BERT, Devlin et al. 2019): cross-entropy of the true ids at the masked tokens, all ranks' tokens alike.

    The head is BERT's, with an output matrix of its own: the word embedding lies in the text encoder, which objectives
    do not see, so it cannot be tied to it. It runs on the masked tokens alone where the batch says how many there are
    at most, see `masked_places`.
    """

    pairs = False
    requires = Requirements(masked_text=True, tokens=True)

    def __init__(self, config: MaskedLanguageConfig, setting: Setting) -> None:
        super().__init__()
        width = setting.width
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-6))
        self.output = nn.Linear(width, setting.vocab_size)

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        places = masked_places(batch.text_targets != IGNORE, batch.num_text_targets)
        targets = batch.text_targets.flatten()[places]
        tokens = student.masked_text.tokens.flatten(0, 1).index_select(0, places)
        logits = at_least_float32(self.output(self.transform(tokens.to(self.output.weight.dtype))))
        weights = even_weights(targets != IGNORE, logits.dtype, gather=self.training)
        loss = (weights * F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")).sum()
        correct = logits.detach().argmax(1) == targets
        return ObjectiveOutput(loss, {"accuracy": 100 * (weights * correct).sum()})


# ----------------------------------------------------------------------------------------------------------------------
# Image
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class MaskedImageConfig:
    loss: str = field(
        default="regression",
        metadata={
            "help": "regression of the teacher's whitened patch features, or in_batch: which of all the masked patches "
            "of the batch, by the teacher's features, each one is"
        },
    )
    beta: float = field(
        default=0.0, metadata={"help": "regression: error at which smooth-L1 turns linear; 0 = squared error"}
    )
    initial_scale: float = field(default=1 / 0.07, metadata={"help": f"in_batch: {SCALE_HELP}"})
    chunk: int = field(
        default=4096,
        metadata={"help": "in_batch: patches compared with all others at a time, to bound memory; 0 = all at once"},
    )


@dataclass
class Patches:
    """Masked patches, and where they are from.

    Attributes:
        features: (M, D_p), the teacher's.
        counted: (M,) bool, False where a row only fills up.
        rows: (M,) int64, of each one's image among those of all ranks.
        image_ids: (M,) int64, of its image.
    """

    features: Tensor
    counted: Tensor
    rows: Tensor
    image_ids: Tensor

    def gathered(self) -> "Patches":
        """Those of all ranks in rank order, without gradient; ranks have equally many."""
        return Patches(*map(all_gather, (self.features, self.counted, self.rows, self.image_ids)))


def patch_errors(prediction: Tensor, targets: Tensor, beta: float = 0.0) -> Tensor:
    """Error of predicted patches, mean over channels, (M,).

    Args:
        prediction, targets: (M, D_p).
        beta: error at which smooth-L1 turns linear; 0 = squared error.
    """
    if beta == 0:
        return F.mse_loss(prediction, targets, reduction="none").mean(1)
    return F.smooth_l1_loss(prediction, targets, beta=beta, reduction="none").mean(1)


def patch_cross_entropy(
    prediction: Tensor, own: Tensor, counts: Tensor, keys: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Classification of predicted patches among teacher's patches (in-batch negatives), logits scale * cos.

    Args:
        prediction: (Q, D_p).
        own: (Q,) int64, which key is each one's own.
        counts: (Q, K) bool, keys that are classes for a prediction; its own one is, whatever is said here.
        keys: (K, D_p).
        scale: scalar.

    Returns:
        Cross-entropy (Q,), and whether the most similar key is the own one (Q,).
    """
    counts = counts.scatter(1, own[:, None], True)
    logits = (scale * normalized(prediction) @ normalized(keys).T).masked_fill(~counts, float("-inf"))
    return F.cross_entropy(logits, own, reduction="none"), logits.detach().argmax(1) == own


class MaskedImageModeling(Objective):
    """MIM in the space of the teacher's patch features: of each masked patch, all ranks' patches alike.

    With in-batch negatives, the classes are all ranks' masked patches. Patches of another copy of the same image, which
    may show the same, are no classes. The head runs on the masked patches alone where the setting says how many an
    image has at most, see `masked_places`.
    """

    pairs = False
    requires = Requirements(masked_image=True, tokens=True, patches=True, patch_grid=True)

    def __init__(self, config: MaskedImageConfig, setting: Setting) -> None:
        super().__init__()
        if config.loss not in LOSSES:
            raise UserError(f"--mim-loss {config.loss!r} is unknown; choose from {', '.join(LOSSES)}")
        for option, value in (("beta", config.beta), ("chunk", config.chunk)):
            if value < 0:
                raise UserError(f"--mim-{option} {value}: want 0 or more")
        self.head = nn.Sequential(nn.LayerNorm(setting.width, eps=1e-6), nn.Linear(setting.width, setting.patch_width))
        self.scale = LogitScale(config.initial_scale) if config.loss == "in_batch" else None
        self.beta = config.beta
        self.chunk = config.chunk
        self.num_masked = setting.num_masked_patches

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        images, grid = batch.patch_mask.shape
        places = masked_places(batch.patch_mask, self.num_masked * images if self.num_masked > 0 else None)
        tokens = student.masked_image.tokens[:, 1:].flatten(0, 1).index_select(0, places)
        prediction = at_least_float32(self.head(tokens.to(self.head[1].weight.dtype)))
        rows = places // grid
        patches = Patches(
            features=at_least_float32(teacher.patches).flatten(0, 1)[places],
            counted=batch.patch_mask.flatten()[places],
            rows=rows + (row_offset(images) if self.training else 0),
            image_ids=batch.image_ids[rows],
        )
        weights = even_weights(patches.counted, prediction.dtype, gather=self.training)
        if self.scale is None:
            return self._regression(prediction, patches, weights)
        return self._contrast(prediction, patches, weights)

    def _regression(self, prediction: Tensor, patches: Patches, weights: Tensor) -> ObjectiveOutput:
        targets = F.layer_norm(patches.features, patches.features.shape[-1:])
        loss = (weights * patch_errors(prediction, targets, self.beta)).sum()
        agreement = F.cosine_similarity(prediction.detach(), targets)
        return ObjectiveOutput(loss, {"agreement": 100 * (weights * agreement).sum()})

    def _contrast(self, prediction: Tensor, patches: Patches, weights: Tensor) -> ObjectiveOutput:
        keys = patches.gathered() if self.training else patches
        count = len(prediction)
        own = torch.arange(count, device=prediction.device) + (row_offset(count) if self.training else 0)
        scale = self.scale()

        def compare(part: slice) -> tuple[Tensor, Tensor]:
            copies = (patches.image_ids[part, None] == keys.image_ids) & (patches.rows[part, None] != keys.rows)
            return patch_cross_entropy(prediction[part], own[part], keys.counted & ~copies, keys.features, scale)

        step = self.chunk if 0 < self.chunk < count else count
        parts = [slice(start, start + step) for start in range(0, count, step)]
        if len(parts) > 1:
            # Each part's logits are made again in the backward pass instead of being kept.
            found = [checkpoint(compare, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        else:
            found = [compare(part) for part in parts]
        losses, correct = (torch.cat(pieces) for pieces in zip(*found, strict=True))
        loss = (weights * losses).sum()
        metrics = {"accuracy": 100 * (weights * correct).sum(), "scale": scale.detach()}
        return ObjectiveOutput(loss, metrics)
