"""Images without captions: one crop, an augmented one, or the views of multi-crop."""

from pathlib import Path

import pytest
import torch

from emkum.data.augment import Augment, AugmentConfig, MultiCrop
from emkum.data.images import ImageDataset, collate
from emkum.data.shards import ShardedSamples, open_split
from emkum.data.transforms import ImageTransform

GLOBAL, LOCAL = ImageTransform(24, 0.4, flip=True), ImageTransform(12, 0.05, flip=True, max_scale=0.4)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, run_prepare) -> ShardedSamples:
    folder: Path = tmp_path_factory.mktemp("images") / "scenes"
    run_prepare("scenes", "--out", folder, "--num-images", 10, "--image-size", 32, "--vocab-size", 0)
    return open_split(folder, "train")


def test_multi_crop_views_travel_as_a_list_of_batches(samples: ShardedSamples) -> None:
    crops = MultiCrop(GLOBAL, LOCAL, num_global=2, num_local=3)
    dataset, again = ImageDataset(samples, crops, seed=4), ImageDataset(samples, crops, seed=4)
    batch = collate([dataset[i] for i in (3, 0, 5, 1)])
    assert [tuple(view.shape) for view in batch["views"]] == [(4, 3, 24, 24)] * 2 + [(4, 3, 12, 12)] * 3
    assert torch.equal(batch["net_input"]["image"], batch["views"][0])
    assert not torch.equal(batch["views"][0], batch["views"][1])
    for one, two in zip(batch["views"], collate([again[i] for i in (3, 0, 5, 1)])["views"], strict=True):
        assert torch.equal(one, two)
    again.set_epoch(2)
    assert not torch.equal(again[3].views[0], dataset[3].views[0])


def test_augmentation_changes_the_crop_and_nothing_else(samples: ShardedSamples) -> None:
    plain = ImageDataset(samples, GLOBAL)
    same = ImageDataset(samples, GLOBAL, augment=Augment(AugmentConfig()))
    gray = ImageDataset(samples, GLOBAL, augment=Augment(AugmentConfig(grayscale_prob=1.0)))
    for index in range(4):
        (crop,), (equal,), (changed,) = plain[index].views, same[index].views, gray[index].views
        assert torch.equal(crop, equal) and not torch.equal(crop, changed)
        # The same region: its luminance, by the weights of ITU-R 601, is that of the plain crop.
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        torch.testing.assert_close(changed[0].float(), (crop.float() * weights).sum(0), rtol=0, atol=1.5)
        assert torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])
