"""The image-text student: encoders of images, captions and, where it hears, sounds, and a shared one that reads any."""

from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emkum.layers.token_types import AUDIO, IMAGE, TEXT
from emkum.models.encoder import Encoder
from emkum.outputs import Encoded, ModalityOutput, StudentOutput


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


def normalized_sounds(
    sounds: Tensor, padding_mask: Tensor | None = None, dtype: torch.dtype = torch.float32, eps: float = 1e-5
) -> Tensor:
    """(B, L) int16 samples to mean 0 and variance 1 of each sound, 0 at padding, as Data2Vec 2 was trained.

    Args:
        sounds: samples of 16 bits.
        padding_mask: (B, L), True at padding; None = there is none.
        dtype: of the result; statistics are in float32 at least.
        eps: added to the variance of samples in [-1, 1]: silence stays silent.
    """
    samples = sounds.to(torch.promote_types(dtype, torch.float32)) / 32768
    if padding_mask is None:
        return F.layer_norm(samples, samples.shape[1:], eps=eps).to(dtype)
    heard = ~padding_mask
    count = heard.sum(1, keepdim=True).clamp_min(1)
    centered = (samples - (samples * heard).sum(1, keepdim=True) / count) * heard
    return (centered * torch.rsqrt(centered.square().sum(1, keepdim=True) / count + eps)).to(dtype)


