"""Objectives by name: config dataclass, pure function, thin module; one family a file."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from emkum.errors import UserError
from emkum.objectives.base import Objective, Requirements
from emkum.objectives.image_text_contrast import ImageTextContrast, ImageTextContrastConfig
from emkum.objectives.knowledge_distillation import (
    ContrastiveDistillation,
    ContrastiveDistillationConfig,
    RegressionDistillation,
    RegressionDistillationConfig,
)
from emkum.options import collect_parts

# Name -> (config dataclass, module). The name is also the prefix of the objective's options and metrics.
OBJECTIVES: dict[str, tuple[type, type[Objective]]] = {
    "itc": (ImageTextContrastConfig, ImageTextContrast),
    "kd_mse": (RegressionDistillationConfig, RegressionDistillation),
    "kd_contrastive": (ContrastiveDistillationConfig, ContrastiveDistillation),
}

OBJECTIVE_PARTS: dict[str, type] = {name: config for name, (config, _) in OBJECTIVES.items()}


def parse_objectives(names: str) -> list[str]:
    """Split a comma-separated list of objectives.

    Raises:
        UserError: one is unknown or named twice, or there is none.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in OBJECTIVES]
    if unknown or not chosen or len(set(chosen)) != len(chosen):
        raise UserError(f"--objectives {names!r}: give each of your choice of {', '.join(OBJECTIVES)} once")
    return chosen


def needs_teacher(names: list[str]) -> bool:
    """Whether any of the objectives compares with a teacher."""
    return any(OBJECTIVES[name][1].requires.teacher for name in names)


def build_objectives(names: list[str], options: Mapping[str, Any], target_width: int | None) -> nn.ModuleDict:
    """Build objectives from flat options.

    Args:
        names: from `parse_objectives`.
        options: flat options, a mapping or an object with attributes.
        target_width: channels of the teacher's global feature; None = there is no teacher.
    """
    configs = collect_parts(OBJECTIVE_PARTS, options)
    return nn.ModuleDict({name: OBJECTIVES[name][1](configs[name], target_width) for name in names})


__all__ = [
    "OBJECTIVES",
    "OBJECTIVE_PARTS",
    "Objective",
    "Requirements",
    "build_objectives",
    "needs_teacher",
    "parse_objectives",
]
