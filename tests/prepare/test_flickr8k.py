"""Flickr8k from raw files in the shapes that people have."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emkum.data.shards import available_splits, open_split
from emkum.data.tokenizers import load_tokenizer
from emkum.errors import UserError
from emkum.prepare.flickr8k import parse_splits, read_captions


def _jpeg(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


CAPTIONS = {f"{number}_ab{number}.jpg": [f"A dog , {number} times .", f'He said "{number}" .'] for number in range(6)}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Six images in a folder and in a zip, captions in both formats, lists of three splits."""
    folder = tmp_path / "raw"
    (folder / "Images" / "deep").mkdir(parents=True)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for number, name in enumerate(CAPTIONS):
            (folder / "Images" / "deep" / name).write_bytes(_jpeg(number))
            archive.writestr(f"Flicker8k_Dataset/{name}", _jpeg(number))
            archive.writestr(f"__MACOSX/Flicker8k_Dataset/{name}", b"shadow")
    with open(folder / "captions.txt", "w") as file:
        file.write("image,caption\n")
        for name, texts in CAPTIONS.items():
            # The first with a bare comma, the second quoted.
            file.write(f'{name},{texts[0]}\n{name},"{texts[1].replace(chr(34), 2 * chr(34))}"\n')
    tokens = [f"{name}#{place}\t{text}\n" for name, texts in CAPTIONS.items() for place, text in enumerate(texts)]
    (folder / "Flickr8k.token.txt").write_text("".join(tokens))
    names = list(CAPTIONS)
    for split, chosen in (("train", names[:3]), ("dev", names[3:5]), ("test", names[5:])):
        (folder / f"{split}.txt").write_text("\n".join(chosen) + "\n\n")
    return folder


def _arguments(raw: Path, out: Path, images: str = "images.zip", captions: str = "captions.txt") -> list[object]:
    lists = [f"--split={name}={raw / name}.txt" for name in ("train", "dev", "test")]
    return ["flickr8k", "--images", raw / images, "--captions", raw / captions, *lists, "--out", out]


@pytest.mark.parametrize("images", ["images.zip", "Images"])
@pytest.mark.parametrize("captions", ["captions.txt", "Flickr8k.token.txt"])
def test_all_raw_forms_give_the_same_samples(raw, tmp_path, run_prepare, images, captions) -> None:
    out = tmp_path / "out"
    run_prepare(*_arguments(raw, out, images, captions), "--vocab-size", 40)
    assert available_splits(out) == ["train", "valid", "test"]
    number = 0
    for split, size in (("train", 3), ("valid", 2), ("test", 1)):
        samples = open_split(out, split)
        assert len(samples) == size
        for sample in samples:
            name = list(CAPTIONS)[number]
            assert sample.image == _jpeg(number)
            assert sample.captions == tuple(CAPTIONS[name])
            assert (sample.key, sample.image_id, sample.meta) == (name[:-4], number, {"file_name": name})
            number += 1
    assert load_tokenizer(out).vocab_size <= 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_record_of_what_was_done(raw, tmp_path, run_prepare) -> None:
    (raw / "Images" / "deep" / "1_ab1.jpg").write_bytes(_jpeg(1)[:300])
    (raw / "Images" / "deep" / "2_ab2.jpg").write_bytes(_jpeg(2, "TIFF"))
    out = tmp_path / "out"
    with pytest.raises(UserError, match="2 of 3 samples are bad, more than --max-bad-fraction 0.5 allows"):
        run_prepare(*_arguments(raw, out, "Images"), "--vocab-size", 0, "--max-bad-fraction", 0.5)
    run_prepare(*_arguments(raw, out, "Images"), "--vocab-size", 0, "--max-bad-fraction", 0.7)
    record = json.loads((out / "prepare.json").read_text())
    clean = {"duplicate_images": 0, "duplicate_names": 0, "skipped_captions": 0}
    assert record["splits"]["train"] == {"images": 1, "captions": 2, "skipped": 2, **clean}
    assert record["splits"]["test"] == {"images": 1, "captions": 2, "skipped": 0, **clean}
    assert set(record["versions"]) >= {"emkum", "python", "numpy", "pillow", "sentencepiece"}
    assert set(record["sources"]) == {"images", "captions", "split train", "split valid", "split test"}
    assert str(tmp_path) not in json.dumps(record)
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [(line["split"], line["key"]) for line in skipped] == [("train", "1_ab1"), ("train", "2_ab2")]
    assert "TIFF" in skipped[1]["reason"]
    assert not (out / "tokenizer.model").exists()


