"""What runs with several seeds say of a difference."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

BETTER, WORSE, SAME, NOISE, UNKNOWN = "better", "worse", "same", "within noise", "unknown"


@dataclass(frozen=True)
class Effect:
    """A difference of means.

    Attributes:
        difference: of what is looked at less what it is compared with.
        margin: half of the 95 % interval of the difference; None where there are too few runs to tell.
    """

    difference: float
    margin: float | None

    @property
    def finding(self) -> str:
        """In a word; a difference that is smaller than its margin is noise."""
        if self.margin is None:
            return UNKNOWN
        if abs(self.difference) <= self.margin:
            return NOISE
        return BETTER if self.difference > 0 else WORSE


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation of a sample; None of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def compare(values: Sequence[float], others: Sequence[float]) -> Effect:
    """The difference of two groups' means with its 95 % interval by Welch's t.

    Groups may have different spreads and sizes. They are not paired by their seeds: runs that differ in what they learn
    share little but the order of their batches.

    Args:
        values: one a run. others: of what it is compared with.
    """
    difference = statistics.fmean(values) - statistics.fmean(others)
    if min(len(values), len(others)) < 2:
        return Effect(difference, None)
    parts = [statistics.variance(group) / len(group) for group in (values, others)]
    total = sum(parts)
    if total == 0:
        return Effect(difference, 0.0)
    from scipy.stats import t

    # Welch (1947) and Satterthwaite (1946).
    degrees = total**2 / sum(part**2 / (len(group) - 1) for part, group in zip(parts, (values, others), strict=True))
    return Effect(difference, float(t.ppf(0.975, degrees)) * total**0.5)


def same_direction(finding: str, expected: str | None) -> str:
    """Whether a finding is what was expected of it: yes, no, noise, unknown, or "not told" where nothing was."""
    if expected is None:
        return "not told"
    if finding == UNKNOWN:
        return UNKNOWN
    if expected == SAME:
        return "yes" if finding == NOISE else "no"
    return "noise" if finding == NOISE else "yes" if finding == expected else "no"
