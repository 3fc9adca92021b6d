"""CIFAR from the official archives, whose pickles must not run, and from image files."""

import io
import json
import pickle
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emkum.data.shards import open_split
from emkum.errors import UserError
from emkum.prepare.cifar import CIFAR10_CLASSES, VERSIONS

ROWS = 4
CIFAR100 = next(version for version in VERSIONS if version.name == "cifar100")


def _python2_pickle(batch: dict[str, Any]) -> bytes:
    """What Python 2 and numpy 1 wrote, protocol 2: strings, lists of numbers, and arrays of bytes."""

    def string(value: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def array(value: np.ndarray) -> bytes:
        shape = b"".join(map(number, value.shape))
        begin = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        begin += number(0) + b"\x85" + string(b"b") + b"\x87R"
        dtype = b"cnumpy\ndtype\n" + string(b"u1") + number(0) + number(1) + b"\x87R"
        dtype += b"(" + number(3) + string(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
        return begin + b"(" + number(1) + shape + b"\x86" + dtype + b"\x89" + string(value.tobytes()) + b"tb"

    items = b""
    for name, value in batch.items():
        items += string(name.encode())
        if isinstance(value, np.ndarray):
            items += array(value)
        elif isinstance(value, list):
            items += b"](" + b"".join(map(number, value)) + b"e"
        else:
            items += string(value)
    return b"\x80\x02}(" + items + b"u."


def _pixels(seed: int, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 3072), dtype=np.uint8)


def _tar_gz(path: Path, contents: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
LABELS = {name: [(3 * seed + row) % 10 for row in range(ROWS)] for seed, name in enumerate(BATCHES)}


def _python_batches() -> dict[str, bytes]:
    batches = {
        name: _python2_pickle(
            {"batch_label": b"training batch", "labels": LABELS[name], "data": _pixels(seed), "filenames": b"x"}
        )
        for seed, name in enumerate(BATCHES)
    }
    return {f"cifar-10-batches-py/{name}": batch for name, batch in batches.items()} | {
        "cifar-10-batches-py/batches.meta": b"not read",
        "cifar-10-batches-py/readme.html": b"<html>",
    }


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """CIFAR-10 in both archives and unpacked, four images a batch."""
    folder = tmp_path / "raw"
    folder.mkdir()
    _tar_gz(folder / "cifar-10-python.tar.gz", _python_batches())
    with tarfile.open(folder / "cifar-10-python.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    binary = {
        name: np.hstack([np.array(LABELS[name], dtype=np.uint8)[:, None], _pixels(seed)]).tobytes()
        for seed, name in enumerate(BATCHES)
    }
    _tar_gz(
        folder / "cifar-10-binary.tar.gz",
        {f"cifar-10-batches-bin/{name}.bin": content for name, content in binary.items()},
    )
    return folder


def _run(run_prepare, name: str, path: Path, out: Path, **options: object) -> None:
    more = [text for option, value in options.items() for text in (f"--{option.replace('_', '-')}", value)]
    run_prepare(name, "--input", path, "--out", out, *more)


def test_the_pickles_of_these_tests_are_like_the_official_ones() -> None:
    batch = _python_batches()["cifar-10-batches-py/data_batch_2"]
    assert batch.startswith(b"\x80\x02}") and b"cnumpy.core.multiarray\n_reconstruct\n" in batch
    found = pickle.loads(batch, encoding="bytes")
    assert found[b"labels"] == LABELS["data_batch_2"]
    np.testing.assert_array_equal(found[b"data"], _pixels(1))


def test_both_archives_and_the_unpacked_one_give_the_same_samples(raw, tmp_path, run_prepare, folder_bytes) -> None:
    forms = ["cifar-10-python.tar.gz", "cifar-10-binary.tar.gz", "cifar-10-batches-py"]
    for form in forms:
        _run(run_prepare, "cifar10", raw / form, tmp_path / form, workers=2 if form == forms[0] else 1)
    outs = [folder_bytes(tmp_path / form) for form in forms]
    # They were made by two processes, by one, and by one.
    for out in outs:
        record = json.loads(out.pop("prepare.json"))
        assert {split: counts["images"] for split, counts in record["splits"].items()} == {"train": 20, "test": 4}
    assert outs[0] == outs[1] == outs[2]
    assert json.loads(outs[0]["classes.json"]) == {"class_name": CIFAR10_CLASSES}
    labels = [label for name in BATCHES[:5] for label in LABELS[name]]
    pixels = np.concatenate([_pixels(seed) for seed in range(5)])
    samples = open_split(tmp_path / forms[0], "train", require_captions=False)
    for number, sample in enumerate(samples):
        assert (sample.key, sample.captions) == (f"{number:05d}", ())
        assert sample.meta == {"label": labels[number], "class_name": CIFAR10_CLASSES[labels[number]]}
        image = Image.open(io.BytesIO(sample.image))
        assert (image.format, image.size, image.mode) == ("PNG", (32, 32), "RGB")
        np.testing.assert_array_equal(np.asarray(image).transpose(2, 0, 1).reshape(-1), pixels[number])


def test_items_are_read_by_range(raw, tmp_path, run_prepare) -> None:
    _run(run_prepare, "cifar10", raw / "cifar-10-binary.tar.gz", tmp_path / "out", limit=3, workers=1)
    for split, name in (("train", "data_batch_1"), ("test", "test_batch")):
        samples = open_split(tmp_path / "out", split, require_captions=False)
        assert [sample.meta["label"] for sample in samples] == LABELS[name][:3]


def test_second_run_does_nothing(raw, tmp_path, run_prepare, capsys, folder_bytes) -> None:
    path = raw / "cifar-10-python.tar.gz"
    _run(run_prepare, "cifar10", path, tmp_path / "out", workers=1)
    before = folder_bytes(tmp_path / "out")
    capsys.readouterr()
    _run(run_prepare, "cifar10", path, tmp_path / "out", workers=1)
    assert "nothing to do" in capsys.readouterr().out
    assert folder_bytes(tmp_path / "out") == before


def _cifar100(folder: Path, python: bool, labels: dict[str, list[int]], coarse: dict[str, list[int]]) -> Path:
    contents = {}
    for seed, split in enumerate(("train", "test")):
        pixels = _pixels(seed, len(labels[split]))
        if python:
            batch = {"filenames": b"x", "fine_labels": labels[split], "coarse_labels": coarse[split], "data": pixels}
            contents[f"cifar-100-python/{split}"] = _python2_pickle(batch)
        else:
            both = np.array([coarse[split], labels[split]], dtype=np.uint8).T
            contents[f"cifar-100-binary/{split}.bin"] = np.hstack([both, pixels]).tobytes()
    path = folder / f"cifar-100-{'python' if python else 'binary'}.tar.gz"
    _tar_gz(path, contents)
    return path


def test_cifar100_has_superclasses(tmp_path, run_prepare, folder_bytes) -> None:
    # Labels and superclasses as the data set's page names them, written out: apple, beaver, maple tree, worm.
    labels, coarse = {"train": [0, 4, 47, 99], "test": [47, 0]}, {"train": [4, 0, 17, 13], "test": [17, 4]}
    outs = []
    for python in (True, False):
        out = tmp_path / str(python)
        _run(run_prepare, "cifar100", _cifar100(tmp_path, python, labels, coarse), out, workers=1)
        outs.append(folder_bytes(out) | {"prepare.json": b""})
    assert outs[0] == outs[1]
    samples = open_split(tmp_path / "True", "train", require_captions=False)
    assert samples[2].meta == {
        "label": 47,
        "class_name": "maple_tree",
        "coarse_label": 17,
        "coarse_name": "trees",
    }
    names = ["fruit_and_vegetables", "aquatic_mammals", "trees", "non-insect_invertebrates"]
    assert [sample.meta["coarse_name"] for sample in samples] == names
    classes = json.loads((tmp_path / "True" / "classes.json").read_text())
    assert len(classes["class_name"]) == 100 and len(set(classes["coarse_name"])) == 20
    assert [classes["coarse_label"].count(label) for label in range(20)] == [5] * 20
    coarse["train"][1] = 1
    with pytest.raises(UserError, match="train.bin is damaged: row 1 has superclass 1, .* its label 4"):
        _run(run_prepare, "cifar100", _cifar100(tmp_path, False, labels, coarse), tmp_path / "out", workers=1)


def _reduce(function: bytes, argument: str) -> bytes:
    return b"\x80\x02c" + function + b"\n(U" + bytes([len(argument)]) + argument.encode() + b"tR."


def _attacks(target: Path) -> dict[str, bytes]:
    """Pickles that would make the file `target`, or call something else, if they were run."""
    command = f"touch {target}"
    assert len(command) < 256
    nested = _python2_pickle({"labels": [1] * ROWS, "data": _pixels(0)})[:-2]
    nested += b"U\x04evil" + _reduce(b"posix\nsystem", command)[2:-1] + b"u."
    return {
        "system": _reduce(b"posix\nsystem", command),
        "in a good batch": nested,
        "eval": _reduce(b"__builtin__\neval", f"open({str(target)!r},'w')"),
        "numpy's own": _reduce(b"numpy.testing._private.utils\nrunstring", command),
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93(tR.",
        "known class as code": b"\x80\x02cnumpy\nndarray\n(tR.",
        "state of a class": b"\x80\x02cnumpy\ndtype\n}U\x01aK\x01sb.",
        "instance": b"(S'" + command.encode() + b"'\niposix\nsystem\n.",
        "persistent": b"P1\n.",
    }


@pytest.mark.parametrize("attack", list(_attacks(Path("x"))))
def test_pickled_code_never_runs(raw, tmp_path, run_prepare, attack) -> None:
    target = tmp_path / "run"
    folder = raw / "cifar-10-batches-py"
    (folder / "data_batch_1").write_bytes(_attacks(target)[attack])
    with pytest.raises(UserError, match="data_batch_1 is damaged") as caught:
        _run(run_prepare, "cifar10", folder, tmp_path / "out", workers=1)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_the_attacks_are_real(tmp_path) -> None:
    for attack in ("system", "in a good batch", "eval", "instance"):
        target = tmp_path / attack.replace(" ", "_")
        pickle.loads(_attacks(target)[attack], encoding="bytes")
        assert target.exists()


def _spoil(raw: Path, what: str) -> Path:
    """Break one thing; return the input."""
    python, binary = raw / "cifar-10-batches-py", raw / "bin"
    with tarfile.open(raw / "cifar-10-binary.tar.gz") as archive:
        archive.extractall(binary, filter="data")
    batch = binary / "cifar-10-batches-bin" / "data_batch_3.bin"
    rows = {"labels": LABELS["data_batch_3"], "data": _pixels(2)}
    if what == "missing batch":
        (python / "data_batch_3").unlink()
        return python
    if what == "cut off":
        batch.write_bytes(batch.read_bytes()[:-1])
    elif what == "empty":
        batch.write_bytes(b"")
    elif what == "label out of range":
        batch.write_bytes(b"\x0a" + batch.read_bytes()[1:])
    elif what == "wrong set":
        return _cifar100(raw, True, {"train": [0], "test": [0]}, {"train": [4], "test": [4]})
    elif what == "archive cut off":
        path = raw / "cifar-10-python.tar.gz"
        path.write_bytes(path.read_bytes()[:-2000])
        return path
    elif what == "no such file":
        return raw / "cifar.tar.gz"
    elif what == "no archive":
        (raw / "cifar.tar.gz").write_bytes(b"no archive")
        return raw / "cifar.tar.gz"
    elif what == "no images":
        (raw / "empty").mkdir()
        return raw / "empty"
    else:
        rows = {
            "too few labels": rows | {"labels": [1]},
            "no labels": {"data": rows["data"]},
            "no data": {"labels": rows["labels"]},
            "narrow rows": rows | {"data": rows["data"][:, :-1]},
            "negative label": rows | {"labels": [0, 1, -1, 2]},
        }[what]
        (python / "data_batch_3").write_bytes(_python2_pickle(rows))
        return python
    return binary


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing batch", "cifar-10-batches-py lacks data_batch_3 of CIFAR-10"),
        ("cut off", "data_batch_3.bin is damaged: 12,291 bytes are no whole rows of 3,073"),
        ("empty", "data_batch_3.bin is damaged: 0 bytes"),
        ("label out of range", r"data_batch_3.bin is damaged: label 10 of row 0 is not in 0 \.\.\. 9"),
        ("wrong set", "cifar-100-python.tar.gz is no archive of CIFAR-10: want a tar with the files data_batch_1"),
        ("archive cut off", "cifar-10-python.tar.gz cannot be read"),
        ("no such file", "--input: there is no folder, zip or tar .*cifar.tar.gz"),
        ("no archive", "cifar.tar.gz is no archive of CIFAR-10"),
        ("no images", "split train of cifar10 has no usable sample"),
        ("too few labels", "data_batch_3 is damaged: want a list of 4 whole numbers as b'labels'"),
        ("no labels", "data_batch_3 is damaged: want a list of 4"),
        ("no data", "data_batch_3 is damaged: want an array as b'data'"),
        ("narrow rows", "data_batch_3 is damaged: want rows of 3,072 bytes"),
        ("negative label", "data_batch_3 is damaged: label -1 of row 2"),
    ],
)
def test_mistakes_are_named_in_one_line_and_leave_nothing(raw, tmp_path, run_prepare, what, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        _run(run_prepare, "cifar10", _spoil(raw, what), tmp_path / "out", workers=1)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def _images(folder: Path) -> Path:
    for split in ("train", "test"):
        for name in ("airplane", "truck"):
            (folder / split / name).mkdir(parents=True)
            Image.fromarray(_pixels(0, 1).reshape(32, 32, 3)).save(folder / split / name / "0001.jpg")
    return folder


def test_unknown_class_folder(tmp_path, run_prepare) -> None:
    folder = _images(tmp_path / "images")
    _run(run_prepare, "cifar10", folder, tmp_path / "out", workers=1)
    samples = open_split(tmp_path / "out", "test", require_captions=False)
    assert [(sample.key, sample.meta["label"]) for sample in samples] == [("airplane_0001", 0), ("truck_0001", 9)]
    shutil.move(folder / "test" / "truck", folder / "test" / "lorry")
    with pytest.raises(UserError, match="test/lorry/0001.jpg is in no class folder; want one of airplane, automobile"):
        _run(run_prepare, "cifar10", folder, tmp_path / "other", workers=1)


def test_real_images(shared_data: Path, tmp_path: Path, run_prepare) -> None:
    source = shared_data / "cifar10" / "images.zip"
    _run(run_prepare, "cifar10", source, tmp_path / "out", workers=1)
    with zipfile.ZipFile(source) as archive:
        for split, size in (("train", 500), ("test", 100)):
            samples = open_split(tmp_path / "out", split, require_captions=False)
            labels = [sample.meta["label"] for sample in samples]
            assert labels == list(range(10)) * size
            for sample in (samples[0], samples[17], samples[-1]):
                name = CIFAR10_CLASSES[sample.meta["label"]]
                assert sample.meta["class_name"] == name
                stem = sample.key.removeprefix(f"{name}_")
                assert sample.image == archive.read(f"{split}/{name}/{stem}.jpg")
