"""COCO from COCO's own JSON, from Karpathy's, and with lists of images."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emkum.data.shards import available_splits, open_split
from emkum.errors import UserError
from emkum.prepare.coco import choose_splits, file_names, parse_captions, read_ids

# Image id -> captions in the order of their annotations' ids; 30 has none.
CAPTIONS = {9: ["A dog.", "Two dogs."], 4: ["A cat."], 20: ["A cow.", "One cow."], 11: ["A hen."], 30: []}
TRAIN_IDS, VAL_IDS = (9, 4), (20, 11, 30)


def _jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def _name(image_id: int) -> str:
    return f"COCO_{'train2014' if image_id in TRAIN_IDS else 'val2014'}_{image_id:012d}.jpg"


def _coco_json(ids: tuple[int, ...], name: Callable[[int], str] = _name) -> dict:
    images = [{"license": 3, "file_name": name(i), "height": 16, "width": 24, "id": i} for i in ids]
    captions = [(i, place, text) for i in ids for place, text in enumerate(CAPTIONS[i])]
    # In the file the annotations come in another order than that of their ids.
    annotations = [{"image_id": i, "id": 100 * i + place, "caption": f"{text}\n"} for i, place, text in captions]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations[::-1]}


def _karpathy_json() -> dict:
    splits = {9: "train", 4: "train", 20: "restval", 11: "val", 30: "test"}
    texts = CAPTIONS | {30: ["A mule."]}
    images = [
        {
            "filepath": _name(i).split("_")[1],
            "filename": _name(i),
            "imgid": number,
            "cocoid": i,
            "split": split,
            "sentids": [],
            "sentences": [{"tokens": text[:-1].lower().split(), "raw": text, "imgid": number} for text in texts[i]],
        }
        for number, (i, split) in enumerate(splits.items())
    ]
    return {"images": images, "dataset": "coco"}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder of train2014, a zip of val2014, COCO's captions of both, Karpathy's JSON, lists of images."""
    folder = tmp_path / "raw"
    (folder / "train2014").mkdir(parents=True)
    for i in TRAIN_IDS:
        (folder / "train2014" / _name(i)).write_bytes(_jpeg(i))
    with zipfile.ZipFile(folder / "val2014.zip", "w") as archive:
        for i in VAL_IDS:
            archive.writestr(f"val2014/{_name(i)}", _jpeg(i))
    (folder / "captions_train2014.json").write_text(json.dumps(_coco_json(TRAIN_IDS)))
    (folder / "captions_val2014.json").write_text(json.dumps(_coco_json(VAL_IDS)))
    (folder / "dataset_coco.json").write_text(json.dumps(_karpathy_json()))
    (folder / "val.txt").write_text(f"val2014/{_name(11)} 11\n\n")
    (folder / "test.txt").write_text(f"val2014/{_name(20)} 20\n")
    return folder


def _images(raw: Path) -> list[object]:
    return ["coco", "--workers", 1, "--images", raw / "train2014", raw / "val2014.zip"]


def _own(raw: Path) -> list[object]:
    captions = (f"{name}={raw}/captions_{part}2014.json" for name, part in (("train", "train"), ("val", "val")))
    return [*_images(raw), *(f"--captions={argument}" for argument in captions)]


def _content(out: Path) -> dict[str, list[tuple]]:
    return {name: [(s.image_id, s.captions, s.image) for s in open_split(out, name)] for name in available_splits(out)}


def _expected(*ids: int) -> list[tuple]:
    return [(i, tuple(CAPTIONS[i]), _jpeg(i)) for i in ids]


def test_own_files(raw, tmp_path, run_prepare, capsys) -> None:
    out = tmp_path / "out"
    run_prepare(*_own(raw), "--out", out, "--max-bad-fraction", 0)
    assert _content(out) == {"train": _expected(9, 4), "valid": _expected(20, 11)}
    sample = open_split(out, "train")[0]
    assert (sample.key, sample.meta) == ("COCO_train2014_000000000009", {"file_name": _name(9)})
    splits = json.loads((out / "prepare.json").read_text())["splits"]
    assert [splits[name]["images_without_captions"] for name in ("train", "valid")] == [0, 1]
    assert [splits[name]["captions"] for name in ("train", "valid")] == [3, 3]
    assert "valid: 2 images, 3 captions" in (printed := capsys.readouterr().out)
    assert "1 images without captions, 0 skipped" in printed
    assert (out / "skipped.jsonl").read_text() == ""


