"""Named outputs that travel between the parts. B images, T captions, N tokens, D channels, C classes."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Encoded:
    """One modality behind an encoder.

    Attributes:
        tokens: (B, N, D), the CLS token first.
        padding_mask: (B, N), True at padding; None where nothing is padded.
    """

    tokens: Tensor
    padding_mask: Tensor | None = None

    @property
    def cls(self) -> Tensor:
        """(B, D), the first token."""
        return self.tokens[:, 0]


@dataclass
class StudentOutput:
    """What the student makes of a batch of B images and their T captions.

    Attributes:
        image, text: shared-encoder outputs of either modality.
        image_features, text_features: (B, D) and (T, D), not normalized; what image-text contrast and retrieval use.
        image_prediction, text_prediction: (B, D_t) and (T, D_t), the distillation head's prediction of the teacher's
            target; None without a teacher.
    """

    image: Encoded
    text: Encoded
    image_features: Tensor
    text_features: Tensor
    image_prediction: Tensor | None = None
    text_prediction: Tensor | None = None


@dataclass
class TeacherOutput:
    """A frozen teacher's targets for B images and T captions; for a teacher of text alone, B counts texts.

    Attributes:
        features: (B, D_t) global feature, which images are to predict.
        text_features: (T, D_t) what captions are to predict; None = the feature of their image.
        patches: (B, N_t, D_p) features of patches (of tokens for a teacher of text alone, special ones included), None
            where the teacher has none; D_p is D_t unless the global feature is pooled from patches in more than one
            way.
        logits: (B, C), None where there are none.
        layers: of every block (B, N, D), special tokens first; None where they were not asked for. A convolutional
            teacher's stages differ in N and D.
    """

    features: Tensor
    text_features: Tensor | None = None
    patches: Tensor | None = None
    logits: Tensor | None = None
    layers: tuple[Tensor, ...] | None = None

    def of_captions(self, caption_image: Tensor) -> Tensor:
        """(T, D_t), what each caption is to predict.

        Args:
            caption_image: (T,) int64, for each caption the row of its image.
        """
        return self.features[caption_image] if self.text_features is None else self.text_features


@dataclass
class Batch:
    """What objectives may know of a batch beside the outputs.

    Attributes:
        image_ids: (B,) int64, equal for equal images across the whole data set.
        caption_image: (T,) int64, for each caption the row of its image in this batch.
    """

    image_ids: Tensor
    caption_image: Tensor


@dataclass
class ObjectiveOutput:
    """Unweighted scalar loss and detached scalar metrics of one objective."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
