"""Retrieval: hand-computed, against a float64 reference and clip_benchmark, and under faults it must not hide."""

import numpy as np
import pytest
import torch

from emkum.evaluation.pair_scores import cosine_scores
from emkum.evaluation.ranks import Reranking
from emkum.evaluation.report import rank_summary
from emkum.evaluation.retrieval import (
    average_median_rank,
    chance_recall,
    draw_pairs,
    nearest,
    recall_metrics,
    retrieval_metrics,
)
from emkum.outputs import PairScores

KEYS = ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "mean_recall", "num_images", "num_captions"]
RANKS = ["i2t_median_rank", "i2t_mean_rank", "t2i_median_rank", "t2i_mean_rank"]


def reference(image, text, caption_image, ks=(1, 5, 10)):
    """The definition, one pair at a time, in float64."""
    image = image.double().numpy() / np.linalg.norm(image.double().numpy(), axis=1, keepdims=True)
    text = text.double().numpy() / np.linalg.norm(text.double().numpy(), axis=1, keepdims=True)
    similarity = image @ text.T
    i2t, t2i = [], []
    for n in range(len(image)):
        own = [t for t in range(len(text)) if caption_image[t] == n]
        if own:
            best = max(similarity[n, t] for t in own)
            i2t.append(sum(similarity[n, t] >= best for t in range(len(text)) if t not in own))
    for t in range(len(text)):
        n_right = caption_image[t]
        t2i.append(sum(similarity[n, t] >= similarity[n_right, t] for n in range(len(image)) if n != n_right))
    recalls = {f"i2t_r{k}": 100 * np.mean([r < k for r in i2t]) for k in ks}
    recalls |= {f"t2i_r{k}": 100 * np.mean([r < k for r in t2i]) for k in ks}
    mean = np.mean(list(recalls.values()))
    ranks = {"i2t_median_rank": np.median(i2t) + 1, "i2t_mean_rank": np.mean(i2t) + 1}
    ranks |= {"t2i_median_rank": np.median(t2i) + 1, "t2i_mean_rank": np.mean(t2i) + 1}
    return recalls | {"mean_recall": mean, "num_images": len(image), "num_captions": len(text)} | ranks


