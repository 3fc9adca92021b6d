"""The image-text student: two unimodal encoders and one shared encoder that reads either modality."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emkum.layers.token_types import IMAGE, TEXT, TokenTypes
from emkum.outputs import Encoded, StudentOutput


class ImageNormalizer(nn.Module):
    """uint8 pixels to the floating-point range that an image encoder was trained with.

    Args:
        mean, std: per channel, of pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to normalized, in the dtype of the statistics (which follows `model.half()`)."""
        # Crops come with their channels last in memory.
        images = images.to(self.mean.dtype, memory_format=torch.contiguous_format)
        return (images / 255 - self.mean) / self.std


class ImageTextStudent(nn.Module):
    """Runs images and captions one after the other through their own encoder and then the shared one.

    Positions are mixed: each encoder brings its own. Parts are injected; any may be exchanged for another of the same
    contract.

    Args:
        image_encoder: normalized (B, 3, S, S) to Encoded, with attributes `width`, `mean`, `std`.
        text_encoder: (T, L) ids and (T, L) padding mask to Encoded, with attribute `width`.
        shared_encoder: (B, N, D) tokens and padding mask to (B, N, D).
        image_projection, text_projection: from each encoder's width to the shared one; Identity where they agree.
        token_types: added between encoder and shared encoder; None = none.
        distillation_head: (B, D) shared CLS to (B, D_t) prediction of the teacher's target; None without a teacher.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        text_encoder: nn.Module,
        shared_encoder: nn.Module,
        image_projection: nn.Module,
        text_projection: nn.Module,
        token_types: TokenTypes | None = None,
        distillation_head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.shared_encoder = shared_encoder
        self.image_projection = image_projection
        self.text_projection = text_projection
        self.token_types = token_types
        self.distillation_head = distillation_head
        self.normalize = ImageNormalizer(image_encoder.mean, image_encoder.std)
        self.width: int = image_encoder.width

    def encode_image(self, images: Tensor) -> Encoded:
        """(B, 3, S, S) uint8 to shared-encoder tokens (B, 1 + N, D)."""
        return self.encode_normalized(self.normalize(images))

    def encode_normalized(self, images: Tensor) -> Encoded:
        """The same of images that are normalized already, (B, 3, S, S) floating point."""
        return self._share(self.image_encoder(images), self.image_projection, IMAGE)

    def encode_text(
        self, text: Tensor, padding_mask: Tensor | None = None, groups: list[tuple[int, int]] | None = None
    ) -> Encoded:
        """(T, L) ids to shared-encoder tokens (T, L, D).

        Args:
            text: token ids, CLS first.
            padding_mask: (T, L), True at padding.
            groups: (rows, length) of consecutive captions to run on their own at their own length, which saves the
                work on padding; rows sum to T, lengths are at most L. None = all at once.
        """
        if groups is None:
            encoded = self.text_encoder(text, padding_mask)
            return self._share(encoded, self.text_projection, TEXT)
        parts, start = [], 0
        for rows, length in groups:
            part = slice(start, start + rows), slice(length)
            encoded = self.encode_text(text[part], None if padding_mask is None else padding_mask[part])
            parts.append(F.pad(encoded.tokens, (0, 0, 0, text.shape[1] - length)))
            start += rows
        return Encoded(torch.cat(parts), padding_mask)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        padding_mask: Tensor | None = None,
        groups: list[tuple[int, int]] | None = None,
    ) -> StudentOutput:
        """Encode a batch of images and its captions; arguments as of `encode_image` and `encode_text`."""
        images, texts = self.encode_image(image), self.encode_text(text, padding_mask, groups)
        head = self.distillation_head
        return StudentOutput(
            image=images,
            text=texts,
            image_features=images.cls,
            text_features=texts.cls,
            image_prediction=None if head is None else head(images.cls),
            text_prediction=None if head is None else head(texts.cls),
        )

    def _share(self, encoded: Encoded, projection: nn.Module, token_type: int) -> Encoded:
        tokens = projection(encoded.tokens)
        if self.token_types is not None:
            tokens = self.token_types(tokens, token_type)
        return Encoded(self.shared_encoder(tokens, encoded.padding_mask), encoded.padding_mask)
