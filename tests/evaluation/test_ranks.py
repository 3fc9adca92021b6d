"""Ranks by blocks against loops over all pairs, for cosines, late interaction, and candidates ordered anew."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emkum.evaluation.objective_scores import match_scores, token_scores
from emkum.evaluation.pair_scores import cosine_scores
from emkum.evaluation.ranks import NEVER, TIE, Reranking, find_ranks
from emkum.evaluation.retrieval import retrieval_metrics
from emkum.objectives.matching import PairClassifier
from emkum.outputs import PairScores

IMAGES, CAPTIONS, WIDTH = 11, 27, 4


def owners(generator: torch.Generator) -> Tensor:
    """Captions in any order; the last image has none."""
    extra = torch.randint(0, IMAGES - 1, (CAPTIONS - IMAGES + 1,), generator=generator)
    owner = torch.cat([torch.arange(IMAGES - 1), extra])
    return owner[torch.randperm(CAPTIONS, generator=generator)]


def make_set(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of images and captions in float64, and each caption's image."""
    generator = torch.Generator().manual_seed(seed)
    owner = owners(generator)
    image = torch.randn(IMAGES, WIDTH, generator=generator, dtype=torch.float64)
    text = image[owner] + torch.randn(CAPTIONS, WIDTH, generator=generator, dtype=torch.float64)
    return F.normalize(image, dim=1), F.normalize(text, dim=1), owner


