"""Zero-shot classification at validations, so that `--best-checkpoint-metric zero_shot_top1` finds it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emkum.checkpoint import ImageTextModel
from emkum.data.crops import centered_crops
from emkum.data.prompts import PromptedSet, open_prompted_set
from emkum.data.tokenizers import Tokenizer, encode
from emkum.distributed import all_gather_rows, rank, world_size
from emkum.errors import UserError
from emkum.evaluation.classification import top_k_accuracy
from emkum.evaluation.zero_shot import class_features, classify


@dataclass
class ZeroShotConfig:
    data: str = field(
        default="",
        metadata={
            "help": "prepared set with classes that each validation classifies by the captions of its classes, without "
            "training on it (zero_shot_top1, zero_shot_top5); empty = none"
        },
    )
    prompts: str = field(
        default="",
        metadata={
            "help": "JSON of class names and templates, as for `emkum evaluate zero-shot`; empty = the set's own names"
        },
    )
    split: str = field(default="test", metadata={"help": "split of the set to classify"})
    limit: int = field(
        default=0, metadata={"help": "classify so many images alone, evenly spaced over the split; 0 = all"}
    )


class ZeroShotScores:
    """Classifies a set, each device a part of it.

    Figures are logged as derived meters, the only kind that fairseq does not write into checkpoints.

    Args:
        found: the set.
        tokenizer: of the run.
        max_tokens: longest caption in tokens.
        limit: images to classify; 0 = all.

    Attributes:
        figures: in percent, by name; None where there are none yet.
    """

    def __init__(self, found: PromptedSet, tokenizer: Tokenizer, max_tokens: int, limit: int = 0) -> None:
        self.found = found
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.positions = spaced_positions(len(found.labels), limit)
        self.figures: dict[str, float] | None = None
        # Of this device's classes, which are tokenized once.
        texts, self._owners = found.prompts.texts(range(rank(), len(found.class_names), world_size()))
        self._tokens = [encode(tokenizer, text, max_tokens) for text in texts]

    @classmethod
    def build(cls, config: ZeroShotConfig, tokenizer: Tokenizer, max_tokens: int) -> "ZeroShotScores | None":
        """None where no set is named.

        Raises:
            UserError: the options do not fit each other or the set.
        """
        if config.limit < 0:
            raise UserError(f"--zero-shot-limit {config.limit}: want 0 (all images) or more")
        if not config.data:
            if config.prompts:
                raise UserError(f"--zero-shot-prompts {config.prompts} needs a set: give --zero-shot-data")
            return None
        found = open_prompted_set(config.data, config.split, config.prompts or None)
        return cls(found, tokenizer, max_tokens, config.limit)

    def __str__(self) -> str:
        return (
            f"{len(self.positions):,} images of {self.found.samples.directory}, {len(self.found.class_names):,} classes"
        )

    def score(self, student: Any, image_size: int, batch_size: int, workers: int) -> None:
        """Classify with a student in eval mode; all devices at once.

        Args:
            student: an `ImageTextStudent`.
            image_size: side of its input in pixels.
            batch_size: images encoded at once.
            workers: decoding processes; 0 = none.
        """
        device = next(student.parameters()).device
        model = ImageTextModel(student, self.tokenizer, image_size, self.max_tokens, device)
        classes = self._class_features(model)
        positions = self.positions[rank() :: world_size()]
        crops = centered_crops(self.found.samples, image_size, batch_size, workers, positions)
        ranks, done = [torch.zeros(0, dtype=torch.int64)], 0
        for batch in crops:
            labels = self.found.labels[positions[done : done + len(batch)]]
            ranks.append(classify(model.encode_crops(batch), classes, labels).ranks)
            done += len(batch)
        gathered = torch.cat(all_gather_rows(torch.cat(ranks).to(device)))
        figures = top_k_accuracy(gathered)
        self.figures = {f"zero_shot_top{k}": round(figures[f"top_{k}"], 3) for k in (1, 5)}

    def _class_features(self, model: ImageTextModel) -> Tensor:
        """(C, D) of all classes on the CPU, each made by one device."""
        own = model.encode_tokens(self._tokens)
        # More devices than classes leave some without one.
        if self._owners:
            places = [label // world_size() for label in self._owners]
            own = class_features(own, places, places[-1] + 1)
        parts = all_gather_rows(own.to(model.device))
        classes = own.new_empty(len(self.found.class_names), own.shape[1])
        for number, part in enumerate(parts):
            classes[number :: len(parts)] = part.cpu()
        return classes

    def log(self, metrics: Any) -> None:
        """Log the figures, where there are some, to all active aggregators of fairseq's `metrics`."""
        for name, value in (self.figures or {}).items():
            metrics.log_derived(name, lambda meters, value=value: value)


def spaced_positions(total: int, limit: int) -> np.ndarray:
    """(min(limit, total),) int64, ascending and evenly spaced over 0..total-1: a set in the order of its classes gives
    some of all; limit 0 = all."""
    count = min(limit or total, total)
    return np.arange(count, dtype=np.int64) * total // count
