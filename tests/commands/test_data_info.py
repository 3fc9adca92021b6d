"""`emkum data info` on folders of every kind."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emkum.cli import build_parser
from emkum.commands.data import BAR_WIDTH, MOST_BARS, histogram, spread
from emkum.data.shard_writing import ShardWriter
from emkum.data.tables import TABLE_NAME, join_rows
from emkum.data.token_blocks import TokenBlockWriter
from emkum.errors import UserError


def _run(*arguments: object) -> None:
    args = build_parser().parse_args(["data", "info", *map(str, arguments)])
    args.run(args)


def _image(number: int, kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20 + number, 60 - number), (20 * number, 100, 200)).save(file, kind)
    return file.getvalue()


def _write_images(folder: Path, count: int) -> None:
    with ShardWriter(folder, samples_per_shard=4) as writer:
        for number in range(count):
            kind = "PNG" if number % 5 == 0 else "JPEG"
            captions = [] if number == 3 else ["a dog " * (number + 1), "it rains"]
            meta = {"label": 7, "tags": ["x"]} if number == 3 else None
            suffix = "png" if kind == "PNG" else "jpg"
            writer.add(f"key{number}", _image(number, kind), suffix, captions, meta)


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two splits of images with a record, the folder above as current one."""
    folder = tmp_path / "data"
    folder.mkdir()
    _write_images(folder / "valid", 3)
    _write_images(folder / "train", 10)
    counts = {"images": 10, "captions": 18, "duplicate_images": 4, "duplicate_names": 2, "skipped": 5}
    record = {"set": "flickr8k", "splits": {"train": counts | {"skipped_captions": 1}}, "versions": {"emkum": "9.9"}}
    (folder / "prepare.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    return folder


def test_images(prepared: Path, capsys, folder_bytes: Callable[[Path], dict[str, bytes]]) -> None:
    before = folder_bytes(prepared)
    _run("data")
    text = capsys.readouterr().out
    assert text.startswith("data: flickr8k, made by emkum 9.9\n")
    train, valid = text[text.index("\ntrain\n") :].split("\nvalid\n")
    assert "10 images in 3 shards" in train and "3 images in 1 shard," in valid
    assert "18 captions, 1.8 an image; 1 image without" in train
    assert "left out when prepared: 5 samples, 1 caption\n" in train and "left out" not in valid
    assert "duplicates: 4 images like an earlier one; 2 left out" in train
    assert re.search(r"width \(min, median, max\) +20 24 29 px", train)
    assert re.search(r"height \(min, median, max\) +51 56 60 px", train)
    assert re.search(r"formats +JPEG 80 %, PNG 20 %", train)
    assert re.search(r"words a caption +median 2, most 20", train)
    assert "evenly spread" not in text
    assert folder_bytes(prepared) == before
    sheet = Image.open("contact_sheet.png")
    assert sheet.format == "PNG" and sheet.width > 1000
    assert sorted(path.name for path in Path().iterdir()) == ["contact_sheet.png", "data"]


def test_one_split_and_few_samples(prepared: Path, capsys) -> None:
    _run(prepared, "--split", "train", "--samples", 2, "--out", "new/few.png")
    text = capsys.readouterr().out
    assert "\nvalid\n" not in text and "of 2 evenly spread samples" in text
    first, second = spread(10, 2)
    assert re.search(rf"width \(min, median, max\) +{20 + first} \S+ {20 + second} px", text)
    assert "contact sheet: new/few.png" in text and Path("new/few.png").is_file()
    _run(prepared, "--samples", 0)
    assert "evenly spread" not in capsys.readouterr().out


def test_tables_and_tokens(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split, count in (("CoLA/train", 30), ("CoLA/valid", 1), ("RTE/train", 2)):
        folder = tmp_path / "glue" / split
        folder.mkdir(parents=True)
        rows = [json.dumps({"sentence1": f"Größe {n} " + "x" * 300 * (n == 5), "label": n}) for n in range(count)]
        (tmp_path / "part").write_text("".join(f"{row}\n" for row in rows))
        join_rows([tmp_path / "part"], folder / TABLE_NAME)
    _run("glue")
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if "/" in line and " " not in line] == [
        "CoLA/train", "CoLA/valid", "RTE/train",
    ]  # fmt: skip
    assert "30 rows, " in text and "1 row, " in text and "columns sentence1, label" in text
    shown = spread(30, 3)[1]
    assert f'{{"sentence1": "Größe {shown} ", "label": {shown}}}' in text
    assert "contact sheet" not in text and not Path("contact_sheet.png").exists()
    assert max(map(len, text.splitlines())) <= 120
    _run("glue", "--split", "RTE/train")
    assert "CoLA" not in capsys.readouterr().out
    with TokenBlockWriter(tmp_path / "text" / "train", vocab_size=500) as writer:
        for length in (3, 40, 7):
            writer.add(np.arange(length) + 100)
    _run("text")
    text = capsys.readouterr().out
    assert "3 blocks of 50 tokens" in text and "3 7 40 (min, median, max)" in text and "100 101 102\n" in text


def test_mistakes(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["none"], "data folder none does not exist"),
        (["empty"], "empty holds no prepared split; make one with `emkum prepare`"),
        (["data", "--split", "tset"], "data has no split 'tset'; choose from train, valid"),
        (["data", "--samples", "-1"], "--samples -1: want 0"),
        (["data", "--out", "sheet.jpg"], "--out sheet.jpg: want a name that ends in .png"),
        (["data", "--out", "data/prepare.json/sheet.png"], "cannot write data/prepare.json/sheet.png"),
    ):
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            _run(*arguments)
        assert "\n" not in str(caught.value)


def test_what_cannot_be_read_is_counted(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ShardWriter(tmp_path / "data" / "train") as writer:
        writer.add("good", _image(0, "JPEG"), "jpg", ["a dog"])
        writer.add("bad", b"no image", "jpg", ["a cat"])
        writer.add("none", b"", "jpg", ["a bird"])
    _run("data")
    assert re.search(r"formats +JPEG 50 %, unreadable 50 %", capsys.readouterr().out)
    assert Path("contact_sheet.png").is_file()


def test_histogram_counts_every_caption() -> None:
    words = np.concatenate([np.full(50, 1), np.full(30, 2), np.full(20, 5)])
    lines = list(histogram(words))
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4", "5"]
    assert [float(line.split()[-2]) for line in lines] == [50, 30, 0, 0, 20]
    assert [line.count("#") for line in lines] == [BAR_WIDTH, BAR_WIDTH * 3 / 5, 0, 0, BAR_WIDTH * 2 / 5]
    words = np.concatenate([np.random.default_rng(0).integers(1, 41, 9999), [3000]])
    lines = list(histogram(words))
    assert len(lines) == MOST_BARS and lines[0].split()[0] == "1-4" and lines[-1].split()[0] == "45+"
    assert sum(float(line.split()[-2]) for line in lines) == pytest.approx(100, abs=1)
    wanted = 100 * ((words >= 5) & (words <= 8)).mean()
    assert float(lines[1].split()[-2]) == pytest.approx(wanted, abs=0.05)


def test_spread() -> None:
    assert spread(3, 5) == [0, 1, 2] and spread(5, 5) == [0, 1, 2, 3, 4]
    for length, count in ((100, 4), (7, 5), (1000, 999), (10**9, 10)):
        positions = spread(length, count)
        assert positions == spread(length, count)
        parts = [range(part * length // count, (part + 1) * length // count) for part in range(count)]
        assert all(position in part for position, part in zip(positions, parts, strict=True))
    assert len({position % 10 for position in spread(5000, 60)}) == 10
