"""A user's own images: class folders, and tables of captions of every kind."""

import csv
import io
import json
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emkum.data.shards import available_splits, open_split
from emkum.data.sounds import to_wav
from emkum.data.tokenizers import load_tokenizer
from emkum.errors import UserError
from emkum.prepare.caption_tables import CaptionTable
from emkum.prepare.image_folder import match_names, round_the_classes, with_valid

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def _jpeg(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _archive(path: Path, files: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def _run(run_prepare, images: Path, out: Path, *more: object) -> None:
    run_prepare("image-folder", "--images", images, "--out", out, "--workers", 1, *more)


def _samples(out: Path, split: str) -> list:
    return list(open_split(out, split, require_captions=False))


# Twenty of each of three classes; "Zebra" comes first, as capitals do.
CLASSES = ["Zebra", "bird", "cat"]
BY_CLASS = {f"{name}/img {n:02d}.jpg": _jpeg(100 * c + n) for c, name in enumerate(CLASSES) for n in range(20)}


@pytest.mark.parametrize("form", ["folder", "deeper folder", "a.zip", "a.tar"])
def test_class_folders_in_all_forms_give_the_same_samples(tmp_path, run_prepare, form) -> None:
    if form.endswith("folder"):
        images = _write(tmp_path / "raw", BY_CLASS)
        (images / "cat" / "Thumbs.db").write_bytes(b"no image")
        images = images.parent if form == "deeper folder" else images
    else:
        images = _archive(tmp_path / form, {f"pets/2024/{name}": content for name, content in BY_CLASS.items()})
    out = tmp_path.with_name(tmp_path.name + "_out")
    _run(run_prepare, images, out)
    assert available_splits(out) == ["train", "valid"]
    train, valid = (_samples(out, split) for split in ("train", "valid"))
    # 5 % of 60, by the lowest BLAKE2b hashes of names such as "cat/img 01.jpg".
    assert (len(train), len(valid)) == (57, 3)
    assert sorted(sample.key for sample in valid) == ["Zebra_img 18", "bird_img 13", "cat_img 01"]
    assert {sample.key for sample in train + valid} == {name[:-4].replace("/", "_") for name in BY_CLASS}
    for sample in train + valid:
        name = sample.key.split("_")[0]
        assert sample.image == BY_CLASS[sample.key.replace("_", "/") + ".jpg"]
        assert sample.meta == {"label": CLASSES.index(name), "class_name": name}
    assert json.loads((out / "classes.json").read_text()) == {"class_name": CLASSES}
    assert not (out / "tokenizer.model").exists()


def test_classes_take_turns() -> None:
    labels = np.array([2, 0, 0, 1, 0, 2])
    order = round_the_classes(labels)
    assert order.tolist() == [1, 3, 0, 2, 5, 4]
    assert round_the_classes(np.array([], dtype=int)).tolist() == []


def test_folders_of_splits(tmp_path, run_prepare) -> None:
    images = _write(
        tmp_path / "raw",
        {f"{split}/{name}": content for split in ("train", "val", "test") for name, content in BY_CLASS.items()},
    )
    _run(run_prepare, images, tmp_path / "out")
    assert available_splits(tmp_path / "out") == ["train", "valid", "test"]
    for split in ("train", "valid", "test"):
        samples = _samples(tmp_path / "out", split)
        assert len(samples) == 60
        # The same name in each split.
        assert samples[0].key == "Zebra_img 00"
    with pytest.raises(UserError, match="--valid-fraction 0.1: there are the splits train, valid, test already"):
        _run(run_prepare, images, tmp_path / "other", "--valid-fraction", 0.1)


def test_train_and_test_folders_stay_as_they_are(tmp_path, run_prepare) -> None:
    files = {f"{split}/{name}": content for split in ("train", "test") for name, content in BY_CLASS.items()}
    _run(run_prepare, _write(tmp_path / "raw", files), tmp_path / "out")
    assert available_splits(tmp_path / "out") == ["train", "test"]
    _run(run_prepare, tmp_path / "raw", tmp_path / "cut", "--valid-fraction", 0.25)
    sizes = {split: len(_samples(tmp_path / "cut", split)) for split in available_splits(tmp_path / "cut")}
    assert sizes == {"train": 45, "valid": 15, "test": 60}


def test_lists_of_splits(tmp_path, run_prepare) -> None:
    images = _write(tmp_path / "raw", BY_CLASS)
    (tmp_path / "train.txt").write_text("cat/img 00.jpg\nbird/img 03.jpg\ncat/gone.jpg\nbird/img 01.jpg\n")
    (tmp_path / "valid.txt").write_text("Zebra/img 07.jpg\n")
    lists = [f"--split={split}={tmp_path / split}.txt" for split in ("train", "valid")]
    _run(run_prepare, images, tmp_path / "out", *lists, "--max-bad-fraction", 0.5)
    assert [sample.key for sample in _samples(tmp_path / "out", "train")] == [
        "bird_img 03",
        "cat_img 00",
        "bird_img 01",
    ]
    assert [sample.meta["label"] for sample in _samples(tmp_path / "out", "valid")] == [0]
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["key"], line["reason"]) for line in skipped] == [("cat/gone.jpg", "there is no such file in raw")]
    (tmp_path / "valid.txt").write_text("bird/img 03.jpg\n")
    with pytest.raises(UserError, match="image bird/img 03.jpg is listed twice: in .*train.txt and in .*valid.txt"):
        _run(run_prepare, images, tmp_path / "other", *lists)


