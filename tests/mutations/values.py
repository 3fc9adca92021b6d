"""Bugs of scores and of numbers that are 0."""

from tests.mutations.base import (
    BANK_TESTS,
    BANKS,
    CHECKPOINT,
    DINO,
    EMA,
    EVALUATE,
    GROUPS,
    ITM,
    KD,
    METER_TESTS,
    METERS,
    RANKS,
    RETRIEVAL,
    RETRIEVAL_TESTS,
    RUNS,
    SCALE,
    TASK,
    TRAPS,
    WEIGHTS,
    bug,
)

ONE_CAPTION = [
    bug(
        "recall-of-first-captions-as-queries",
        RETRIEVAL,
        "    image, text, owner = _prepare(image_features, text_features, caption_image)\n",
        "    image, text, owner = _prepare(image_features, text_features, caption_image)\n"
        "    first = torch.tensor([not (owner[:t] == owner[t]).any() for t in range(len(owner))])\n"
        "    text, owner = text[first], owner[first]\n",
        f"{RETRIEVAL_TESTS}::test_five_captions_by_hand",
    ),
    bug(
        "recall-of-first-captions-as-answers",
        RANKS,
        "    own = _own_scores(score, owned)\n",
        "    own = _own_scores(score, owned)\n"
        "    first = [not (caption_image[:t] == caption_image[t]).any() for t in range(len(caption_image))]\n"
        "    own.image_to_text.masked_fill_(~torch.tensor(first), -torch.inf)\n",
        f"{RETRIEVAL_TESTS}::test_every_caption_counts_not_the_first_alone",
    ),
    bug(
        "validation-reads-as-many-captions-as-training",
        TASK,
        "captions_per_image=self.captions.per_image if training else 0",
        "captions_per_image=self.captions.per_image",
        f"{RUNS}::test_every_caption_is_scored",
    ),
    bug(
        "validation-keeps-one-caption",
        METERS,
        "if owner in fresh]",
        "if owner in fresh and owner not in owners[:row]]",
        METER_TESTS,
    ),
    bug(
        "evaluate-reads-one-caption",
        EVALUATE,
        "for caption in sample.captions]",
        "for caption in sample.captions[:1]]",
        f"{RUNS}::test_every_caption_is_scored",
    ),
]

ZEROS = [
    bug(
        "scale-one-taken-for-none",
        SCALE,
        "torch.tensor(math.log(initial))",
        "torch.tensor(math.log(initial) or math.log(1 / 0.07))",
        f"{TRAPS}::test_scale_starts_where_it_is_told_within_its_range",
    ),
    bug(
        "scale-bound-one-taken-for-none",
        SCALE,
        "clamp_(0.0, math.log(100.0))",
        "clamp_(0.0 or None, math.log(100.0))",
        f"{TRAPS}::test_scale_starts_where_it_is_told_within_its_range",
    ),
    bug(
        "decay-zero-taken-for-none",
        EMA,
        "(self.decay if decay is None else decay)",
        "(decay or self.decay)",
        f"{TRAPS}::test_a_decay_of_zero_takes_over_at_once",
    ),
    bug(
        "center-decay-zero-taken-for-none",
        DINO,
        "(1 - self.config.center_decay)",
        "(1 - (self.config.center_decay or 0.9))",
        f"{TRAPS}::test_a_center_without_inertia_is_the_last_mean",
    ),
    bug(
        "weight-zero-taken-for-none",
        WEIGHTS,
        "        return config.weight\n",
        "        return config.weight or 1.0\n",
        f"{TRAPS}::test_a_weight_of_zero_counts_nothing",
    ),
    bug(
        "proximal-weight-zero-taken-for-none",
        BANKS,
        "self.proximal_weight = config.proximal_weight",
        "self.proximal_weight = config.proximal_weight or 30.0",
        f"{BANK_TESTS}::test_against_loops",
    ),
    bug(
        "hard-scale-zero-taken-for-none",
        ITM,
        'config.hard_scale if config.negatives == "hard"',
        '(config.hard_scale or 1 / 0.07) if config.negatives == "hard"',
        f"{TRAPS}::test_hard_negatives_of_scale_zero_are_uniform_ones",
    ),
    bug(
        "image-zero-taken-for-empty-in-banks",
        BANKS,
        "(past.ids[None] == EMPTY)",
        "(past.ids[None] <= 0)",
        f"{TRAPS}::test_the_image_numbered_zero_is_a_negative_like_any_other",
    ),
    bug(
        "image-zero-taken-for-empty-in-kd",
        KD,
        "(targets.ids[None] < 0)",
        "(targets.ids[None] <= 0)",
        f"{TRAPS}::test_the_image_numbered_zero_is_a_negative_like_any_other",
    ),
    bug(
        "learning-rate-zero-taken-for-none",
        GROUPS,
        "rates.get(key, 1.0)",
        "(rates.get(key) or 1.0)",
        f"{TRAPS}::test_an_encoder_whose_rate_is_zero_does_not_learn",
    ),
    bug(
        "no-block-learning-taken-for-none",
        GROUPS,
        "if learning_blocks != -1:",
        "if learning_blocks > 0:",
        CHECKPOINT,
    ),
]
