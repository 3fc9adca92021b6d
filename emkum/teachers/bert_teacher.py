"""BERT as teacher of texts."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from emkum.errors import UserError
from emkum.layers.pooling import masked_mean
from emkum.outputs import TeacherOutput
from emkum.teachers.base import TEXT, FrozenTeacher
from emkum.weights import fingerprint

POOLINGS = ("default", "cls", "mean")


def bert_teacher(
    model: nn.Module,
    identity: dict[str, Any],
    tokenizer: Path | None,
    max_tokens: int = 0,
    pooling: str = "default",
    **options: Any,
) -> FrozenTeacher:
    """A BERT encoder.

    Args:
        model: `model(text, padding_mask)` gives Encoded, `model.hidden_states` of the same a list of layers; with
            `max_positions`.
        identity: plain data that says which one it is; pooling and hash of the weights are added.
        tokenizer: its `vocab.txt`, or the folder of it.
        max_tokens: longest text in tokens; 0 = as long as the model can read.
        pooling: default = cls, the first token of the last layer; mean = over all of its tokens but padding.
        options: target, autocast, compiled and layers of FrozenTeacher.

    Raises:
        UserError: no vocabulary, no such pooling, or the model cannot read such long texts.
    """
    if tokenizer is None:
        raise UserError("bert: a teacher needs the vocab.txt of its model; put it beside the weights")
    if pooling not in POOLINGS:
        raise UserError(f"--teacher-pooling {pooling!r}: bert knows {', '.join(POOLINGS)}")
    if max_tokens > model.max_positions:
        raise UserError(f"bert reads texts of up to {model.max_positions} tokens, not of {max_tokens}")
    return FrozenTeacher(
        _BertTeacher(model, pooling),
        {**identity, "pooling": pooling, "weights_sha256": fingerprint(model)},
        modalities=(TEXT,),
        tokenizer=tokenizer,
        max_tokens=max_tokens or model.max_positions,
        **options,
    )


class _BertTeacher(nn.Module):
    def __init__(self, model: nn.Module, pooling: str) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling

    def forward(
        self, images: None, text: Tensor, padding_mask: Tensor | None = None, layers: bool = False
    ) -> TeacherOutput:
        states = tuple(self.model.hidden_states(text, padding_mask)) if layers else None
        tokens = self.model(text, padding_mask).tokens if states is None else states[-1]
        features = masked_mean(tokens, padding_mask) if self.pooling == "mean" else tokens[:, 0]
        return TeacherOutput(features, patches=tokens, layers=states)
