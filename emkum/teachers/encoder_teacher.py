"""A self-supervised encoder of this project's own kind as teacher."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emkum.outputs import TeacherOutput
from emkum.teachers.base import FrozenTeacher
from emkum.weights import fingerprint


def average_layers(layers: list[Tensor], eps: float = 1e-8) -> Tensor:
    """Mean over layers of instance-normed tokens, the target that Data2Vec 2 itself predicts (Baevski et al. 2022).

    Args:
        layers: (B, N, D) each; every channel is normed over its N tokens.
    """
    normed = [F.instance_norm(layer.transpose(1, 2).float(), eps=eps) for layer in layers]
    return torch.stack(normed).mean(0).transpose(1, 2)


def encoder_teacher(encoder: nn.Module, identity: dict[str, Any]) -> FrozenTeacher:
    """An image encoder with `hidden_states(images)`, its global feature the mean over patches of all layers' outputs.

    Args:
        encoder: has attributes `width`, `image_size`, `mean`, `std`.
        identity: plain data that says which one it is; the hash of the weights is added.
    """
    return FrozenTeacher(
        encoder,
        _features,
        width=encoder.width,
        image_size=encoder.image_size,
        mean=encoder.mean,
        std=encoder.std,
        identity={**identity, "weights_sha256": fingerprint(encoder), "image_size": encoder.image_size},
    )


def _features(encoder: nn.Module, images: Tensor) -> TeacherOutput:
    layers = encoder.hidden_states(images)
    # Over its tokens an instance norm has mean zero: the global feature must come from what is not normed so.
    pooled = torch.stack([F.layer_norm(layer[:, 1:].float(), layer.shape[-1:]).mean(1) for layer in layers]).mean(0)
    return TeacherOutput(features=pooled, patches=average_layers(layers)[:, 1:])
