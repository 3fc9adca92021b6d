"""Image-text contrast with negatives beyond the batch.

Three kinds of rows serve as further negatives: the student's own past features, first in, first out; its last feature
of every training sample, held in place by a proximal term; and past features of its moving average.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emkum.distributed import all_gather
from emkum.errors import UserError
from emkum.layers.feature_queue import EMPTY, FeatureQueue
from emkum.layers.precision import normalized
from emkum.layers.temperature import LogitScale
from emkum.objectives.base import Objective, Requirements, Setting
from emkum.objectives.image_text_contrast import SCALE_HELP, Pairs
from emkum.outputs import Batch, ObjectiveOutput, StudentOutput, TeacherOutput


@dataclass
class BankContrastConfig:
    size: int = field(
        default=65536, metadata={"help": "past features of images kept, and as many of captions, in rows"}
    )
    half_life: float = field(
        default=0.0,
        metadata={"help": "batches after which a row of the bank weighs half as much; 0 = all rows weigh alike"},
    )
    initial_scale: float = field(default=1 / 0.07, metadata={"help": SCALE_HELP})


@dataclass
class ProximalContrastConfig:
    proximal_weight: float = field(
        default=30.0,
        metadata={"help": "factor of the squared distance of a sample's unit feature to its last one; 0 = none"},
    )
    negatives: int = field(
        default=65536,
        metadata={"help": "rows of the bank drawn for each batch; 0 = all, as where the bank has no more"},
    )
    initial_scale: float = field(default=1 / 0.07, metadata={"help": SCALE_HELP})


@dataclass
class MomentumContrastConfig:
    size: int = field(
        default=65536, metadata={"help": "past features of images kept, and as many of captions, in rows"}
    )
    initial_scale: float = field(default=1 / 0.07, metadata={"help": SCALE_HELP})


@dataclass
class PastRows:
    """Rows of earlier batches.

    Attributes:
        features: (M, D) unit vectors.
        ids: (M,) int64, whose image each is of; EMPTY where a row is not filled.
        log_weight: (M,), what is added to the logits; None = nothing.
    """

    features: Tensor
    ids: Tensor
    log_weight: Tensor | None = None


def contrast_with_past(
    queries: Tensor, query_ids: Tensor, keys: Tensor, key_ids: Tensor, past: PastRows, scale: Tensor
) -> ObjectiveOutput:
    """Cross-entropy against evenly weighted positives among the keys, with past rows as further negatives.

    Keys with a query's id are its positives. A past row with this id is neither positive nor negative and is left out,
    as is one that is not filled.

    Args:
        queries: (Q, D). query_ids: (Q,).
        keys: (K, D), one of each query's id at least. key_ids: (K,).
        past: M rows.
        scale: scalar, factor of cosines.

    Returns:
        mean loss over queries; as metrics `loss` and `accuracy`, the part of the queries whose highest logit is a
        positive's, in percent.
    """
    queries = normalized(queries)
    # The copy that this makes of a bank also keeps the graph right when rows are written before the backward.
    everything = torch.cat([normalized(keys), past.features.to(queries.dtype)])
    logits = scale * queries @ everything.T
    num_keys, num_past = len(keys), len(past.ids)
    if past.log_weight is not None:
        logits = logits + F.pad(past.log_weight.to(logits.dtype), (num_keys, 0))
    left_out = (past.ids[None] == query_ids[:, None]) | (past.ids[None] == EMPTY)
    logits = logits.masked_fill(F.pad(left_out, (num_keys, 0)), float("-inf"))
    positives = query_ids[:, None] == key_ids[None]
    # Not F.cross_entropy with probabilities: 0 * -inf is not a number.
    positive = logits[:, :num_keys].masked_fill(~positives, 0.0).sum(1) / positives.sum(1)
    loss = (logits.logsumexp(1) - positive).mean()
    best = logits.detach().argmax(1, keepdim=True)
    accuracy = F.pad(positives, (0, num_past)).gather(1, best).float().mean() * 100
    return ObjectiveOutput(loss, {"loss": loss.detach(), "accuracy": accuracy})


def contrast_both_ways(
    queries: Pairs, keys: Pairs, past_images: PastRows, past_texts: PastRows, scale: Tensor
) -> ObjectiveOutput:
    """Mean of the contrast of images with captions and of captions with images."""
    ways = {
        "i2t": (queries.images, queries.image_ids, keys.texts, keys.text_ids, past_texts),
        "t2i": (queries.texts, queries.text_ids, keys.images, keys.image_ids, past_images),
    }
    outputs = {way: contrast_with_past(*inputs, scale) for way, inputs in ways.items()}
    metrics = {f"{way}_{name}": value for way, output in outputs.items() for name, value in output.metrics.items()}
    loss = 0.5 * (outputs["i2t"].loss + outputs["t2i"].loss)
    return ObjectiveOutput(loss, metrics | {"scale": scale.detach()})


class BankContrast(Objective):
    """Contrast with all ranks' rows and with the student's own past features, first in, first out.

    With a half-life h, a row of n batches ago weighs 2^(-n / h): as much as that part of a row that stood in the batch.
    """

    image_written: Tensor
    text_written: Tensor
    pushes: Tensor

    def __init__(self, config: BankContrastConfig, setting: Setting) -> None:
        super().__init__()
        _assert_size("bank_itc", config.size)
        if config.half_life < 0:
            raise UserError(f"--bank-itc-half-life {config.half_life}: want a number of batches from 0 (no decay) on")
        self.scale = LogitScale(config.initial_scale)
        self.half_life = config.half_life
        self.images = FeatureQueue(config.size, setting.contrast_width)
        self.texts = FeatureQueue(config.size, setting.contrast_width)
        # In which batch each row was written, and how many there were.
        self.register_buffer("image_written", torch.zeros(config.size, dtype=torch.int64))
        self.register_buffer("text_written", torch.zeros(config.size, dtype=torch.int64))
        self.register_buffer("pushes", torch.zeros((), dtype=torch.int64))

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        own = Pairs(student.image.features, student.text.features, batch.image_ids, batch.caption_ids)
        everyone = own.gathered() if self.training else own
        past_images = PastRows(self.images.features, self.images.ids, self._log_weight(self.image_written))
        past_texts = PastRows(self.texts.features, self.texts.ids, self._log_weight(self.text_written))
        output = contrast_both_ways(own, everyone, past_images, past_texts, self.scale())
        if self.training:
            self._push(everyone)
        return output

    def _log_weight(self, written: Tensor) -> Tensor | None:
        """(size,), of rows by the batch that each was written in; None = all weigh alike."""
        if self.half_life == 0:
            return None
        return (written - self.pushes) * (math.log(2) / self.half_life)

    @torch.no_grad()
    def _push(self, pairs: Pairs) -> None:
        self.image_written[self.images.push(normalized(pairs.images), pairs.image_ids)] = self.pushes
        self.text_written[self.texts.push(normalized(pairs.texts), pairs.text_ids)] = self.pushes
        self.pushes += 1


class ProximalContrast(Objective):
    """Contrast with all ranks' rows and with a bank of one row a training sample, which a proximal term holds in place.

    Bank and term are those of instance discrimination (Wu et al. 2018, sections 3.1 and 3.3) for each modality. A
    sample's rows are the unit features that its image and its captions (their mean, made a unit vector) had when it was
    last seen; of a sample that a batch holds twice, those of its last occurrence. The term is the squared distance to
    the sample's row, half the mean over images plus half the mean over captions, where unseen samples count 0. At
    validation there is none: sample numbers are those of the training data. The bank takes 8 bytes a channel and image.
    """

    image_bank: Tensor
    text_bank: Tensor
    bank_ids: Tensor

    def __init__(self, config: ProximalContrastConfig, setting: Setting) -> None:
        super().__init__()
        if setting.num_images < 1:
            raise UserError("objective proximal_itc keeps a row for each training image: it needs a counted data set")
        if config.negatives < 0:
            raise UserError(f"--proximal-itc-negatives {config.negatives}: want a number of rows; 0 = all")
        self.scale = LogitScale(config.initial_scale)
        self.proximal_weight = config.proximal_weight
        self.negatives = config.negatives
        self.register_buffer("image_bank", torch.zeros(setting.num_images, setting.contrast_width))
        self.register_buffer("text_bank", torch.zeros(setting.num_images, setting.contrast_width))
        self.register_buffer("bank_ids", torch.full((setting.num_images,), EMPTY, dtype=torch.int64))
        # On the host, where they seed the draw: both are told anew at each update, so that none is to be saved.
        self._num_updates = self._batches = 0

    def begin_update(self, num_updates: int, decay: float) -> None:
        self._num_updates, self._batches = num_updates, 0

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
        rows = len(state_dict.get(f"{prefix}bank_ids", self.bank_ids))
        if rows != len(self.bank_ids):
            raise UserError(
                f"the checkpoint's bank of proximal_itc is of {rows} training images, DATA has {len(self.bank_ids)}: "
                "give the data that it was trained on"
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        own = Pairs(student.image.features, student.text.features, batch.image_ids, batch.caption_ids)
        everyone = own.gathered() if self.training else own
        rows = self._draw_rows()
        past_images = PastRows(self.image_bank[rows], self.bank_ids[rows])
        past_texts = PastRows(self.text_bank[rows], self.bank_ids[rows])
        output = contrast_both_ways(own, everyone, past_images, past_texts, self.scale())
        if not self.training:
            return output
        if batch.sample_ids is None:
            raise UserError("objective proximal_itc needs training data whose samples are numbered")
        image_drift = self._drift(own.images, self.image_bank, batch.sample_ids)
        text_drift = self._drift(own.texts, self.text_bank, batch.sample_ids[batch.caption_image])
        self._write(own, batch)
        self._batches += 1
        metrics = output.metrics | {"image_drift": image_drift.detach(), "text_drift": text_drift.detach()}
        return ObjectiveOutput(output.loss + self.proximal_weight * 0.5 * (image_drift + text_drift), metrics)

    def _draw_rows(self) -> Tensor | slice:
        """Rows of the bank that are negatives for this batch, the same on all ranks and when an update is repeated."""
        size = len(self.bank_ids)
        if self.negatives == 0 or self.negatives >= size:
            return slice(None)
        device = self.bank_ids.device
        generator = torch.Generator(device).manual_seed((self._num_updates << 16) + self._batches)
        return torch.randint(size, (self.negatives,), generator=generator, device=device)

    def _drift(self, features: Tensor, bank: Tensor, samples: Tensor) -> Tensor:
        """Mean squared distance of features (Q, D) to the last ones of the samples (Q,) that they are of."""
        features = normalized(features)
        moved = (features - bank[samples].to(features.dtype)).square().sum(1)
        return moved.masked_fill(self.bank_ids[samples] == EMPTY, 0.0).mean()

    @torch.no_grad()
    def _write(self, own: Pairs, batch: Batch) -> None:
        images = normalized(own.images)
        owned = batch.caption_image[None] == torch.arange(len(images), device=images.device)[:, None]
        # The direction of a sum of unit vectors is that of their mean.
        texts = normalized(owned.to(images.dtype) @ normalized(own.texts).nan_to_num(nan=0.0))
        samples, ids = all_gather(batch.sample_ids), all_gather(own.image_ids)
        last = last_occurrences(samples)
        for bank, features in ((self.image_bank, images), (self.text_bank, texts)):
            features = all_gather(features.to(bank.dtype)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            bank[samples] = features[last]
        self.bank_ids[samples] = ids


def last_occurrences(values: Tensor) -> Tensor:
    """(N,) int64, for each value the last place of an equal one.

    An indexed assignment with repeated places is determined, also on a GPU, where equal places get equal rows.
    """
    ordered, order = values.sort(stable=True)
    return order[torch.searchsorted(ordered, values, right=True) - 1]


class MomentumContrast(Objective):
    """The student's features against those that its moving average has of all ranks' rows and had of earlier ones.

    MoCo (He et al. 2020) for two modalities, as in ALBEF (Li et al. 2021, section 3.2) without its soft targets. Keys
    carry no gradient.
    """

    requires = Requirements(average=True)

    def __init__(self, config: MomentumContrastConfig, setting: Setting) -> None:
        super().__init__()
        _assert_size("momentum_itc", config.size)
        self.scale = LogitScale(config.initial_scale)
        self.images = FeatureQueue(config.size, setting.contrast_width)
        self.texts = FeatureQueue(config.size, setting.contrast_width)

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        own = Pairs(student.image.features, student.text.features, batch.image_ids, batch.caption_ids)
        average = student.average
        keys = Pairs(average.image.features, average.text.features, own.image_ids, own.text_ids)
        keys = keys.gathered() if self.training else keys
        past_images = PastRows(self.images.features, self.images.ids)
        past_texts = PastRows(self.texts.features, self.texts.ids)
        output = contrast_both_ways(own, keys, past_images, past_texts, self.scale())
        if self.training:
            self.images.push(normalized(keys.images), keys.image_ids)
            self.texts.push(normalized(keys.texts), keys.text_ids)
        return output


def _assert_size(name: str, size: int) -> None:
    if size < 1:
        raise UserError(f"--{name.replace('_', '-')}-size {size}: want at least one row")
