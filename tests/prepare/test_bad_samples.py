"""Bad input of every kind, through the real commands: what is bad is counted, named and left out, and nothing else."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emkum.data.decoding import decode
from emkum.data.shards import ShardedSamples, open_split
from emkum.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NUM_GOOD = 30
NOTHING = {"duplicate_images": 0, "duplicate_names": 0, "skipped": 0, "skipped_captions": 0}

Pairs = dict[str, tuple[bytes, bytes | None]]


def _picture(seed: int, height: int = 16, width: int = 24) -> Image.Image:
    """Random squares of 8 pixels, which JPEG keeps."""
    squares = np.random.default_rng(seed).integers(0, 255, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return Image.fromarray(squares.repeat(8, 0).repeat(8, 1)[:height, :width])


def _file(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _file(_picture(100), exif=exif, quality=95)


def _palette_with_alpha() -> bytes:
    image = _picture(101).quantize(4)
    return _file(image, "PNG", transparency=bytes([0, 85, 170, 255]))


def _bomb() -> bytes:
    """A PNG whose header tells of 20,000 x 20,000 pixels."""
    return _file(Image.new("1", (20_000, 20_000)), "PNG")


# Name -> the image file, and why it is skipped; None = it is used.
ODD_IMAGES: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "cmyk.jpg": (lambda: _file(_picture(102).convert("CMYK")), None),
    "gray.jpg": (lambda: _file(_picture(103).convert("L")), None),
    "palette_with_alpha.png": (_palette_with_alpha, None),
    "rotated.jpg": (_rotated, None),
    "wrong_extension.jpg": (lambda: _file(_picture(104), "PNG"), None),
    "truncated.jpg": (lambda: _file(_picture(105, 128, 128), quality=95)[:-800], "truncated|broken"),
    "pixel.png": (lambda: _file(_picture(106, 1, 1), "PNG"), "1 x 1 pixels: want a side of at least 8"),
    "bomb.png": (_bomb, "decompression bomb"),
    "page.jpg": (lambda: b"<html>404</html>", "no image"),
    "empty.jpg": (lambda: b"", "empty file"),
}

# Name -> the caption, and why it is skipped.
BAD_CAPTIONS = {
    "empty": (b"  ", "empty"),
    "enormous": (b"page " * 4000, "19,999 characters; more than 10,000"),
    "latin": ("straße".encode("latin-1"), "not UTF-8"),
}


def _good(number: int) -> tuple[bytes, bytes]:
    return _file(_picture(number)), f"Photo {number}".encode()


def _good_ones() -> Pairs:
    return {f"good{number:02d}.jpg": _good(number) for number in range(NUM_GOOD)}


def _write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _members(name: str, image: bytes, caption: bytes | None) -> list[tuple[str, bytes]]:
    text = [] if caption is None else [(f"{Path(name).stem}.txt", caption)]
    return [(name, image), *text]


def _write_raw(form: str, raw: Path, pairs: Pairs) -> list[object]:
    """Write samples in the form of a set; return the arguments that prepare them, all but --out."""
    if form == "img2dataset":
        _write_tar(raw / "00000.tar", [m for name, pair in pairs.items() for m in _members(name, *pair)])
        return ["img2dataset", "--input", raw, "--workers", 1]
    (raw / "images").mkdir(parents=True)
    rows = [b"image,caption\n"]
    for name, (image, caption) in pairs.items():
        (raw / "images" / name).write_bytes(image)
        rows.append(name.encode() + b"," + caption + b"\n")
    (raw / "captions.csv").write_bytes(b"".join(rows))
    arguments = ["--images", raw / "images", "--captions", raw / "captions.csv"]
    return ["image-folder", *arguments, "--valid-fraction", 0, "--vocab-size", 0, "--workers", 1]


def _skipped(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


def _counts(out: Path) -> dict[str, int]:
    return json.loads((out / "prepare.json").read_text())["splits"]["train"]


def _by_key(out: Path) -> dict[str, bytes]:
    return {sample.key: sample.image for sample in open_split(out, "train")}


forms = pytest.mark.parametrize("form", ["image-folder", "img2dataset"])


@forms
def test_odd_images(tmp_path, run_prepare, form: str) -> None:
    odd = {name: (make(), name.encode()) for name, (make, _) in ODD_IMAGES.items()}
    arguments = _write_raw(form, tmp_path / "raw", {**odd, **_good_ones()})
    run_prepare(*arguments, "--out", tmp_path / "out", "--max-bad-fraction", 0.2)
    expected = {Path(name).stem: reason for name, (_, reason) in ODD_IMAGES.items()}
    bad = {name for name, reason in expected.items() if reason is not None}
    images = _by_key(tmp_path / "out")
    assert set(images) == {f"good{n:02d}" for n in range(NUM_GOOD)} | set(expected) - bad
    for line in _skipped(tmp_path / "out"):
        name = Path(line["key"].rpartition(" ")[2]).stem
        bad.remove(name)
        assert (line["split"], line["what"]) == ("train", "sample")
        assert line["reason"] and any(part in line["reason"] for part in expected[name].split("|")), line
    assert not bad
    counted = {"images": NUM_GOOD + 5, "captions": NUM_GOOD + 5, **NOTHING, "skipped": 5}
    assert _counts(tmp_path / "out") == counted
    for stem, original in (("cmyk", 102), ("gray", 103), ("wrong_extension", 104)):
        wanted = _picture(original).convert("L" if stem == "gray" else "RGB").convert("RGB")
        assert _difference(decode(images[stem]), wanted) < 6
    assert _difference(decode(images["rotated"]), _picture(100).transpose(Image.Transpose.ROTATE_270)) < 6
    palette = Image.open(io.BytesIO(odd["palette_with_alpha.png"][0])).convert("RGBA")
    white = Image.new("RGBA", palette.size, "white")
    white.alpha_composite(palette)
    assert _difference(decode(images["palette_with_alpha"]), white.convert("RGB")) < 1


def _difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference of 8-bit values."""
    assert (a.mode, a.size) == (b.mode, b.size)
    return float(np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).mean())


