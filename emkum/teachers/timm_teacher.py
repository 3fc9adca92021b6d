"""Any timm image model as teacher."""

from typing import Any

import torch
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.outputs import TeacherOutput
from emkum.teachers.base import FrozenTeacher, TeacherConfig, shared_options
from emkum.weights import fingerprint, timm_model

POOLINGS = ("default", "cls", "mean")


def timm_teacher(name: str, config: TeacherConfig, layers: bool = False) -> FrozenTeacher:
    """A timm model.

    Args:
        name: timm's model name.
        config: weights, input size (0 = the model's own), pooling, parameters that may be missing, and how to run.
        layers: give all layers; a convolutional model's stages count as such.

    Raises:
        UserError: no such model, weights of another one, or the model has no such pooling or no layers to give.
    """
    size = {"img_size": config.image_size} if config.image_size else {}
    arguments = {"allowed": config.allow_missing}
    try:
        model = timm_model(name, config.weights, **arguments, **size)
    except TypeError:  # a convolutional model is not built for one size
        model = timm_model(name, config.weights, **arguments)
    pretrained = model.pretrained_cfg
    return FrozenTeacher(
        _TimmTeacher(model, f"timm:{name}", config.pooling, layers),
        {"teacher": f"timm:{name}", "weights_sha256": fingerprint(model), "pooling": config.pooling},
        image_size=config.image_size or pretrained["input_size"][-1],
        mean=tuple(pretrained["mean"]),
        std=tuple(pretrained["std"]),
        layers=layers,
        **shared_options(config),
    )


class _TimmTeacher(nn.Module):
    """Outputs of a timm model under common names.

    Args:
        model: with `forward_features` and `forward_head`.
        name: for messages.
        pooling: default = what the classifier would see (normed CLS token or pooled patches); cls and mean = of what
            `forward_features` gives, normed where the model norms before it pools.
        layers: whether layers will be asked for.
    """

    def __init__(self, model: nn.Module, name: str, pooling: str, layers: bool) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise UserError(f"--teacher-pooling {pooling!r}: {name} knows {', '.join(POOLINGS)}")
        if pooling == "cls" and getattr(model, "cls_token", None) is None:
            raise UserError(f"--teacher-pooling cls: {name} has no CLS token; choose default or mean")
        if layers and not hasattr(model, "forward_intermediates"):
            raise UserError(f"{name} does not give its layers: timm has no forward_intermediates for it")
        self.model = model
        self.pooling = pooling
        # Tokens before the patches; None for a model whose features are a map.
        self.prefix: int | None = getattr(model, "num_prefix_tokens", None)

    def forward(
        self, images: Tensor, text: Tensor | None = None, padding_mask: Tensor | None = None, layers: bool = False
    ) -> TeacherOutput:
        if layers:
            features, parts = self._intermediates(images)
        else:
            features, parts = self.model.forward_features(images), None
        patches = self._patches(features)
        if self.pooling == "cls":
            pooled = features[:, 0]
        elif self.pooling == "mean":
            pooled = patches.mean(1)
        else:
            pooled = self.model.forward_head(features, pre_logits=True)
        logits = self.model.forward_head(features) if self.model.num_classes > 0 else None
        return TeacherOutput(pooled, patches=patches, logits=logits, layers=parts)

    def _intermediates(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.prefix is None:
            features, parts = self.model.forward_intermediates(images)
            return features, tuple(part.flatten(2).transpose(1, 2) for part in parts)
        options: dict[str, Any] = {"output_fmt": "NLC", "return_prefix_tokens": self.prefix > 0}
        features, parts = self.model.forward_intermediates(images, **options)
        # Prefix tokens come apart, behind the patches.
        return features, tuple(
            torch.cat([part[1], part[0]], dim=1) if isinstance(part, tuple) else part for part in parts
        )

    def _patches(self, features: Tensor) -> Tensor | None:
        """(B, N, D) of what `forward_features` gave: tokens, or a map in either order."""
        if features.ndim == 3:
            return features[:, self.prefix or 0 :]
        if features.ndim == 4:
            channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
        return None
