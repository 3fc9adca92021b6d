"""The protocol of objectives."""

from dataclasses import dataclass, field

from torch import nn

from emkum.outputs import Batch, ObjectiveOutput, StudentOutput, TeacherOutput


@dataclass(frozen=True)
class Requirements:
    """What an objective needs of the run.

    Attributes:
        teacher: a teacher's global features.
    """

    teacher: bool = False


@dataclass
class WeightConfig:
    weight: float = field(default=1.0, metadata={"help": "factor of this objective in the sum; 0 = only logged"})


class Objective(nn.Module):
    """One loss of a student's output, and its metrics.

    State (scales, banks) is parameters and persistent buffers, so that it is trained, saved and restored with the
    model. `requires` is checked when the run starts.
    """

    requires = Requirements()

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        """Unweighted loss (mean over this rank's rows) and metrics of a batch."""
        raise NotImplementedError
