"""Distillation of discrete targets: the code that a fitted table gives a teacher's feature, as a class to predict.

The table is made beforehand: centroids by `emkum fit-clusters`, a codebook by training the image quantizer.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.files import replaced_file
from emkum.layers.nearest_code import CodeTable, NearestCentroid, NearestCode
from emkum.layers.precision import at_least_float32
from emkum.objectives.base import Objective, Requirements, Setting
from emkum.objectives.knowledge_distillation import PredictionHead, Scored, argmax_agreement, summed
from emkum.outputs import Batch, ObjectiveOutput, StudentOutput, TeacherOutput
from emkum.provenance import differing_keys
from emkum.weights import first_line, read_checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class FittedTable:
    """A table of codes as its file has it.

    Attributes:
        tensors: of the `CodeTable`, by name.
        count: codes.
        width: channels of the features that have codes.
        teacher: identity of the teacher whose features it was fitted to; None where the file does not say.
    """

    tensors: dict[str, Tensor]
    count: int
    width: int
    teacher: dict[str, Any] | None


def write_centroids(path: Path, centroids: Tensor, teacher: Mapping[str, Any]) -> None:
    """Write centroids (K, D) and the identity of the teacher whose features they were fitted to.

    Raises:
        UserError: the file cannot be written.
    """
    from safetensors.torch import save_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as temporary:
            save_file({"centroids": centroids.contiguous()}, temporary, {"teacher": json.dumps(teacher)})
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def read_centroids(path: str | Path) -> FittedTable:
    """What `write_centroids` wrote.

    Raises:
        UserError: the file is none of these, or damaged.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            centroids = file.get_tensor("centroids")
            teacher = json.loads(file.metadata()["teacher"])
    except Exception as error:  # the reader raises several types for damaged files
        raise UserError(
            f"{path} holds no centroids: make such a file with `emkum fit-clusters` ({first_line(error)})"
        ) from None
    return FittedTable({"centroids": centroids}, *centroids.shape, teacher)


def read_quantizer(path: str | Path) -> FittedTable:
    """The map and the codes of a trained image quantizer.

    Raises:
        UserError: the file is no checkpoint of one, or of one that has no codes yet.
    """
    state = read_checkpoint(path)
    names = {"weight": "project.weight", "bias": "project.bias", "codes": "codebook.codes"}
    try:
        tensors = {name: state["model"][f"quantizer.{key}"] for name, key in names.items()}
        is_started = bool(state["model"]["quantizer.codebook.started"])
    except (LookupError, TypeError):
        raise UserError(f"{path} is no checkpoint of a run with --arch image_quantizer") from None
    if not is_started:
        raise UserError(f"{path}: training stopped before the codebook had its first codes; train longer")
    count, width = len(tensors["codes"]), tensors["weight"].shape[1]
    return FittedTable(tensors, count, width, (state.get("task_state") or {}).get("teacher"))


# ----------------------------------------------------------------------------------------------------------------------
# Objectives
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class ClusterDistillationConfig:
    clusters: int = field(default=1000, metadata={"help": "clusters in the file of centroids"})
    centroids: str = field(
        default="",
        metadata={
            "help": "file of centroids that `emkum fit-clusters` wrote; checkpoints hold its content, so that going on "
            "from one does without"
        },
    )


@dataclass
class CodeDistillationConfig:
    codes: int = field(default=1024, metadata={"help": "codes of the image quantizer"})
    quantizer: str = field(
        default="",
        metadata={
            "help": "checkpoint of a run with --arch image_quantizer; the student's checkpoints hold what is needed of "
            "it, so that going on from one does without"
        },
    )


def code_prediction(logits: Tensor, codes: Tensor) -> Scored:
    """Cross-entropy of logits (B, J) against codes (B,), mean over rows, and accuracy in percent."""
    logits = at_least_float32(logits)
    return Scored(F.cross_entropy(logits, codes), argmax_agreement(logits, F.one_hot(codes, logits.shape[1])))


