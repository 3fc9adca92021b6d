"""Several sets as one sequence."""

from pathlib import Path

import numpy as np
import pytest

from emkum.data.mixture import MixedSamples, open_mixture
from emkum.data.shard_writing import ShardWriter
from emkum.data.shards import ShardedSamples
from emkum.errors import UserError


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three sets of 5, 1 and 4 images; the first and the last hold equal images."""
    for name, count in (("a", 5), ("b", 1), ("c", 4)):
        with ShardWriter(tmp_path / name / "train") as writer:
            for number in range(count):
                image = f"{'x' if name == 'b' else ''}{number}".encode()
                writer.add(f"{name}{number}", image, "jpg", [f"{name} {number}" * (number + 1)])
    return [tmp_path / name for name in "abc"]


def test_samples_lie_one_behind_the_other(folders: list[Path]) -> None:
    mixed = open_mixture(folders, "train")
    assert len(mixed) == 10 and mixed.lengths == [5, 1, 4]
    assert [mixed[i].key for i in range(10)] == ["a0", "a1", "a2", "a3", "a4", "b0", "c0", "c1", "c2", "c3"]
    for index in (-1, 10):
        with pytest.raises(IndexError):
            mixed[index]
    lengths = [len(mixed[i].captions[0]) for i in range(10)]
    np.testing.assert_array_equal(mixed.caption_lengths, lengths)


def test_images_of_two_sets_are_never_taken_for_equal(folders: list[Path]) -> None:
    mixed = open_mixture(folders, "train")
    assert mixed[0].image == mixed[6].image
    assert len({mixed[i].image_id for i in range(10)}) == 10
    assert [mixed[i].image_id for i in range(5)] == ShardedSamples(folders[0] / "train").image_ids.tolist()


def test_hash_tells_sets_and_their_order_apart(folders: list[Path]) -> None:
    alone = open_mixture(folders[:1], "train")
    assert alone.content_hash() == ShardedSamples(folders[0] / "train").content_hash()
    hashes = {open_mixture([folders[i] for i in order], "train").content_hash() for order in ((0, 1), (1, 0), (0, 2))}
    assert len(hashes | {alone.content_hash()}) == 4


def test_a_missing_split_names_its_folder(folders: list[Path]) -> None:
    with pytest.raises(UserError, match=f"{folders[0]} has no split 'valid'"):
        open_mixture(folders, "valid")
    with pytest.raises(UserError, match="none does not exist"):
        open_mixture([*folders, folders[0].parent / "none"], "train")
    assert isinstance(open_mixture(folders, "train"), MixedSamples)


def test_parts_of_sets_lie_in_one_another(folders: list[Path]) -> None:
    whole = open_mixture(folders, "train")
    keys = {}
    for fraction in (0.2, 0.5, 0.8):
        part = open_mixture(folders, "train", fraction=fraction, seed=3)
        assert part.lengths == [round(5 * fraction), 1, max(1, round(4 * fraction))]
        keys[fraction] = [part[i].key for i in range(len(part))]
        assert keys[fraction] == sorted(keys[fraction]) and len(part.caption_lengths) == len(part)
        np.testing.assert_array_equal(part.caption_lengths, [len(part[i].captions[0]) for i in range(len(part))])
        # Targets that were cached for all images are those of a part of them.
        assert part.content_hash() == whole.content_hash()
        ids = {whole[i].key: whole[i].image_id for i in range(len(whole))}
        assert [part[i].image_id for i in range(len(part))] == [ids[key] for key in keys[fraction]]
    assert set(keys[0.2]) < set(keys[0.5]) < set(keys[0.8])
    others = [open_mixture(folders, "train", fraction=0.5, seed=seed) for seed in range(8)]
    assert len({tuple(part[i].key for i in range(len(part))) for part in others}) > 1
