"""Tars that other programs wrote, indexed where they are."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emkum.data.shards import ShardSample, available_splits, open_split
from emkum.errors import UserError

Members = list[tuple[str, bytes]]


def _image(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def _write_tar(path: Path, members: Members, form: int = tarfile.PAX_FORMAT) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _sample(number: int, key: str | None = None) -> Members:
    """What img2dataset writes for one image."""
    key = key or f"{number // 4:05d}{number % 4:04d}"
    described = {"caption": f"Photo {number}", "url": f"http://a/{number}.jpg", "key": key, "status": "success"}
    return [
        (f"{key}.jpg", _image(number)),
        (f"{key}.json", json.dumps(described).encode()),
        (f"{key}.txt", f"Photo {number}".encode()),
    ]


def _write_folder(folder: Path, numbers: range) -> None:
    """Tars of four samples each, with the files that img2dataset leaves beside them."""
    folder.mkdir()
    for start in range(numbers.start, numbers.stop, 4):
        name = f"{start // 4:05d}"
        members = [m for number in range(start, min(start + 4, numbers.stop)) for m in _sample(number)]
        _write_tar(folder / f"{name}.tar", members)
        (folder / f"{name}.parquet").write_bytes(b"PAR1")
        (folder / f"{name}_stats.json").write_text("{}")


@pytest.fixture
def state() -> Callable[[Path], dict[str, tuple[bytes, int]]]:
    """A function that gives bytes and time of last change of all files below a folder, and of the folders."""

    def read(folder: Path) -> dict[str, tuple[bytes, int]]:
        paths = [folder, *sorted(folder.rglob("*"))]
        return {str(p): (p.read_bytes() if p.is_file() else b"", p.stat().st_mtime_ns) for p in paths}

    return read


def _assert_sample(sample: ShardSample, number: int) -> None:
    assert sample.image == _image(number)
    assert sample.captions == (f"Photo {number}",)
    assert sample.key == f"{number // 4:05d}{number % 4:04d}"


def test_folder_is_indexed_in_place(tmp_path, run_prepare, state, folder_bytes) -> None:
    _write_folder(tmp_path / "raw", range(14))
    before = state(tmp_path / "raw")
    for out, workers in (("one", 1), ("two", 2)):
        run_prepare(
            "img2dataset", "--input", tmp_path / "raw", "--valid-shards", 1, "--workers", workers,
            "--out", tmp_path / out,
        )  # fmt: skip
    assert available_splits(tmp_path / "one") == ["train", "valid"]
    for split, numbers in (("train", range(12)), ("valid", range(12, 14))):
        samples = open_split(tmp_path / "one", split)
        assert len(samples) == len(numbers)
        for sample, number in zip(samples, numbers, strict=True):
            _assert_sample(sample, number)
    assert samples.image_ids.tolist() == [12, 13]
    record = json.loads((tmp_path / "one" / "prepare.json").read_text())
    nothing = {"duplicate_images": 0, "duplicate_names": 0, "skipped": 0, "skipped_captions": 0}
    assert record["splits"]["train"] == {"images": 12, "captions": 12, **nothing}
    assert state(tmp_path / "raw") == before
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "raw", "two"]


def test_tars_of_webdataset(tmp_path, run_prepare, state) -> None:
    webdataset = pytest.importorskip("webdataset")
    (tmp_path / "raw").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "raw" / "%05d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            key = f"{number // 4:05d}{number % 4:04d}"
            writer.write({"__key__": key, "jpg": _image(number), "txt": f"Photo {number}", "json": {"width": 24}})
    before = state(tmp_path / "raw")
    run_prepare("img2dataset", "--input", tmp_path / "raw", "--out", tmp_path / "out", "--workers", 1)
    samples = open_split(tmp_path / "out", "train")
    for sample, number in zip(samples, range(10), strict=True):
        _assert_sample(sample, number)
    assert len(samples.manifest.names) == 3
    assert state(tmp_path / "raw") == before


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_length(tmp_path, run_prepare, form: int) -> None:
    keys = ["a", "./b", "folder/of some/c", "k" * 95, f"{'d' * 60}/{'e' * 90}"]
    if form != tarfile.USTAR_FORMAT:
        keys += ["k" * 96, "l" * 97, "m" * 240, f"{'f' * 150}/{'g' * 200}", "straße/日本", "ü" * 120]
    members = [member for number, key in enumerate(keys) for member in _sample(number, key)]
    _write_tar(tmp_path / "raw" / "0.tar", members, form)
    run_prepare("img2dataset", "--input", tmp_path / "raw", "--out", tmp_path / "out", "--workers", 1)
    samples = open_split(tmp_path / "out", "train")
    assert [sample.key for sample in samples] == keys
    assert [sample.image for sample in samples] == [_image(number) for number in range(len(keys))]
    assert [sample.captions for sample in samples] == [(f"Photo {number}",) for number in range(len(keys))]


def test_members_of_a_sample(tmp_path, run_prepare) -> None:
    described = b'{"caption": " from JSON ", "width": 3}'
    _write_tar(
        tmp_path / "raw" / "0.tar",
        [
            ("both.JPG", _image(0)),
            ("both.json", described),
            ("both.txt", b" from text \n"),
            ("json.png", _image(1, "PNG")),
            ("json.json", described),
            ("order.txt", b"text first"),
            ("order.cls", b"7"),
            ("order.webp", _image(2, "WEBP")),
        ],
    )
    run_prepare("img2dataset", "--split", f"test={tmp_path / 'raw'}", "--out", tmp_path / "out", "--workers", 1)
    both, from_json, order = open_split(tmp_path / "out", "test")
    assert (both.captions, both.meta) == (("from text",), {})
    assert (from_json.captions, from_json.meta) == (("from JSON",), {"width": 3})
    assert (order.captions, order.image) == (("text first",), _image(2, "WEBP"))


def test_splits_of_their_own_folders(tmp_path, run_prepare) -> None:
    _write_folder(tmp_path / "a", range(6))
    _write_folder(tmp_path / "b", range(4, 8))
    splits = [f"--split=dev={tmp_path / 'b'}", f"--split=train={tmp_path / 'a'}"]
    run_prepare("img2dataset", *splits, "--out", tmp_path / "out", "--workers", 1)
    ids = {split: open_split(tmp_path / "out", split).image_ids.tolist() for split in ("train", "valid")}
    assert ids == {"train": [0, 1, 2, 3, 4, 5], "valid": [4, 5, 8, 9]}
    record = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert record["splits"]["valid"]["duplicate_images"] == 2


def test_limit_and_equal_names(tmp_path, run_prepare) -> None:
    for name in ("0", "1"):
        _write_tar(tmp_path / "raw" / f"{name}.tar", [m for n in range(3) for m in _sample(3 * int(name) + n, f"k{n}")])
    run_prepare("img2dataset", "--input", tmp_path / "raw", "--out", tmp_path / "out", "--workers", 1)
    assert [sample.captions[0] for sample in open_split(tmp_path / "out", "train")] == ["Photo 0", "Photo 1", "Photo 2"]
    record = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert record["splits"]["train"]["duplicate_names"] == 3
    run_prepare("img2dataset", "--input", tmp_path / "raw", "--out", tmp_path / "two", "--workers", 1, "--limit", 2)
    assert len(open_split(tmp_path / "two", "train")) == 2


def test_again_does_nothing_and_changed_tars_are_refused(tmp_path, run_prepare, capsys, folder_bytes) -> None:
    _write_folder(tmp_path / "raw", range(8))
    arguments = ["img2dataset", "--input", tmp_path / "raw", "--out", tmp_path / "out", "--workers", 1]
    run_prepare(*arguments)
    before = folder_bytes(tmp_path / "out")
    capsys.readouterr()
    run_prepare(*arguments)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="option valid_shards: 0 there, 1 here"):
        run_prepare(*arguments, "--valid-shards", 1)
    _write_tar(tmp_path / "raw" / "00002.tar", _sample(8))
    with pytest.raises(UserError, match="source tars of train differs"):
        run_prepare(*arguments)
    assert folder_bytes(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --input DIR or --split NAME=DIR"),
        (["--input", "raw", "--split", "train=raw"], "either --input DIR or --split NAME=DIR"),
        (["--split", "train=raw", "--valid-shards", "1"], "--valid-shards goes with --input"),
        (["--input", "none"], "there is no folder none"),
        (["--input", "empty"], "folder empty holds no .*tar"),
        (["--split", "train=raw/00000.tar"], "there is no folder raw/00000.tar"),
        (["--input", "raw", "--valid-shards", "2"], "--valid-shards 2: want 0 to 1, for raw holds 2 tars"),
        (["--input", "raw", "--valid-shards", "-1"], "--valid-shards -1: want 0 to 1"),
        (["--input", "raw", "--out", "raw/index"], "--out raw/index lies in raw"),
        (["--input", "raw", "--out", "raw"], "--out raw lies in raw"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path, run_prepare, monkeypatch, state, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    _write_folder(tmp_path / "raw", range(8))
    before = state(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        run_prepare("img2dataset", "--out", "out", "--workers", 1, *arguments)
    assert "\n" not in str(caught.value)
    assert state(tmp_path) == before


def test_tars_that_moved(tmp_path, run_prepare) -> None:
    _write_folder(tmp_path / "raw", range(8))
    run_prepare("img2dataset", "--input", tmp_path / "raw", "--out", tmp_path / "out", "--workers", 1)
    (tmp_path / "raw" / "00001.tar").unlink()
    with pytest.raises(UserError, match="raw/00001.tar is missing"):
        open_split(tmp_path / "out", "train")


def test_samples_without_caption_among_captioned_ones(tmp_path, run_prepare) -> None:
    bare = [(f"bare{number}.jpg", _image(50 + number)) for number in range(3)]
    _write_tar(tmp_path / "mixed" / "0.tar", [*_sample(0), bare[0], *_sample(1)])
    _write_tar(tmp_path / "images" / "0.tar", bare)
    run_prepare("img2dataset", "--input", tmp_path / "mixed", "--max-bad-fraction", 0.5, "--out", tmp_path / "a")
    assert [sample.captions for sample in open_split(tmp_path / "a", "train")] == [("Photo 0",), ("Photo 1",)]
    (line,) = (tmp_path / "a" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line) | {"split": ""} == {
        "split": "",
        "key": "0.tar: bare0",
        "what": "sample",
        "reason": "no caption",
    }
    # Images alone are a set of their own kind.
    run_prepare("img2dataset", "--input", tmp_path / "images", "--out", tmp_path / "b")
    assert len(open_split(tmp_path / "b", "train", require_captions=False)) == 3
