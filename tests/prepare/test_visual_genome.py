"""Visual Genome from region_descriptions.json."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import emkum.prepare.visual_genome
from emkum.data.shards import available_splits, open_split
from emkum.errors import UserError
from emkum.prepare.visual_genome import choose_splits, find_regions, list_elements

# Phrases of each image; 7 has none, 5 the same one twice.
PHRASES = {1: ["the clock is green", "a tall café "], 5: ["a dog", "two dogs", "a dog"], 7: [], 2: ["a red car"]}


def _jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def _element(image_id: int) -> dict:
    regions = [
        {
            "region_id": 10 * image_id + n,
            "width": 9 + n,
            "height": 8,
            "image_id": image_id,
            "phrase": p,
            "y": n,
            "x": -1,
        }
        for n, p in enumerate(PHRASES[image_id])
    ]
    return {"regions": regions, "id": image_id}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Photos in a folder and a zip, regions, image data that says that the originals were ten times as large."""
    folder = tmp_path / "raw"
    (folder / "VG_100K").mkdir(parents=True)
    with zipfile.ZipFile(folder / "images2.zip", "w") as archive:
        for i in (5, 2):
            archive.writestr(f"VG_100K_2/{i}.jpg", _jpeg(i))
    for i in (1, 7):
        (folder / "VG_100K" / f"{i}.jpg").write_bytes(_jpeg(i))
    (folder / "regions.json").write_text(json.dumps([_element(i) for i in PHRASES]))
    entries = [
        {"width": 480, "height": 320, "image_id": i, "url": "", "coco_id": None, "flickr_id": i} for i in PHRASES
    ]
    entries[1]["coco_id"] = 397133
    (folder / "image_data.json").write_text(json.dumps(entries))
    (folder / "valid.txt").write_text("2\n7\n")
    (folder / "test.txt").write_text("VG_100K/1.jpg\n")
    return folder


def _arguments(raw: Path, *more: object) -> list[object]:
    images = ["--images", raw / "VG_100K", raw / "images2.zip"]
    return ["visual-genome", "--workers", 1, *images, "--regions", raw / "regions.json", *more]


def test_samples(raw, tmp_path, run_prepare, capsys) -> None:
    out = tmp_path / "out"
    run_prepare(*_arguments(raw, "--image-data", raw / "image_data.json", "--max-bad-fraction", 0), "--out", out)
    assert available_splits(out) == ["train"]
    samples = list(open_split(out, "train"))
    assert [(s.key, s.image_id, s.image) for s in samples] == [(str(i), i, _jpeg(i)) for i in (1, 5, 2)]
    assert samples[0].captions == ("the clock is green", "a tall café")
    assert samples[1].captions == ("a dog", "two dogs")
    boxes = [[-1, n, 9 + n, 8] for n in range(3)]
    regions = [{"phrase": text, "box": box} for text, box in zip(PHRASES[5], boxes, strict=True)]
    assert samples[1].meta == {"width": 480, "height": 320, "coco_id": 397133, "regions": regions}
    assert "coco_id" not in samples[0].meta
    assert (
        "train: 3 images, 5 captions, 0 duplicate images, 0 duplicate names, 1 images without captions, 0 skipped"
        in (capsys.readouterr().out)
    )


def test_size_is_that_of_the_file_before_it_is_shrunk(raw, tmp_path, run_prepare) -> None:
    run_prepare(*_arguments(raw, "--image-size", 16, "--limit", 2), "--out", tmp_path / "out")
    samples = list(open_split(tmp_path / "out", "train"))
    assert [sample.key for sample in samples] == ["1", "5"]
    for sample in samples:
        assert (sample.meta["width"], sample.meta["height"]) == (48, 32)
        assert Image.open(io.BytesIO(sample.image)).size == (24, 16)


