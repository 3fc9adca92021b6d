"""The text classifier as a fairseq model."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model
from torch import Tensor

from emkum.errors import UserError
from emkum.layers.precision import AUTOCAST_HELP, Autocast
from emkum.models.encoder import Encoder
from emkum.models.encoder_sources import TEXT_FORMS, TEXT_PARTS, load_text_encoder
from emkum.models.parameter_groups import LearningRateConfig, assign_overrides
from emkum.models.text_classifier import MODEL, ClassifierConfig, TextClassifier, build_text_classifier
from emkum.options import collect_parts
from emkum.weights import load_strictly

from ..config import flat_dataclass


@dataclass
class InitConfig:
    layers: int = field(default=0, metadata={"help": "of the blocks of --init-from keep the first so many; 0 = all"})
    random: bool = field(
        default=False,
        metadata={"help": "take size and tokenizer of --init-from alone, with random weights: training from scratch"},
    )


@dataclass
class _Base(FairseqDataclass):
    init_from: Optional[str] = field(
        default=None,
        metadata={
            "help": f"text encoder to start from: {TEXT_FORMS}. It brings its own architecture, whatever the options "
            "of --text-* and --student-* say of it; empty = as these say"
        },
    )
    autocast: Optional[str] = field(default=None, metadata={"help": AUTOCAST_HELP})


_PARTS = {"init": InitConfig, **TEXT_PARTS, "classifier": ClassifierConfig, "lr_scale": LearningRateConfig}
TextClassifierConfig = flat_dataclass("TextClassifierConfig", _PARTS, base=_Base)


@register_model(MODEL, dataclass=TextClassifierConfig)
class TextClassifierModel(TextClassifier, BaseFairseqModel):
    """`emkum.models.text_classifier.TextClassifier` with its loss by name, as fairseq's criterion `model` takes it.

    A subclass, not a wrapper, so that the encoder's weights are called `encoder.` in checkpoints, where
    `emkum.models.encoder_sources` finds them.

    Args:
        encoder, num_classes, dropout: of TextClassifier.
        autocast: see AUTOCAST_HELP.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        dropout: float,
        autocast: str | None = None,
    ) -> None:
        super().__init__(encoder, num_classes, dropout)
        self.autocast = Autocast(autocast)

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "TextClassifierModel":
        make = partial(cls, autocast=cfg.autocast)
        tokenizer, start = task.tokenizer, task.start
        model = build_text_classifier(
            cfg,
            tokenizer.vocab_size,
            tokenizer.special.pad,
            len(task.classes),
            pretrained=start is None and task.load_pretrained,
            make=make,
        )
        if model.encoder.max_positions < task.max_tokens:
            raise UserError(
                f"--glue-max-tokens {task.max_tokens}: the text encoder has {model.encoder.max_positions} positions"
            )
        if start is not None and not cfg.init_random:
            load_strictly(model.encoder, start.encoder.state_dict(), cfg.init_from)
        assign_overrides(model, model, collect_parts({"lr_scale": LearningRateConfig}, cfg)["lr_scale"])
        return model

    def forward(self, text: Tensor, padding_mask: Tensor | None, labels: Tensor) -> dict[str, Any]:
        """Loss of a batch, a figure for the log while training, and the outputs of `TextClassifier`.

        Shapes are those of `emkum.data.glue.GlueDataset.collate`.
        """
        # Validation runs in full precision: its figures are those that `emkum glue` prints.
        with self.autocast.context(text.device, enabled=self.training):
            outputs = super().forward(text, padding_mask)
        logs = {}
        if self.training and self.num_classes:
            logs["accuracy"] = 100.0 * (outputs.detach().argmax(dim=1) == labels).float().mean()
        return {"losses": {"classification": self.loss(outputs, labels)}, "logs": logs, "outputs": outputs}

    def max_positions(self) -> None:
        return None


def complete_options(cfg: Any, tokenizer: str) -> Any:
    """Load the encoder that `--init-from` names, and let the flat options say what it is made of, so that a checkpoint
    can be read without it.

    Args:
        cfg: the model's options, which are changed.
        tokenizer: the encoder's, where it does not come with one; else empty.

    Returns:
        The encoder and what belongs to it; None where the options name none.

    Raises:
        UserError: it cannot be read or built anew, or an option that only it can have stands without it.
    """
    config = collect_parts({"init": InitConfig}, cfg)["init"]
    if not cfg.init_from:
        if config.layers or config.random:
            raise UserError("--init-layers and --init-random are of the encoder that --init-from names: give that")
        return None
    start = load_text_encoder(cfg.init_from, tokenizer, config.layers)
    if not start.options:
        raise UserError(
            f"--init-from {cfg.init_from}: its student adds positions or token types to the words, which a classifier "
            "does not; give a student with position_kind mixed, and token types after the encoders"
        )
    for name, value in start.options.items():
        cfg[name] = value
    return start
