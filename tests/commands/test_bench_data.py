"""`emkum bench`: that it measures what it says, not how fast this machine is."""

import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emkum.cli import build_parser
from emkum.commands.bench_data import (
    BARE_LOOP,
    EndlessBatches,
    FolderImages,
    FromWebDataset,
    _extract,
    format_rates,
    measure,
    open_work,
    runs,
)
from emkum.data.shard_writing import ShardWriter
from emkum.errors import UserError
from emkum.prepare.tokenizer import train_sentencepiece


def _run(*arguments: object) -> None:
    args = build_parser().parse_args(["bench", *map(str, arguments)])
    args.run(args)


def _image(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "data"
    folder.mkdir()
    captions = [f"a photo of {word} in the rain" for word in "dog cat bird horse man woman child tree car".split()]
    with ShardWriter(folder / "train", samples_per_shard=10) as writer:
        for number in range(20):
            writer.add(f"{number:03d}", _image(number), "jpg", captions[number % 4 : number % 4 + 2])
    train_sentencepiece(captions, folder / "tokenizer.model", 60)
    return folder


@pytest.fixture(scope="module")
def work(data: Path):
    return open_work(data, "train", "", image_size=16, batch_size=5, images=8)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_command_prints_and_writes_all(data: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("webdataset")
    _run(
        "data", data, "--workers", 0, 1, "--image-size", 16, "--batch-size", 5, "--seconds", 0.05, "--rounds", 2,
        "--against", "webdataset", "folder", "--json", tmp_path / "rates.json",
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    names = [re.split(r"  +", line)[0] for line in lines[1:]]
    loaders = [f"{what}, {n}" for n in ("0 workers", "1 worker") for what in ("loader", "webdataset", "folder")]
    assert names == ["read", "decode", "transform", BARE_LOOP, *loaders]
    assert re.search(r"100 %$", lines[4])
    written = json.loads((tmp_path / "rates.json").read_text())
    assert list(written["samples_per_second"]) == sorted(names)
    assert all(len(rates) == 2 and min(rates) > 0 for rates in written["samples_per_second"].values())
    assert written["settings"]["image_size"] == 16
    assert written["machine"]["cores"] >= 1 and "torch" in written["machine"]["versions"]


def test_rivals_do_the_same_work(work, tmp_path: Path) -> None:
    """Each makes batches of the same form, of crops of the true images and tokens of the true captions."""
    files = _extract(work, tmp_path)
    assert [file.read_bytes() for file in files] == list(work.held)
    members = {"__key__": "0", "jpg": work.held[3], "json": json.dumps({"captions": work.captions[3]}).encode()}
    foreign = {"__key__": "0", "jpg": work.held[3], "txt": work.captions[3][0].encode()}
    items = [FolderImages(files, work)[3], FromWebDataset(work)(members), FromWebDataset(work)(foreign)]
    allowed = [[0, *work.tokenizer.pieces(caption), 2] for caption in work.captions[3]]
    mean = np.asarray(Image.open(io.BytesIO(work.held[3]))).mean()
    for item in items:
        assert item.captions[0] in allowed
        assert item.image.shape == (3, 16, 16) and item.image.dtype == torch.uint8
        assert item.image.float().mean().item() == pytest.approx(mean, abs=8)
    batch = work.collate(items)
    assert batch["net_input"]["image"].shape == (3, 3, 16, 16) and batch["nsentences"] == 3


def test_every_run_gives_whole_batches(work) -> None:
    pytest.importorskip("webdataset")
    with runs(work, [0], ["webdataset", "folder"]) as started:
        for name, run in started.items():
            steps = run()
            # More than an epoch: none of them ends.
            assert [next(steps) for _ in range(12)] == [5 if "worker" in name else 1] * 12
            steps.close()


def test_measure_leaves_the_start_out_and_goes_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("emkum.commands.bench_data.time.perf_counter", lambda: clock[0])
    begun = []

    def run(name: str, start: float, step: float, count: int) -> Iterator[int]:
        begun.append(name)
        clock[0] += start
        yield 1000
        while True:
            clock[0] += step
            yield count

    slow = lambda: run("slow", 50.0, 0.5, 4)  # noqa: E731
    fast = lambda: run("fast", 10.0, 0.25, 4)  # noqa: E731
    assert measure({"slow": slow, "fast": fast}, seconds=2, rounds=3) == {"slow": [8.0] * 3, "fast": [16.0] * 3}
    assert begun == ["slow", "fast"] * 3


def test_table_compares_within_rounds() -> None:
    # The machine was half as fast in the second round, and four times as fast in the third.
    text = format_rates({BARE_LOOP: [100.0, 50.0, 400.0], "loader": [90.0, 45.0, 360.0]})
    assert re.search(r"loader +90 +90 %$", text) and re.search(rf"{BARE_LOOP} +100 +100 %", text)


def test_endless_batches_visit_all() -> None:
    batches = iter(EndlessBatches(10, 5))
    epochs = [np.concatenate([next(batches), next(batches)]).tolist() for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert sorted(next(iter(EndlessBatches(3, 64))).tolist()) == [0, 1, 2]


def test_mistakes(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        (["--batch-size", 0], "--batch-size 0: want more than 0"),
        (["--workers", -1], "--workers -1: want 0"),
        (["--split", "tset"], "no split 'tset'"),
        (["--tokenizer", "none"], "no tokenizer at none"),
        (["--against", "webdataset", "--workers", 3], "each of 3 workers its own shards"),
    ):
        with pytest.raises(UserError, match=message):
            _run("data", data, "--images", 4, *arguments)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(UserError, match="pip install webdataset"):
        _run("data", data, "--images", 4, "--against", "webdataset")
    with pytest.raises(UserError, match="--samples 0: want more than 0"):
        _run("index", "--samples", 0)


def test_index(tmp_path: Path, capsys) -> None:
    _run("index", "--samples", 25_000, "--batch-size", 100, "--json", tmp_path / "index.json")
    lines = capsys.readouterr().out.splitlines()
    steps = json.loads((tmp_path / "index.json").read_text())["steps"]
    assert lines[0].startswith("25,000 samples") and len(lines) == 1 + len(steps) == 7
    peaks = {step["step"]: step["peak_bytes"] for step in steps}
    # The interpreter with NumPy, not this process with PyTorch.
    assert 10e6 < peaks["imports alone"] <= min(peaks.values()) + 2e6 and max(peaks.values()) < 150e6