def random_set(num_images=40, num_captions=90, dim=8, noise=1.0, seed=0):
    """Captions scattered around their images; each image but the last has one at least."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(num_images, dim, generator=generator)
    extra = torch.randint(0, num_images - 1, (num_captions - num_images + 1,), generator=generator)
    owner = torch.cat([torch.arange(num_images - 1), extra])
    text = image[owner] + noise * torch.randn(num_captions, dim, generator=generator)
    return image, text, owner


def test_five_captions_by_hand():
    # Images along the axes a, b, c; captions 0 and 1 belong to a, 2 and 3 to b, 4 to c.
    image = torch.eye(3)
    text = torch.tensor(
        [
            [0.8, 0.6, 0.0],  # a's: a first, right
            [0.0, 0.6, 0.8],  # a's: a last, behind b and c
            [0.6, 0.8, 0.0],  # b's: b first, right
            [0.0, 0.7, 0.7],  # b's: b and c tie, so c counts as ahead
            [0.8, 0.0, 0.6],  # c's: a first, c second
        ]
    )
    owner = [0, 0, 1, 1, 2]
    metrics = recall_metrics(image, text, owner, ks=(1, 2, 3))
    # Ranks of captions: 0, 2, 0, 1, 1.
    assert metrics["t2i_r1"] == pytest.approx(40.0)
    assert metrics["t2i_r2"] == pytest.approx(80.0)
    assert metrics["t2i_r3"] == pytest.approx(100.0)
    # a: its best caption 0 (.8) ties with caption 4 (.8), rank 1. b: caption 2 (.8) beats all, rank 0.
    # c: its caption 4 (.6) stands behind caption 1 (.8) and caption 3 (.707), rank 2.
    assert metrics["i2t_r1"] == pytest.approx(100 / 3)
    assert metrics["i2t_r2"] == pytest.approx(200 / 3)
    assert metrics["i2t_r3"] == pytest.approx(100.0)
    assert metrics["mean_recall"] == pytest.approx((40 + 80 + 100 + 100 / 3 + 200 / 3 + 100) / 6)
    assert (metrics["num_images"], metrics["num_captions"]) == (3, 5)
    # From 1: captions 1, 3, 1, 2, 2; images 2, 1, 3.
    assert (metrics["t2i_median_rank"], metrics["t2i_mean_rank"]) == (2.0, pytest.approx(1.8))
    assert (metrics["i2t_median_rank"], metrics["i2t_mean_rank"]) == (2.0, pytest.approx(2.0))


def test_default_keys_and_numpy():
    image, text, owner = random_set()
    metrics = recall_metrics(image.numpy(), text.numpy(), owner.numpy())
    assert list(metrics) == KEYS + RANKS
    assert metrics == recall_metrics(image, text, owner.tolist())
    assert all(type(value) in (int, float) for value in metrics.values())


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_float64_reference(seed):
    image, text, owner = random_set(seed=seed)
    assert recall_metrics(image, text, owner) == pytest.approx(reference(image, text, owner.tolist()))


@pytest.mark.parametrize("block", [1, 7, 64])
def test_block_size_leaves_the_result_alone(block):
    image, text, owner = random_set(seed=1)
    assert recall_metrics(image, text, owner, block=block) == recall_metrics(image, text, owner, block=10_000)


def test_order_of_rows_leaves_the_result_alone():
    image, text, owner = random_set(seed=2)
    generator = torch.Generator().manual_seed(3)
    images = torch.randperm(len(image), generator=generator)
    captions = torch.randperm(len(text), generator=generator)
    moved_to = torch.argsort(images)
    shuffled = recall_metrics(image[images], text[captions], moved_to[owner[captions]])
    assert shuffled == recall_metrics(image, text, owner)


def test_scale_of_features_leaves_the_result_alone():
    image, text, owner = random_set(seed=4)
    scaled = recall_metrics(image * torch.rand(len(image), 1).add(0.1), text * 8, owner)
    assert scaled == recall_metrics(image, text, owner)


def test_perfect_features_give_100():
    image = torch.eye(30)
    assert recall_metrics(image, image.repeat_interleave(5, 0), np.repeat(np.arange(30), 5))["mean_recall"] == 100.0


@pytest.mark.parametrize("dim", [3, 192, 257])
def test_collapsed_features_give_0(dim):
    image = torch.randn(1, dim, generator=torch.Generator().manual_seed(0)).repeat(37, 1)
    metrics = recall_metrics(image, image, torch.arange(37), block=8)
    assert metrics["mean_recall"] == 0.0


@pytest.mark.parametrize("which", ["image", "text", "both"])
@pytest.mark.parametrize("count", [3, 40])
def test_nan_features_give_0(which, count):
    # With 3 candidates a rank below 5 is certain: the miss must not hang on the number of candidates.
    image, text = torch.eye(count), torch.eye(count)
    if which in ("image", "both"):
        image = image * torch.nan
    if which in ("text", "both"):
        text = text * torch.nan
    assert recall_metrics(image, text, torch.arange(count))["mean_recall"] == 0.0


def test_one_nan_caption_is_one_miss_and_its_image_keeps_the_others():
    image, text = torch.eye(12), torch.eye(12).repeat(2, 1)
    text[0] = torch.nan
    metrics = recall_metrics(image, text, torch.arange(12).repeat(2))
    assert metrics["t2i_r1"] == pytest.approx(100 * 23 / 24)
    assert metrics["i2t_r5"] == 100.0


def test_a_miss_stands_one_behind_the_last_candidate():
    image, text = torch.eye(4), torch.eye(4).repeat(2, 1)
    text[0] = torch.nan
    metrics = recall_metrics(image, text, torch.arange(4).repeat(2))
    # Seven captions find their image at rank 1; the eighth counts as rank 5 among 4 images.
    assert metrics["t2i_mean_rank"] == pytest.approx((7 + 5) / 8) and metrics["t2i_median_rank"] == 1.0
    # Image 0 has another caption; behind the NaN, which counts as ahead, all images but the first are second.
    assert metrics["i2t_mean_rank"] == pytest.approx((1 + 2 + 2 + 2) / 4) and metrics["i2t_median_rank"] == 2.0
    lost = recall_metrics(torch.eye(4), torch.full((8, 4), torch.nan), torch.arange(4).repeat(2))
    assert [lost[key] for key in RANKS] == [9.0, 9.0, 5.0, 5.0]


def test_median_of_an_even_number_of_queries_is_between_the_two_in_the_middle():
    # Caption 0 finds its image first, caption 1 second.
    image, text = torch.eye(2), torch.tensor([[1.0, 0.1], [1.0, 0.1]])
    assert recall_metrics(image, text, [0, 1])["t2i_median_rank"] == 1.5


def test_image_without_caption_is_candidate_but_no_query():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])
    text = torch.tensor([[1.0, 0.1], [0.0, 1.0]])
    metrics = recall_metrics(image, text, [0, 1], ks=(1,))
    assert metrics["t2i_r1"] == 50.0  # the image without caption stands before the right one
    assert metrics["i2t_r1"] == 100.0  # two queries, both right
    assert metrics["num_images"] == 3


def test_every_caption_counts_not_the_first_alone():
    # Scored with one caption an image, image 0 would fail.
    image = torch.eye(2)
    text = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.1, 1.0]])
    assert recall_metrics(image, text, [0, 0, 1], ks=(1,))["i2t_r1"] == 50.0


def test_features_are_compared_in_float32_under_autocast():
    image, text, owner = random_set(300, 300, dim=4, noise=0.1, seed=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = recall_metrics(image, text, owner)
    assert inside == recall_metrics(image, text, owner)


def test_chance_against_simulation():
    owner = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 4, 4, 5, 6, 7, 7])  # image 3 has no caption
    generator = torch.Generator().manual_seed(0)
    sums = dict.fromkeys(KEYS, 0.0)
    rounds = 1000
    for _ in range(rounds):
        metrics = recall_metrics(
            torch.randn(8, 64, generator=generator), torch.randn(len(owner), 64, generator=generator), owner
        )
        for key in KEYS:
            sums[key] += metrics[key] / rounds
    assert chance_recall(8, owner) == pytest.approx(sums, abs=1.0)


def test_chance_by_hand():
    chance = chance_recall(1000, np.repeat(np.arange(1000), 5))
    assert list(chance) == KEYS
    assert chance["t2i_r1"] == pytest.approx(0.1) and chance["t2i_r10"] == pytest.approx(1.0)
    assert chance["i2t_r1"] == pytest.approx(0.1)
    # Five captions among 5,000: 1 - (4995/5000)(4994/4999)...(4991/4996)
    missed = np.prod([(4995 - i) / (5000 - i) for i in range(5)])
    assert chance["i2t_r5"] == pytest.approx(100 * (1 - missed))
    assert chance_recall(2, [0, 1])["mean_recall"] == pytest.approx((50 + 100 + 100) / 3)


def test_nearest():
    i2t = torch.tensor([[1.0, 3.0, 2.0], [torch.nan, 0.0, 5.0], [9.0, 9.5, 0.0]])
    t2i = torch.tensor([[1.0, 2.0, 3.0], [6.0, 5.0, 4.0], [0.0, torch.nan, 1.0]])

    def score(images, captions):
        return PairScores(i2t[images][:, captions], t2i[images][:, captions])

    found = nearest(score, [2, 1], [0, 2], torch.device("cpu"), k=2)
    assert found.image_to_text.tolist() == [[1, 0], [2, 1]]
    # Of each caption's column.
    assert found.text_to_image.tolist() == [[1, 0], [1, 0]]
    assert nearest(score, [1], [1], torch.device("cpu"), k=9).image_to_text.tolist() == [[2, 1, 0]]
    assert nearest(score, [], [1], torch.device("cpu")).image_to_text.shape == (0, 3)


@pytest.mark.parametrize(
    ("image", "text", "owner", "message"),
    [
        (torch.zeros(0, 4), torch.ones(2, 4), [0, 0], "got 0 and 2"),
        (torch.ones(2, 4), torch.zeros(0, 4), [], "got 2 and 0"),
        (torch.ones(2, 4), torch.ones(2, 5), [0, 1], "features must be"),
        (torch.ones(2, 4), torch.ones(2, 4), [0], "2 captions but 1"),
        (torch.ones(2, 4), torch.ones(2, 4), [0, 2], "must lie in 0..1"),
        (torch.ones(2, 4), torch.ones(2, 4), [0, -1], "must lie in 0..1"),
        (torch.ones(2, 4), torch.ones(2, 4), [0.0, 1.0], "integers"),
    ],
)
def test_errors(image, text, owner, message):
    with pytest.raises(ValueError, match=message):
        recall_metrics(image, text, owner)


def clip_benchmark_recalls(image, text, owner, ks):
    """What clip_benchmark's own evaluation gives for these embeddings, in percent."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")

    class Embeddings:
        def encode_image(self, rows):
            return image[rows]

        def encode_text(self, rows):
            return text[rows]

    captions = [[str(row) for row in range(len(text)) if owner[row] == n] for n in range(len(image))]
    batches = [(torch.arange(i, min(i + 7, len(image))), captions[i : i + 7]) for i in range(0, len(image), 7)]
    found = theirs.evaluate(
        Embeddings(), batches, lambda words: torch.tensor([*map(int, words)]), "cpu", amp=False, recall_k_list=ks
    )
    named = {f"i2t_r{k}": found[f"text_retrieval_recall@{k}"] for k in ks}
    return {
        key: 100 * value
        for key, value in (named | {f"t2i_r{k}": found[f"image_retrieval_recall@{k}"] for k in ks}).items()
    }