def test_one_split_needs_no_other(raw, tmp_path, run_prepare) -> None:
    captions = f"valid={raw}/captions_val2014.json"
    run_prepare("coco", "--images", raw / "val2014.zip", "--captions", captions, "--out", tmp_path / "out")
    assert _content(tmp_path / "out") == {"valid": _expected(20, 11)}


@pytest.mark.parametrize("year", [2014, 2017])
def test_karpathy(raw, tmp_path, run_prepare, year) -> None:
    if year == 2017:
        (raw / "train2017").mkdir()
        for i in CAPTIONS:
            (raw / "train2017" / f"{i:012d}.jpg").write_bytes(_jpeg(i))
    images = ["coco", "--workers", 1, "--images", raw / "train2017"] if year == 2017 else _images(raw)
    arguments = [*images, "--karpathy", raw / "dataset_coco.json", "--out"]
    run_prepare(*arguments, tmp_path / "all")
    test = [(30, ("A mule.",), _jpeg(30))]
    assert _content(tmp_path / "all") == {"train": _expected(9, 4, 20), "valid": _expected(11), "test": test}
    assert open_split(tmp_path / "all", "test")[0].meta == {"file_name": _name(30)}
    run_prepare(*arguments, tmp_path / "less", "--no-restval")
    assert _content(tmp_path / "less") == {"train": _expected(9, 4), "valid": _expected(11), "test": test}
    with pytest.raises(UserError, match="option restval: True there, False here"):
        run_prepare(*arguments, tmp_path / "all", "--no-restval")


def test_lists_select_from_files_without_a_name(raw, tmp_path, run_prepare) -> None:
    lists = [f"--split={name}={raw}/{name}.txt" for name in ("test", "val")]
    captions = ["--captions", raw / "captions_val2014.json"]
    run_prepare(*_images(raw), *captions, *lists, "--out", tmp_path / "out")
    assert _content(tmp_path / "out") == {"valid": _expected(11), "test": _expected(20)}


def test_lists_take_their_images_from_files_with_a_name(raw, tmp_path, run_prepare) -> None:
    captions = [f"--captions=train={raw}/captions_{part}2014.json" for part in ("train", "val")]
    lists = [f"--split={name}={raw}/{name}.txt" for name in ("val", "test")]
    run_prepare(*_images(raw), *captions, *lists, "--out", tmp_path / "out")
    assert _content(tmp_path / "out") == {"train": _expected(9, 4), "valid": _expected(11), "test": _expected(20)}
    record = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert record["splits"]["train"]["images_without_captions"] == 1
    assert record["options"]["captions"] == ["train", "train"]


def test_missing_and_broken_images_are_skipped(raw, tmp_path, run_prepare) -> None:
    (raw / "train2014" / _name(9)).write_bytes(_jpeg(9)[:200])
    with zipfile.ZipFile(raw / "val2014.zip", "w") as archive:
        archive.writestr(f"val2014/{_name(20)}", _jpeg(20))
    with pytest.raises(UserError, match="1 of 2 samples are bad, more than --max-bad-fraction 0.1 allows"):
        run_prepare(*_own(raw), "--out", tmp_path / "out")
    run_prepare(*_own(raw), "--out", tmp_path / "out", "--max-bad-fraction", 0.5)
    assert _content(tmp_path / "out") == {"train": _expected(4), "valid": _expected(20)}
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in skipped] == ["COCO_train2014_000000000009", "COCO_val2014_000000000011"]
    assert skipped[1]["reason"] == "there is no such file among --images"


