"""Images that two splits share, within one folder by their ids and between folders by their bytes."""

from pathlib import Path

import numpy as np

from emkum.data.overlap import shared_images
from emkum.data.shard_writing import ShardWriter
from emkum.data.shards import ShardedSamples, open_split


def write_split(folder: Path, images: list[bytes], ids: list[int] | None = None) -> ShardedSamples:
    with ShardWriter(folder) as writer:
        for number, image in enumerate(images):
            image_id = number if ids is None else ids[number]
            writer.add(f"{number}", image, "jpg", [f"caption {number} of {folder.parent.name}"], image_id=image_id)
    return open_split(folder.parent, folder.name)


def test_images_are_compared_by_bytes_between_folders(tmp_path: Path) -> None:
    own = write_split(tmp_path / "a" / "test", [b"one", b"two", b"three", b"", b"six"])
    # An image of equal length, an equal one under another number, an empty one, and one of a length of its own.
    others = write_split(tmp_path / "b" / "train", [b"six", b"2wo", b"", b"three", b"seventeen"])
    np.testing.assert_array_equal(shared_images(own, others), [False, False, True, False, True])
    np.testing.assert_array_equal(shared_images(others, own), [True, False, False, True, False])


def test_images_of_one_folder_are_compared_by_their_ids(tmp_path: Path) -> None:
    own = write_split(tmp_path / "a" / "test", [b"one", b"two"], ids=[7, 8])
    others = write_split(tmp_path / "a" / "train", [b"three", b"four"], ids=[8, 9])
    np.testing.assert_array_equal(shared_images(own, others), [False, True])