def test_odd_images_are_shrunk_upright(tmp_path, run_prepare) -> None:
    odd = {name: (make(), name.encode()) for name, (make, reason) in ODD_IMAGES.items() if reason is None}
    arguments = _write_raw("image-folder", tmp_path / "raw", odd)
    run_prepare(*arguments, "--out", tmp_path / "out", "--image-size", 8)
    for key, data in _by_key(tmp_path / "out").items():
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (8, 12) if key == "rotated" else (12, 8))
        assert not image.getexif()
    assert _counts(tmp_path / "out")["images"] == 5


@forms
def test_bad_captions(tmp_path, run_prepare, form: str) -> None:
    bad = {f"{name}.jpg": (_file(_picture(100 + n)), BAD_CAPTIONS[name][0]) for n, name in enumerate(BAD_CAPTIONS)}
    arguments = _write_raw(form, tmp_path / "raw", {**bad, **_good_ones()})
    run_prepare(*arguments, "--out", tmp_path / "out")
    assert set(_by_key(tmp_path / "out")) == {f"good{n:02d}" for n in range(NUM_GOOD)}
    lines = {Path(line["key"].rpartition(" ")[2]).stem: line for line in _skipped(tmp_path / "out")
             if line["what"] == "sample"}  # fmt: skip
    assert set(lines) == set(BAD_CAPTIONS)
    for name, (_, reason) in BAD_CAPTIONS.items():
        assert reason in lines[name]["reason"]
    assert _counts(tmp_path / "out")["skipped"] == len(BAD_CAPTIONS)


def test_image_with_a_good_caption_stays(tmp_path, run_prepare) -> None:
    arguments = _write_raw("image-folder", tmp_path / "raw", _good_ones())
    with open(tmp_path / "raw" / "captions.csv", "ab") as file:
        for caption, _ in BAD_CAPTIONS.values():
            file.write(b"good03.jpg," + caption + b"\n")
        file.write(b"good03.jpg,A second one\n")
    run_prepare(*arguments, "--out", tmp_path / "out")
    samples = {sample.key: sample.captions for sample in open_split(tmp_path / "out", "train")}
    assert samples["good03"] == ("Photo 3", "A second one")
    assert _counts(tmp_path / "out") == {"images": 30, "captions": 31, **NOTHING, "skipped_captions": 3}
    assert [(line["key"], line["what"]) for line in _skipped(tmp_path / "out")] == [
        ("good03", f"caption {number}") for number in (1, 2, 3)
    ]


