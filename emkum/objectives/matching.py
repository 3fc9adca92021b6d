"""Image-text matching (ITM): whether an image and a caption belong together, told from one feature of the pair.

B' images and T' captions of all ranks together, B and T of one rank.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emkum.distributed import all_gather, all_gather_with_gradient, row_offset, world_size
from emkum.errors import UserError
from emkum.layers.precision import at_least_float32, normalized
from emkum.objectives.base import Objective, Setting
from emkum.outputs import Batch, ObjectiveOutput, StudentOutput, TeacherOutput

NEGATIVES = ("uniform", "hard")
ACTIVATIONS = {"gelu": nn.GELU, "none": nn.Identity}


@dataclass
class MatchingConfig:
    negatives: str = field(
        default="uniform",
        metadata={
            "help": "uniform: drawn evenly; hard: in proportion to the softmax of the similarities that image-text "
            "contrast compares"
        },
    )
    hard_scale: float = field(
        default=1 / 0.07, metadata={"help": "hard negatives: scale of the similarities (1 / temperature); 0 = uniform"}
    )
    local: bool = field(
        default=False, metadata={"help": "draw negatives from each device's own part of the batch, not from all of it"}
    )
    activation: str = field(
        default="gelu",
        metadata={
            "help": "between the pair's feature and the classifier: gelu, or none, with which the logits are a sum of "
            "the image's part and the caption's part, so that no pair is more than its two parts"
        },
    )


@dataclass
class PairNoise:
    """What draws negatives; the same whatever the number of ranks. All of the standard Gumbel distribution.

    Attributes:
        captions: (T',), for the choice among an image's own captions.
        to_texts: (B', T'), for the choice of a caption for an image.
        to_images: (B', B'), for the choice of an image for the caption of an image.
    """

    captions: Tensor
    to_texts: Tensor
    to_images: Tensor


def pair_noise(draw: int, images: int, captions: int, device: torch.device | str = "cpu") -> PairNoise:
    """Noise of one draw.

    Args:
        draw: number of the draw; equal numbers give equal noise.
        images, captions: B', T', of all ranks together.
    """
    generator = torch.Generator(device).manual_seed(draw)
    size = captions + images * captions + images * images
    # Minus the logarithm of a standard exponential variable is a standard Gumbel one.
    noise = -torch.empty(size, device=device).exponential_(generator=generator).log()
    own, to_texts, to_images = noise.split([captions, images * captions, images * images])
    return PairNoise(own, to_texts.view(images, captions), to_images.view(images, images))


def draw_rows(logits: Tensor | None, allowed: Tensor, noise: Tensor) -> Tensor:
    """(Q,) int64: one allowed key of each query, from the softmax of the logits (Gumbel's maximum).

    Args:
        logits: (Q, K); None = all alike.
        allowed: (Q, K) bool; a query without any allowed key gets some key.
        noise: (Q, K), standard Gumbel.
    """
    total = noise if logits is None else noise + logits
    return total.masked_fill(~allowed, float("-inf")).argmax(1)


class PairClassifier(nn.Module):
    """Feature fusion: activation(W_v image + W_w caption), then a linear map to (not matched, matched).

    Args:
        width: D, of both features and of the pair's.
        activation: one of ACTIVATIONS.
    """

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.image = nn.Linear(width, width)
        self.text = nn.Linear(width, width)
        self.activation = ACTIVATIONS[activation]()
        self.output = nn.Linear(width, 2)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """(P, 2) logits, of float32 at least, of P pairs of what `image` and `text` gave, (P, D) each."""
        return at_least_float32(self.output(self.activation(images + texts)))


@dataclass
class Candidates:
    """What pairs are made of.

    Attributes:
        images, texts: (B, D), (T, D), behind the classifier's first maps.
        image_ids: (B,) int64. text_ids: (T,) int64, ids of the captions' images.
        image_features, text_features: (B, D_c), (T, D_c) of unit length; None where all negatives are alike.
    """

    images: Tensor
    texts: Tensor
    image_ids: Tensor
    text_ids: Tensor
    image_features: Tensor | None = None
    text_features: Tensor | None = None

    def gathered(self) -> "Candidates":
        """Those of all ranks in rank order, images and texts with gradient."""
        without = (self.image_ids, self.text_ids, self.image_features, self.text_features)
        return Candidates(
            all_gather_with_gradient(self.images),
            all_gather_with_gradient(self.texts),
            *(None if value is None else all_gather(value) for value in without),
        )


class Matching(Objective):
    """ITM: for each image of this rank its pair with one of its captions, drawn evenly, the pair of the image with a
    wrong caption, and the pair of the caption with a wrong image.

    No pair of equal image ids is a negative; where nothing else is left, the pair is left out. Always saying "not
    matched" gives an accuracy of 66.67 %. With activation none nothing much better is possible: logits are then the
    sum of a function of the image and one of the caption, and either is the same in matched pairs and in others.

    The number of draws is kept, so that a resumed run goes on with the draws of an uninterrupted one. At validation
    all batches share one draw.
    """

    draws: Tensor

    def __init__(self, config: MatchingConfig, setting: Setting) -> None:
        super().__init__()
        for option, value, choices in (
            ("negatives", config.negatives, NEGATIVES),
            ("activation", config.activation, tuple(ACTIVATIONS)),
        ):
            if value not in choices:
                raise UserError(f"--itm-{option} {value!r} is unknown; choose from {', '.join(choices)}")
        if config.hard_scale < 0:
            raise UserError(f"--itm-hard-scale {config.hard_scale}: choose 0 or more")
        self.hard_scale = config.hard_scale if config.negatives == "hard" else None
        self.local = config.local
        self.classifier = PairClassifier(setting.width, config.activation)
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        # The same on the host, where asking costs nothing; -1 = not known yet.
        self._draws = -1

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        own = self._candidates(student, batch)
        images, captions = len(own.image_ids), len(own.text_ids)
        # Validation batches may differ in size between ranks; there the loss is each rank's own.
        everything = own.gathered() if self.training and not self.local else own
        noise = self._own_noise(images, captions, batch.image_ids.device)
        rows = torch.arange(images, device=batch.image_ids.device)
        caption = draw_rows(None, batch.caption_image == rows[:, None], noise.captions.expand(images, -1))
        allowed_texts = own.image_ids[:, None] != everything.text_ids
        allowed_images = own.image_ids[:, None] != everything.image_ids
        text_logits = image_logits = None
        if self.hard_scale is not None:
            text_logits = self.hard_scale * own.image_features @ everything.text_features.T
            image_logits = self.hard_scale * own.text_features[caption] @ everything.image_features.T
        wrong_text = draw_rows(text_logits, allowed_texts, noise.to_texts)
        wrong_image = draw_rows(image_logits, allowed_images, noise.to_images)
        texts = own.texts[caption]
        logits = self.classifier(
            torch.cat([own.images, own.images, everything.images[wrong_image]]),
            torch.cat([texts, everything.texts[wrong_text], texts]),
        )
        weights = torch.cat([torch.ones_like(rows, dtype=torch.bool), allowed_texts.any(1), allowed_images.any(1)])
        return self._judged(logits, weights.to(logits.dtype), images)

    def _candidates(self, student: StudentOutput, batch: Batch) -> Candidates:
        """This rank's."""
        dtype = self.classifier.image.weight.dtype
        own = Candidates(
            self.classifier.image(student.image.cls.to(dtype)),
            self.classifier.text(student.text.cls.to(dtype)),
            batch.image_ids,
            batch.caption_ids,
        )
        if self.hard_scale is not None:
            own.image_features = normalized(student.image.features.detach())
            own.text_features = normalized(student.text.features.detach())
        return own

    def _own_noise(self, images: int, captions: int, device: torch.device) -> PairNoise:
        """This rank's rows of the noise of the next draw, and of all columns those that it draws from."""
        if not self.training:
            return pair_noise(0, images, captions, device)
        if self._draws < 0:
            self._draws = int(self.draws)
        self._draws += 1
        self.draws.fill_(self._draws)
        total = world_size()
        noise = pair_noise(self._draws, total * images, total * captions, device)
        rows = slice(row_offset(images), row_offset(images) + images)
        columns = slice(row_offset(captions), row_offset(captions) + captions)
        to_texts, to_images = noise.to_texts[rows], noise.to_images[rows]
        if self.local:
            to_texts, to_images = to_texts[:, columns], to_images[:, rows]
        return PairNoise(noise.captions[columns], to_texts, to_images)

    def _judged(self, logits: Tensor, weights: Tensor, positives: int) -> ObjectiveOutput:
        """Loss and accuracies of pairs, of which the first `positives` are matched; `weights` (P,) are 0 or 1."""
        labels = (torch.arange(len(logits), device=logits.device) < positives).long()
        losses = F.cross_entropy(logits, labels, reduction="none")
        right = (logits.detach().argmax(1) == labels).to(weights.dtype) * weights
        wrong, present = right[positives:].sum(), weights[positives:].sum()
        metrics = {
            "accuracy": 100 * right.sum() / weights.sum(),
            "positive_accuracy": 100 * right[:positives].mean(),
            "negative_accuracy": 100 * wrong / present.clamp(min=1),
        }
        return ObjectiveOutput((losses * weights).sum() / weights.sum(), metrics)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._draws = -1
