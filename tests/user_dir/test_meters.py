"""Corpus metrics through fairseq's meters."""

import math
from collections.abc import Sequence

import pytest
import torch
from fairseq.logging import metrics
from torch import Tensor

from emkum.evaluation.retrieval import recall_metrics
from user_dir.meters import RECALL_KEYS, FeatureChunk, RetrievalScores, merge_chunks

SAMPLES, WIDTH = 12, 6
# Captions of each sample: 1, 2 or 3.
COUNTS = [1 + sample % 3 for sample in range(SAMPLES)]


def features() -> tuple[Tensor, list[Tensor]]:
    """(N, D) images and, for each, its captions; near enough for a recall between none and all."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(SAMPLES, WIDTH, generator=generator)
    return images, [
        images[sample] + 1.5 * torch.randn(count, WIDTH, generator=generator) for sample, count in enumerate(COUNTS)
    ]


def chunk(samples: Sequence[int], seed: int = 0) -> FeatureChunk:
    """A batch whose captions stand in any order, as batches do that are ordered by length."""
    images, texts = features()
    captions = torch.cat([texts[sample] for sample in samples])
    owners = torch.tensor([sample for sample in samples for _ in range(COUNTS[sample])])
    order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(seed))
    return FeatureChunk(torch.tensor(samples), images[list(samples)], owners[order], captions[order])


def expected_recall() -> dict[str, float]:
    images, texts = features()
    owners = [sample for sample, count in enumerate(COUNTS) for _ in range(count)]
    return recall_metrics(images, torch.cat(texts), torch.tensor(owners))


def assert_complete(chunks: list[FeatureChunk]) -> None:
    """Every image and every caption is there once, and each caption points to its own image."""
    images, texts, rows = merge_chunks(chunks)
    all_images, all_texts = features()
    assert images.shape == (SAMPLES, WIDTH) and texts.shape == (sum(COUNTS), WIDTH)
    assert rows.dtype == torch.int64
    found = []
    for text, row in zip(texts, rows, strict=True):
        owner = next(sample for sample in range(SAMPLES) if torch.equal(all_images[sample], images[row]))
        number = [torch.equal(text, caption) for caption in all_texts[owner]].index(True)
        found.append((owner, number))
    assert sorted(found) == [(sample, number) for sample in range(SAMPLES) for number in range(COUNTS[sample])]
    assert recall_metrics(images, texts, rows) == pytest.approx(expected_recall())


def test_batches_are_joined() -> None:
    assert_complete([chunk(range(SAMPLES))])
    assert_complete([chunk([0, 1, 2, 3, 4], 1), chunk([5, 6, 7, 8, 9], 2), chunk([10, 11], 3)])
    assert_complete([chunk([7, 2, 11, 0], 1), chunk([3, 10, 1, 5], 2), chunk([9, 8, 6, 4], 3)])


def test_a_repeated_batch_counts_once() -> None:
    first, second, third = chunk([0, 1, 2, 3], 1), chunk([4, 5, 6, 7], 2), chunk([8, 9, 10, 11], 3)
    assert_complete([first, second, first, third, first])


@pytest.mark.parametrize("copies", [2, 3, 4])
def test_copies_of_one_step_count_once(copies: int) -> None:
    # Fewer batches than devices: all others repeat the one that there is, at the same step.
    first, second = chunk([3, 1, 2, 0, 4], 1), chunk([5, 6, 7, 8, 9, 10, 11], 2)
    assert_complete([*[first] * copies, second])
    assert_complete([second, *[first] * copies])


def test_a_batch_that_overlaps_another_adds_what_is_new() -> None:
    assert_complete([chunk([0, 1, 2, 3, 4, 5], 1), chunk([4, 9, 2, 7, 6, 8], 2), chunk([10, 11, 0], 3)])


def test_a_few_hand_written_rows() -> None:
    def rows(*values: float) -> Tensor:
        return torch.tensor(values)[:, None]

    chunks = [
        FeatureChunk(torch.tensor([7, 3]), rows(7, 3), torch.tensor([3, 7, 3]), rows(31, 71, 32)),
        FeatureChunk(torch.tensor([5, 7]), rows(5, 70), torch.tensor([7, 5]), rows(710, 51)),
    ]
    images, texts, owners = merge_chunks(chunks)
    assert images.flatten().tolist() == [7, 3, 5]
    assert texts.flatten().tolist() == [31, 71, 32, 51]
    assert owners.tolist() == [1, 0, 1, 2]


def test_mean_recall_is_among_the_smoothed_values() -> None:
    wanted = expected_recall()
    assert 0 < wanted["mean_recall"] < 100
    scores = RetrievalScores()
    with metrics.aggregate(new_root=True) as total:
        # Two devices; the second repeats its batch at the last step.
        for number, parts in enumerate(
            ([chunk([7, 2, 11, 0]), chunk([3, 10])], [chunk([1, 5, 9, 8, 6, 4]), chunk([3, 10])])
        ):
            with metrics.aggregate() as one_step:
                scores.add("valid", parts)
                scores.log(metrics)
            # A part of the split is no figure of it, except while it is all that there is.
            assert math.isnan(one_step.get_smoothed_value("mean_recall")) == (number > 0)
        values = total.get_smoothed_values()
    assert set(RECALL_KEYS) == {key for key in values if not key.startswith("_")}
    for key in RECALL_KEYS:
        assert values[key] == pytest.approx(wanted[key], abs=5e-4), key


def test_what_fairseq_stores_of_the_meters_can_be_restored() -> None:
    scores = RetrievalScores()
    with metrics.aggregate(new_root=True) as total:
        scores.add("valid", [chunk(range(SAMPLES))])
        scores.log(metrics)
    restored = metrics.MetersDict()
    restored.load_state_dict(total.state_dict())
    assert "mean_recall" in total and "mean_recall" not in restored


def recall_over(scores: RetrievalScores, split: str, samples: Sequence[int]) -> float:
    with metrics.aggregate(new_root=True) as total:
        scores.add(split, [chunk(samples)])
        scores.log(metrics)
    return total.get_smoothed_value("mean_recall")


def test_nothing_is_kept_from_one_validation_to_the_next() -> None:
    scores = RetrievalScores()
    whole = recall_over(scores, "valid", range(SAMPLES))
    assert whole == pytest.approx(expected_recall()["mean_recall"], abs=5e-4)
    scores.start("")
    half = recall_over(scores, "valid", range(0, SAMPLES, 2))
    assert half > whole and scores.batches == 1
    assert recall_over(scores, "test", range(SAMPLES)) == whole
    assert scores.split == "test" and scores.batches == 1


def test_logging_twice_counts_a_batch_once() -> None:
    scores = RetrievalScores()
    with metrics.aggregate(new_root=True) as total:
        scores.add("valid", [chunk(range(6))])
        scores.log(metrics)
        scores.log(metrics)
        scores.add("valid", [chunk(range(6, SAMPLES))])
        scores.log(metrics)
    assert total.get_smoothed_value("mean_recall") == pytest.approx(expected_recall()["mean_recall"], abs=5e-4)


def test_the_list_of_chunks_that_was_given_is_left_alone() -> None:
    scores, given = RetrievalScores(), [chunk(range(6))]
    scores.add("valid", given)
    scores.add("valid", [chunk(range(6, SAMPLES))])
    assert len(given) == 1 and len(scores.chunks) == 2