def naive_rank(scores: list[float], right: set[int], odds: list[float] | None = None, k: int = 0) -> int:
    """Place, from 0, of the first right candidate among candidates by falling score, the first k ordered anew."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j in right))
    if odds is not None:
        order = sorted(order[:k], key=lambda j: (-odds[j], j in right)) + order[k:]
    return next(place for place, j in enumerate(order) if j in right)


def naive_ranks(
    scores: PairScores, owner: Tensor, odds: Tensor | None = None, k: int = 0
) -> tuple[list[int], list[int]]:
    """Of all images (NEVER without captions) and of all captions; scores and odds are (N, T)."""
    owned = [{t for t in range(len(owner)) if owner[t] == n} for n in range(len(scores.image_to_text))]
    rows = [None] * len(owned) if odds is None else odds.tolist()
    columns = [None] * len(owner) if odds is None else odds.T.tolist()
    images = [
        naive_rank(row, owned[n], rows[n], k) if owned[n] else NEVER
        for n, row in enumerate(scores.image_to_text.tolist())
    ]
    captions = [
        naive_rank(row, {int(owner[t])}, columns[t], k) for t, row in enumerate(scores.text_to_image.T.tolist())
    ]
    return images, captions


@pytest.mark.parametrize("block", [1, 4, 100])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_of_cosines(seed: int, block: int) -> None:
    image, text, owner = make_set(seed)
    found = find_ranks(cosine_scores(image, text), owner, IMAGES, block)
    similarity = image @ text.T
    images, captions = naive_ranks(PairScores(similarity, similarity), owner)
    assert found.images.tolist() == images and found.captions.tolist() == captions
    assert max(captions) > 2 and min(captions) == 0 and NEVER in images
    single = find_ranks(cosine_scores(image.float(), text.float()), owner, IMAGES, block)
    assert single.images.tolist() == images and single.captions.tolist() == captions


def naive_token_scores(images: Tensor, texts: Tensor, special: Tensor) -> PairScores:
    """One pair, patch and token at a time."""
    i2t, t2i = torch.zeros(len(images), len(texts)), torch.zeros(len(images), len(texts))
    for n, patches in enumerate(images.tolist()):
        for t, tokens in enumerate(texts.tolist()):
            words = [word for word, hidden in zip(tokens, special[t].tolist(), strict=True) if not hidden]
            table = [
                [sum(a * b for a, b in zip(p, w, strict=True)) / (math.hypot(*p) * math.hypot(*w)) for w in words]
                for p in patches
            ]
            i2t[n, t] = sum(map(max, table)) / len(table)
            t2i[n, t] = sum(max(row[j] for row in table) for j in range(len(words))) / len(words)
    return PairScores(i2t, t2i)


@pytest.mark.parametrize(("block", "chunk", "text_chunk"), [(1, 1, 1), (4, 3, 5), (100, 16, 256)])
def test_ranks_of_late_interaction(block: int, chunk: int, text_chunk: int) -> None:
    """The two ways are different scores, unlike cosines."""
    generator = torch.Generator().manual_seed(1)
    owner = owners(generator)
    images = torch.randn(IMAGES, 6, WIDTH, generator=generator)
    texts = torch.randn(CAPTIONS, 5, WIDTH, generator=generator)
    texts[:, 1:3] += 2 * images[owner, :2]
    special = torch.rand(CAPTIONS, 5, generator=generator) < 0.3
    special[:, 1] = False
    want = naive_token_scores(images, texts, special)
    score = token_scores(images, texts, special, chunk, text_chunk)
    found = score(slice(None), slice(None))
    torch.testing.assert_close(found.image_to_text, want.image_to_text)
    torch.testing.assert_close(found.text_to_image, want.text_to_image)
    ranks = find_ranks(score, owner, IMAGES, block)
    expected = naive_ranks(want, owner)
    assert (ranks.images.tolist(), ranks.captions.tolist()) == expected
    crossed = naive_ranks(PairScores(want.text_to_image, want.image_to_text), owner)
    assert crossed[0] != expected[0] and crossed[1] != expected[1]


def classifier() -> PairClassifier:
    torch.manual_seed(3)
    made = PairClassifier(WIDTH, "gelu").double()
    made.output.weight.data.mul_(10)
    return made


@pytest.mark.parametrize("k", [1, 2, 5, 11, 27, 99])
@pytest.mark.parametrize("block", [1, 4, 100])
def test_candidates_ordered_anew(k: int, block: int) -> None:
    """The first k by cosine in the order of the match probability, then the others as they were; both ways."""
    image, text, owner = make_set(4)
    judge = classifier()
    with torch.no_grad():
        first, second = judge.image(image), judge.text(text)
        probability = torch.stack(
            [torch.stack([judge(i[None], t[None]).softmax(1)[0, 1] for t in second]) for i in first]
        )
    similarity = image @ text.T
    reranking = Reranking(match_scores(judge, first, second), k)
    found = find_ranks(cosine_scores(image, text), owner, IMAGES, block, reranking)
    expected = naive_ranks(PairScores(similarity, similarity), owner, probability, k)
    assert (found.images.tolist(), found.captions.tolist()) == expected
    plain = naive_ranks(PairScores(similarity, similarity), owner)
    assert (expected == plain) == (k == 1)


def test_a_classifier_that_says_nothing_puts_right_ones_last_of_the_candidates() -> None:
    image, text, owner = make_set(5)
    plain = find_ranks(cosine_scores(image, text), owner, IMAGES)
    for value in (0.0, torch.nan):
        constant = Reranking(lambda i, t, value=value: torch.full((len(i),), value), 6)
        found = find_ranks(cosine_scores(image, text), owner, IMAGES, reranking=constant)
        # One right image among six candidates: five wrong ones ahead.
        expected = torch.where(plain.captions < 6, 5, plain.captions)
        assert found.captions.tolist() == expected.tolist() and (plain.captions < 6).any()


def test_ties_keep_right_ones_out_of_the_candidates() -> None:
    # All pairs are equally similar: no right one is among the first five, whatever the second opinion is.
    owner = torch.arange(12)
    equal = F.normalize(torch.ones(12, 7), dim=1)
    found = find_ranks(
        cosine_scores(equal, equal), owner, 12, 5, Reranking(lambda images, texts: (images == texts).float(), 5)
    )
    assert found.images.tolist() == [11] * 12 and found.captions.tolist() == [11] * 12
    # Within the tolerance is a tie, beyond it is none.
    for gap, rank in ((TIE / 4, 1), (-TIE / 4, 1), (4 * TIE, 0)):
        scores = torch.tensor([[0.5 + gap, 0.5], [0.1, 0.9]], dtype=torch.float64)
        found = find_ranks(lambda i, t, scores=scores: PairScores(*2 * [scores[i][:, t]]), torch.arange(2), 2)
        assert found.images.tolist() == [rank, 0], gap


def test_nan_counts_against_the_model_with_a_second_opinion() -> None:
    image, text = torch.eye(6), torch.eye(6)
    text[0], image[5] = torch.nan, torch.nan

    def favors_right(images: Tensor, captions: Tensor) -> Tensor:
        return (images == captions).float()

    for k in (2, 6):
        found = find_ranks(cosine_scores(image, text), torch.arange(6), 6, 4, Reranking(favors_right, k))
        assert found.images[0] == found.images[5] == found.captions[0] == found.captions[5] == NEVER
        assert found.images[1:5].tolist() == found.captions[1:5].tolist() == [0] * 4
    metrics = retrieval_metrics(cosine_scores(image, text), torch.arange(6), 6)
    assert metrics["i2t_median_rank"] == 2.0 and metrics["i2t_r1"] == 0.0


def test_no_more_than_a_block_is_scored_at_once_and_nothing_twice() -> None:
    images, block = 200, 16
    image, text = torch.randn(images, 3), torch.randn(5 * images, 3)
    sizes = []

    def counted(image_rows: slice, caption_rows: slice | Tensor) -> PairScores:
        found = cosine_scores(image, text)(image_rows, caption_rows)
        sizes.append(found.image_to_text.numel())
        return found

    find_ranks(counted, torch.arange(5 * images) // 5, images, block)
    everything = images * 5 * images
    assert max(sizes) == block * 5 * images
    # Beside every pair once, a caption with the few images around its own.
    assert everything < sum(sizes) <= everything * (1 + 32 / images)