def test_valid_is_chosen_by_name_alone() -> None:
    names = [f"{number}.jpg" for number in range(200)]
    first, fraction = with_valid({"train": names}, None)
    assert fraction == 0.05 and len(first["valid"]) == 10
    assert sorted(first["train"] + first["valid"]) == sorted(names)
    again, _ = with_valid({"train": names[::-1]}, None)
    assert set(again["valid"]) == set(first["valid"])
    more, _ = with_valid({"train": names}, 0.1)
    assert set(more["valid"]) > set(first["valid"])
    assert with_valid({"train": names}, 0.0) == ({"train": names}, 0.0)
    # As long as there are two images, there are both splits.
    two, _ = with_valid({"train": names[:2]}, None)
    assert [len(two[split]) for split in ("train", "valid")] == [1, 1]
    assert list(with_valid({"train": names[:1]}, None)[0]) == ["train"]
    with pytest.raises(UserError, match="--valid-fraction 1.0: want 0 or more and less than 1"):
        with_valid({"train": names}, 1.0)


def test_number_of_processes_changes_nothing_and_a_second_run_does_nothing(
    tmp_path, run_prepare, capsys, folder_bytes
) -> None:
    images = _write(tmp_path / "raw", BY_CLASS)
    for workers in (1, 2):
        run_prepare("image-folder", "--images", images, "--out", tmp_path / str(workers), "--workers", workers)
    before = folder_bytes(tmp_path / "1")
    assert before == folder_bytes(tmp_path / "2")
    capsys.readouterr()
    _run(run_prepare, images, tmp_path / "1")
    assert "nothing to do" in capsys.readouterr().out
    assert folder_bytes(tmp_path / "1") == before


# Images with captions ------------------------------------------------------------------------------------------------

PHOTOS = {f"{name}.jpg": _jpeg(number) for number, name in enumerate(("sea", "town", "wood", "hill"))}
ROWS = [
    ("town.jpg", "A town, at night."),
    ("sea.jpg", "The sea."),
    ("town.jpg", 'They call it "old".'),
    ("hill.jpg", "Ein grüner Hügel"),
    ("wood.jpg", "Trees and more trees."),
]
CAPTIONS = {
    "town": ("A town, at night.", 'They call it "old".'),
    "sea": ("The sea.",),
    "hill": ("Ein grüner Hügel",),
    "wood": ("Trees and more trees.",),
}


def _table(path: Path, rows: list[tuple[str, str]] = ROWS, names: tuple[str, str] = ("image", "caption")) -> Path:
    """A table of the kind that its suffix says, with a column more."""
    header = ("number", *names)
    numbered = [(number, *row) for number, row in enumerate(rows)]
    if path.suffix == ".parquet":
        columns = dict(zip(header, (list(column) for column in zip(*numbered, strict=True)), strict=True))
        parquet.write_table(pyarrow.table(columns), path)
    elif path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False) for row in numbered]
        path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([header, *numbered])
    return path