class Heads(nn.Module):
    """What is made of the shared CLS token.

    Args:
        contrast: (B, D) to the features (B, D_c) that are compared, by token type; Identity = the CLS token itself.
        prediction: (B, D) to a prediction (B, D_t) of the teacher's feature; None = none is made.
        logits: (B, D) to logits (B, C) over the teacher's classes; None = none are made.
    """

    def __init__(
        self,
        contrast: tuple[nn.Module, ...],
        prediction: nn.Module | None = None,
        logits: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.contrast = nn.ModuleList(contrast)
        self.prediction = prediction
        self.logits = logits

    def contrast_width(self, width: int) -> int:
        """D_c, where the shared encoder has `width` channels."""
        head = self.contrast[0]
        return width if isinstance(head, nn.Identity) else head.out_features

    def forward(self, encoded: Encoded, token_type: int) -> ModalityOutput:
        """The shared encoder's output with everything that is made of it."""
        cls = encoded.cls
        return ModalityOutput(
            encoded.tokens,
            encoded.padding_mask,
            encoded.hidden,
            encoded.cls_attention,
            features=self.contrast[token_type](cls),
            prediction=None if self.prediction is None else self.prediction(cls),
            logits=None if self.logits is None else self.logits(cls),
        )


class ImageTextStudent(nn.Module):
    """Runs images, captions and sounds one after the other through their own encoder and then the shared one.

    Parts are injected; any may be exchanged for another of the same contract.

    Args:
        image_encoder: of normalized (B, 3, S, S), with attributes `mean` and `std`.
        text_encoder: of (T, L) token ids.
        shared_encoder: (B, N, D) tokens and padding mask to Encoded.
        image_projection, text_projection: from each encoder's width to the shared one; Identity where they agree.
        heads: what is made of the shared CLS token.
        width: D, of the shared encoder; `contrast_width` is D_c.
        before, after: what is added to the tokens before the encoders' first block, and before the shared encoder:
            modules that take tokens and token type, by name.
        mask_token: make a learned token that stands for masked patches.
        audio_encoder: of normalized (B, L) samples; None = the student does not hear.
        audio_projection: as the others; None without `audio_encoder`.
    """

    def __init__(
        self,
        image_encoder: Encoder,
        text_encoder: Encoder,
        shared_encoder: nn.Module,
        image_projection: nn.Module,
        text_projection: nn.Module,
        heads: Heads,
        width: int,
        before: dict[str, nn.Module] | None = None,
        after: dict[str, nn.Module] | None = None,
        mask_token: bool = False,
        audio_encoder: Encoder | None = None,
        audio_projection: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.audio_encoder = audio_encoder
        self.audio_projection = audio_projection
        self.before = nn.ModuleDict(before)
        self.image_projection = image_projection
        self.text_projection = text_projection
        self.after = nn.ModuleDict(after)
        self.shared_encoder = shared_encoder
        self.heads = heads
        self.normalize = ImageNormalizer(image_encoder.mean, image_encoder.std)
        self.width = width
        self.contrast_width = heads.contrast_width(width)
        token = nn.init.trunc_normal_(torch.empty(image_encoder.width), std=0.02) if mask_token else None
        self.mask_token = None if token is None else nn.Parameter(token)

    def encode_image(self, images: Tensor, masked: Tensor | None = None) -> ModalityOutput:
        """Images through both encoders.

        Args:
            images: (B, 3, S, S) uint8.
            masked: (B, N) bool, True at patches that are hidden from the student; None = none.

        Returns:
            Tokens (B, 1 + N, D).
        """
        return self.encode_normalized(self.normalize(images), masked)

    def encode_normalized(self, images: Tensor, masked: Tensor | None = None) -> ModalityOutput:
        """The same of images that are normalized already, (B, 3, S, S) floating point."""
        tokens = self.image_encoder.embed(images, masked, None if masked is None else self.mask_token)
        return self._encode(tokens, None, self.image_encoder, self.image_projection, IMAGE)

    def encode_text(
        self, text: Tensor, padding_mask: Tensor | None = None, groups: list[tuple[int, int]] | None = None
    ) -> ModalityOutput:
        """Captions through both encoders.

        Args:
            text: (T, L) token ids, CLS first.
            padding_mask: (T, L), True at padding.
            groups: (rows, length) of consecutive captions to run on their own at their own length, which saves the
                work on padding; rows sum to T, lengths are at most L. None = all at once.

        Returns:
            Tokens (T, L, D).
        """
        if groups is None:
            tokens = self.text_encoder.embed(text)
            return self._encode(tokens, padding_mask, self.text_encoder, self.text_projection, TEXT)
        parts, start = [], 0
        for rows, length in groups:
            part = slice(start, start + rows), slice(length)
            parts.append(self.encode_text(text[part], None if padding_mask is None else padding_mask[part]))
            start += rows
        return joined(parts, text.shape[1])

    def encode_audio(self, sounds: Tensor, padding_mask: Tensor | None = None) -> ModalityOutput:
        """Sounds through both encoders.

        Args:
            sounds: (B, L) int16 samples at 16 kHz.
            padding_mask: (B, L), True at padding.

        Returns:
            Tokens (B, 1 + N, D), of N frames.
        """
        tokens = self.audio_encoder.embed(normalized_sounds(sounds, padding_mask, self.normalize.mean.dtype))
        hidden = self.audio_encoder.token_padding(padding_mask)
        return self._encode(tokens, hidden, self.audio_encoder, self.audio_projection, AUDIO)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        padding_mask: Tensor | None = None,
        groups: list[tuple[int, int]] | None = None,
    ) -> StudentOutput:
        """Encode a batch of images and its captions; arguments as of `encode_image` and `encode_text`."""
        return StudentOutput(self.encode_image(image), self.encode_text(text, padding_mask, groups))

    def _encode(
        self, tokens: Tensor, padding_mask: Tensor | None, encoder: Encoder, projection: nn.Module, token_type: int
    ) -> ModalityOutput:
        for addition in self.before.values():
            tokens = addition(tokens, token_type)
        tokens = projection(encoder.encode(tokens, padding_mask))
        for addition in self.after.values():
            tokens = addition(tokens, token_type)
        return self.heads(self.shared_encoder(tokens, padding_mask), token_type)


def joined(parts: list[ModalityOutput], length: int) -> ModalityOutput:
    """Outputs of consecutive rows as one; tokens are padded to `length`, unless they are CLS tokens alone."""
    found: dict[str, Tensor | None] = {}
    for item in fields(ModalityOutput):
        values = [getattr(part, item.name) for part in parts]
        if values[0] is None:
            found[item.name] = None
            continue
        if item.name == "tokens" and any(value.shape[1] > 1 for value in values):
            values = [F.pad(value, (0, 0, 0, length - value.shape[1])) for value in values]
        elif item.name == "cls_attention":
            values = [F.pad(value, (0, length - value.shape[1])) for value in values]
        elif item.name == "padding_mask":
            values = [F.pad(value, (0, length - value.shape[1]), value=True) for value in values]
        found[item.name] = torch.cat(values)
    return ModalityOutput(**found)
