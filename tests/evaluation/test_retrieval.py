"""Retrieval recall: hand-computed, against a float64 reference, and under the faults it must not hide."""

import numpy as np
import pytest
import torch

from emkum.evaluation.retrieval import chance_recall, nearest, recall_metrics

KEYS = ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "mean_recall", "num_images", "num_captions"]


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
    return recalls | {"mean_recall": mean, "num_images": len(image), "num_captions": len(text)}


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


def test_default_keys_and_numpy():
    image, text, owner = random_set()
    metrics = recall_metrics(image.numpy(), text.numpy(), owner.numpy())
    assert list(metrics) == KEYS
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
        for key, value in metrics.items():
            sums[key] += value / rounds
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
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [torch.nan, 0.0]])
    text = torch.tensor([[2.0, 1.0], [1.0, 2.0], [3.0, 0.0]])
    found = nearest(image, text, k=2, block=2)
    assert found.image_to_text[:2].tolist() == [[2, 0], [1, 0]]
    assert found.text_to_image.tolist() == [[0, 1], [1, 0], [0, 1]]
    assert nearest(image, text, k=9).image_to_text.shape == (3, 3)


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
