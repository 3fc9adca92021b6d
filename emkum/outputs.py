"""Named outputs that travel between the parts. B images, T captions, N tokens, D channels, C classes."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class Encoded:
    """One modality behind an encoder.

    Attributes:
        tokens: (B, N, D), the CLS token first.
        padding_mask: (B, N), True at padding; None where nothing is padded.
        hidden: (B, D_h), what the CLS token is inside the shared encoder's feed-forward part, before its activation;
            None where there is no such part.
        cls_attention: (B, N), how much the CLS token attends to each token in the shared encoder's last block, mean
            over heads, without gradient; None where no objective asks for it.
    """

    tokens: Tensor
    padding_mask: Tensor | None = None
    hidden: Tensor | None = None
    cls_attention: Tensor | None = None

    @property
    def cls(self) -> Tensor:
        """(B, D), the first token."""
        return self.tokens[:, 0]


@dataclass
class ModalityOutput(Encoded):
    """What the student makes of B images, of T captions or of B sounds: what the shared encoder gives, and what heads
    make of its CLS token.

    Where no objective asks for tokens, `tokens` may be the CLS token alone, (B, 1, D), and `padding_mask` None.

    Attributes:
        features: (B, D_c), not normalized; what image-text contrast and retrieval compare.
        prediction: (B, D_t), of the teacher's global feature; None where no objective asks for it.
        logits: (B, C), over the teacher's classes; None likewise.
    """

    features: Tensor | None = None
    prediction: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class StudentOutput:
    """What the student makes of a batch of B images and their T captions.

    Attributes:
        image, text: of either modality.
        masked_image, masked_text: the same of images with some patches masked and of captions with some tokens masked;
            None where no objective asks for them.
        average: what the student's moving average makes of the same images and captions, without gradient; None where
            no objective asks for it.
        crops: (V * B rows) of V further crops of each image, those of the first crop of all images first; None where
            no objective asks for them.
        audio: (B rows) of each image's sound; None where none is heard.
    """

    image: ModalityOutput
    text: ModalityOutput
    masked_image: ModalityOutput | None = None
    masked_text: ModalityOutput | None = None
    average: "StudentOutput | None" = None
    crops: ModalityOutput | None = None
    audio: ModalityOutput | None = None

    def with_sounds_for_captions(self) -> "StudentOutput":
        """The same, where each image's sound stands in the place of its captions; captions are not there."""
        average = None if self.average is None else self.average.with_sounds_for_captions()
        return replace(self, text=self.audio, audio=None, masked_text=None, average=average)


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
        image_ids: (B,) int64, equal for equal images across the whole data set, not negative.
        caption_image: (T,) int64, for each caption the row of its image in this batch.
        special: (T, L) bool, True at CLS, SEP and padding; None where it is not known.
        text_targets: (T, L) int64, the true id where a token of `masked_text` is to be predicted, else -100.
        patch_mask: (B, N) bool, True at masked patches of `masked_image`, row by row.
        num_text_targets: at least the number of tokens to predict, known without asking the device; None = not known.
        sample_ids: (B,) int64, number of each image in the training data, from 0; None where it is not known.
    """

    image_ids: Tensor
    caption_image: Tensor
    special: Tensor | None = None
    text_targets: Tensor | None = None
    patch_mask: Tensor | None = None
    num_text_targets: int | None = None
    sample_ids: Tensor | None = None

    def with_sounds_for_captions(self, special: Tensor) -> "Batch":
        """The same, where each image's one sound stands in the place of its captions.

        Args:
            special: (B, N) bool, True at what is no frame of a sound: CLS and padding.
        """
        rows = torch.arange(len(self.image_ids), device=self.image_ids.device)
        return replace(self, caption_image=rows, special=special, text_targets=None, num_text_targets=None)

    @property
    def caption_ids(self) -> Tensor:
        """(T,) int64, for each caption the id of its image."""
        return self.image_ids[self.caption_image]


@dataclass
class ObjectiveOutput:
    """Unweighted scalar loss and detached scalar metrics of one objective."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class PairScores:
    """How similar each image and each caption are, the higher the more.

    Attributes:
        image_to_text: (B, T), as an image's candidates are compared.
        text_to_image: (B, T), as a caption's candidates are.
    """

    image_to_text: Tensor
    text_to_image: Tensor
