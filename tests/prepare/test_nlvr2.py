"""NLVR2 from its JSON lines."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emkum.data.shards import available_splits, open_split
from emkum.errors import UserError
from emkum.prepare.nlvr2 import Nlvr2
from emkum.prepare.raw_set import Settings
from emkum.prepare.runner import prepare

# Pair -> labels of its statements.
PAIRS = {"train-10171-0": [True, False], "train-10171-2": [False], "train-7-1": [True], "dev-850-0": [True]}


def _png(*seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _image(pair: str, side: int) -> bytes:
    return _png(list(PAIRS).index(pair), side)


def _line(pair: str, number: int) -> str:
    entry = {
        "validation": {"4": "True"},
        "sentence": f"Statement {number} of {pair}.",
        "left_url": "https://example.org/left.jpg",
        "writer": "48",
        "label": str(PAIRS[pair][number]),
        "right_url": "https://example.org/right.jpg",
        "synset": "acorn",
        "query": "group",
        "identifier": f"{pair}-{number}",
        "directory": "71",
    }
    return json.dumps(entry) + "\n"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Train images in the folders of the release, dev images in a zip, JSON lines of both."""
    folder = tmp_path / "raw"
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for pair in PAIRS:
            for side in range(2):
                name = f"{pair}-img{side}.png"
                if pair.startswith("dev"):
                    archive.writestr(f"dev/{name}", _image(pair, side))
                else:
                    place = folder / "images" / "train" / pair.split("-")[1]
                    place.mkdir(parents=True, exist_ok=True)
                    (place / name).write_bytes(_image(pair, side))
    folder.with_suffix(".zip").rename(folder / "dev.zip")
    lines = {"train": "", "dev": ""}
    # The second statement of the first pair comes last.
    for pair, number in [(pair, 0) for pair in PAIRS] + [("train-10171-0", 1)]:
        lines[pair.split("-")[0]] += _line(pair, number)
    for name, text in lines.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def _arguments(raw: Path) -> list[object]:
    splits = [f"--split={name}={raw / name}.json" for name in ("train", "dev")]
    return ["nlvr2", "--workers", 1, "--images", raw / "images", raw / "dev.zip", *splits]


def _pairs(out: Path, split: str = "train") -> list[str]:
    """Names of the pairs of a split, each of which must be whole."""
    samples = list(open_split(out, split, require_captions=False))
    for left, right in zip(samples[::2], samples[1::2], strict=True):
        assert left.meta["pair"] == right.meta["pair"]
        assert (left.meta["side"], right.meta["side"]) == ("left", "right")
    return [sample.meta["pair"] for sample in samples[::2]]


def test_samples(raw, tmp_path, run_prepare) -> None:
    out = tmp_path / "out"
    run_prepare(*_arguments(raw), "--out", out)
    assert available_splits(out) == ["train", "valid"]
    assert (_pairs(out), _pairs(out, "valid")) == (list(PAIRS)[:3], list(PAIRS)[3:])
    for split in available_splits(out):
        for sample in open_split(out, split, require_captions=False):
            pair, side = sample.meta["pair"], ("left", "right").index(sample.meta["side"])
            assert (sample.key, sample.captions) == (f"{pair}_img{side}", ())
            assert sample.image == _image(pair, side)
            statements = [
                {"identifier": f"{pair}-{number}", "sentence": f"Statement {number} of {pair}.", "label": label}
                for number, label in enumerate(PAIRS[pair])
            ]
            assert sample.meta.get("statements") == (None if side else statements)


def test_limit_counts_pairs(raw, tmp_path, run_prepare) -> None:
    run_prepare(*_arguments(raw), "--limit", 1, "--image-size", 8, "--out", tmp_path / "out")
    assert _pairs(tmp_path / "out") == ["train-10171-0"]
    sample = open_split(tmp_path / "out", "train", require_captions=False)[1]
    assert Image.open(io.BytesIO(sample.image)).size == (12, 8)


def test_parts_never_cut_a_pair(raw, tmp_path) -> None:
    raw_set = Nlvr2([raw / "images"], {"train": raw / "train.json"})
    prepare(raw_set, tmp_path / "out", Settings(samples_per_shard=1))
    assert len(list((tmp_path / "out" / "train").glob("*.tar"))) == 3
    assert _pairs(tmp_path / "out") == list(PAIRS)[:3]