def test_again_does_nothing_and_other_sources_are_refused(raw, tmp_path, run_prepare, capsys, folder_bytes) -> None:
    out = tmp_path / "out"
    run_prepare(*_arguments(raw, out), "--vocab-size", 40)
    before = folder_bytes(out)
    capsys.readouterr()
    run_prepare(*_arguments(raw, out), "--vocab-size", 40)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="option vocab_size: 40 there, 0 here"):
        run_prepare(*_arguments(raw, out), "--vocab-size", 0)
    with pytest.raises(UserError, match="source captions differs"):
        run_prepare(*_arguments(raw, out, captions="Flickr8k.token.txt"), "--vocab-size", 40)
    with pytest.raises(UserError, match="set flickr8k there, scenes here"):
        run_prepare("scenes", "--out", out)
    assert folder_bytes(out) == before


def test_foreign_folder_is_left_alone(raw, tmp_path, run_prepare) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds no prepared data"):
        run_prepare(*_arguments(raw, tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def _spoil(raw: Path, what: str) -> None:
    names = list(CAPTIONS)
    if what == "no zip":
        (raw / "images.zip").write_bytes(b"no zip")
    elif what == "no images":
        (raw / "images.zip").unlink()
    elif what == "no captions file":
        (raw / "captions.txt").unlink()
    elif what == "captions of another kind":
        (raw / "captions.txt").write_text("name;text\n1.jpg;a dog\n")
    elif what == "line without caption":
        (raw / "captions.txt").write_text("image,caption\n1.jpg,a dog\n2.jpg\n")
    elif what == "binary captions":
        (raw / "captions.txt").write_bytes(b"\xff\xd8\xff")
    elif what == "images without captions":
        (raw / "train.txt").write_text(f"{names[0]}\nnew.jpg\nnewer.jpg\n")
    elif what == "images without files":
        with zipfile.ZipFile(raw / "images.zip", "w") as archive:
            archive.writestr(names[0], _jpeg(0))
    elif what == "image in two splits":
        (raw / "dev.txt").write_text(f"{names[3]}\n{names[0]}\n")
    elif what == "empty list":
        (raw / "test.txt").write_text("\n")
    elif what == "two files of a name":
        with zipfile.ZipFile(raw / "images.zip", "a") as archive:
            archive.writestr(f"again/{names[0]}", _jpeg(0))
    elif what == "all images broken":
        with zipfile.ZipFile(raw / "images.zip", "w") as archive:
            for name in names:
                archive.writestr(name, b"broken")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no zip", "images.zip is neither a folder nor a zip"),
        ("no images", "no folder, zip or tar .*images.zip"),
        ("no captions file", "cannot read .*captions.txt"),
        ("captions of another kind", "captions.txt, line 1: want the header image,caption"),
        ("line without caption", "captions.txt, line 3"),
        ("binary captions", "captions.txt, line 1"),
        ("images without captions", "split train of flickr8k: 2 of 3 samples are bad.* no captions of this name"),
        ("images without files", "dev.txt: no file in .* for any of its images, such as 3_ab3.jpg"),
        ("image in two splits", "0_ab0.jpg is listed twice: in .*train.txt and in .*dev.txt"),
        ("empty list", "test.txt is empty"),
        ("two files of a name", "two files named 0_ab0.jpg"),
        ("all images broken", r"split train of flickr8k has no usable sample \(3 skipped, 3 of them: "),
    ],
)
def test_mistakes_are_named_in_one_line_and_leave_nothing(raw, tmp_path, run_prepare, what, message) -> None:
    _spoil(raw, what)
    with pytest.raises(UserError, match=message) as caught:
        run_prepare(*_arguments(raw, tmp_path / "out"), "--vocab-size", 0)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_single_bad_samples_stop_nothing(raw, tmp_path, run_prepare) -> None:
    names = list(CAPTIONS)
    (raw / "train.txt").write_text("\n".join([*names[:3], "new.jpg"]))
    (raw / "Images" / "deep" / names[1]).unlink()
    lines = (raw / "captions.txt").read_text().replace("A dog , 0 times .", "")
    (raw / "captions.txt").write_text(lines)
    run_prepare(*_arguments(raw, tmp_path / "out", "Images"), "--vocab-size", 0, "--max-bad-fraction", 0.6)
    train = open_split(tmp_path / "out", "train")
    assert [sample.key for sample in train] == ["0_ab0", "2_ab2"]
    assert train[0].captions == ('He said "0" .',)
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["key"], line["what"], line["reason"]) for line in skipped] == [
        ("0_ab0", "caption 0", "empty"),
        (names[1], "sample", "no file of this name"),
        ("new.jpg", "sample", "no captions of this name"),
    ]