def test_captions_that_are_not_utf8_are_skipped(raw, tmp_path, run_prepare) -> None:
    path = raw / "captions_train2014.json"
    path.write_bytes(path.read_bytes().replace(b"Two dogs", b"Zw\xf6lf dogs"))
    run_prepare(*_own(raw), "--out", tmp_path / "out")
    assert open_split(tmp_path / "out", "train")[0].captions == ("A dog.",)
    (line,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["what"] == "caption 1"


def _spoil(raw: Path, what: str) -> None:
    path = raw / "captions_val2014.json"
    content = json.loads(path.read_text())
    if what == "no file":
        return path.unlink()
    if what == "no JSON":
        path.write_text(path.read_text()[:-20])
        return None
    if what == "nested without end":
        path.write_text("[" * 100_000)
        return None
    if what == "image twice in a file":
        content["images"].append(content["images"][0])
    elif what == "image in two files":
        content["images"][0]["id"] = 9
        content["annotations"] = []
    elif what == "unknown image":
        content["annotations"][1]["image_id"] = 5
    elif what == "no annotations":
        del content["annotations"]
    elif what == "boxes":
        del content["annotations"][0]["caption"]
    elif what == "id is text":
        content["images"][1]["id"] = "11"
    elif what == "no captions":
        content["annotations"] = []
    elif what == "a list":
        content = [content]
    path.write_text(json.dumps(content))
    return None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no file", "cannot read .*captions_val2014.json: No such file"),
        ("no JSON", r"captions_val2014.json is no JSON: .*line 1 column"),
        ("nested without end", "captions_val2014.json is no JSON"),
        ("image twice in a file", r"captions_val2014.json, images\[3\]: image 20 is listed twice"),
        ("image in two files", "image 9 is listed twice: in .*train2014.json and in .*val2014.json"),
        ("unknown image", r"val2014.json, annotations\[1\]: image 5 is not among the file's images"),
        ("no annotations", "captions_val2014.json: want a list named annotations"),
        ("boxes", r"captions_val2014.json, annotations\[0\]: want a text named caption"),
        ("id is text", r"captions_val2014.json, images\[1\]: want a whole number named id"),
        ("no captions", "split valid has no image with captions in .*val2014.json"),
        ("a list", "captions_val2014.json: want a list named images"),
    ],
)
def test_mistakes_in_files_leave_nothing(raw, tmp_path, run_prepare, what, message) -> None:
    _spoil(raw, what)
    with pytest.raises(UserError, match=message) as caught:
        run_prepare(*_own(raw), "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--captions=trian=RAW/captions_val2014.json"],
            "--captions trian=.*: want FILE or NAME=FILE with NAME",
        ),
        (["--captions=RAW/captions_val2014.json"], "want --captions NAME=.*val2014.json, or --split NAME=FILE beside"),
        (["--captions=val=RAW/captions_val2014.json", "--split=valid=RAW/val.txt"], "both --captions valid=... and"),
        (["--captions=RAW/captions_val2014.json", "--split=valdi=RAW/val.txt"], "--split valdi=.*: want NAME=FILE"),
        (["--captions=RAW/captions_train2014.json", "--split=val=RAW/val.txt"], "val.txt: not in .*train2014.json"),
        (
            ["--captions=RAW/captions_val2014.json", "--split=val=RAW/val.txt", "--split=test=RAW/both.txt"],
            "image 11 is listed twice: in .*val.txt and in .*both.txt",
        ),
        (["--captions=RAW/captions_val2014.json", "--split=val=RAW/words.txt"], "words.txt: .* number, as .*, not dog"),
        (["--captions=val=RAW/captions_val2014.json", "--no-restval"], "--no-restval belongs to --karpathy"),
        (["--karpathy=RAW/dataset_coco.json", "--split=val=RAW/val.txt"], "--split belongs to --captions"),
        (["--karpathy=RAW/captions_val2014.json"], r"val2014.json, images\[0\]: want a text named split"),
        (["--karpathy=RAW/flickr.json"], "flickr.json is of flickr30k, not of coco"),
        (["--karpathy=RAW/minival.json"], "split 'minival' is none of train, restval, val, test"),
        (["--karpathy=RAW/twice.json"], "image COCO_train2014_000000000009.jpg is listed twice"),
        (["--captions=val=RAW/captions_val2014.json", "--images=RAW/copy"], "000000000020.jpg is both in .*zip and in"),
        (["--captions=val=RAW/captions_val2014.json", "--images=RAW/none"], "no folder, zip or tar .*none"),
    ],
)
def test_mistakes_in_arguments(raw, tmp_path, run_prepare, arguments, message) -> None:
    (raw / "both.txt").write_text(f"{_name(20)}\n{_name(11)}\n")
    (raw / "words.txt").write_text("dog.jpg\n")
    content = _karpathy_json()
    (raw / "flickr.json").write_text(json.dumps(content | {"dataset": "flickr30k"}))
    (raw / "twice.json").write_text(json.dumps(content | {"images": content["images"][:1] * 2}))
    content["images"][3]["split"] = "minival"
    (raw / "minival.json").write_text(json.dumps(content))
    (raw / "copy").mkdir()
    (raw / "copy" / _name(20)).write_bytes(_jpeg(20))
    with pytest.raises(UserError, match=message) as caught:
        run_prepare(*_images(raw), *(text.replace("RAW", str(raw)) for text in arguments), "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_one_form_of_captions_is_required(raw, tmp_path, run_prepare, capsys) -> None:
    for arguments in ([], [*_own(raw)[6:], "--karpathy", raw / "dataset_coco.json"]):
        with pytest.raises(SystemExit):
            run_prepare(*_images(raw), *arguments, "--out", tmp_path / "out")
        assert "--captions" in capsys.readouterr().err


def test_again_does_nothing(raw, tmp_path, run_prepare, capsys, folder_bytes) -> None:
    out = tmp_path / "out"
    run_prepare(*_own(raw), "--out", out)
    before = folder_bytes(out)
    capsys.readouterr()
    run_prepare(*_own(raw), "--out", out)
    assert "nothing to do" in capsys.readouterr().out
    swapped = [str(argument).replace("=train=", "=test=", 1) for argument in _own(raw)]
    with pytest.raises(UserError, match=r"option captions: \['train', 'valid'\] there, \['test', 'valid'\] here"):
        run_prepare(*swapped, "--out", out)
    assert folder_bytes(out) == before


def test_file_name_may_hold_an_equals_sign(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("year=2014.json").write_text("{}")
    assert parse_captions(["year=2014.json", "dev=year=2014.json"]) == [
        (None, Path("year=2014.json")),
        ("valid", Path("year=2014.json")),
    ]


def test_list_order_decides(raw, tmp_path) -> None:
    (raw / "both.txt").write_text(f"{_name(11)}\n{_name(20)}\n")
    captions = [(None, raw / "captions_val2014.json")]
    splits = choose_splits(captions, {"test": raw / "both.txt"})
    assert [photo.image_id for photo in splits["test"]] == [11, 20]


def test_real_coco_mini(shared_data: Path, tmp_path: Path, run_prepare, folder_bytes) -> None:
    source = shared_data / "coco_mini"
    annotations = source / "annotations"
    captions = [f"--captions={name}={annotations}/captions_{name}2017.json" for name in ("train", "val")]
    arguments = ["coco", "--workers", 1, "--images", source / "images.zip", *captions]
    for workers in (1, 2):
        run_prepare(*arguments, "--workers", workers, "--out", tmp_path / f"{workers}")
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "2")
    splits = {name: open_split(tmp_path / "1", name) for name in ("train", "valid")}
    assert {name: len(split) for name, split in splits.items()} == {"train": 80, "valid": 79}
    with zipfile.ZipFile(source / "images.zip") as archive:
        assert len(archive.namelist()) == 239
        for name, split in splits.items():
            content = json.loads((annotations / f"captions_{name.removesuffix('id')}2017.json").read_text())
            texts = sorted((a["image_id"], a["id"], a["caption"].strip()) for a in content["annotations"])
            assert [s.image_id for s in split] == [entry["id"] for entry in content["images"]]
            for sample in split:
                assert sample.captions == tuple(text for i, _, text in texts if i == sample.image_id)
                assert sample.image == archive.read(f"{name.removesuffix('id')}2017/{sample.image_id:012d}.jpg")
    run_prepare(*arguments, "--limit", 7, "--image-size", 64, "--quality", 80, "--out", tmp_path / "small")
    small = open_split(tmp_path / "small", "train")
    assert [sample.key for sample in small] == [splits["train"][number].key for number in range(7)]
    assert {min(Image.open(io.BytesIO(sample.image)).size) for sample in small} == {64}


def test_real_karpathy_lists(shared_data: Path, tmp_path: Path) -> None:
    ids = {name: read_ids(shared_data / "coco_karpathy" / f"karpathy_{name}_images.txt") for name in ("val", "test")}
    for name, chosen in ids.items():
        lines = (shared_data / "coco_karpathy" / f"karpathy_{name}_images.txt").read_text().splitlines()
        assert chosen == [int(line.split()[1]) for line in lines]
        assert len(set(chosen)) == 5000
        assert all(line.startswith(f"val2014/{file_names(i)[2]} ") for i, line in zip(chosen, lines, strict=True))
    assert not set(ids["val"]) & set(ids["test"])
    mini = shared_data / "coco_mini" / "annotations" / "captions_val2017.json"
    with pytest.raises(UserError, match=r"karpathy_val_images.txt: not in .*captions_val2017.json for \d{4} of its"):
        choose_splits([(None, mini)], {"valid": shared_data / "coco_karpathy" / "karpathy_val_images.txt"})
