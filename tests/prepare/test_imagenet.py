"""ImageNet from raw files in the shapes that people have."""

import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from emkum.data.shards import open_split
from emkum.errors import UserError

# Not in alphabetical order: labels are places in the list.
WORDS = {"n02119789": "kit fox, Vulpes macrotis", "n01440764": "tench, Tinca tinca", "n01751748": "sea snake"}
# In the devkit's own order, which is another; 1001 and up are no classes.
DEVKIT = {1: "n01751748", 2: "n02119789", 3: "n01440764", 1001: "n00004475"}
PER_CLASS = 3
VALID = ["n01440764", "n01751748", "n01751748", "n02119789", "n01440764"]


def _jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def _tar(contents: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


TRAIN = {
    f"{wnid}_{10 * number + place}": _jpeg(100 * number + place)
    for number, wnid in enumerate(sorted(WORDS))
    for place in range(PER_CLASS)
}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Train images in four forms, validation images in two, and labels for the flat one in four."""
    folder = tmp_path / "raw"
    by_class = {wnid: {f"{k}.JPEG": v for k, v in TRAIN.items() if k.startswith(wnid)} for wnid in WORDS}
    tars = {f"{wnid}.tar": _tar(images) for wnid, images in by_class.items()}
    (folder / "tars").mkdir(parents=True)
    for name, content in tars.items():
        (folder / "tars" / name).write_bytes(content)
    (folder / "ILSVRC2012_img_train.tar").write_bytes(_tar(tars))
    for wnid, images in by_class.items():
        (folder / "train" / wnid).mkdir(parents=True)
        for name, content in images.items():
            (folder / "train" / wnid / name).write_bytes(content)
    (folder / "train" / "readme.txt").write_text("no image")
    with zipfile.ZipFile(folder / "flat.zip", "w") as archive:
        for name, content in TRAIN.items():
            archive.writestr(f"{name}.JPEG", content)

    valid = {f"ILSVRC2012_val_{number:08d}.JPEG": _jpeg(1000 + number) for number in range(1, len(VALID) + 1)}
    (folder / "val.tar").write_bytes(_tar(valid))
    for wnid, (name, content) in zip(VALID, valid.items(), strict=True):
        (folder / "val" / wnid).mkdir(parents=True, exist_ok=True)
        (folder / "val" / wnid / name).write_bytes(content)
    numbers = {wnid: number for number, wnid in DEVKIT.items()}
    (folder / "ground_truth.txt").write_text("".join(f"{numbers[wnid]}\n" for wnid in VALID))
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)]
    synsets = np.array([(number, wnid, "words") for number, wnid in DEVKIT.items()], dtype=fields)
    savemat(folder / "meta.mat", {"synsets": synsets.reshape(-1, 1)})
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in VALID))
    (folder / "val.txt").write_text(
        "".join(f"{name} {list(WORDS).index(wnid)}\n" for wnid, name in zip(VALID, valid, strict=True))
    )
    boxes = [f"{name[:-5]},{wnid} 1 2 30 40 {wnid} 5 6 7 8 \n" for wnid, name in zip(VALID, valid, strict=True)]
    (folder / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(reversed(boxes)))
    (folder / "synset_words.txt").write_text("".join(f"{wnid} {words}\n" for wnid, words in WORDS.items()))
    return folder


def _arguments(raw: Path, out: Path, **changed: str | None) -> list[object]:
    files = {"synsets": "synset_words.txt", "out": out, "workers": 1} | changed
    arguments: list[object] = ["imagenet"]
    for name, value in files.items():
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", raw / value if isinstance(value, str) else value]
    return arguments


@pytest.mark.parametrize("train", ["train", "flat.zip", "tars", "ILSVRC2012_img_train.tar"])
def test_all_forms_of_train_give_the_same_samples(raw, tmp_path, run_prepare, train) -> None:
    before = sorted(raw.rglob("*"))
    run_prepare(*_arguments(raw, tmp_path / "out", train=train))
    samples = list(open_split(tmp_path / "out", "train", require_captions=False))
    # Round the classes, by label; in a class by name.
    wnids = list(WORDS)
    by_class = {wnid: sorted(name for name in TRAIN if name.startswith(wnid)) for wnid in wnids}
    assert [sample.key for sample in samples] == [by_class[wnid][place] for place in range(3) for wnid in wnids]
    for sample in samples:
        wnid = sample.key[:9]
        assert sample.image == TRAIN[sample.key]
        assert sample.meta == {"label": wnids.index(wnid), "wnid": wnid, "class_name": WORDS[wnid]}
        assert sample.captions == ()
    classes = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert classes == {"class_name": list(WORDS.values()), "wnid": wnids}
    assert sorted(raw.rglob("*")) == before


@pytest.mark.parametrize("labels", ["ground_truth.txt", "wnids.txt", "val.txt", "LOC_val_solution.csv", None])
def test_all_forms_of_validation_labels_give_the_same_samples(raw, tmp_path, run_prepare, labels) -> None:
    valid = "val" if labels is None else "val.tar"
    run_prepare(*_arguments(raw, tmp_path / "out", valid=valid, valid_labels=labels))
    samples = list(open_split(tmp_path / "out", "valid", require_captions=False))
    found = {int(sample.key[-8:]): (sample.meta["wnid"], sample.image) for sample in samples}
    assert found == {number: (wnid, _jpeg(1000 + number)) for number, wnid in enumerate(VALID, start=1)}
    assert all(list(WORDS)[sample.meta["label"]] == sample.meta["wnid"] for sample in samples)
    assert [sample.meta["label"] for sample in samples] == [0, 1, 2, 1, 2]


def test_limit_takes_as_many_of_each_class(raw, tmp_path, run_prepare) -> None:
    run_prepare(*_arguments(raw, tmp_path / "out", train="train", limit=6))
    labels = [sample.meta["label"] for sample in open_split(tmp_path / "out", "train", require_captions=False)]
    assert labels == [0, 1, 2, 0, 1, 2]


def test_record_and_second_run(raw, tmp_path, run_prepare, capsys, folder_bytes) -> None:
    arguments = _arguments(raw, tmp_path / "out", train="train", valid="val.tar", val_labels="ground_truth.txt")
    run_prepare(*arguments)
    before = folder_bytes(tmp_path / "out")
    record = json.loads(before["prepare.json"])
    assert {split: counts["images"] for split, counts in record["splits"].items()} == {"train": 9, "valid": 5}
    assert set(record["sources"]) == {"train", "valid", "synsets", "valid labels", "synset numbers"}
    capsys.readouterr()
    run_prepare(*arguments)
    assert "nothing to do" in capsys.readouterr().out
    assert folder_bytes(tmp_path / "out") == before


def test_number_of_processes_changes_nothing(raw, tmp_path, run_prepare, folder_bytes) -> None:
    files = {"train": "ILSVRC2012_img_train.tar", "valid": "val.tar", "valid_labels": "wnids.txt"}
    for workers in (1, 2):
        run_prepare(*_arguments(raw, tmp_path / str(workers), **files, workers=workers))
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "2")


def test_bad_images_are_listed(raw, tmp_path, run_prepare) -> None:
    names = [raw / "train" / name[:9] / f"{name}.JPEG" for name in TRAIN]
    names[0].write_bytes(b"")
    names[4].write_bytes(names[4].read_bytes()[:200])
    run_prepare(*_arguments(raw, tmp_path / "out", train="train", max_bad_fraction=0.5))
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert {line["key"] for line in skipped} == {names[0].stem, names[4].stem}
    assert len(open_split(tmp_path / "out", "train", require_captions=False)) == 7


def _spoil(raw: Path, what: str) -> dict[str, str | None]:
    """Break one thing; return the arguments."""
    arguments: dict[str, str | None] = {"train": "train", "valid": "val.tar", "valid_labels": "ground_truth.txt"}
    truth = raw / "ground_truth.txt"
    if what == "unknown class folder":
        (raw / "train" / "n09999999").mkdir()
        (raw / "train" / "n09999999" / "1.JPEG").write_bytes(_jpeg(0))
    elif what == "image in no class folder":
        (raw / "train" / "1.JPEG").write_bytes(_jpeg(0))
    elif what == "flat without labels":
        arguments["valid_labels"] = None
    elif what == "no meta.mat":
        (raw / "meta.mat").unlink()
    elif what == "another meta.mat":
        (raw / "meta.mat").write_bytes(b"no matrix")
    elif what == "label out of range":
        truth.write_text("1\n1001\n1\n1\n1\n")
    elif what == "label beyond the list":
        arguments["valid_labels"] = "val.txt"
        (raw / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG 3\n")
    elif what == "too few labels":
        truth.write_text("1\n2\n")
    elif what == "no labels":
        truth.write_text("\n")
    elif what == "labels of another kind":
        truth.write_text("a;b\n")
    elif what == "synset twice":
        (raw / "synset_words.txt").write_text("n01440764 tench\nn01440764 tench\n")
    elif what == "synsets without words":
        (raw / "synset_words.txt").write_text("n01440764\n")
    elif what == "no synsets":
        (raw / "synset_words.txt").write_text("")
    elif what == "missing file":
        shutil.rmtree(raw / "train")
    elif what == "empty folder":
        shutil.rmtree(raw / "train")
        (raw / "train").mkdir()
    elif what == "train tar cut off":
        arguments["train"] = "ILSVRC2012_img_train.tar"
        content = (raw / arguments["train"]).read_bytes()
        (raw / arguments["train"]).write_bytes(content[: len(content) // 2])
    elif what == "class tar cut off":
        arguments["train"] = "tars"
        content = (raw / "tars" / "n01440764.tar").read_bytes()
        (raw / "tars" / "n01440764.tar").write_bytes(content[:1000])
    elif what == "nothing to read":
        arguments = {}
    elif what == "labels without images":
        arguments["valid"] = None
    return arguments


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("unknown class folder", "the class n09999999 of n09999999/1.JPEG is not in .*synset_words.txt"),
        ("image in no class folder", "--train: .*train: no class in its folder or name for 1 of its images"),
        ("flat without labels", "--valid: .*val.tar: no class in its folder or name for 5 of its images"),
        ("no meta.mat", "ground_truth.txt has the devkit's own numbers of classes: want its meta.mat beside it"),
        ("another meta.mat", "meta.mat is not the devkit's"),
        ("label out of range", "ground_truth.txt, line 2: '1001' is no class of .*synset_words.txt"),
        ("label beyond the list", "val.txt, line 1: 'ILSVRC2012_val_00000001.JPEG 3' is no class"),
        ("too few labels", "no class in .*ground_truth.txt for 3 of its images, the first ILSVRC2012_val_00000003"),
        ("no labels", "ground_truth.txt holds no labels; want the devkit's"),
        ("labels of another kind", "ground_truth.txt, line 1: 'a;b' is no class"),
        ("synset twice", "synset_words.txt, line 2: want a synset not listed before"),
        ("synsets without words", "synset_words.txt, line 1: want a synset"),
        ("no synsets", "synset_words.txt holds no synsets"),
        ("missing file", "--train: there is no folder, zip or tar"),
        ("empty folder", "--train: .*train holds no images"),
        ("train tar cut off", "--train: .*ILSVRC2012_img_train.tar cannot be read"),
        ("class tar cut off", "--train: .*tars cannot be read: cut off within n01440764_0.JPEG"),
        ("nothing to read", "give --train PATH, --valid PATH or both"),
        ("labels without images", "--valid-labels are those of --valid"),
    ],
)
def test_mistakes_are_named_in_one_line_and_leave_nothing(raw, tmp_path, run_prepare, what, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run_prepare(*_arguments(raw, tmp_path / "out", **_spoil(raw, what)))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_real_sample(shared_data: Path, tmp_path: Path, run_prepare) -> None:
    source = shared_data / "imagenet_sample"
    out = tmp_path / "out"
    run_prepare(
        *("imagenet", "--train", source / "images.zip", "--synsets", source / "synset_words.txt"),
        *("--out", out, "--workers", 1),
    )
    lines = [line.split(" ", 1) for line in (source / "synset_words.txt").read_text().splitlines()]
    samples = open_split(out, "train", require_captions=False)
    assert len(samples) == 1000
    with zipfile.ZipFile(source / "images.zip") as archive:
        for label, (sample, (wnid, words)) in enumerate(zip(samples, lines, strict=True)):
            assert sample.meta == {"label": label, "wnid": wnid, "class_name": words}
            assert sample.key.startswith(wnid)
            assert sample.image == archive.read(f"{sample.key}.jpg")
