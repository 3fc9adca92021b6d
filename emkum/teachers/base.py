"""What a teacher is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from emkum.outputs import TeacherOutput


@dataclass
class TeacherConfig:
    weights: str = field(
        default="hub", metadata={"help": "weights of a timm: teacher: a local file, or 'hub' to download them"}
    )
    image_size: int = field(
        default=0, metadata={"help": "side of the teacher's crops in pixels; 0 = what the teacher was trained with"}
    )


@dataclass
class TeacherInput:
    """What a teacher may know of a batch of B images.

    Attributes:
        images: (B, 3, S, S) uint8 crops.
        ids: (B,) int64, index of each sample in its split.
        views: (B,) int64, which of the repeating crops each one is; -1 where crops do not repeat.
        split: name of the split.
    """

    images: Tensor
    ids: Tensor
    views: Tensor
    split: str


class Teacher(Protocol):
    """Targets for a batch; never trained, never saved with the student.

    Attributes:
        width: channels D_t of the global feature.
        image_size: side in pixels of the crops it wants; 0 = it does not look at them.
        identity: what the targets depend on (architecture, hash of the weights, pooling), as plain data.
    """

    width: int
    image_size: int
    identity: dict[str, Any]

    def __call__(self, batch: TeacherInput) -> TeacherOutput:
        """Targets for a batch, without gradient."""
        ...

    def open_split(self, split: str, data_hash: str, crops: dict[str, Any]) -> None:
        """Called before the first batch of a split, with its content hash and what its random crops depend on.

        Raises:
            UserError: the teacher has no targets for these.
        """
        ...


class FrozenTeacher:
    """A frozen vision model that looks at the pixels.

    Args:
        model: eval mode and no gradients are set here; it moves to the images' device on first use.
        features: (model, normalized images (B, 3, S, S)) to TeacherOutput.
        width: channels of the global feature.
        image_size: side of the input in pixels.
        mean, std: normalization of pixels in [0, 1].
        identity: plain data that identifies the targets.
    """

    def __init__(
        self,
        model: nn.Module,
        features: Callable[[nn.Module, Tensor], TeacherOutput],
        width: int,
        image_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        identity: dict[str, Any],
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.features = features
        self.width = width
        self.image_size = image_size
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)
        self.identity = identity

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> TeacherOutput:
        if self.mean.device != images.device:
            self.model, self.mean, self.std = (part.to(images.device) for part in (self.model, self.mean, self.std))
        # Crops come with their channels last in memory.
        images = images.to(torch.float32, memory_format=torch.contiguous_format)
        return self.features(self.model, (images / 255 - self.mean) / self.std)

    def __call__(self, batch: TeacherInput) -> TeacherOutput:
        out = self._forward(batch.images)
        # Inference tensors cannot be saved for backward; a clone outside the mode is an ordinary one.
        return TeacherOutput(
            *(None if part is None else part.clone() for part in (out.features, out.patches, out.logits))
        )

    def open_split(self, split: str, data_hash: str, crops: dict[str, Any]) -> None:
        pass