def test_lists_and_fraction(raw, tmp_path, run_prepare) -> None:
    lists = [f"--split={name}={raw / name}.txt" for name in ("test", "valid")]
    run_prepare(*_arguments(raw, *lists), "--out", tmp_path / "lists")
    ids = {
        name: open_split(tmp_path / "lists", name).image_ids.tolist() for name in available_splits(tmp_path / "lists")
    }
    assert ids == {"train": [5], "valid": [2], "test": [1]}
    (raw / "train.txt").write_text("5\n")
    run_prepare(*_arguments(raw, f"--split=train={raw}/train.txt", lists[0]), "--out", tmp_path / "only")
    assert [len(open_split(tmp_path / "only", name)) for name in ("train", "test")] == [1, 1]
    assert available_splits(tmp_path / "only") == ["train", "test"]
    run_prepare(*_arguments(raw, lists[0], "--valid-fraction", 0.5), "--out", tmp_path / "half")
    half = {
        name: open_split(tmp_path / "half", name).image_ids.tolist() for name in available_splits(tmp_path / "half")
    }
    assert half["test"] == [1]
    assert sorted(half["train"] + half["valid"]) == [2, 5]


def test_fraction_depends_on_ids_alone() -> None:
    ids = list(range(1, 20_001))
    splits = choose_splits(ids, {}, 0.1, Path("regions.json"))
    # Five standard deviations of a binomial count.
    assert abs(len(splits["valid"]) - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5
    assert sorted(splits["train"] + splits["valid"]) == ids
    some = choose_splits(ids[::-7], {}, 0.1, Path("regions.json"))
    assert set(some["valid"]) == set(splits["valid"]) & set(ids[::-7])
    assert set(choose_splits(ids, {}, 0.2, Path("regions.json"))["valid"]) > set(splits["valid"])


def test_missing_image_and_bad_phrases_are_skipped(raw, tmp_path, run_prepare) -> None:
    (raw / "VG_100K" / "1.jpg").unlink()
    text = (raw / "regions.json").read_bytes().replace(b"two dogs", b"zw\xf6lf dogs").replace(b"a red car", b" ")
    (raw / "regions.json").write_bytes(text)
    run_prepare(*_arguments(raw, "--max-bad-fraction", 0.8), "--out", tmp_path / "out")
    (sample,) = open_split(tmp_path / "out", "train")
    assert sample.captions == ("a dog",)
    assert [region["phrase"] for region in sample.meta["regions"]] == ["a dog", "a dog"]
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    reasons = {(line["key"], line["what"]): line["reason"] for line in skipped}
    assert reasons == {
        ("1", "sample"): "there is no such file among --images",
        ("5", "caption 1"): "not UTF-8",
        ("2", "caption 0"): "empty",
        ("2", "sample"): "none of its captions can be used: empty",
    }


def test_again_does_nothing_and_workers_change_nothing(raw, tmp_path, run_prepare, capsys, folder_bytes) -> None:
    arguments = _arguments(raw, f"--split=valid={raw}/valid.txt")
    run_prepare(*arguments, "--out", tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    run_prepare(*arguments, "--out", tmp_path / "out")
    assert "nothing to do" in capsys.readouterr().out
    run_prepare(*arguments, "--workers", 2, "--out", tmp_path / "two")
    assert folder_bytes(tmp_path / "two") == before == folder_bytes(tmp_path / "out")


@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
@pytest.mark.parametrize("style", [{}, {"indent": 1}, {"ensure_ascii": False, "separators": (",", ":")}])
def test_elements_are_found_whatever_the_chunk(tmp_path, monkeypatch, chunk, style) -> None:
    monkeypatch.setattr(emkum.prepare.visual_genome, "_CHUNK_BYTES", chunk)
    elements = [_element(i) for i in PHRASES] + [{"id": 9, "regions": [], "text": '][}{",\\ é 日本 😀'}]
    path = tmp_path / "regions.json"
    path.write_text("\ufeff " + json.dumps(elements, **style) + "\n", encoding="utf-8")
    found = list(list_elements(path))
    data = path.read_bytes()
    assert [json.loads(data[offset : offset + length]) for offset, length, _ in found] == elements
    assert [element["id"] for *_, element in found] == [element["id"] for element in elements]


def test_damaged_element_is_given_up_before_the_whole_file_is_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(emkum.prepare.visual_genome, "_CHUNK_BYTES", 100)
    monkeypatch.setattr(emkum.prepare.visual_genome, "_LONGEST_ELEMENT", 1000)
    path = tmp_path / "regions.json"
    path.write_text('[{"id": 1, "regions": []}, {"id": 2 "regions"' + 1_000_000 * " ")
    reads = []

    class Spy(io.TextIOWrapper):
        def read(self, size: int = -1) -> str:
            reads.append(size)
            return super().read(size)

    monkeypatch.setattr("builtins.open", lambda name, encoding, newline: Spy(io.FileIO(name), encoding))
    with pytest.raises(UserError, match="no JSON list of objects at byte 27"):
        list(list_elements(path))
    assert len(reads) < 20


def _spoil(raw: Path, what: str) -> None:
    regions, data = raw / "regions.json", raw / "image_data.json"
    elements, entries = json.loads(regions.read_text()), json.loads(data.read_text())
    if what == "no file":
        return regions.unlink()
    if what == "cut off":
        regions.write_text(regions.read_text()[:-30])
        return None
    if what == "an object":
        elements = {"regions": []}
    elif what == "numbers":
        elements = [1, 2]
    elif what == "empty":
        elements = []
    elif what == "no id":
        del elements[1]["id"]
    elif what == "no phrase":
        del elements[1]["regions"][2]["phrase"]
    elif what == "phrase is a number":
        elements[1]["regions"][2]["phrase"] = 5
    elif what == "no regions":
        del elements[1]["regions"]
    elif what == "twice":
        elements.append(elements[0])
    elif what == "no image data":
        del entries[0]
    elif what == "no width":
        del entries[2]["width"]
    elif what == "unknown id":
        (raw / "valid.txt").write_text("2\n99\n")
    elif what == "no number":
        (raw / "valid.txt").write_text("two\n")
    elif what == "in two lists":
        (raw / "valid.txt").write_text("2\n1\n")
    elif what == "nothing in a split":
        (raw / "valid.txt").write_text("7\n")
    regions.write_text(json.dumps(elements))
    data.write_text(json.dumps(entries))
    return None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no file", "cannot read .*regions.json: No such file"),
        ("cut off", r"regions.json is no JSON list of objects at byte \d+"),
        ("an object", "regions.json is no JSON list"),
        ("numbers", "regions.json is no JSON list of objects at byte 1"),
        ("empty", "regions.json names no images"),
        ("no id", "regions.json, element 1: want a whole number named id"),
        ("no phrase", "regions.json, element 1: want a list named regions of phrase, x, y, width, height"),
        ("phrase is a number", "regions.json, element 1: want a list named regions of phrase"),
        ("no regions", "regions.json, element 1: want a list named regions of phrase"),
        ("twice", "regions.json, element 4: image 1 is listed twice"),
        ("no image data", "image_data.json: no entry, unlike in .*regions.json, for 1 of its images, the first 1"),
        ("no width", "image_data.json, element 2: want a whole number named width"),
        ("unknown id", "valid.txt: not in .*regions.json for 1 of its images, the first 99"),
        ("no number", "valid.txt: want image ids, one a line, not two"),
        ("in two lists", "image 1 is listed twice: in .*valid.txt and in .*test.txt"),
        ("nothing in a split", "split valid has no image with regions in .*regions.json"),
    ],
)
def test_mistakes_in_files_leave_nothing(raw, tmp_path, run_prepare, what, message) -> None:
    _spoil(raw, what)
    lists = [f"--split={name}={raw / name}.txt" for name in ("valid", "test")]
    with pytest.raises(UserError, match=message) as caught:
        run_prepare(*_arguments(raw, *lists, "--image-data", raw / "image_data.json"), "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--valid-fraction", 1], "--valid-fraction 1: want 0 to less than 1"),
        (["--valid-fraction", 0.5, "--split=val=RAW/valid.txt"], "--valid-fraction and --split valid=... exclude"),
        (["--valid-fraction", 0.5, "--split=train=RAW/valid.txt"], "--valid-fraction and --split train=... exclude"),
        (["--split=vaild=RAW/valid.txt"], "--split vaild=.*: want NAME=FILE with NAME one of train, valid"),
    ],
)
def test_mistakes_in_arguments(raw, tmp_path, run_prepare, arguments, message) -> None:
    arguments = [str(argument).replace("RAW", str(raw)) for argument in arguments]
    with pytest.raises(UserError, match=message):
        run_prepare(*_arguments(raw, *arguments), "--out", tmp_path / "out")


def test_image_id_may_be_given_in_place_of_id(raw) -> None:
    elements = [{"image_id": i, **_element(i), "id": 0} for i in PHRASES]
    (raw / "regions.json").write_text(json.dumps(elements))
    assert {i: place[2] for i, place in find_regions(raw / "regions.json").items()} == {1: 2, 5: 3, 7: 0, 2: 1}