@pytest.mark.parametrize("table", ["t.csv", "t.tsv", "t.txt", "t.jsonl", "t.parquet"])
def test_all_kinds_of_tables_give_the_same_samples(tmp_path, run_prepare, table) -> None:
    images = _write(tmp_path / "photos", {f"2024/{name}": content for name, content in PHOTOS.items()})
    captions = _table(tmp_path / table, names=("file_name", "Text"))
    _run(run_prepare, images, tmp_path / "out", "--captions", captions, "--vocab-size", 60)
    train, valid = (_samples(tmp_path / "out", split) for split in ("train", "valid"))
    assert (len(train), len(valid)) == (3, 1)
    assert [sample.key for sample in train] == [key for key in CAPTIONS if key != valid[0].key]
    for sample in train + valid:
        assert sample.captions == CAPTIONS[sample.key]
        assert sample.image == PHOTOS[f"{sample.key}.jpg"]
        assert sample.meta == {"file_name": f"{sample.key}.jpg"}
    assert load_tokenizer(tmp_path / "out").vocab_size <= 60


def test_columns_are_named_or_guessed(tmp_path) -> None:
    rows = [("a.jpg", "one")]
    for names in (("filepath", "title"), ("file_name", "text"), ("Image", "Caption")):
        table = CaptionTable(_table(tmp_path / "t.csv", rows, names))
        assert (table.names, table.captions(0)) == (["a.jpg"], ["one"])
    table = CaptionTable(_table(tmp_path / "t.csv", rows, ("photo", "words")), "photo", "words")
    assert (table.names, table.captions(0)) == (["a.jpg"], ["one"])
    # Of two usual names, the first of the list counts.
    (tmp_path / "t.csv").write_text("text,caption,image\nno,yes,a.jpg\n")
    assert CaptionTable(tmp_path / "t.csv").captions(0) == ["yes"]
    with pytest.raises(UserError, match="--image-column file: .*t.csv has the columns text, caption, image"):
        CaptionTable(tmp_path / "t.csv", "file")
    (tmp_path / "t.csv").write_text("a;b\n1;2\n")
    with pytest.raises(UserError, match="t.csv has the columns a;b, none of image, .*: name one with --image-column"):
        CaptionTable(tmp_path / "t.csv")