@forms
def test_missing_image(tmp_path, run_prepare, form: str) -> None:
    arguments = _write_raw(form, tmp_path / "raw", _good_ones())
    if form == "image-folder":
        (tmp_path / "raw" / "images" / "good07.jpg").unlink()
    else:
        pairs = _good_ones().items()
        members = [m for name, pair in pairs for m in _members(name, *pair) if m[0] != "good07.jpg"]
        _write_tar(tmp_path / "raw" / "00000.tar", members)
    run_prepare(*arguments, "--out", tmp_path / "out")
    assert len(open_split(tmp_path / "out", "train")) == NUM_GOOD - 1
    (line,) = _skipped(tmp_path / "out")
    assert "good07" in line["key"] and ("no such file" in line["reason"] or "no image" in line["reason"])


def test_equal_names_in_new_shards(tmp_path, run_prepare) -> None:
    # Names that differ where shards cannot tell them apart.
    pairs = {"a.b.jpg": _good(1), "a_b.jpg": _good(2), **_good_ones()}
    run_prepare(*_write_raw("image-folder", tmp_path / "raw", pairs), "--out", tmp_path / "out")
    images = _by_key(tmp_path / "out")
    assert images["a_b"] == _good(1)[0] and len(images) == NUM_GOOD + 1
    (line,) = _skipped(tmp_path / "out")
    assert line["key"] == "a_b" and "are named a_b" in line["reason"] and str(tmp_path) not in line["reason"]


@pytest.mark.parametrize("apart", [False, True])
def test_equal_names_in_a_tar(tmp_path, run_prepare, apart: bool) -> None:
    pairs = [("same.jpg", *_good(1)), ("same.jpg", *_good(2))]
    pairs += [(name, *pair) for name, pair in _good_ones().items()]
    if apart:
        pairs.append(pairs.pop(1))
    _write_tar(tmp_path / "raw" / "0.tar", [member for pair in pairs for member in _members(*pair)])
    run_prepare("img2dataset", "--input", tmp_path / "raw", "--workers", 1, "--out", tmp_path / "out")
    samples = open_split(tmp_path / "out", "train")
    assert (samples[0].image, samples[0].captions) == (_good(1)[0], ("Photo 1",))
    assert len(samples) == NUM_GOOD + 1
    (line,) = _skipped(tmp_path / "out")
    assert line["key"] == "0.tar: same" and "same name" in line["reason"]


@pytest.mark.parametrize(
    ("where", "lost"),
    [("image", 1), ("between members", 1), ("caption", 1), ("between samples", 1), ("header", 1), ("end mark", 1)],
)
def test_truncated_tar(tmp_path, run_prepare, where: str, lost: int) -> None:
    """The sample before the cut may lack members, so that it is lost whatever is there of it."""
    pairs = list(_good_ones().items())
    tar = tmp_path / "raw" / "0.tar"
    _write_tar(tar, [member for name, pair in pairs for member in _members(name, *pair)])
    with tarfile.open(tar) as archive:
        image, caption, after = (archive.getmember(name) for name in ("good19.jpg", "good19.txt", "good20.jpg"))
        end = archive.getmembers()[-1].offset_data + 512
    cut = {
        "image": image.offset_data + 100,
        "between members": caption.offset,
        "caption": caption.offset_data + 3,
        "between samples": after.offset,
        "header": after.offset + 100,
        "end mark": end,
    }[where]
    tar.write_bytes(tar.read_bytes()[:cut])
    _write_tar(tmp_path / "raw" / "1.tar", _members("whole.jpg", *_good(50)))
    before = tar.read_bytes()
    run_prepare("img2dataset", "--input", tmp_path / "raw", "--workers", 1, "--out", tmp_path / "out")
    names = [name for name, _ in pairs][: (NUM_GOOD if where == "end mark" else 20) - lost]
    samples = list(open_split(tmp_path / "out", "train"))
    assert [sample.key for sample in samples] == [Path(name).stem for name in names] + ["whole"]
    assert all(len(sample.captions) == 1 for sample in samples)
    (line,) = _skipped(tmp_path / "out")
    assert line["key"].startswith("0.tar: good") and "0.tar is cut off" in line["reason"]
    assert tar.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, b"\x1f\x8b" + bytes(2000)])