class TargetCodes(Objective):
    """Half the images' cross-entropy plus half the captions', of a head on the shared CLS token against target codes.

    A caption's code is that of its image, or of its own target where the teacher gives captions one.

    Args:
        table: gives the teacher's features their codes.
        count: number of codes, and `count_option` the flag that says so.
        path: file of the codes, and `file_option` the flag that names it.
        fitted: content of the file; None where there is no such file, as when a run goes on elsewhere.
        setting: sizes around it.

    Attributes:
        teacher: identity of the teacher that the codes are of; None where it is not known.

    Raises:
        UserError: the file has another number of codes, or is of features of another width.
    """

    requires = Requirements(features=True)
    file_option = count_option = ""

    def __init__(self, table: CodeTable, count: int, path: str, fitted: FittedTable | None, setting: Setting) -> None:
        super().__init__()
        self.head = PredictionHead(setting.width, count)
        self.table = table
        self.path = path
        self.teacher = None if fitted is None else fitted.teacher
        if fitted is None:
            return
        if fitted.count != count:
            raise UserError(f"{path} has {fitted.count:,} codes: give {self.count_option} {fitted.count}, not {count}")
        if fitted.width != setting.target_width:
            raise UserError(
                f"{self.file_option} {path} is made of features of {fitted.width} channels; the teacher's have "
                f"{setting.target_width}: fit it to this teacher"
            )
        table.fill(**fitted.tensors)

    def forward(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> ObjectiveOutput:
        if not self.table.is_filled():
            given = f"{self.path} does not exist" if self.path else "none is given"
            raise UserError(f"{self.file_option} must name a file where no checkpoint brings its content; {given}")
        codes = self.table(teacher.features)
        own = teacher.text_features
        text_codes = codes[batch.caption_image] if own is None else self.table(own)
        image = code_prediction(self.head(student.image.cls), codes)
        return summed("accuracy", image, code_prediction(self.head(student.text.cls), text_codes))


class ClusterDistillation(TargetCodes):
    """Cluster KD: the nearest of centroids that k-means found among the teacher's features."""

    file_option, count_option = "--kd-cluster-centroids", "--kd-cluster-clusters"

    def __init__(self, config: ClusterDistillationConfig, setting: Setting) -> None:
        table, path = NearestCentroid(config.clusters, setting.target_width), config.centroids
        super().__init__(table, config.clusters, path, read_centroids(path) if Path(path).is_file() else None, setting)


class CodeDistillation(TargetCodes):
    """VQ KD: the code that a trained image quantizer gives the teacher's feature."""

    file_option, count_option = "--kd-vq-quantizer", "--kd-vq-codes"

    def __init__(self, config: CodeDistillationConfig, setting: Setting) -> None:
        table, path = NearestCode(config.codes, setting.target_width), config.quantizer
        super().__init__(table, config.codes, path, read_quantizer(path) if Path(path).is_file() else None, setting)


def assert_fitted_to(objectives: Mapping[str, nn.Module], identity: Mapping[str, Any]) -> None:
    """Check that codes were fitted to the teacher of the run.

    Args:
        objectives: of the run, by name.
        identity: of its teacher.

    Raises:
        UserError: some are another teacher's.
    """
    for objective in objectives.values():
        if isinstance(objective, TargetCodes):
            file = f"{objective.file_option} {objective.path}"
            assert_same_teacher(file, objective.teacher, identity, "--teacher names")


def assert_same_teacher(
    file: str, fitted_to: Mapping[str, Any] | None, identity: Mapping[str, Any], teacher: str
) -> None:
    """
    Args:
        file: of codes, for messages.
        fitted_to: identity of their teacher; None where it is not known.
        identity: of the teacher that is there. teacher: what that is called in messages.

    Raises:
        UserError: they are two.
    """
    if fitted_to is not None and (names := differing_keys(fitted_to, identity)):
        raise UserError(f"{file} was fitted to another teacher than {teacher} (it differs in {', '.join(names)})")
