"""How much each objective counts in the sum, from the beginning of a run to its end."""

import math
from dataclasses import dataclass, field

from emkum.errors import UserError

SCHEDULES = ("constant", "linear", "cosine")


@dataclass
class WeightConfig:
    weight: float = field(default=1.0, metadata={"help": "factor of this objective in the sum; 0 = only logged"})
    weight_schedule: str = field(
        default="constant",
        metadata={"help": "constant; linear (grows from 0 to the factor); cosine (goes from the factor to its end)"},
    )
    weight_updates: int = field(
        default=0, metadata={"help": "updates that a linear or cosine schedule takes; 0 = the whole run"}
    )
    weight_end: float = field(default=0.0, metadata={"help": "factor at the end of a cosine schedule"})


def weight_at(config: WeightConfig, num_updates: int, max_updates: int) -> float:
    """The factor after so many updates.

    Args:
        config: of one objective.
        num_updates: updates done.
        max_updates: of the run.
    """
    if config.weight_schedule == "constant":
        return config.weight
    progress = min(1.0, num_updates / max(1, config.weight_updates or max_updates))
    if config.weight_schedule == "linear":
        return config.weight * progress
    return config.weight_end + (config.weight - config.weight_end) * (1 + math.cos(math.pi * progress)) / 2


def assert_schedule(config: WeightConfig, name: str, max_updates: int) -> None:
    """Check the options of an objective's weight.

    Raises:
        UserError: there is no such schedule, or it takes the whole of a run whose length is not known.
    """
    option = f"--{name.replace('_', '-')}-weight"
    if config.weight_schedule not in SCHEDULES:
        raise UserError(f"{option}-schedule {config.weight_schedule!r} is unknown; choose from {', '.join(SCHEDULES)}")
    if config.weight_updates < 0 or (
        config.weight_schedule != "constant" and config.weight_updates == 0 and max_updates < 1
    ):
        raise UserError(f"{option}-updates {config.weight_updates}: want the schedule's length, or --max-update and 0")