def test_file_that_is_no_tar(tmp_path, run_prepare, content: bytes) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "0.tar").write_bytes(content)
    arguments = ["img2dataset", "--input", tmp_path / "raw", "--workers", 1, "--out", tmp_path / "out"]
    with pytest.raises(UserError, match="split train of img2dataset has no usable sample .*0.tar is no whole tar"):
        run_prepare(*arguments)
    _write_tar(tmp_path / "raw" / "1.tar", [m for name, pair in _good_ones().items() for m in _members(name, *pair)])
    run_prepare(*arguments)
    assert len(open_split(tmp_path / "out", "train")) == NUM_GOOD
    assert [line["key"] for line in _skipped(tmp_path / "out")] == ["0.tar: 0.tar"]


@pytest.mark.parametrize("name", ["../x.jpg", "/tmp/x.jpg", "a/../../x.jpg"])
def test_member_that_leaves_the_folder(tmp_path, run_prepare, folder_bytes, name: str) -> None:
    members = [m for good, pair in _good_ones().items() for m in _members(good, *pair)]
    _write_tar(tmp_path / "raw" / "0.tar", [*members, (name, _good(40)[0]), (f"{name[:-4]}.txt", b"Out")])
    with tarfile.open(tmp_path / "raw" / "0.tar", "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = kind, "../../x.jpg"
            archive.addfile(link)
    before = folder_bytes(tmp_path)
    run_prepare("img2dataset", "--input", tmp_path / "raw", "--workers", 1, "--out", tmp_path / "out")
    assert len(open_split(tmp_path / "out", "train")) == NUM_GOOD
    assert {line["reason"] for line in _skipped(tmp_path / "out")} == {"its name leaves the folder"}
    assert {k: v for k, v in folder_bytes(tmp_path).items() if not k.startswith("out/")} == before
    # The same archive as a source of images is read where it is, too.
    (tmp_path / "captions.csv").write_text(f"image,caption\n{name},Out\ngood01.jpg,In\n")
    arguments = ["--images", tmp_path / "raw" / "0.tar", "--captions", tmp_path / "captions.csv", "--workers", 1]
    run_prepare(
        "image-folder", *arguments, "--valid-fraction", 0, "--vocab-size", 0, "--out", tmp_path / "second",
        "--max-bad-fraction", 1,
    )  # fmt: skip
    there = {k: v for k, v in folder_bytes(tmp_path).items() if k.partition("/")[0] not in ("out", "second")}
    assert there.pop("captions.csv") and there == before


@forms
def test_too_many_bad_ones_stop_the_run(tmp_path, run_prepare, form: str) -> None:
    pairs = {f"bad{number}.jpg": (b"broken", b"Bad") for number in range(10)}
    arguments = _write_raw(form, tmp_path / "raw", {**pairs, **_good_ones()})
    with pytest.raises(UserError) as caught:
        run_prepare(*arguments, "--out", tmp_path / "out", "--max-bad-fraction", 0.2)
    message = str(caught.value)
    assert "\n" not in message
    assert f"split train of {form}: 10 of 40 samples are bad, more than --max-bad-fraction 0.2 allows" in message
    assert "10 skipped, 10 of them: no image" in message
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    run_prepare(*arguments, "--out", tmp_path / "out", "--max-bad-fraction", 0.25)
    assert len(open_split(tmp_path / "out", "train")) == NUM_GOOD


@forms
def test_stale_index(tmp_path, run_prepare, form: str) -> None:
    run_prepare(*_write_raw(form, tmp_path / "raw", _good_ones()), "--out", tmp_path / "out")
    samples = open_split(tmp_path / "out", "train")
    tar = tmp_path / "raw" / "00000.tar" if form == "img2dataset" else tmp_path / "out" / "train" / "000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole + bytes(10240))
    with pytest.raises(UserError, match="00000.tar has .* bytes, but had .* when it was indexed: prepare"):
        open_split(tmp_path / "out", "train")
    # Of the same size, one image's bytes, then one caption's, are others.
    for part in (samples[4].image, b"Photo 4"):
        tar.write_bytes(whole.replace(part, bytes(len(part))))
        again = ShardedSamples(tmp_path / "out" / "train")
        assert [again[n].image for n in (3, 5)] == [samples[n].image for n in (3, 5)]
        with pytest.raises(UserError, match="00000.tar is damaged at sample 4: prepare the data again"):
            again[4]


def _command(arguments: list[object]) -> list[str]:
    return [sys.executable, "-B", "-m", "emkum.cli", "prepare", *map(str, arguments)]


@forms
def test_full_disk(tmp_path, run_prepare, folder_bytes, form: str) -> None:
    """A limit on the size of files answers as a full disk does."""
    pairs = {f"{number:04d}.png": (_file(_picture(number), "PNG"), b"Small") for number in range(1000)}
    if form == "image-folder":
        # The first part stays below the limit, the second does not.
        noise = np.random.default_rng(0).integers(0, 255, (80, 128, 128, 3), dtype=np.uint8)
        pairs |= {f"{1000 + n}.png": (_file(Image.fromarray(image), "PNG"), b"Large") for n, image in enumerate(noise)}
        limit = 3_700_000
    else:
        # Records of the only part are below the limit, the joined index is too; the list of skipped ones is not.
        pairs |= {f"{1000 + number}.png": (b"broken", b"Bad") for number in range(3000)}
        limit = 200_000
    arguments = [*_write_raw(form, tmp_path / "raw", pairs), "--max-bad-fraction", 0.9, "--out", tmp_path / "out"]
    code = "import resource, runpy, sys\n"
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    code += "sys.argv = sys.argv[1:]\nrunpy.run_module('emkum.cli', run_name='__main__')"
    command = [sys.executable, "-B", "-c", code, "emkum", "prepare", *map(str, arguments)]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1, failed.stderr
    message = failed.stderr.strip().splitlines()[-1]
    assert message.startswith("emkum: error: File too large while writing") and "run the same command again" in message
    assert not (tmp_path / "out").exists()
    stage = tmp_path / ".out.partial"
    made = {path.name: path.stat().st_mtime_ns for path in (stage / "train").glob("000000.*")}
    run_prepare(*arguments)
    if form == "image-folder":
        assert {"000000.tar", "000000.part.npy", "000000.part.json"} <= set(made)
        assert (tmp_path / "out" / "train" / "000000.tar").stat().st_mtime_ns == made["000000.tar"]
    assert not stage.exists()
    run_prepare(*arguments[:-1], tmp_path / "fresh")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "fresh")


