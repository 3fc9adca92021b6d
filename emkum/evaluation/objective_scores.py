"""How similar images and captions are by what an objective has learned, beside features: see `pair_scores`."""

from torch import Tensor

from emkum.evaluation.pair_scores import Match, Rows, Score
from emkum.objectives.late_interaction import late_interaction_scores
from emkum.objectives.matching import PairClassifier
from emkum.outputs import PairScores


def token_scores(images: Tensor, texts: Tensor, special: Tensor, chunk: int = 16, text_chunk: int = 256) -> Score:
    """Late interaction, token by token.

    Args:
        images: (N, P, D) patches. texts: (T, L, D) tokens. special: (T, L) bool, tokens that take no part.
        chunk, text_chunk: images and captions compared at once, which bounds the memory beside the block of scores.
    """

    def score(image_rows: Rows, caption_rows: Rows) -> PairScores:
        captions = texts[caption_rows], special[caption_rows]
        return late_interaction_scores(images[image_rows], *captions, chunk, text_chunk)

    return score


def match_scores(classifier: PairClassifier, images: Tensor, texts: Tensor) -> Match:
    """Log-odds that image and caption belong together.

    They order pairs as the probability does, which in float32 is 1 from log-odds of 17 on.

    Args:
        classifier: of image-text matching.
        images, texts: (N, D), (T, D), what its first maps made of the CLS tokens.
    """

    def match(image_rows: Tensor, caption_rows: Tensor) -> Tensor:
        logits = classifier(images[image_rows], texts[caption_rows])
        return logits[:, 1] - logits[:, 0]

    return match
