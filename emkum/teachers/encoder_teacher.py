"""A self-supervised encoder of this project's own kind as teacher."""

from typing import Any

import torch
from torch import Tensor, nn

from emkum.outputs import TeacherOutput
from emkum.teachers.base import FrozenTeacher
from emkum.weights import fingerprint


def encoder_teacher(encoder: nn.Module, identity: dict[str, Any]) -> FrozenTeacher:
    """An image encoder whose global feature is the mean and the maximum over its patches, side by side.

    Its CLS token is trained to predict a mean over patches alone; the maximum adds which things are there at all.

    Args:
        encoder: `encoder(images)` gives Encoded; it has attributes `width`, `image_size`, `mean`, `std`.
        identity: plain data that says which one it is; pooling and hash of the weights are added.
    """
    return FrozenTeacher(
        encoder,
        _features,
        width=2 * encoder.width,
        image_size=encoder.image_size,
        mean=encoder.mean,
        std=encoder.std,
        identity={
            **identity,
            "pooling": "patch mean and maximum",
            "weights_sha256": fingerprint(encoder),
            "image_size": encoder.image_size,
        },
    )


def _features(encoder: nn.Module, images: Tensor) -> TeacherOutput:
    patches = encoder(images).tokens[:, 1:].float()
    return TeacherOutput(features=torch.cat([patches.mean(1), patches.amax(1)], dim=1), patches=patches)