@pytest.mark.parametrize("what", ["missing", "damaged", "second missing", "both missing"])
def test_pair_with_one_bad_image_is_left_out(raw, tmp_path, run_prepare, what) -> None:
    paths = [raw / "images" / "train" / "10171" / f"train-10171-2-img{side}.png" for side in range(2)]
    for path in {"missing": paths[:1], "second missing": paths[1:], "both missing": paths}.get(what, []):
        path.unlink()
    if what == "damaged":
        paths[0].write_bytes(paths[0].read_bytes()[:100])
    # Two of six images are bad.
    with pytest.raises(UserError, match=r"2 of 6 samples are bad, more than --max-bad-fraction 0.33 allows"):
        run_prepare(*_arguments(raw), "--max-bad-fraction", 0.33, "--out", tmp_path / "out")
    run_prepare(*_arguments(raw), "--max-bad-fraction", 0.34, "--out", tmp_path / "out")
    assert _pairs(tmp_path / "out") == ["train-10171-0", "train-7-1"]
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    reasons = {line["key"]: line["reason"] for line in skipped}
    assert sorted(reasons) == ["train-10171-2_img0", "train-10171-2_img1"]
    absent, other = "there is no such file among --images", "belongs to train-10171-2_img0"
    if what == "missing":
        assert list(reasons.values()) == [absent, other]
    elif what == "second missing":
        assert list(reasons.values()) == ["belongs to train-10171-2_img1", absent]
    elif what == "both missing":
        assert list(reasons.values()) == [absent, absent]
    else:
        assert reasons["train-10171-2_img1"] == other


def test_again_does_nothing(raw, tmp_path, run_prepare, capsys, folder_bytes) -> None:
    run_prepare(*_arguments(raw), "--out", tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    run_prepare(*_arguments(raw), "--out", tmp_path / "out")
    assert "nothing to do" in capsys.readouterr().out
    assert folder_bytes(tmp_path / "out") == before


def test_another_process_reads_the_same_samples(raw) -> None:
    raw_set = Nlvr2([raw / "images", raw / "dev.zip"], {"train": raw / "train.json", "valid": raw / "dev.json"})
    for split, pairs in (("train", 3), ("valid", 1)):
        samples = list(raw_set.samples(split, 0, pairs))
        assert len(samples) == 2 * pairs
        assert list(pickle.loads(pickle.dumps(raw_set)).samples(split, 0, pairs)) == samples


def test_text_that_is_not_utf8_does_not_stop_the_run(raw, tmp_path, run_prepare) -> None:
    path = raw / "train.json"
    path.write_bytes(path.read_bytes().replace(b"Statement 0 of train-7", b"St\xe4tement of tr\\ud800in-7"))
    run_prepare(*_arguments(raw), "--out", tmp_path / "out")
    sample = open_split(tmp_path / "out", "train", require_captions=False)[4]
    assert sample.meta["statements"][0]["sentence"] == "St?tement of tr?in-7-1."


def _with(**changed: object) -> str:
    return json.dumps(json.loads(_line("train-7-1", 0)) | changed) + "\n"


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("{\n", "train.json, line 5 is no JSON"),
        ("[]\n", "train.json, line 5: want a text named identifier"),
        (_with(identifier="train-8-1-0", label="true"), "train.json, line 5: label true is none of True, False"),
        (_with(identifier="train-8-1-0", label=None), "train.json, line 5: want a text named label"),
        (_with(identifier="train-8-1-0", sentence=None), "train.json, line 5: want a text named sentence"),
        (_with(identifier="train-8"), "line 5: want an identifier such as train-10171-0-0, not train-8"),
        (_with(), "train.json, line 5: train-7-1-0 is listed twice"),
        (_line("dev-850-0", 0), "image dev-850-0 is listed twice: in .*train.json and in .*dev.json"),
    ],
)
def test_mistakes_in_files_leave_nothing(raw, tmp_path, run_prepare, added, message) -> None:
    path = raw / "train.json"
    path.write_text(path.read_text() + added)
    with pytest.raises(UserError, match=message) as caught:
        run_prepare(*_arguments(raw), "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_mistakes_in_arguments(raw, tmp_path, run_prepare) -> None:
    with pytest.raises(UserError, match="--split trian=.*: want NAME=FILE with NAME one of train, valid"):
        run_prepare(*_arguments(raw), f"--split=trian={raw}/train.json", "--out", tmp_path / "out")
    (raw / "empty.json").write_text("\n")
    with pytest.raises(UserError, match="empty.json holds no statements"):
        run_prepare(*_arguments(raw), f"--split=test={raw}/empty.json", "--out", tmp_path / "out")
