"""What a trained image-text student hands on to a run that starts from it, such as retrieval fine-tuning."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emkum.checkpoint import find_checkpoint, load
from emkum.data.tokenizers import Tokenizer
from emkum.errors import UserError
from emkum.models.builders import STUDENT_PARTS
from emkum.models.student import ImageTextStudent
from emkum.options import flat_fields
from emkum.weights import load_strictly, read_checkpoint

# What a run may choose anew: rates of dropout, how the work is done, and heads that objectives ask for.
_FREE = (
    "dropout",
    "attention_dropout",
    "drop_path",
    "attention",
    "checkpoint_activations",
    "weights",
    "init",
    "head_kd",
)
# Heads that objectives ask for: they begin anew.
_NEW = "heads.prediction.*,heads.logits.*,mask_token"
# Of a checkpoint, objectives of images and captions, and of images and sounds.
_OBJECTIVES = ("objectives.", "audio_objectives.")


@dataclass(frozen=True)
class StudentStart:
    """A trained student without what only its own objectives needed.

    Attributes:
        path: its checkpoint.
        options: flat options that say what it is made of.
        student: its parameters and buffers by name.
        objectives: what its objectives learned, such as temperatures, by the name in the run's model; banks and queues
            too, which nothing is taken from.
        tokenizer: of its captions.
    """

    path: Path
    options: Mapping[str, Any]
    student: Mapping[str, Tensor]
    objectives: Mapping[str, Tensor]
    tokenizer: Tokenizer


def read_start(source: str | Path) -> StudentStart:
    """
    Args:
        source: a run's folder, for its best checkpoint, or a checkpoint.

    Raises:
        UserError: no such file, a damaged one, or one of another kind of model.
    """
    path = find_checkpoint(source)
    model = load(path)
    state = read_checkpoint(path)
    names = [name for name, item in flat_fields(STUDENT_PARTS) if name not in _FREE and item.name not in _FREE]
    options = {name: state["cfg"]["model"][name] for name in names if name in state["cfg"]["model"]}
    learned = {key: value for key, value in state["model"].items() if key.startswith(_OBJECTIVES)}
    return StudentStart(path, options, model.student.state_dict(), learned, model.tokenizer)


def fill_student(student: ImageTextStudent, start: StudentStart) -> None:
    """Give a student all weights but those of heads that its own objectives ask for.

    Raises:
        UserError: it is made of other parts.
    """
    load_strictly(student, start.student, start.path, allowed=_NEW, what="the student that the options describe")


def fill_objectives(model: nn.Module, start: StudentStart) -> None:
    """Let objectives that were there before go on from the parameters that they had; banks and queues begin empty.

    Args:
        model: has `objectives` and `audio_objectives`, as the model of the run that `start` is of.
        start: the trained student.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            before = start.objectives.get(name)
            if before is not None and before.shape == parameter.shape:
                parameter.copy_(before)


def assert_same_tokenizer(tokenizer: Tokenizer, start: StudentStart) -> None:
    """
    Raises:
        UserError: a run reads captions by another tokenizer than the student did, so that ids mean other pieces.
    """

    def content(one: Tokenizer) -> dict[str, bytes]:
        return {name: file.read_bytes() for name, file in one.files.items()}

    if content(tokenizer) != content(start.tokenizer):
        folder = next(iter(start.tokenizer.files.values())).parent
        raise UserError(
            f"--init-from {start.path}: that student reads captions by another tokenizer than this run; give "
            f"--caption-tokenizer {folder}"
        )
