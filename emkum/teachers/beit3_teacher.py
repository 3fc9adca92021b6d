"""BEiT-3 as teacher: of images, of texts, or of both read together."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from emkum.errors import UserError
from emkum.outputs import TeacherOutput
from emkum.teachers.base import IMAGE, TEXT, FrozenTeacher
from emkum.weights import fingerprint

POOLINGS = ("default", "cls", "mean")


def beit3_teacher(
    model: nn.Module,
    identity: dict[str, Any],
    tokenizer: Path | None = None,
    max_tokens: int = 0,
    pooling: str = "default",
    **options: Any,
) -> FrozenTeacher:
    """A BEiT-3 encoder.

    Args:
        model: `model(images, text, padding_mask)` gives Encoded of either or both, `model.hidden_states` of the same a
            list of layers, `model.norm` the final norm of one; with `image_size`, `mean`, `std`, `max_positions`.
        identity: plain data that says which one it is; pooling, hash of the weights and transform are added.
        tokenizer: file or folder of the tokenizer.
        max_tokens: longest text in tokens; 0 = as long as the model can read.
        pooling: of images: default = cls, or mean over the patches. Of texts and pairs it is the first token always.
        options: target, autocast, compiled and layers of FrozenTeacher. Layers are those of the image, before the
            final norm.

    Raises:
        UserError: there is no such pooling, or the model cannot read such long texts.
    """
    if pooling not in POOLINGS:
        raise UserError(f"--teacher-pooling {pooling!r}: beit3 knows {', '.join(POOLINGS)}")
    if max_tokens > model.max_positions:
        raise UserError(f"beit3 reads texts of up to {model.max_positions} tokens, not of {max_tokens}")
    return FrozenTeacher(
        _BEiT3Teacher(model, pooling),
        {**identity, "pooling": pooling, "weights_sha256": fingerprint(model)},
        image_size=model.image_size,
        mean=model.mean,
        std=model.std,
        modalities=(IMAGE, TEXT),
        tokenizer=tokenizer,
        max_tokens=max_tokens or model.max_positions,
        **options,
    )


class _BEiT3Teacher(nn.Module):
    def __init__(self, model: nn.Module, pooling: str) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling

    def forward(
        self, images: Tensor, text: Tensor | None = None, padding_mask: Tensor | None = None, layers: bool = False
    ) -> TeacherOutput:
        if layers:
            states = tuple(self.model.hidden_states(images))
            tokens = self.model.norm(states[-1], states[-1].shape[1])
        else:
            states, tokens = None, self.model(images).tokens
        patches = tokens[:, 1:]
        return TeacherOutput(
            patches.mean(1) if self.pooling == "mean" else tokens[:, 0],
            text_features=None if text is None else self.model(text=text, padding_mask=padding_mask).cls,
            patches=patches,
            layers=states,
        )

    def fuse(self, images: Tensor, text: Tensor, padding_mask: Tensor | None) -> Tensor:
        """(T, D), the image's CLS token of each pair read together."""
        return self.model(images, text, padding_mask).cls
