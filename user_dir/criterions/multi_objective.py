"""The one criterion: weighs the model's objectives, sums and logs."""

import math
from dataclasses import dataclass
from typing import Any

from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from omegaconf import II

from emkum.objectives import HEARD, OBJECTIVE_PARTS
from emkum.objectives.weights import WeightConfig, assert_schedule, weight_at
from emkum.options import collect_parts

from ..config import flat_dataclass


@dataclass
class _Base(FairseqDataclass):
    max_update: int = II("optimization.max_update")


# Of images and sounds, a further factor of all objectives.
_AUDIO = "audio_loss"
_WEIGHTS = dict.fromkeys((*OBJECTIVE_PARTS, _AUDIO), WeightConfig)
MultiObjectiveConfig = flat_dataclass("MultiObjectiveConfig", _WEIGHTS, base=_Base)


@register_criterion("multi_objective", dataclass=MultiObjectiveConfig)
class MultiObjectiveCriterion(FairseqCriterion):
    """Weighted sum, in float32, of the objectives that the model computes.

    Losses are batch means, so the sample size is 1 and gradients are averaged over devices and `--update-freq`.
    """

    def __init__(self, cfg: Any, task: Any) -> None:
        super().__init__(task)
        self.weights = collect_parts(_WEIGHTS, cfg)
        self.max_updates = max(0, cfg.max_update)
        for name, config in self.weights.items():
            assert_schedule(config, name, self.max_updates)

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> "MultiObjectiveCriterion":
        return cls(cfg, task)

    def forward(self, model: Any, sample: dict[str, Any], reduce: bool = True) -> tuple:
        outputs, student = model(**self.task.student_input(sample), targets=self.task.teacher_targets(sample))
        weights = {name: self._weight(name, model.num_updates) for name in outputs}
        loss = sum(weights[name] * output.loss.float() for name, output in outputs.items())
        log = {"loss": loss.detach(), "ntokens": sample["ntokens"], "nsentences": sample["nsentences"]}
        log["sample_size"] = log["batches"] = 1
        for name, output in outputs.items():
            log[f"{name}_loss"] = output.loss.detach().float()
            log.update({f"{name}_{metric}": value.detach().float() for metric, value in output.metrics.items()})
        if not model.training:
            self.task.collect_features(sample, student)
        return loss, 1, log

    def _weight(self, output: str, num_updates: int) -> float:
        """Factor of an objective's loss, or of its loss on sounds."""
        name = output.removeprefix(HEARD)
        parts = (name,) if name == output else (name, _AUDIO)
        return math.prod(weight_at(self.weights[part], num_updates, self.max_updates) for part in parts)

    # Of a fairseq batch, but not a figure to average.
    _COUNTS = ("ntokens", "nsentences", "sample_size", "batches")

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Average every figure over batches and devices."""
        batches = sum(log["batches"] for log in logging_outputs)
        names = dict.fromkeys(key for log in logging_outputs for key in log if key not in cls._COUNTS)
        for name in names:
            total = sum(log.get(name, 0.0) for log in logging_outputs)
            metrics.log_scalar(name, total / batches, batches, round=3)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True
