"""Tar shards: what is written, how it is read at random, and what is left behind by errors."""

import json
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from emkum.data.mixture import MixedSamples, ReducedSamples
from emkum.data.shard_writing import ShardWriter
from emkum.data.shards import INDEX_DTYPE, INDEX_NAME, MANIFEST_NAME, ShardedSamples, available_splits, open_split
from emkum.errors import UserError

NUM_SAMPLES = 25


def _image(number: int) -> bytes:
    return np.random.default_rng(number).bytes(300 + 211 * number)


def _captions(number: int) -> list[str]:
    return [f"caption {caption} of image {number} — ünïcode" for caption in range(1 + number % 3)]


def write(directory: Path, numbers=range(NUM_SAMPLES), samples_per_shard: int = 10) -> ShardedSamples:
    with ShardWriter(directory, samples_per_shard) as writer:
        for number in numbers:
            meta = {"tags": [number, "x"]} if number % 2 else None
            writer.add(f"key{number:04d}", _image(number), "jpg", _captions(number), meta, image_id=1000 + number // 2)
    return ShardedSamples(directory)


@pytest.fixture
def samples(tmp_path: Path) -> ShardedSamples:
    return write(tmp_path / "data" / "train")


def test_every_sample_comes_back(samples: ShardedSamples) -> None:
    assert len(samples) == NUM_SAMPLES
    for number in np.random.default_rng(0).permutation(NUM_SAMPLES):
        sample = samples[number]
        assert sample.key == f"key{number:04d}"
        assert sample.image == _image(number)
        assert sample.captions == tuple(_captions(number))
        assert sample.image_id == 1000 + number // 2
        assert sample.meta == ({"tags": [number, "x"]} if number % 2 else {})
    assert samples[-1].key == samples[NUM_SAMPLES - 1].key
    assert len(list(samples)) == NUM_SAMPLES
    for index in (NUM_SAMPLES, -NUM_SAMPLES - 1):
        with pytest.raises(IndexError):
            samples[index]


def test_random_access_equals_sequential_tar_reading(samples: ShardedSamples) -> None:
    members: list[tuple[str, bytes]] = []
    for path in sorted(samples.directory.glob("*.tar")):
        with tarfile.open(path) as archive:
            for info in archive:
                assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")
                members.append((info.name, archive.extractfile(info).read()))
    assert len(members) == 3 * NUM_SAMPLES
    for number, sample in enumerate(samples):
        (image_name, image), (text_name, text), (json_name, described) = members[3 * number : 3 * number + 3]
        assert (image_name, text_name, json_name) == tuple(f"{sample.key}.{end}" for end in ("jpg", "txt", "json"))
        assert image == sample.image
        assert text.decode() == sample.captions[0]
        assert json.loads(described) == {
            "key": sample.key,
            "captions": list(sample.captions),
            **sample.meta,
        }


def test_shards_are_filled_one_after_another(samples: ShardedSamples, tmp_path: Path) -> None:
    names = ["000000.tar", "000001.tar", "000002.tar", INDEX_NAME, MANIFEST_NAME]
    assert sorted(path.name for path in samples.directory.iterdir()) == names
    exact = write(tmp_path / "exact", range(20))
    assert sorted(path.name for path in exact.directory.iterdir()) == names[:2] + names[3:]


def test_index_arrays(samples: ShardedSamples) -> None:
    np.testing.assert_array_equal(samples.image_ids, 1000 + np.arange(NUM_SAMPLES) // 2)
    np.testing.assert_array_equal(samples.num_captions, 1 + np.arange(NUM_SAMPLES) % 3)
    lengths = [round(np.mean([len(caption) for caption in _captions(number)])) for number in range(NUM_SAMPLES)]
    np.testing.assert_array_equal(samples.caption_lengths, lengths)
    with pytest.raises(ValueError, match="read-only"):
        samples.image_ids[0] = 1


def test_image_ids_count_up_by_default(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train") as writer:
        for number in range(3):
            writer.add(str(number), _image(number), "png", ["a"])
    assert ShardedSamples(tmp_path / "train").image_ids.tolist() == [0, 1, 2]


def test_equal_images_have_the_first_ones_id(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train", samples_per_shard=2) as writer:
        for number, (image, image_id) in enumerate([(b"x", 7), (b"y", None), (b"x", 9), (b"z", 5), (b"y", 3)]):
            writer.add(str(number), image, "jpg", ["a"], image_id=image_id)
    assert ShardedSamples(tmp_path / "train").image_ids.tolist() == [7, 1, 7, 5, 1]


def test_equal_samples_give_equal_bytes(tmp_path: Path, folder_bytes) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    assert folder_bytes(a.directory) == folder_bytes(b.directory)
    assert a.content_hash() == b.content_hash()


def test_content_hash_sees_one_changed_byte(tmp_path: Path) -> None:
    hashes = set()
    for name, image in (("a", b"image 1"), ("b", b"image 2")):
        with ShardWriter(tmp_path / name) as writer:
            writer.add("key", image, "jpg", ["a"])
        hashes.add(ShardedSamples(tmp_path / name).content_hash())
    assert len(hashes) == 2


def test_long_and_foreign_keys(tmp_path: Path) -> None:
    keys = ["k" * 150, "straße 5", "日本"]
    with ShardWriter(tmp_path / "train") as writer:
        for key in keys:
            writer.add(key, key.encode(), "jpg", [key])
    samples = ShardedSamples(tmp_path / "train")
    assert [sample.key for sample in samples] == keys
    assert [sample.image for sample in samples] == [key.encode() for key in keys]
    with tarfile.open(tmp_path / "train" / "000000.tar") as archive:
        assert [name for name in archive.getnames() if name.endswith(".jpg")] == [f"{key}.jpg" for key in keys]


@pytest.mark.parametrize("key", ["", "a.b", "a/b", ".."])
def test_malformed_key(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match="sample name"), ShardWriter(tmp_path / "train") as writer:
        writer.add(key, b"image", "jpg", ["a"])
    assert list(tmp_path.iterdir()) == []


def test_duplicate_key_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="key0003"):
        write(tmp_path / "train", [1, 2, 3, 4, 3], samples_per_shard=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), ShardWriter(tmp_path / "train") as writer:
        writer.add("key", b"image", "jpg", ["a"])
        raise error
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_visible_before_the_end(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train") as writer:
        writer.add("key", b"image", "jpg", ["a"])
        assert available_splits(tmp_path) == []
    assert available_splits(tmp_path) == ["train"]


def test_writer_refuses(tmp_path: Path, samples: ShardedSamples) -> None:
    before = sorted(samples.directory.iterdir())
    with pytest.raises(UserError, match="not empty"), ShardWriter(samples.directory):
        pass
    assert sorted(samples.directory.iterdir()) == before
    with pytest.raises(UserError, match="no samples"), ShardWriter(tmp_path / "empty"):
        pass
    assert not (tmp_path / "empty").exists()
    with pytest.raises(ValueError, match="meta"), ShardWriter(tmp_path / "meta") as writer:
        writer.add("key", b"image", "jpg", ["a"], meta={"captions": 1})
    with pytest.raises(ValueError, match="suffix"), ShardWriter(tmp_path / "suffix") as writer:
        writer.add("key", b"image", "json", ["a"])


def test_pickle_carries_no_samples(samples: ShardedSamples) -> None:
    samples[0]
    data = pickle.dumps(samples)
    assert len(data) < 500
    assert pickle.loads(data)[7] == samples[7]


def test_reading_moves_no_file_position(samples: ShardedSamples) -> None:
    # Forked processes share positions: moving one would disturb another process's reading.
    for index in range(len(samples)):
        samples[index]
    shards = set(samples.directory.glob("*.tar"))
    links = [link for link in Path("/proc/self/fd").iterdir() if link.resolve() in shards]
    assert len(links) >= len(shards)
    for link in links:
        assert os.lseek(int(link.name), 0, os.SEEK_CUR) == 0


def _read_in_child(samples: ShardedSamples, seed: int, queue: multiprocessing.Queue) -> None:
    order = np.random.default_rng(seed).integers(0, len(samples), 300)
    queue.put(all(samples[int(i)].image == _image(int(i)) for i in order))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_processes_share_open_files(samples: ShardedSamples) -> None:
    context = multiprocessing.get_context("fork")
    for index in range(len(samples)):
        samples[index]
    queue = context.Queue()
    children = [context.Process(target=_read_in_child, args=(samples, seed, queue)) for seed in range(3)]
    for child in children:
        child.start()
    order = np.random.default_rng(9).integers(0, len(samples), 300)
    assert all(samples[int(i)].image == _image(int(i)) for i in order)
    assert [queue.get(timeout=60) for _ in children] == [True, True, True]
    for child in children:
        child.join()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(samples: ShardedSamples, method: str) -> None:
    samples[0]
    loader = torch.utils.data.DataLoader(
        samples, batch_size=None, num_workers=2, shuffle=False, multiprocessing_context=method
    )
    assert [sample.image for sample in loader] == [_image(number) for number in range(NUM_SAMPLES)]


def test_open_files_are_bounded_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emkum.data.shards._MAX_OPEN_SHARDS", 2)
    samples = write(tmp_path / "train", samples_per_shard=1)
    before = len(os.listdir("/proc/self/fd"))
    assert [sample.image for sample in samples] == [_image(number) for number in range(NUM_SAMPLES)]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    del samples
    assert len(os.listdir("/proc/self/fd")) <= before


def test_missing_split_names_the_others(samples: ShardedSamples) -> None:
    data_dir = samples.directory.parent
    for call in (lambda: open_split(data_dir, "tset"), lambda: ShardedSamples(data_dir / "tset")):
        with pytest.raises(UserError, match="tset.*train") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_missing_data_says_how_to_make_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for data_dir in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(UserError, match=f"{data_dir.name}.*emkum prepare") as caught:
            open_split(data_dir, "train")
        assert "\n" not in str(caught.value)


def test_split_without_captions(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train") as writer:
        writer.add("first", b"image", "jpg", ["a"])
        writer.add("second", b"image", "jpg", [])
    with pytest.raises(UserError, match="1 of 2 images without a caption, the first second"):
        open_split(tmp_path, "train")
    assert open_split(tmp_path, "train", require_captions=False)[1].captions == ()
    with tarfile.open(tmp_path / "train" / "000000.tar") as archive:
        assert "second.txt" not in archive.getnames()


def test_available_splits_in_order(tmp_path: Path) -> None:
    for name in ("test", "extra", "valid", "train"):
        write(tmp_path / name, range(2))
    (tmp_path / "other").mkdir()
    (tmp_path / "prepare.json").write_text("{}")
    assert available_splits(tmp_path) == ["train", "valid", "test", "extra"]
    assert available_splits(tmp_path / "none") == []


@pytest.mark.parametrize("damage", ["index", "version", "shard", "cut"])
def test_damage_is_found_on_opening(samples: ShardedSamples, damage: str) -> None:
    index, shard = samples.directory / INDEX_NAME, samples.directory / "000001.tar"
    if damage == "index":
        index.write_bytes(b"no index")
    elif damage == "version":
        np.save(index, np.zeros(3))
    elif damage == "shard":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:20000])
    with pytest.raises(UserError, match="000001.tar" if damage in ("shard", "cut") else INDEX_NAME):
        ShardedSamples(samples.directory)


def test_damaged_bytes_are_found_on_reading(samples: ShardedSamples) -> None:
    path = samples.directory / "000000.tar"
    data = bytearray(path.read_bytes())
    position = data.index(_image(5))
    data[position + 10] ^= 1
    path.write_bytes(data)
    again = ShardedSamples(samples.directory)
    assert again[4].image == _image(4)
    with pytest.raises(UserError, match="000000.tar is damaged at sample 5"):
        again[5]


# ----------------------------------------------------------------------------------------------------------------------
# Sounds
# ----------------------------------------------------------------------------------------------------------------------


def write_with_sounds(directory: Path) -> ShardedSamples:
    """Every second sample has a sound; what stands for it are bytes that are no WAV."""
    with ShardWriter(directory, 10) as writer:
        for number in range(NUM_SAMPLES):
            sound = _image(100 + number) if number % 2 else b""
            writer.add(f"key{number:04d}", _image(number), "jpg", _captions(number), sound=sound)
    return ShardedSamples(directory)


def test_sounds_come_back_where_there_are_any(tmp_path: Path, samples: ShardedSamples) -> None:
    heard = write_with_sounds(tmp_path / "heard" / "train")
    for number in range(NUM_SAMPLES):
        sample = heard[number]
        assert sample.sound == (_image(100 + number) if number % 2 else b"")
        assert (sample.image, sample.captions) == (_image(number), tuple(_captions(number)))
    assert heard.has_sound.tolist() == [number % 2 == 1 for number in range(NUM_SAMPLES)]
    mixed = MixedSamples([ReducedSamples(heard, 0.5, seed=1), samples])
    assert mixed.has_sound.tolist() == [mixed[row].sound != b"" for row in range(len(mixed))]
    assert 0 < mixed.has_sound.sum() < len(mixed)
    # Sets without sounds have the index that they had before there were any.
    assert not samples.has_sound.any() and samples[0].sound == b""
    assert np.load(samples.directory / INDEX_NAME).dtype == INDEX_DTYPE
    assert np.load(heard.directory / INDEX_NAME).dtype.itemsize == INDEX_DTYPE.itemsize + 12
    with tarfile.open(heard.directory / "000000.tar") as archive:
        names = [name for name in archive.getnames() if name.startswith("key0001")]
    assert names == ["key0001.jpg", "key0001.txt", "key0001.json", "key0001.wav"]


def test_a_damaged_sound_is_refused(tmp_path: Path) -> None:
    heard = write_with_sounds(tmp_path / "train")
    path = heard.directory / "000000.tar"
    content = bytearray(path.read_bytes())
    content[content.index(_image(101))] ^= 1
    path.write_bytes(content)
    assert heard[0].sound == b""
    with pytest.raises(UserError, match="000000.tar is damaged at sample 1: prepare the data again"):
        heard[1]
