"""A text encoder with a head that tells classes, or a score, from its CLS token: fine-tuning for GLUE."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emkum.checkpoint import find_checkpoint, model_name
from emkum.data.glue import TOP_SCORE
from emkum.data.tokenizers import Tokenizer, load_tokenizer
from emkum.errors import UserError
from emkum.layers.precision import at_least_float32
from emkum.layers.shared_encoders import initialize_weights
from emkum.models.encoder import Encoder
from emkum.models.encoder_sources import text_encoder_from_options
from emkum.options import collect_parts
from emkum.weights import load_strictly, read_checkpoint

MODEL = "text_classifier"
# What a classifier says whose outputs are not finite: none of the classes.
NO_CLASS = -1


@dataclass
class ClassifierConfig:
    dropout: float = field(default=0.1, metadata={"help": "dropout before each of the two layers of the head"})


class ClassifierHead(nn.Module):
    """RoBERTa's head (Liu et al. 2019): dropout, a layer with tanh, dropout, a linear map.

    Args:
        width: channels D of the CLS token.
        num_outputs: C.
        dropout: rate of both.
    """

    def __init__(self, width: int, num_outputs: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(width, width)
        self.out = nn.Linear(width, num_outputs)
        self.apply(initialize_weights)

    def forward(self, cls: Tensor) -> Tensor:
        """(B, C) of (B, D)."""
        return self.out(self.dropout(torch.tanh(self.dense(self.dropout(cls)))))


class TextClassifier(nn.Module):
    """Tells the class or the score of texts.

    Args:
        encoder: of texts.
        num_classes: 0 = a score from 0 to TOP_SCORE.
        dropout: of the head.
    """

    # With `text_encoder`, what `emkum.models.parameter_groups` asks of a student.
    image_encoder = None

    def __init__(self, encoder: Encoder, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_classes = num_classes
        self.head = ClassifierHead(encoder.width, num_classes or 1, dropout)

    @property
    def text_encoder(self) -> Encoder:
        return self.encoder

    def forward(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, C) logits of (B, L) ids, or (B, 1) scores in units of TOP_SCORE; the mask (B, L) is True at padding."""
        return self.head(self.encoder(tokens, padding_mask).cls)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean over the batch: cross-entropy of logits, or squared error of scores in units of TOP_SCORE.

        Args:
            outputs: as `forward` gives them.
            labels: (B,) classes, or scores from 0 to TOP_SCORE.
        """
        outputs = at_least_float32(outputs)
        if self.num_classes:
            return F.cross_entropy(outputs, labels)
        return F.mse_loss(outputs[:, 0], labels.to(outputs.dtype) / TOP_SCORE)

    def predictions(self, outputs: Tensor) -> Tensor:
        """(B,) classes, NO_CLASS where an output is not finite; or (B,) scores, which may leave 0 ... TOP_SCORE."""
        if self.num_classes == 0:
            return TOP_SCORE * at_least_float32(outputs[:, 0])
        return torch.where(outputs.isfinite().all(dim=1), outputs.argmax(dim=1), NO_CLASS)


def build_text_classifier(
    options: Any,
    vocab_size: int,
    pad_index: int,
    num_classes: int,
    pretrained: bool = True,
    make: Callable[[Encoder, int, float], TextClassifier] = TextClassifier,
) -> TextClassifier:
    """Build a classifier from flat options with the prefixes student, text and classifier.

    Args:
        options: a mapping, or an object with the options as attributes.
        vocab_size: rows of the word embedding.
        pad_index: id of padding.
        num_classes: 0 = a score.
        pretrained: read the weights that `text_weights` names.
        make: from encoder, classes and dropout to the classifier.

    Raises:
        UserError: an option has a value that names nothing, or weights do not fit.
    """
    config = collect_parts({"classifier": ClassifierConfig}, options)["classifier"]
    if not 0 <= config.dropout < 1:
        raise UserError(f"--classifier-dropout {config.dropout}: want 0 to below 1")
    encoder = text_encoder_from_options(options, vocab_size, pad_index, pretrained)
    return make(encoder, num_classes, config.dropout)


@dataclass
class LoadedClassifier:
    """A trained classifier, in eval mode on the CPU, and how it reads texts.

    Attributes:
        max_tokens: longest input, special tokens included.
    """

    classifier: TextClassifier
    tokenizer: Tokenizer
    max_tokens: int


def load_text_classifier(path: str | Path, num_classes: int) -> LoadedClassifier:
    """Load a classifier from a checkpoint, or the best one of a run's folder; its tokenizer's folder lies beside it.

    Args:
        path: the file, or the folder.
        num_classes: that it was trained for; 0 = a score.

    Raises:
        UserError: no such file, a damaged one, one of another kind of model, or of another number of classes.
    """
    path = find_checkpoint(path)
    state = read_checkpoint(path)
    name = model_name(state)
    if name != MODEL:
        raise UserError(f"{path} is a checkpoint of {name or 'an unknown kind'}, not of {MODEL}")
    tokenizer = load_tokenizer(path.parent / "tokenizer")
    classifier = build_text_classifier(
        state["cfg"]["model"], tokenizer.vocab_size, tokenizer.special.pad, num_classes, pretrained=False
    )
    load_strictly(classifier, state["model"], path, what=f"a classifier of {num_classes or 'no'} classes")
    return LoadedClassifier(classifier.eval(), tokenizer, state["cfg"]["task"]["glue_max_tokens"])