def test_lists_of_captions_and_what_spreadsheets_write(tmp_path) -> None:
    (tmp_path / "t.jsonl").write_text(
        '{"image": "a.jpg", "captions": ["one", "two"]}\n{"image": "b.jpg", "captions": []}\n'
        '{"image": "./a.jpg", "captions": null}\n{"image": "d\\\\c.jpg", "captions": "\\ud800"}\n'
    )
    table = CaptionTable(tmp_path / "t.jsonl")
    assert table.names == ["a.jpg", "b.jpg", "d/c.jpg"]
    assert [table.captions(number) for number in range(3)] == [["one", "two", ""], [""], ["\ud800"]]
    schema = pyarrow.schema([("image", pyarrow.string()), ("caption", pyarrow.list_(pyarrow.string()))])
    rows = [{"image": "a.jpg", "caption": ["one", "two"]}, {"image": "b.jpg", "caption": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / "t.parquet")
    assert [CaptionTable(tmp_path / "t.parquet").captions(number) for number in range(2)] == [["one", "two"], [""]]
    # Quotation marks around a field are a spreadsheet's; others are the caption's. Line breaks can be in a CSV's field.
    (tmp_path / "t.tsv").write_text('image\tcaption\na.jpg\t"a ""b"""\na.jpg\t"Stop," she said\na.jpg\tsay "no"\r\n')
    assert CaptionTable(tmp_path / "t.tsv").captions(0) == ['a "b"', '"Stop," she said', 'say "no"']
    (tmp_path / "t.csv").write_bytes(b'image,caption\r\na.jpg,"one\nline"\r\n\r\nb.jpg,two\r\n')
    table = CaptionTable(tmp_path / "t.csv")
    assert [table.captions(number) for number in range(2)] == [["one\nline"], ["two"]]


def test_bad_captions_and_missing_images_are_listed(tmp_path, run_prepare) -> None:
    images = _write(
        tmp_path / "photos", PHOTOS | {"bad.png": _jpeg(9)[:99], "name.png": _jpeg(5), "x.tif": _jpeg(6, "TIFF")}
    )
    rows = [*ROWS, ("gone.jpg", "Nothing"), ("sea.jpg", " "), ("sea.jpg", "y" * 200_000), ("bad.png", "Bad")]
    rows += [("name.png", "A JPEG"), ("x.tif", "A TIFF")]
    captions = _table(tmp_path / "t.csv", rows)
    captions.write_bytes(captions.read_bytes().replace(b"Trees and more", b"Trees \xff and"))
    more = ["--captions", captions, "--valid-fraction", 0, "--vocab-size", 0, "--max-bad-fraction", 0.7]
    _run(run_prepare, images, tmp_path / "out", *more)
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    found = {(line["key"], line["what"]): line["reason"] for line in skipped}
    assert found[("gone.jpg", "sample")] == "there is no such file in photos"
    assert found[("sea", "caption 1")] == "empty"
    assert "200,000 characters" in found[("sea", "caption 2")]
    assert found[("wood", "caption 0")] == "not UTF-8"
    assert "not UTF-8" in found[("wood", "sample")]
    assert "TIFF" in found[("x", "sample")]
    assert ("bad", "sample") in found
    assert len(found) == 7
    assert [sample.key for sample in _samples(tmp_path / "out", "train")] == ["town", "sea", "hill", "name"]
    assert _samples(tmp_path / "out", "train")[1].captions == ("The sea.",)


def test_splits_of_captioned_images(tmp_path, run_prepare, capsys) -> None:
    files = dict(zip(("train/sea.jpg", "train/town.jpg", "val/wood.jpg", "val/hill.jpg"), PHOTOS.values(), strict=True))
    images = _write(tmp_path / "photos", files | {"train/more.jpg": _jpeg(8)})
    captions = _table(tmp_path / "t.csv")
    _run(run_prepare, images, tmp_path / "folders", "--captions", captions, "--vocab-size", 0)
    assert "1 images are not in" in capsys.readouterr().out
    for split, keys in (("train", ["town", "sea"]), ("valid", ["hill", "wood"])):
        assert [sample.key for sample in _samples(tmp_path / "folders", split)] == keys
    (tmp_path / "a.txt").write_text("wood.jpg\nsea.jpg\n")
    (tmp_path / "b.txt").write_text("hill.jpg\n")
    lists = [f"--split=train={tmp_path / 'a.txt'}", f"--split=test={tmp_path / 'b.txt'}"]
    _run(run_prepare, images, tmp_path / "lists", "--captions", captions, "--vocab-size", 0, *lists)
    for split, keys in (("train", ["wood", "sea"]), ("test", ["hill"])):
        assert [sample.key for sample in _samples(tmp_path / "lists", split)] == keys
    (tmp_path / "b.txt").write_text("more.jpg\n")
    with pytest.raises(UserError, match="b.txt: no captions in .*t.csv for 1 of its images, the first more.jpg"):
        _run(run_prepare, images, tmp_path / "other", "--captions", captions, *lists)


def test_names_are_matched_without_guessing() -> None:
    there = ["photos/a/1.jpg", "photos/b/1.jpg", "photos/b/2.jpg"]
    source = Path("photos.zip")
    # By their folders, with or without those that all share; a base name without a folder is found in any.
    wanted = ["a/1.jpg", "photos/b/1.jpg", "2.jpg", "gone.jpg"]
    assert match_names(wanted, there, source) == {wanted[0]: there[0], wanted[1]: there[1], wanted[2]: there[2]}
    # A missing image must not become another one of the same base name.
    assert match_names(["a/1.jpg", "c/2.jpg"], there, source) == {"a/1.jpg": there[0]}
    # A table that was made elsewhere: all names have other folders.
    assert match_names(["/home/me/x/2.jpg", "/home/me/y/3.jpg"], there, source) == {"/home/me/x/2.jpg": there[2]}
    assert match_names(["x/2.jpg", "y/2.jpg"], there, source) == {}
    with pytest.raises(UserError, match="photos.zip holds two files named 1.jpg"):
        match_names(["1.jpg"], there, source)


def _spoil(folder: Path, what: str) -> list[object]:
    """Break one thing; return further arguments."""
    table = _table(folder / "t.csv")
    captioned = ["--captions", table]
    if what == "no images":
        (folder / "photos").rename(folder / "elsewhere")
        return captioned
    if what == "flat without captions":
        return []
    if what == "an image beside the classes":
        _write(folder / "photos", BY_CLASS)
        return []
    if what == "a class beside the splits":
        for name in list(PHOTOS):
            (folder / "photos" / name).unlink()
        _write(folder / "photos", {"train/cat/1.jpg": b"", "test/cat/1.jpg": b"", "extra/cat/1.jpg": b""})
        return []
    if what == "a split twice":
        for name in list(PHOTOS):
            (folder / "photos" / name).unlink()
        _write(folder / "photos", {"valid/cat/1.jpg": b"", "dev/cat/1.jpg": b""})
        return []
    if what == "column without table":
        return ["--image-column", "image"]
    if what == "no table":
        return ["--captions", folder / "none.csv"]
    if what == "wrong extension":
        (folder / "t.xlsx").write_bytes(b"PK")
        return ["--captions", folder / "t.xlsx"]
    if what == "none of the images":
        return ["--captions", _table(folder / "t.csv", [("other.jpg", "Other"), ("x.jpg", "X")])]
    texts = {
        "too few fields": "image,caption\nsea.jpg,The sea\ntown.jpg\n",
        "too many fields": "image,caption\nsea.jpg,The sea, and more\n",
        "unclosed quotation": 'image,caption\nsea.jpg,"The sea\ntown.jpg,Town\n',
        "no header": "sea.jpg,The sea\n",
        "empty table": "image,caption\n",
        "empty name": "image,caption\n,The sea\n",
        "binary": "image,cap\0tion\n",
    }
    if what in texts:
        table.write_text(texts[what])
        return captioned
    lines = {
        "no JSON": '{"image": "sea.jpg", "caption": "The sea"}\n{"image": \n',
        "no object": '["sea.jpg", "The sea"]\n',
        "later line without column": '{"image": "sea.jpg", "caption": "The sea"}\n{"image": "town.jpg"}\n',
        "name is a number": '{"image": 5, "caption": "The sea"}\n',
        "caption is an object": '{"image": "sea.jpg", "caption": {"en": "The sea"}}\n',
    }
    if what in lines:
        (folder / "t.jsonl").write_text(lines[what])
        return ["--captions", folder / "t.jsonl"]
    if what == "no Parquet":
        (folder / "t.parquet").write_text("no Parquet")
    elif what == "images in Parquet":
        parquet.write_table(pyarrow.table({"image": [{"bytes": b"x" * 999}], "text": ["A"]}), folder / "t.parquet")
    return ["--captions", folder / "t.parquet"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no images", "--images: there is no folder, zip or tar"),
        ("flat without captions", "want two or more class folders, .* or --captions FILE; hill.jpg is in none"),
        ("an image beside the classes", "want two or more class folders, .*; hill.jpg is in none"),
        ("a class beside the splits", "beside test, train is extra: name the splits with --split"),
        ("a split twice", "two of the folders dev, valid are the same split"),
        ("column without table", "name columns of the table --captions: give one"),
        ("no table", "cannot read .*none.csv"),
        ("wrong extension", r"t.xlsx is no caption table: want \*.csv, \*.tsv"),
        ("none of the images", "none of the 2 images of .*t.csv is in .*photos, the first other.jpg"),
        ("too few fields", "t.csv, line 3: 1 fields, but the header has 2"),
        ("too many fields", "t.csv, line 2: 3 fields, but the header has 2"),
        ("unclosed quotation", "t.csv, line 2: no CSV"),
        ("no header", "t.csv has the columns sea.jpg, The sea, none of image"),
        ("empty table", "t.csv holds no captions"),
        ("empty name", "t.csv, line 2: the image must be a file's name, not ''"),
        ("binary", "t.csv is not text"),
        ("no JSON", "t.jsonl, line 2: no JSON"),
        ("no object", "t.jsonl, line 1: want one JSON object a line"),
        ("later line without column", "t.jsonl, line 2: no 'caption', which earlier lines have"),
        ("name is a number", "t.jsonl, line 1: the image must be a file's name, not 5"),
        ("caption is an object", "line 1: the caption must be text or a list of texts, not a dict"),
        ("no Parquet", "cannot read .*t.parquet"),
        ("images in Parquet", "row 1: the image must be a file's name, not a dict"),
    ],
)
def test_mistakes_are_named_in_one_line_and_leave_nothing(tmp_path, run_prepare, what, message) -> None:
    folder = tmp_path / "raw"
    _write(folder / "photos", PHOTOS)
    more = _spoil(folder, what)
    with pytest.raises(UserError, match=message) as caught:
        _run(run_prepare, folder / "photos", tmp_path / "out", *more)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_missing_pyarrow_is_named(tmp_path, monkeypatch) -> None:
    table = _table(tmp_path / "t.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"Parquet is read by pyarrow: pip install 'emkum\[parquet\]'"):
        CaptionTable(table)


def test_a_table_costs_little_beside_its_text(tmp_path) -> None:
    """Bytes a caption: the offsets, and the name of each image."""
    path = tmp_path / "t.csv"
    path.write_text("image,caption\n" + "".join(f"{n // 5:06d}.jpg,caption number {n:05d}\n" for n in range(50_000)))
    table = CaptionTable(path)
    assert table.captions(9_999) == [f"caption number {n}" for n in range(49_995, 50_000)]
    text = 20 * 50_000
    assert len(pickle.dumps(table)) - text < 50_000 * 16 + 10_000 * 32


def test_real_photos_with_their_table(shared_data: Path, tmp_path: Path, run_prepare) -> None:
    source = shared_data / "flickr8k"
    more = ["--captions", source / "captions.txt", "--vocab-size", 300, "--limit", 200]
    _run(run_prepare, source / "images.zip", tmp_path / "out", *more)
    assert {split: len(_samples(tmp_path / "out", split)) for split in ("train", "valid")} == {
        "train": 200,
        "valid": 200,
    }
    record = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert record["splits"]["train"]["captions"] == 1000 and record["options"]["valid_fraction"] == 0.05
    with open(source / "captions.txt", newline="") as file:
        rows = list(csv.reader(file))[1:]
    for sample in _samples(tmp_path / "out", "valid")[:20]:
        name = sample.meta["file_name"]
        assert sample.captions == tuple(caption.strip() for image, caption in rows if image == name)


# sounds ---------------------------------------------------------------------------------------------------------------


def _sound(seed: int) -> bytes:
    return to_wav(np.random.default_rng(seed).integers(-9000, 9000, 900).astype(np.int16))


def test_sounds_that_a_table_names(tmp_path, run_prepare) -> None:
    images = _write(tmp_path / "photos", {f"{n}.jpg": _jpeg(n) for n in range(30)})
    clips = {f"clip {n}.wav": _sound(n) for n in range(30)} | {"clip 3.wav": b"no sound", "clip 4.wav": b""}
    del clips["clip 5.wav"]
    sounds = _archive(tmp_path / "clips.zip", {f"in/{name}": content for name, content in clips.items()})
    rows = [
        [f"{n}.jpg", f"image {n} {k}", f"clip {n}.wav" if k == 1 and n != 6 else ""] for n in range(30) for k in (0, 1)
    ]
    table = tmp_path / "table.csv"
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([["file_name", "caption", "Audio"], *rows])
    options = ("--captions", table, "--sounds", sounds, "--vocab-size", 0, "--max-bad-fraction", 0.5)
    _run(run_prepare, images, tmp_path / "out", *options, "--valid-fraction", 0)
    samples = _samples(tmp_path / "out", "train")
    assert [sample.key for sample in samples] == [str(n) for n in range(30) if n not in (3, 4, 5, 6)]
    assert all(sample.sound == _sound(int(sample.key)) and len(sample.captions) == 2 for sample in samples)
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    reasons = {entry["key"]: entry["reason"] for entry in skipped}
    assert reasons["5"] == "sound: there is no clip 5.wav in clips.zip" and reasons["6"].endswith("none in the table")
    assert reasons["3"].startswith("sound: ") and reasons["4"].startswith("sound: ") and len(reasons) == 4
    # The column is not looked for unless sounds are wanted.
    _run(run_prepare, images, tmp_path / "silent", "--captions", table, "--vocab-size", 0, "--valid-fraction", 0)
    assert len(_samples(tmp_path / "silent", "train")) == 30


def test_wrong_tables_of_sounds(tmp_path, run_prepare) -> None:
    images = _write(tmp_path / "photos", {f"{n}.jpg": _jpeg(n) for n in range(3)})
    sounds = _write(tmp_path / "clips", {"a.wav": _sound(0), "b.wav": _sound(1)})
    table = tmp_path / "table.csv"
    given = ("--captions", table, "--sounds", sounds)
    table.write_text("image,caption,sound\n0.jpg,x,a.wav\n0.jpg,y,b.wav\n")
    for more, reason in (
        (given, "table.csv, line 3: b.wav is a second sound of 0.jpg; an image has one"),
        ((*given, "--sound-column", "clip"), "--sound-column clip: .* has the columns image, caption, sound"),
        (("--captions", table, "--sound-column", "sound"), "--sound-column names files of --sounds PATH"),
        (("--sounds", sounds), "--sounds needs a table"),
    ):
        with pytest.raises(UserError, match=reason):
            _run(run_prepare, images, tmp_path / "out", *more)
    table.write_text("image,caption\n0.jpg,x\n")
    with pytest.raises(UserError, match="none of sound, audio, .*: name one with --sound-column"):
        _run(run_prepare, images, tmp_path / "out", *given)
