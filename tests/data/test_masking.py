"""Masks of text and of patches: exact properties, and frequencies against the binomial distribution."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emkum.data.masking import IGNORE, BlockMasking, MaskedText, TextMaskingConfig, block_mask, draw_block, mask_text
from emkum.data.tokenizers import SpecialTokens, load_tokenizer
from emkum.errors import UserError

BOS, PAD, EOS, UNK, MASK = 0, 7, 2, 11, 29
VOCABULARY = 30


class Letters:
    """Ids of 20 and more go on with the word of the id before them; special ids are strewn over the vocabulary."""

    special = SpecialTokens(BOS, PAD, EOS, UNK, MASK)
    vocab_size = VOCABULARY
    files: Mapping[str, Path] = {}

    def pieces(self, text: str) -> list[int]:
        raise NotImplementedError

    def word_starts(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        starts = (np.asarray(ids) < 20) & ~np.isin(ids, self.special.ids)
        starts[:1] = True
        return starts


TEXT = [BOS, 3, 4, 21, 22, 5, UNK, 6, 23, 8, EOS, 24, 25, 9, 10, EOS, PAD, PAD]
ORDINARY = [place for place, i in enumerate(TEXT) if i not in (BOS, PAD, EOS, UNK, MASK)]
# 24 goes on with no word: another text begins before it. 23 is a word's second piece, as are 21 and 22.
WORDS = [[1], [2, 3, 4], [5], [7, 8], [9], [11, 12], [13], [14]]


def masked(config: TextMaskingConfig, seed: int, ids: Sequence[int] = TEXT) -> MaskedText:
    return mask_text(ids, Letters(), config, np.random.default_rng(seed))


def assert_binomial(hits: int, trials: int, probability: float) -> None:
    """Within five standard deviations: a right count fails once in a million seeds."""
    assert abs(hits - trials * probability) <= 5 * math.sqrt(trials * probability * (1 - probability)) + 1e-9


@pytest.mark.parametrize("whole_word", [False, True])
def test_what_is_not_predicted_is_as_it_was(whole_word: bool) -> None:
    config = TextMaskingConfig(prob=0.4, whole_word=whole_word, keep=0.2, random=0.3)
    original = np.array(TEXT)
    for seed in range(300):
        result = masked(config, seed)
        predicted = result.targets != IGNORE
        assert result.inputs.dtype == result.targets.dtype == np.int64
        assert result.inputs.shape == result.targets.shape == (len(TEXT),)
        assert (result.inputs[~predicted] == original[~predicted]).all()
        assert (result.targets[predicted] == original[predicted]).all()
        assert set(np.flatnonzero(predicted)) <= set(ORDINARY)
        assert not set(result.inputs[predicted]) & {BOS, PAD, EOS, UNK}
    assert TEXT[0] == BOS and len(TEXT) == 18, "the caller's ids must not change"


@pytest.mark.parametrize("prob", [0.0, 0.15, 0.5, 1.0])
def test_each_token_is_predicted_with_the_probability(prob: float) -> None:
    config, runs = TextMaskingConfig(prob=prob), 2000
    counts, sizes = np.zeros(len(TEXT), dtype=int), set()
    for seed in range(runs):
        predicted = masked(config, seed).targets != IGNORE
        counts += predicted
        sizes.add(int(predicted.sum()))
    share = prob * len(ORDINARY)
    assert sizes <= {math.floor(share), math.ceil(share)}
    for place in ORDINARY:
        assert_binomial(counts[place], runs, prob)
    assert_binomial(counts.sum(), runs * len(ORDINARY), prob)


def test_tokens_are_masked_kept_and_replaced_in_their_parts() -> None:
    config = TextMaskingConfig(prob=0.5, keep=0.1, random=0.2)
    ids = np.array([BOS] + [3] * 100 + [EOS])
    shown = np.concatenate(
        [masked(config, seed, ids).inputs[masked(config, seed, ids).targets == 3] for seed in range(200)]
    )
    assert len(shown) == 200 * 50
    others = VOCABULARY - 5
    assert_binomial((shown == MASK).sum(), len(shown), 0.7)
    # A random piece can be the one that was there.
    assert_binomial((shown == 3).sum(), len(shown), 0.1 + 0.2 / others)
    for piece in set(range(VOCABULARY)) - {BOS, PAD, EOS, UNK, MASK, 3}:
        assert_binomial((shown == piece).sum(), len(shown), 0.2 / others)


@pytest.mark.parametrize(("keep", "random"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_extreme_parts(keep: float, random: float) -> None:
    result = masked(TextMaskingConfig(prob=1.0, keep=keep, random=random), 0, [BOS] + [3] * 200 + [EOS])
    inside = result.inputs[1:-1]
    assert (inside == 3).all() == (keep == 1)
    assert (inside == MASK).all() == (keep == random == 0)
    assert (len(set(inside)) == VOCABULARY - 5) == (random == 1)


def test_words_are_predicted_and_shown_together() -> None:
    config, runs = TextMaskingConfig(prob=0.4, whole_word=True, keep=0.3, random=0.3), 2000
    counts, sizes, fates = np.zeros(len(WORDS), dtype=int), set(), set()
    for seed in range(runs):
        result = masked(config, seed)
        predicted = [result.targets[word] != IGNORE for word in WORDS]
        for word, hit in zip(WORDS, predicted, strict=True):
            assert hit.all() or not hit.any()
            shown, truth = result.inputs[word], np.array(TEXT)[word]
            if hit.all():
                fate = "mask" if (shown == MASK).all() else "keep" if (shown == truth).all() else "random"
                assert fate == "mask" or MASK not in shown
                fates.add(fate)
        counts += [hit.all() for hit in predicted]
        sizes.add(sum(hit.all() for hit in predicted))
    assert sizes == {3, 4} and fates == {"mask", "keep", "random"}
    for count in counts:
        assert_binomial(count, runs, 0.4)


def test_single_tokens_are_chosen_apart() -> None:
    results = (masked(TextMaskingConfig(prob=0.4), seed).targets != IGNORE for seed in range(50))
    assert any(0 < predicted[[2, 3, 4]].sum() < 3 for predicted in results)


def test_equal_generators_give_equal_masks() -> None:
    config = TextMaskingConfig(prob=0.5, random=0.5)
    one, same, other = masked(config, 1), masked(config, 1), masked(config, 2)
    assert (one.inputs == same.inputs).all() and (one.targets == same.targets).all()
    assert (one.targets != other.targets).any()


@pytest.mark.parametrize("ids", [[], [BOS, EOS], [BOS, UNK, UNK, EOS]])
@pytest.mark.parametrize("whole_word", [False, True])
def test_nothing_to_predict(ids: list[int], whole_word: bool) -> None:
    result = masked(TextMaskingConfig(prob=1.0, whole_word=whole_word), 0, ids)
    assert result.inputs.tolist() == ids and (result.targets == IGNORE).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prob": 1.5}, "prob is 1.5; want 0 to 1"),
        ({"keep": -0.1}, "keep is -0.1"),
        ({"keep": 0.6, "random": 0.6}, "keep 0.6 and random 0.6 are more than 1"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TextMaskingConfig(**options)


def test_a_tokenizer_without_mask_token() -> None:
    tokenizer = Letters()
    tokenizer.special = SpecialTokens(BOS, PAD, EOS, UNK, None)
    with pytest.raises(UserError, match="needs a tokenizer with a mask token: BERT's"):
        mask_text(TEXT, tokenizer, TextMaskingConfig(), np.random.default_rng(0))


def test_whole_words_of_real_tokenizers(shared_data: Path) -> None:
    folder = shared_data / "tokenizers"
    for place, spans in (
        # a, puppy, ##ish, dog, ., [SEP], ##ish is a piece of its own after the separator
        (folder / "bert-base-uncased-vocab.txt", [[1], [2, 3], [4], [5], [7]]),
        # A, Ġpuppy, ish, Ġdog, ., </s>, ish
        (folder, [[1], [2, 3], [4, 5], [7]]),
    ):
        tokenizer = load_tokenizer(place)
        special, pieces = tokenizer.special, tokenizer.pieces("A puppyish dog.")
        suffix = tokenizer.pieces("A puppyish")[-1]
        ids = [special.bos, *pieces, special.eos, suffix, special.eos]
        # At most one word is drawn.
        config = TextMaskingConfig(prob=0.2, whole_word=True)
        targets = (mask_text(ids, tokenizer, config, np.random.default_rng(seed)).targets for seed in range(200))
        seen = {tuple(np.flatnonzero(row != IGNORE).tolist()) for row in targets}
        assert seen - {()} == {tuple(span) for span in spans}


# ----------------------------------------------------------------------------------------------------------------------
# Patches
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "num_masked"),
    [((14, 14), 75), ((14, 14), 0), ((14, 14), 5), ((14, 14), 196), ((2, 3), 4), ((1, 20), 9), ((7, 11), 30)],
)
def test_exactly_as_many_patches_are_masked(grid: tuple[int, int], num_masked: int) -> None:
    masking = BlockMasking(grid, num_masked)
    for seed in range(50):
        mask = block_mask(grid, num_masked, np.random.default_rng(seed))
        assert mask.shape == grid and mask.dtype == bool and mask.sum() == num_masked
        assert (mask == masking(np.random.default_rng(seed))).all()


def test_blocks_keep_their_limits() -> None:
    rng = np.random.default_rng(0)
    areas, aspects, corners = [], [], set()
    for _ in range(3000):
        top, left, rows, columns = draw_block((14, 14), 16, 75, 0.3, rng)
        assert 0 <= top <= 14 - rows and 0 <= left <= 14 - columns
        areas.append(rows * columns)
        aspects.append(rows / columns)
        corners.add((top, left))
    assert min(areas) == 16 and 72 <= max(areas) <= 84
    # A uniform area; rounding to whole rows and columns moves it by some patches.
    assert abs(np.mean(areas) - (16 + 75) / 2) < 1.5
    # The grid's side bounds the widest and the rounding moves the ratio.
    assert 0.2 < min(aspects) < 0.35 and 2.9 < max(aspects) < 5
    assert_binomial(sum(aspect > 1 for aspect in aspects), sum(aspect != 1 for aspect in aspects), 0.5)
    assert len(corners) > 100


@pytest.mark.parametrize("grid", [(14, 14), (4, 30), (3, 5), (1, 16), (16, 1)])
@pytest.mark.parametrize("most", [1, 16, 40])
def test_no_block_is_smaller_than_the_least(grid: tuple[int, int], most: int) -> None:
    rng = np.random.default_rng(1)
    for _ in range(500):
        _, _, rows, columns = draw_block(grid, 16, most, 0.3, rng)
        assert rows * columns >= min(16, grid[0] * grid[1])
        assert rows <= grid[0] and columns <= grid[1]


def within_full_block(mask: np.ndarray, area: int) -> np.ndarray:
    """True for cells of a rectangle of at least `area` cells that is masked throughout, by trying all of them."""
    found = np.zeros_like(mask)
    height, width = mask.shape
    for top in range(height):
        for bottom in range(top + 1, height + 1):
            for left in range(width):
                for right in range(left + 1, width + 1):
                    inside = (slice(top, bottom), slice(left, right))
                    if (bottom - top) * (right - left) >= area and mask[inside].all():
                        found[inside] = True
    return found


def test_all_but_the_last_block_are_whole() -> None:
    whole = [within_full_block(block_mask((9, 9), 40, np.random.default_rng(seed)), 16).sum() for seed in range(12)]
    # Less than a block of 16 can be left where the last one is trimmed; most masks have more whole ones.
    assert min(whole) >= 16 and np.mean(whole) > 30
    scattered = np.random.default_rng(0).permutation(81).reshape(9, 9) < 40
    assert within_full_block(scattered, 16).sum() == 0


def test_what_is_trimmed_is_drawn_at_random() -> None:
    # One block that covers the whole grid, of which five patches stay masked.
    counts = sum(block_mask((4, 4), 5, np.random.default_rng(seed)).astype(int) for seed in range(2000))
    for count in counts.flat:
        assert_binomial(count, 2000, 5 / 16)


def test_all_patches_are_masked_at_times() -> None:
    counts = sum(block_mask((14, 14), 75, np.random.default_rng(seed)).astype(int) for seed in range(300))
    assert counts.sum() == 300 * 75
    assert counts.min() > 0 and counts.max() < 240
    assert (counts[4:10, 4:10].mean()) > counts[[0, 0, -1, -1], [0, -1, 0, -1]].mean(), "blocks overlap in the middle"


@pytest.mark.parametrize("num_masked", [-1, 197])
def test_more_patches_than_there_are(num_masked: int) -> None:
    for make in (lambda: BlockMasking((14, 14), num_masked), lambda: block_mask((14, 14), num_masked, None)):
        with pytest.raises(UserError, match=f"cannot mask {num_masked} of 14 x 14 patches"):
            make()
    with pytest.raises(UserError, match="want 1 or more"):
        BlockMasking((14, 14), 75, min_block=0)
    with pytest.raises(UserError, match="aspect ratio of at least 1.5"):
        BlockMasking((14, 14), 75, min_aspect=1.5)