@pytest.mark.parametrize("seed", range(3))
def test_equals_clip_benchmark(seed):
    image, text, owner = random_set(50, 250, dim=16, noise=1.5, seed=seed)
    image, owner = image[:-1], owner  # their candidates are images with captions
    ours = recall_metrics(image, text, owner)
    assert 5 < ours["mean_recall"] < 95
    theirs = clip_benchmark_recalls(image, text, owner.tolist(), [1, 5, 10])
    assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=1e-6)


def test_differs_from_clip_benchmark_in_ties_alone():
    # All are equally similar. There, candidates with low numbers are the best; here, none is found.
    image, text, owner = torch.ones(12, 4), torch.ones(60, 4), [row // 5 for row in range(60)]
    theirs = clip_benchmark_recalls(image, text, owner, [1, 5])
    assert theirs["t2i_r5"] > 40 and theirs["i2t_r5"] > 8
    ours = recall_metrics(image, text, owner, ks=(1, 5))
    assert all(ours[key] == 0 for key in theirs)


def test_drawn_pairs():
    owner = torch.tensor([3, 0, 0, 1, 1, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11])  # image 2 has no caption
    draws = draw_pairs(owner, 12, draws=3, size=4, seed=0)
    assert len(draws) == 3
    for images, captions in draws:
        assert len(set(images.tolist())) == 4
        assert owner[captions].tolist() == images.tolist()
    # 11 images with captions: two draws share none, and all three together miss none.
    everything = [image for images, _ in draws for image in images.tolist()]
    assert len(set(everything[:8])) == 8 and set(everything) == set(owner.tolist())
    again = draw_pairs(owner, 12, draws=3, size=4, seed=0)
    assert all(torch.equal(a, b) for x, y in zip(draws, again, strict=True) for a, b in zip(x, y, strict=True))
    other = draw_pairs(owner, 12, draws=3, size=4, seed=1)
    assert any(not torch.equal(x[0], y[0]) for x, y in zip(draws, other, strict=True))
    # Fewer images than wanted: all of them, once.
    ((images, captions),) = draw_pairs(owner, 12, draws=3, size=12, seed=0)
    assert sorted(images.tolist()) == sorted(set(owner.tolist())) and owner[captions].tolist() == images.tolist()
    # As many as wanted: equal images, other captions.
    drawn = draw_pairs(owner, 12, draws=20, size=11, seed=0)
    assert all(sorted(images.tolist()) == sorted(set(owner.tolist())) for images, _ in drawn)
    assert {caption for _, captions in drawn for caption in captions.tolist()} == set(range(15))


def test_average_median_rank_against_loops():
    image, text, owner = random_set(40, 200, dim=4, noise=1.0, seed=3)
    image, text = (torch.nn.functional.normalize(part, dim=1) for part in (image, text))
    found = average_median_rank(cosine_scores(image, text), owner, 40, draws=3, size=12, seed=5)
    medians = []
    for images, captions in draw_pairs(owner, 40, draws=3, size=12, seed=5):
        similarity = (image[images].double() @ text[captions].double().T).numpy()
        i2t = [sum(similarity[n] >= similarity[n, n]) for n in range(12)]
        t2i = [sum(similarity[:, n] >= similarity[n, n]) for n in range(12)]
        medians.append((np.median(i2t), np.median(t2i)))
    i2t, t2i = np.mean(medians, axis=0)
    assert 1 < i2t < 6 and len(set(medians)) > 1
    assert found == {
        "i2t_average_median_rank": pytest.approx(i2t),
        "t2i_average_median_rank": pytest.approx(t2i),
        "average_median_rank_draws": 3,
        "average_median_rank_images": 12,
    }


def test_average_median_rank_of_small_sets_of_chance_and_of_reordered_candidates():
    image, text, owner = torch.eye(30), torch.eye(30).repeat(2, 1), torch.arange(30).repeat(2)
    score = cosine_scores(image, text)
    perfect = average_median_rank(score, owner, 30)
    assert list(perfect.values()) == [1.0, 1.0, 1, 30]
    generator = torch.Generator().manual_seed(0)
    noise = [torch.nn.functional.normalize(torch.randn(1200, 64, generator=generator), dim=1) for _ in range(2)]
    chance = average_median_rank(cosine_scores(*noise), torch.arange(1200), 1200)
    assert chance["average_median_rank_draws"] == 5 and chance["average_median_rank_images"] == 1000
    assert chance["i2t_average_median_rank"] == pytest.approx(500.5, abs=40)
    assert chance["t2i_average_median_rank"] == pytest.approx(500.5, abs=40)

    def opposite(images, captions):
        return -(owner[captions] == images).float()

    # Rows that `match` is given are those of the whole set: each right candidate becomes the last of four.
    worse = average_median_rank(score, owner, 30, Reranking(opposite, 4))
    assert [worse[f"{way}_average_median_rank"] for way in ("i2t", "t2i")] == [4.0, 4.0]
    metrics = retrieval_metrics(score, owner, 30, reranking=Reranking(opposite, 4))
    assert metrics["t2i_median_rank"] == 4.0 and metrics["t2i_r1"] == 0.0 and metrics["t2i_r5"] == 100.0
    # Among the four, both captions of an image are right, behind two wrong ones.
    assert metrics["i2t_median_rank"] == 3.0


def test_rank_summary():
    metrics = {
        f"{way}_{key}": value
        for way in ("i2t", "t2i")
        for key, value in (("median_rank", 3.5), ("mean_rank", 12.34), ("average_median_rank", 2.2))
    }
    lines = rank_summary(metrics | {"average_median_rank_draws": 5, "average_median_rank_images": 1000}).splitlines()
    assert lines == [
        "median rank: i2t 3.5, t2i 3.5; mean rank: i2t 12.3, t2i 12.3",
        "average median rank of 5 x 1,000 pairs: i2t 2.2, t2i 2.2",
    ]
