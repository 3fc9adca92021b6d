"""What is hidden from a student: tokens of a text (masked language modeling), patches of an image in blocks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from emkum.data.tokenizers import Tokenizer
from emkum.errors import UserError

# Target where nothing is to be predicted; what `torch.nn.functional.cross_entropy` leaves out of itself.
IGNORE = -100


@dataclass
class TextMaskingConfig:
    prob: float = field(default=0.15, metadata={"help": "part of the tokens to predict; 0 = none, 1 = all"})
    whole_word: bool = field(default=False, metadata={"help": "choose whole words, not single tokens"})
    keep: float = field(
        default=0.1, metadata={"help": "part of the tokens to predict that the student sees as they are"}
    )
    random: float = field(
        default=0.1, metadata={"help": "part of the tokens to predict that it sees as random others, not as the mask"}
    )

    def __post_init__(self) -> None:
        for name in ("prob", "keep", "random"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"text masking: {name} is {getattr(self, name)}; want 0 to 1")
        if self.keep + self.random > 1:
            raise UserError(f"text masking: keep {self.keep} and random {self.random} are more than 1 together")


@dataclass
class MaskedText:
    """One text with some of its tokens hidden.

    Attributes:
        inputs: (L,) int64, what the student sees.
        targets: (L,) int64, the true id where it is to be predicted, else IGNORE.
    """

    inputs: np.ndarray
    targets: np.ndarray


def assert_mask_token(tokenizer: Tokenizer) -> None:
    """Raise UserError where a tokenizer has no mask token."""
    if tokenizer.special.mask is None:
        raise UserError(
            "text masking needs a tokenizer with a mask token: BERT's, GPT-2's with fairseq's dictionary, or a "
            "SentencePiece model with a piece <mask> (`emkum prepare tokenizer` makes one)"
        )


def mask_text(
    ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer, config: TextMaskingConfig, rng: np.random.Generator
) -> MaskedText:
    """Hide tokens as BERT does (Devlin et al. 2019, section 3.1), with a steadier number of them.

    Of n units, which are tokens or whole words, floor(prob * n + u) are drawn without replacement, with u uniform in
    [0, 1): each has the probability `prob`, and a text never has one more or less than its share. Each drawn unit is
    kept, replaced by random pieces or masked, all of its tokens alike. Special tokens are never drawn, neither to be
    predicted nor as random pieces. A word ends at a special token other than the unknown one.

    Args:
        ids: (L,), special tokens included.
        tokenizer: gives special tokens, number of ids and beginnings of words.
        config: how many, and what becomes of them.
        rng: source of all randomness.

    Raises:
        UserError: the tokenizer has no mask token.
    """
    assert_mask_token(tokenizer)
    inputs = np.array(ids, dtype=np.int64)
    special = tokenizer.special
    targets = np.full_like(inputs, IGNORE)
    places = np.flatnonzero(~_is_any(inputs, special.ids))
    if config.whole_word:
        boundary = _is_any(inputs, (special.bos, special.eos, special.pad))
        starts = tokenizer.word_starts(inputs)
        starts[1:] |= boundary[:-1]
        _, unit_of_place = np.unique(np.cumsum(starts)[places], return_inverse=True)
        num_units = int(unit_of_place.max(initial=-1)) + 1
    else:
        unit_of_place, num_units = np.arange(len(places)), len(places)
    # Not above num_units, which the rounding of a sum close to the next integer could give.
    num_drawn = min(num_units, math.floor(config.prob * num_units + rng.random()))
    fate = np.full(num_units, np.inf)
    fate[rng.permutation(num_units)[:num_drawn]] = rng.random(num_drawn)
    fate = fate[unit_of_place]
    places, fate = places[fate < np.inf], fate[fate < np.inf]

    targets[places] = truth = inputs[places]
    shown = np.where(fate < config.keep + config.random, _random_pieces(tokenizer, len(places), rng), special.mask)
    inputs[places] = np.where(fate < config.keep, truth, shown)
    return MaskedText(inputs, targets)


def _is_any(ids: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Like `np.isin`, which takes longer than all the rest for a caption and a handful of values."""
    found = np.zeros(ids.shape, dtype=bool)
    for value in values:
        found |= ids == value
    return found


