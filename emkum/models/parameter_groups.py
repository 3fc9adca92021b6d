"""Which parameters learn slower or are not decayed, as attributes that the optimizer reads."""

from dataclasses import dataclass, field

from torch import nn

from emkum.models.student import ImageTextStudent


@dataclass
class LearningRateConfig:
    image_encoder: float = field(
        default=1.0, metadata={"help": "factor of the learning rate for the image encoder (METER, Dou et al. 2022)"}
    )
    text_encoder: float = field(default=1.0, metadata={"help": "factor of the learning rate for the text encoder"})


# Tables and tokens that weight decay would only shrink.
_NO_DECAY = ("embed", "position", "extra_tokens", "_token", "token_types", "log_scale")


def assign_overrides(module: nn.Module, student: ImageTextStudent, config: LearningRateConfig) -> None:
    """Set `optim_overrides` on every parameter: no weight decay on biases, norms, other 1-D parameters, CLS tokens,
    positions and embeddings; encoders at their own fraction of the learning rate.

    Args:
        module: all that is trained, the student and the objectives' parameters.
        student: the student inside it.
        config: factors of the learning rate.
    """
    scales = {id(p): config.image_encoder for p in student.image_encoder.parameters()}
    scales.update((id(p), config.text_encoder) for p in student.text_encoder.parameters())
    for name, parameter in module.named_parameters():
        # A patch embedding's kernel is a weight like any other, despite its name.
        is_table = any(part in name for part in _NO_DECAY) and "patch_embed" not in name
        decay = 0.0 if parameter.ndim < 2 or is_table else 1.0
        parameter.optim_overrides = {
            "optimizer": {"lr_scale": scales.get(id(parameter), 1.0), "weight_decay_scale": decay}
        }
