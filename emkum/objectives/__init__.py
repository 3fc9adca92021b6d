"""Objectives by name: config dataclass, pure function, thin module; one family a file."""

from collections.abc import Iterable, Mapping
from functools import reduce
from operator import or_
from typing import Any

from torch import nn

from emkum.errors import UserError
from emkum.objectives.base import Objective, Requirements, Setting
from emkum.objectives.image_text_contrast import ImageTextContrast, ImageTextContrastConfig
from emkum.objectives.knowledge_distillation import (
    ClassDistillation,
    ClassDistillationConfig,
    ContrastiveDistillation,
    ContrastiveDistillationConfig,
    RegressionDistillation,
    RegressionDistillationConfig,
)
from emkum.objectives.late_interaction import (
    LateInteraction,
    LateInteractionConfig,
    TargetLateInteraction,
    TargetLateInteractionConfig,
)
from emkum.objectives.masked_modeling import (
    MaskedImageConfig,
    MaskedImageModeling,
    MaskedLanguageConfig,
    MaskedLanguageModeling,
)
from emkum.objectives.matching import Matching, MatchingConfig
from emkum.objectives.negative_banks import (
    BankContrast,
    BankContrastConfig,
    MomentumContrast,
    MomentumContrastConfig,
    ProximalContrast,
    ProximalContrastConfig,
)
from emkum.objectives.patch_distillation import PatchDistillation, PatchDistillationConfig
from emkum.objectives.ranking import Ranking, RankingConfig
from emkum.objectives.reduced_distillation import ReducedDistillation, ReducedDistillationConfig
from emkum.objectives.self_distillation import SelfDistillation, SelfDistillationConfig
from emkum.objectives.target_codes import (
    ClusterDistillation,
    ClusterDistillationConfig,
    CodeDistillation,
    CodeDistillationConfig,
)
from emkum.options import collect_parts

# Name -> (config dataclass, module). The name is also the prefix of the objective's options and metrics.
OBJECTIVES: dict[str, tuple[type, type[Objective]]] = {
    "itc": (ImageTextContrastConfig, ImageTextContrast),
    "ranking": (RankingConfig, Ranking),
    "bank_itc": (BankContrastConfig, BankContrast),
    "proximal_itc": (ProximalContrastConfig, ProximalContrast),
    "momentum_itc": (MomentumContrastConfig, MomentumContrast),
    "kd_kl": (ClassDistillationConfig, ClassDistillation),
    "kd_mse": (RegressionDistillationConfig, RegressionDistillation),
    "kd_contrastive": (ContrastiveDistillationConfig, ContrastiveDistillation),
    "kd_patch": (PatchDistillationConfig, PatchDistillation),
    "kd_reduced": (ReducedDistillationConfig, ReducedDistillation),
    "kd_cluster": (ClusterDistillationConfig, ClusterDistillation),
    "kd_vq": (CodeDistillationConfig, CodeDistillation),
    "cmli": (LateInteractionConfig, LateInteraction),
    "target_cmli": (TargetLateInteractionConfig, TargetLateInteraction),
    "itm": (MatchingConfig, Matching),
    "mlm": (MaskedLanguageConfig, MaskedLanguageModeling),
    "mim": (MaskedImageConfig, MaskedImageModeling),
    "dino": (SelfDistillationConfig, SelfDistillation),
}

# Before the name of an objective that compares images with sounds instead of captions, in figures and outputs.
HEARD = "audio_"

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


def objective_configs(names: list[str], options: Any) -> dict[str, Any]:
    """Each objective's own config dataclass out of flat options.

    Args:
        names: from `parse_objectives`.
        options: flat options, a mapping or an object with attributes.
    """
    return collect_parts({name: OBJECTIVE_PARTS[name] for name in names}, options)


def required(configs: Mapping[str, Any]) -> Requirements:
    """What objectives, given by `objective_configs`, need of the run all together."""
    return reduce(or_, (OBJECTIVES[name][1].requires_of(config) for name, config in configs.items()), Requirements())


def heard_objectives(names: Iterable[str]) -> list[str]:
    """Those of the objectives that compare images with sounds as they do with captions.

    Raises:
        UserError: none of them does.
    """
    names = list(names)
    heard = [name for name in names if OBJECTIVES[name][1].pairs]
    if not heard:
        raise UserError(f"--audio-encoder: {', '.join(names)} learns nothing from sounds; add an objective such as itc")
    return heard


def assert_teacher_gives(configs: Mapping[str, Any], offered: Requirements | None, teacher: str) -> None:
    """Check that a teacher gives what the objectives compare with.

    Args:
        configs: from `objective_configs`.
        offered: what the teacher gives; None = there is no teacher.
        teacher: its name, or without one those to choose from, for messages.

    Raises:
        UserError: an objective needs something else.
    """
    for name, config in configs.items():
        needs = OBJECTIVES[name][1].requires_of(config)
        wanted = {"a global feature": needs.prediction or needs.features, "logits": needs.logits}
        wanted["patch features"] = needs.patches
        if offered is None:
            if needs.teacher:
                parts = " and ".join(part for part, is_wanted in wanted.items() if is_wanted)
                raise UserError(f"objective {name} needs a --teacher with {parts}: {teacher}")
            continue
        given = {"a global feature": offered.features, "logits": offered.logits, "patch features": offered.patches}
        lacking = [part for part, is_wanted in wanted.items() if is_wanted and not given[part]]
        if lacking:
            raise UserError(f"objective {name} needs a teacher with {' and '.join(lacking)}; {teacher} gives none")


def build_objectives(names: list[str], options: Any, setting: Setting) -> nn.ModuleDict:
    """Build objectives from flat options; arguments as of `objective_configs`, and the sizes around them."""
    configs = objective_configs(names, options)
    return nn.ModuleDict({name: OBJECTIVES[name][1](config, setting) for name, config in configs.items()})


__all__ = [
    "HEARD",
    "OBJECTIVES",
    "OBJECTIVE_PARTS",
    "Objective",
    "Requirements",
    "Setting",
    "assert_teacher_gives",
    "build_objectives",
    "heard_objectives",
    "objective_configs",
    "parse_objectives",
    "required",
]
