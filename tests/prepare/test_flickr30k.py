"""Flickr30k from Karpathy's JSON, and from the original captions with lists."""

import gzip
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emkum.data.shards import available_splits, open_split
from emkum.errors import UserError
from emkum.prepare.flickr30k import read_captions

# The last sorts first; one caption begins with a digit, one holds the characters that part the columns.
CAPTIONS = {f"{1000 + n}{n}.jpg": [f"{n} dogs , running .", f"A | bar and # {n} ."] for n in range(4)} | {
    "0998845445.jpg": ["A cat .", "Cats ."]
}
NAMES = list(CAPTIONS)
SPLITS = {"train": NAMES[:3], "val": NAMES[3:4], "test": NAMES[4:]}


def _jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Photos in a folder and in a zip, captions in three formats, lists with and without .jpg."""
    folder = tmp_path / "raw"
    (folder / "images").mkdir(parents=True)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.writestr("flickr30k_images/results.csv", "another copy")
        for number, name in enumerate(NAMES):
            (folder / "images" / name).write_bytes(_jpeg(number))
            archive.writestr(f"flickr30k_images/flickr30k_images/{name}", _jpeg(number))
    rows = [(name, place, text) for name, texts in CAPTIONS.items() for place, text in enumerate(texts)]
    # Not in the order of their numbers.
    rows[0], rows[1] = rows[1], rows[0]
    (folder / "results_20130124.token").write_text("".join(f"{n}#{place}\t{text}\n" for n, place, text in rows))
    table = "".join(f"{name}| {place}| {text}\n" for name, place, text in rows)
    # Kaggle's file has one such line.
    table = table.replace("10033.jpg| 0| 3 dogs", "10033.jpg| 0   3 dogs")
    (folder / "results.csv").write_text(f"image_name| comment_number| comment\n{table}")
    for split, names in SPLITS.items():
        (folder / f"{split}.txt").write_text("".join(f"{name.removesuffix('.jpg')}\n" for name in names))
    (folder / "train.txt").write_text("".join(f"{name}\n" for name in SPLITS["train"]))
    split_of = {name: split for split, names in SPLITS.items() for name in names}
    images = [
        {
            "sentids": [],
            "imgid": number,
            "sentences": [{"tokens": [], "raw": text, "imgid": number, "sentid": 0} for text in CAPTIONS[name]],
            "split": split_of[name],
            "filename": name,
        }
        for number, name in enumerate(NAMES)
    ]
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    return folder


def _arguments(raw: Path, form: str, images: str = "images") -> list[object]:
    arguments = ["flickr30k", "--workers", 1, "--images", raw / images]
    if form == "karpathy":
        return [*arguments, "--karpathy", raw / "dataset_flickr30k.json"]
    return [*arguments, "--captions", raw / form, *(f"--split={name}={raw / name}.txt" for name in SPLITS)]


@pytest.mark.parametrize("images", ["images", "images.zip"])
@pytest.mark.parametrize("form", ["karpathy", "results_20130124.token", "results.csv"])
def test_all_forms_give_the_same_samples(raw, tmp_path, run_prepare, images, form) -> None:
    out = tmp_path / "out"
    run_prepare(*_arguments(raw, form, images), "--vocab-size", 40, "--out", out)
    assert available_splits(out) == ["train", "valid", "test"]
    ids = range(5) if form == "karpathy" else [1, 2, 3, 4, 0]
    expected = [
        (name.removesuffix(".jpg"), image_id, tuple(CAPTIONS[name]), _jpeg(number), {"file_name": name})
        for number, (name, image_id) in enumerate(zip(NAMES, ids, strict=True))
    ]
    samples = [sample for split in available_splits(out) for sample in open_split(out, split)]
    assert [(s.key, s.image_id, s.captions, s.image, s.meta) for s in samples] == expected
    assert [len(open_split(out, split)) for split in available_splits(out)] == [3, 1, 1]
    assert (out / "tokenizer.model").is_file()


def test_again_does_nothing(raw, tmp_path, run_prepare, capsys, folder_bytes) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        run_prepare(*_arguments(raw, "karpathy"), "--out", out)
    assert "nothing to do" in capsys.readouterr().out
    assert not (out / "tokenizer.model").exists()
    before = folder_bytes(out)
    with pytest.raises(UserError, match="holds other prepared data"):
        run_prepare(*_arguments(raw, "results.csv"), "--out", out)
    assert folder_bytes(out) == before


def test_missing_image_and_empty_caption_are_skipped(raw, tmp_path, run_prepare) -> None:
    (raw / "images" / NAMES[0]).unlink()
    path = raw / "results_20130124.token"
    path.write_text(path.read_text().replace("A | bar and # 1 .", ""))
    run_prepare(*_arguments(raw, path.name), "--out", tmp_path / "out", "--max-bad-fraction", 0.5)
    samples = open_split(tmp_path / "out", "train")
    assert [sample.captions for sample in samples] == [("1 dogs , running .",), tuple(CAPTIONS[NAMES[2]])]
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["key"], line["what"], line["reason"]) for line in skipped] == [
        ("10000", "sample", "there is no such file among --images"),
        ("10011", "caption 1", "empty"),
    ]


@pytest.mark.parametrize(
    ("file", "content", "form", "message"),
    [
        ("results.csv", "image,caption\na.jpg,a dog\n", "results.csv", "results.csv, line 1: want NAME.jpg#0<TAB>"),
        ("results.csv", "\n", "results.csv", "results.csv holds no captions"),
        (
            "train.txt",
            "10000.jpg\n5.jpg\n",
            "results.csv",
            "train.txt: no captions in .*csv for 1 of its .* first 5.jpg",
        ),
        ("train.txt", "10000.jpg\n10033\n", "results.csv", "image 10033.jpg is listed twice: in .*train.txt and in"),
        ("train.txt", "\n", "results.csv", "split list .*train.txt is empty"),
        ("dataset_flickr30k.json", "{", "karpathy", "dataset_flickr30k.json is no JSON"),
        ("dataset_flickr30k.json", "{}", "karpathy", "want a list named images"),
        ("dataset_flickr30k.json", '{"images": []}', "karpathy", "dataset_flickr30k.json names no images"),
        ("dataset_flickr30k.json", '{"images": [], "dataset": "coco"}', "karpathy", "is of coco, not of flickr30k"),
    ],
)
def test_mistakes_in_files_leave_nothing(raw, tmp_path, run_prepare, file, content, form, message) -> None:
    (raw / file).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        run_prepare(*_arguments(raw, form), "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_mistakes_in_arguments(raw, tmp_path, run_prepare) -> None:
    out = ["--out", tmp_path / "out"]
    with pytest.raises(UserError, match="--split NAME=FILE goes with --captions"):
        run_prepare(*_arguments(raw, "results.csv")[:-3], *out)
    with pytest.raises(UserError, match="--split NAME=FILE goes with --captions"):
        run_prepare(*_arguments(raw, "karpathy"), f"--split=train={raw}/train.txt", *out)
    with pytest.raises(UserError, match="--split trian=.*: want NAME=FILE with NAME one of train, valid, val"):
        run_prepare(*_arguments(raw, "results.csv"), f"--split=trian={raw}/train.txt", *out)
    (raw / "images2").mkdir()
    with pytest.raises(UserError, match=r"no usable sample \(3 skipped, 3 of them: there is no such file"):
        run_prepare(*_arguments(raw, "karpathy", "images2"), *out)


def test_real_captions_are_read(shared_data: Path, tmp_path: Path) -> None:
    with gzip.open(shared_data / "flickr30k_captions" / "val.txt.gz", "rt", encoding="utf-8") as file:
        texts = [line.strip() for line in file]
    assert len(texts) == 5070
    lines = [f"{n // 5}.jpg| {n % 5}| {text}\n" for n, text in enumerate(texts)]
    (tmp_path / "results.csv").write_text("image_name| comment_number| comment\n" + "".join(lines))
    photos = read_captions(tmp_path / "results.csv")
    assert len(photos) == 1014
    assert [text for n in range(1014) for text in photos[f"{n}.jpg"].captions] == texts