def _random_pieces(tokenizer: Tokenizer, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count,) int64, uniform over all ids but the special ones."""
    special = tokenizer.special.ids
    drawn = rng.integers(tokenizer.vocab_size - len(special), size=count)
    for skipped in special:
        drawn += drawn >= skipped
    return drawn


@dataclass
class PatchMaskingConfig:
    ratio: float = field(default=0.38, metadata={"help": "part of an image's patches that is masked"})
    min_block: int = field(default=16, metadata={"help": "smallest block of masked patches"})
    min_aspect: float = field(default=0.3, metadata={"help": "smallest ratio of a block's sides"})

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise UserError(f"--patch-mask-ratio {self.ratio}: want 0 to 1")

    def number_of(self, patches: int) -> int:
        """How many of an image's patches are masked."""
        return round(self.ratio * patches)


@dataclass(frozen=True)
class BlockMasking:
    """`block_mask` with its arguments but the source of randomness, which it is called with.

    Raises:
        UserError: more patches to mask than there are.
    """

    grid: tuple[int, int]
    num_masked: int
    min_block: int = 16
    min_aspect: float = 0.3

    def __post_init__(self) -> None:
        _assert_block_mask(self.grid, self.num_masked, self.min_block, self.min_aspect)

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        return block_mask(self.grid, self.num_masked, rng, self.min_block, self.min_aspect)


def block_mask(
    grid: tuple[int, int], num_masked: int, rng: np.random.Generator, min_block: int = 16, min_aspect: float = 0.3
) -> np.ndarray:
    """Mask an image's patches in blocks that may overlap (BEiT, Bao et al. 2022, Algorithm 1).

    BEiT masks 75 of 14 x 14 patches. There the last block may go over the number; here as many of its new patches as
    are too many, drawn at random, stay visible, so that each image has the same number.

    Args:
        grid: rows and columns of patches.
        num_masked: patches to mask.
        rng: source of all randomness.
        min_block: fewest patches of a block, visible ones of the last block included; at most the whole grid.
        min_aspect: smallest ratio of rows to columns of a block before rounding; the largest is its inverse.

    Returns:
        (H, W) bool with exactly `num_masked` True.

    Raises:
        UserError: more patches to mask than there are.
    """
    _assert_block_mask(grid, num_masked, min_block, min_aspect)
    mask = np.zeros(grid, dtype=bool)
    remaining = num_masked
    while remaining > 0:
        top, left, rows, columns = draw_block(grid, min_block, remaining, min_aspect, rng)
        block = np.zeros(grid, dtype=bool)
        block[top : top + rows, left : left + columns] = True
        new = np.flatnonzero(block & ~mask)
        if len(new) > remaining:
            new = rng.choice(new, remaining, replace=False)
        mask.flat[new] = True
        remaining -= len(new)
    return mask


def draw_block(
    grid: tuple[int, int], min_area: int, max_area: int, min_aspect: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top row, left column, number of rows and of columns of a block.

    Its area is uniform between both limits, in patches; `min_area` wins where it is the larger one. Its aspect ratio is
    log-uniform, so that tall and wide blocks are alike.
    """
    height, width = grid
    min_area = min(min_area, height * width)
    area = rng.uniform(min_area, max(min_area, max_area))
    aspect = math.exp(rng.uniform(math.log(min_aspect), -math.log(min_aspect)))
    rows = min(max(round(math.sqrt(area * aspect)), math.ceil(min_area / width)), height)
    columns = min(max(round(area / rows), math.ceil(min_area / rows)), width)
    return int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1)), rows, columns


def _assert_block_mask(grid: tuple[int, int], num_masked: int, min_block: int, min_aspect: float) -> None:
    height, width = grid
    if not 0 <= num_masked <= height * width:
        raise UserError(f"cannot mask {num_masked} of {height} x {width} patches")
    if min_block < 1 or not 0 < min_aspect <= 1:
        raise UserError(
            f"blocks of at least {min_block} patches and an aspect ratio of at least {min_aspect}: "
            "want 1 or more, and more than 0 up to 1"
        )