@forms
def test_killed_run_goes_on(tmp_path, run_prepare, folder_bytes, form: str) -> None:
    if form == "image-folder":
        pairs = {f"{number:04d}.png": (_file(_picture(number), "PNG"), b"Small") for number in range(2200)}
        arguments = _write_raw(form, tmp_path / "raw", pairs)
    else:
        for tar in range(60):
            numbers = range(40 * tar, 40 * tar + 40)
            members = [m for n in numbers for m in _members(f"{n}.jpg", *_good(n))]
            _write_tar(tmp_path / "raw" / f"{tar:05d}.tar", members)
        arguments = ["img2dataset", "--input", tmp_path / "raw"]
    stage = tmp_path / ".out.partial"
    started = subprocess.Popen(
        _command([*arguments, "--workers", 2, "--out", tmp_path / "out"]),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (made := list(stage.glob("train/*.part.json"))) and started.poll() is None:
        time.sleep(0.005)
    workers = [int(pid) for pid in _children(started.pid)]
    os.kill(started.pid, signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert len(workers) >= 2
    deadline = time.monotonic() + 30
    while any(map(_is_alive, workers)):
        assert time.monotonic() < deadline, "workers outlive a killed run"
        time.sleep(0.01)
    stamps = {path: path.stat().st_mtime_ns for path in made}
    (stage / "train" / ".000003.tar.1.tmp").write_bytes(b"half a shard")
    run_prepare(*arguments, "--workers", 1, "--out", tmp_path / "out")
    run_prepare(*arguments, "--workers", 1, "--out", tmp_path / "fresh")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "fresh")
    if form == "image-folder":
        for path, stamp in stamps.items():
            tar = tmp_path / "out" / "train" / f"{path.name[:6]}.tar"
            assert tar.stat().st_mtime_ns <= stamp
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "out", "raw"]


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
