"""What `emkum evaluate retrieval` compares beside features: tokens, and what image-text matching makes of CLS tokens.

A reader sees each output of the student, in the order of the split, and keeps what its objective compares.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from emkum.checkpoint import ImageTextModel, TextOutput, unit_features
from emkum.commands.evaluate import IMAGE_TEXT, LATE_INTERACTION, encode_split
from emkum.data.shards import ShardedSamples
from emkum.evaluation.objective_scores import match_scores, token_scores
from emkum.evaluation.pair_scores import Match, Score, cosine_scores
from emkum.evaluation.ranks import Reranking
from emkum.objectives import Objective
from emkum.objectives.late_interaction import Tokens
from emkum.outputs import ModalityOutput

CMLI, ITM = "cmli", "itm"


@dataclass
class ComparedSplit:
    """A split whose images and captions can be compared.

    Attributes:
        score: of pairs. reranking: of the best ones; None = none.
        caption_image: (T,) int64, the row of each caption's image.
    """

    score: Score
    reranking: Reranking | None
    caption_image: Tensor


def objectives_for(scores: str, rerank: str | None) -> list[str]:
    """Objectives whose own parts are needed for options of `emkum evaluate retrieval`."""
    return [*([CMLI] if scores == LATE_INTERACTION else []), *([rerank] if rerank else [])]


class ReadSplit:
    """What is left of a split that a model has read once: enough to compare it in several ways.

    Args:
        model: with the objectives whose parts are wanted.
        samples: the split.
        objectives: some of those: `cmli`, `itm`.
        batch_size: images encoded at once.
        pair: senses that are compared; another than images and text by their features alone.

    Attributes:
        encoded: features, on the CPU.
    """

    def __init__(
        self,
        model: ImageTextModel,
        samples: ShardedSamples,
        objectives: Sequence[str] = (),
        batch_size: int = 128,
        pair: str = IMAGE_TEXT,
    ) -> None:
        self._device = model.device
        self._tokens = TokenReader(model.objectives[CMLI]) if CMLI in objectives else None
        self._pairs = MatchReader(model.objectives[ITM]) if ITM in objectives else None
        readers = [reader for reader in (self._tokens, self._pairs) if reader is not None]
        self.encoded = encode_split(ReadModel(model, readers) if readers else model, samples, batch_size, pair)

    @cached_property
    def _token_scores(self) -> Score:
        return self._tokens.score()

    def compared(self, scores: str = "cls", rerank: str | None = None, rerank_k: int = 16) -> ComparedSplit:
        """Scores, and what orders candidates anew, by options of `emkum evaluate retrieval`.

        The objectives of `objectives_for` these must have been read.
        """
        images, texts = self.encoded.images.to(self._device), self.encoded.texts.to(self._device)
        return ComparedSplit(
            self._token_scores if scores == LATE_INTERACTION else cosine_scores(images, texts),
            Reranking(self._pairs.match(), rerank_k) if rerank == ITM else None,
            self.encoded.caption_image.to(self._device),
        )


class Reader(Protocol):
    """Keeps what it needs of outputs, on the student's device."""

    def add_images(self, output: ModalityOutput) -> None:
        """Of the next images."""
        ...

    def add_texts(self, part: TextOutput) -> None:
        """Of captions; `part.rows` are theirs in the whole split."""
        ...


class ReadModel:
    """A model whose outputs readers see while it encodes.

    Args:
        model: encodes. readers: see each output once.
    """

    def __init__(self, model: ImageTextModel, readers: Sequence[Reader]) -> None:
        self.model, self.readers = model, readers
        self._captions = 0

    @torch.inference_mode()
    def encode_image(self, images: Sequence[Image.Image]) -> Tensor:
        """As of the model."""
        features = []
        for output in self.model.image_outputs(images):
            for reader in self.readers:
                reader.add_images(output)
            features.append(unit_features(output))
        return torch.cat(features)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """As of the model."""
        features = torch.empty(len(texts), self.model.student.contrast_width)
        for part in self.model.text_outputs(self.model.tokenize(texts)):
            features[part.rows] = unit_features(part.output)
            moved = TextOutput(self._captions + part.rows, part.output, part.special)
            for reader in self.readers:
                reader.add_texts(moved)
        self._captions += len(texts)
        return features


class TokenReader:
    """Projected tokens for late interaction.

    Args:
        objective: `cmli`, trained.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._images: list[Tensor] = []
        self._texts: list[tuple[Tensor, Tokens]] = []

    def add_images(self, output: ModalityOutput) -> None:
        self._images.append(self.objective.image_tokens(output).features)

    def add_texts(self, part: TextOutput) -> None:
        self._texts.append((part.rows, self.objective.text_tokens(part.output, part.special)))

    def score(self) -> Score:
        """Scores of all that was read, which is given away."""
        images = torch.cat(self._images)
        total = sum(len(rows) for rows, _ in self._texts)
        longest = max(tokens.special.shape[1] for _, tokens in self._texts)
        texts = images.new_zeros(total, longest, images.shape[2])
        special = torch.ones(total, longest, dtype=torch.bool, device=images.device)
        self._images.clear()
        # Parts go as they are copied, so that no two copies of all are there.
        while self._texts:
            rows, tokens = self._texts.pop()
            length = tokens.special.shape[1]
            texts[rows.to(texts.device), :length] = tokens.features
            special[rows.to(texts.device), :length] = tokens.special
        return token_scores(images, texts, special)


class MatchReader:
    """What the first maps of image-text matching make of CLS tokens.

    Args:
        objective: `itm`, trained.
    """

    def __init__(self, objective: Objective) -> None:
        self.classifier = objective.classifier
        self._images: list[Tensor] = []
        self._texts: list[Tensor] = []
        self._rows: list[Tensor] = []

    def add_images(self, output: ModalityOutput) -> None:
        self._images.append(self.classifier.image(output.cls))

    def add_texts(self, part: TextOutput) -> None:
        self._texts.append(self.classifier.text(part.output.cls))
        self._rows.append(part.rows)

    def match(self) -> Match:
        """Scores of pairs of all that was read."""
        order = torch.cat(self._rows).argsort()
        texts = torch.cat(self._texts)
        return match_scores(self.classifier, torch.cat(self._images), texts[order.to(texts.device)])