def test_failing_tokenizer_leaves_nothing(raw, tmp_path, run_prepare) -> None:
    with pytest.raises(UserError, match="tokenizer of 5 pieces"):
        run_prepare(*_arguments(raw, tmp_path / "out"), "--vocab-size", 5)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize("argument", ["train", "train=", "trainn=train.txt", "=train.txt", "train=none.txt"])
def test_split_syntax(argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.txt").write_text("1.jpg\n")
    with pytest.raises(UserError, match="--split"):
        parse_splits([argument])
    with pytest.raises(UserError, match="given twice"):
        parse_splits(["val=train.txt", "dev=train.txt"])


def test_tokenizer_needs_the_train_split(raw, tmp_path, run_prepare) -> None:
    arguments = ["flickr8k", "--images", raw / "images.zip", "--captions", raw / "captions.txt"]
    arguments += [f"--split=test={raw / 'test.txt'}", "--out", tmp_path / "out"]
    with pytest.raises(UserError, match="--vocab-size 0"):
        run_prepare(*arguments)
    run_prepare(*arguments, "--vocab-size", 0)
    # The id of an image does not depend on the splits that were asked for.
    assert open_split(tmp_path / "out", "test")[0].image_id == 5


def test_equal_images_have_equal_ids(raw, tmp_path, run_prepare) -> None:
    for name in ("2_ab2.jpg", "5_ab5.jpg"):
        (raw / "Images" / "deep" / name).write_bytes(_jpeg(1))
    run_prepare(*_arguments(raw, tmp_path / "out", "Images"), "--vocab-size", 0)
    ids = {split: open_split(tmp_path / "out", split).image_ids.tolist() for split in ("train", "valid", "test")}
    assert ids == {"train": [0, 1, 1], "valid": [3, 4], "test": [1]}


def test_stray_quotation_mark_swallows_no_line(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text('image,caption\na.jpg,"Unclosed , he said\nb.jpg,A dog , two cats\nb.jpg,"A dog , a cat"\n')
    captions = read_captions(path)
    assert captions == {"a.jpg": ("Unclosed , he said",), "b.jpg": ("A dog , two cats", "A dog , a cat")}


def test_real_flickr8k(shared_data: Path, tmp_path: Path, run_prepare) -> None:
    source = shared_data / "flickr8k"
    # The smaller official list serves as both splits' source, cut in two.
    names = (source / "Flickr_8k.devImages.txt").read_text().split()
    (tmp_path / "train.txt").write_text("\n".join(names[:300]))
    (tmp_path / "valid.txt").write_text("\n".join(names[300:400]))
    arguments = ["flickr8k", "--images", source / "images.zip", "--captions", source / "captions.txt"]
    arguments += [f"--split={split}={tmp_path / split}.txt" for split in ("train", "valid")]
    run_prepare(*arguments, "--out", tmp_path / "out", "--vocab-size", 500)
    samples = open_split(tmp_path / "out", "valid")
    assert len(samples) == 100
    assert set(samples.num_captions) == {5}
    with zipfile.ZipFile(source / "images.zip") as archive:
        for sample, name in zip(samples, names[300:400], strict=True):
            assert sample.meta["file_name"] == name
            assert sample.image == archive.read(name)
    lines = [line for line in (source / "captions.txt").read_text().splitlines() if line.startswith(names[300] + ",")]
    assert samples[0].captions == tuple(line.partition(",")[2].strip('"').replace('""', '"').strip() for line in lines)
    tokenizer = load_tokenizer(tmp_path / "out")
    assert np.mean([3 in tokenizer.pieces(caption) for sample in samples for caption in sample.captions]) < 0.01
