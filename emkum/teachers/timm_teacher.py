"""Any timm image model as teacher."""

from functools import partial

from torch import Tensor, nn

from emkum.outputs import TeacherOutput
from emkum.teachers.base import FrozenTeacher
from emkum.weights import fingerprint, timm_model


def timm_teacher(name: str, weights: str, image_size: int = 0) -> FrozenTeacher:
    """A timm model whose global feature is what its classifier would see (CLS or pooled patches, normed).

    Args:
        name: timm's model name.
        weights: local file, or `hub`.
        image_size: side of the input in pixels; 0 = the model's own.
    """
    size = {"img_size": image_size} if image_size else {}
    try:
        model = timm_model(name, weights, **size)
    except TypeError:  # a convolutional model is not built for one size
        model = timm_model(name, weights)
    config = model.pretrained_cfg
    side = image_size or config["input_size"][-1]
    has_patches = hasattr(model, "num_prefix_tokens")
    return FrozenTeacher(
        model,
        partial(_features, has_patches=has_patches),
        # Some convolutional models widen their features before the classifier.
        width=getattr(model, "head_hidden_size", model.num_features),
        image_size=side,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        identity={"teacher": f"timm:{name}", "weights_sha256": fingerprint(model), "image_size": side},
    )


def _features(model: nn.Module, images: Tensor, has_patches: bool) -> TeacherOutput:
    tokens = model.forward_features(images)
    return TeacherOutput(
        features=model.forward_head(tokens, pre_logits=True),
        patches=tokens[:, model.num_prefix_tokens :] if has_patches else None,
        logits=model.forward_head(tokens) if model.num_classes > 0 else None,
    )
