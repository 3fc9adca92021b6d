"""What a scorecard says of leakage, from records and small splits."""

from pathlib import Path
from typing import Any

import pytest

from emkum.commands.leakage import CLEAN, LEAK, NOTE, UNKNOWN, find_leakage, read_lineage
from emkum.data.mixture import MixedSamples
from emkum.data.shards import ShardedSamples, open_split
from emkum.provenance import write_json
from tests.data.test_overlap import write_split


def make_set(folder: Path, name: str, **splits: list[bytes]) -> Path:
    """A prepared set; image ids tell images apart over its splits."""
    known: dict[bytes, int] = {}
    for split, images in splits.items():
        write_split(folder / split, images, [known.setdefault(image, len(known)) for image in images])
    write_json(folder / "prepare.json", {"set": name})
    return folder


def make_run(folder: Path, *sets: Path, more: Any = None, **task: Any) -> Path:
    """A run's record and its checkpoint's file."""
    parts = [open_split(each, "train", require_captions=False) for each in sets]
    data = {"folders": [str(each) for each in sets], "train_hash": MixedSamples(parts).content_hash() if parts else "0"}
    model = {key: task.pop(key) for key in list(task) if key.startswith(("image_", "init_"))}
    options = {"task": task, "model": model, "dataset": {"valid_subset": "valid"}}
    options["checkpoint"] = {"best_checkpoint_metric": "mean_recall", "restore_file": "checkpoint_last.pt"}
    write_json(folder / "run.json", {"options": options, "data": data, "teacher": None, **(more or {})})
    return folder / "checkpoint_best.pt"


def found(checkpoint: Path, samples: ShardedSamples) -> list[tuple[str, str]]:
    return [(each.level, each.text) for each in find_leakage(read_lineage(checkpoint), samples)]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    images = {"train": [b"one", b"two", b"three"], "valid": [b"four", b"two"], "test": [b"five"]}
    return make_set(tmp_path / "pairs", "flickr8k", **images)


def test_splits_of_the_set_that_was_trained_on(pairs: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", pairs)
    assert found(run, open_split(pairs, "train")) == [(LEAK, "this very split was in training (the run)")]
    assert found(run, open_split(pairs, "test")) == [(NOTE, "this set's training split was in training (the run)")]
    assert found(run, open_split(pairs, "valid")) == [
        (NOTE, "1 of its 2 images were in training, byte for byte (the run)"),
        (NOTE, "this set's training split was in training (the run)"),
        (NOTE, "this split chose the checkpoint (the best mean_recall of the run's validations)"),
    ]
    # The last checkpoint is not chosen.
    last = found(run.with_name("checkpoint_last.pt"), open_split(pairs, "valid"))
    assert len(last) == 2


def test_other_sets(pairs: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", pairs, make_set(tmp_path / "more", "coco", train=[b"nine"]))
    clean = make_set(tmp_path / "clean", "cifar10", test=[b"0ne", b"eleven"])
    assert found(run, open_split(clean, "test")) == [
        (CLEAN, "none of its images is, byte for byte, among the 4 of training")
    ]
    again = make_set(tmp_path / "again", "flickr8k", test=[b"small five"])
    assert found(run, open_split(again, "test")) == [
        (NOTE, "images of flickr8k, prepared otherwise, were in training (the run)")
    ]
    inside = make_set(tmp_path / "inside", "image-folder", test=[b"nine", b"two"])
    assert found(run, open_split(inside, "test"))[0] == (
        NOTE, "1 of its 2 images were in training, byte for byte (the run)"
    )  # fmt: skip
    within = make_set(tmp_path / "within", "image-folder", test=[b"three", b"two"])
    assert found(run, open_split(within, "test")) == [(LEAK, "all 2 images of this split were in training (the run)")]


def test_training_data_that_is_gone(pairs: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", pairs)
    moved = pairs.rename(tmp_path / "moved")
    assert found(run, open_split(moved, "train"))[0] == (LEAK, "this very split was in training (the run)")
    assert found(run, open_split(moved, "test"))[0] == (NOTE, "this set's training split was in training (the run)")
    other = make_set(tmp_path / "other", "cifar10", test=[b"one"])
    [(level, text)] = found(run, open_split(other, "test"))
    assert level == UNKNOWN and "not at hand" in text
    # Other data in its place is not that of training.
    make_set(pairs, "flickr8k", train=[b"one", b"2"])
    assert found(run, open_split(other, "test"))[0][0] == UNKNOWN


def test_runs_and_weights_behind_a_run(pairs: Path, tmp_path: Path) -> None:
    labeled = make_set(tmp_path / "labeled", "cifar10", train=[b"red", b"blue"], test=[b"green"])
    start = make_run(tmp_path / "start", labeled, more={"class_names": ["red", "blue"]})
    teacher = make_run(tmp_path / "teacher", labeled, image_encoder="timm:resnet50.a1_in1k", image_weights="hub")
    run = make_run(
        tmp_path / "run", pairs, teacher=f"checkpoint:{teacher.parent}", init_from=str(start.parent), data_fraction=0.5
    )
    assert found(run, open_split(labeled, "train")) == [
        (LEAK, "this very split was in training (the teacher)"),
        (LEAK, "this very split was in training (what it starts from, with labels)"),
        (
            NOTE,
            "timm:resnet50.a1_in1k, the start of the image encoder of the teacher, was trained with labels of "
            "ImageNet-1K (timm's tag)",
        ),
    ]
    assert "(the run; 50 % of what is counted here)" in found(run, open_split(pairs, "test"))[0][1]


def test_public_weights_by_what_is_known_of_their_file(pairs: Path, tmp_path: Path) -> None:
    imagenet = make_set(tmp_path / "imagenet", "imagenet", valid=[b"dog"])

    def texts(**options: Any) -> list[tuple[str, str]]:
        return found(make_run(tmp_path / "run", pairs, **options), open_split(imagenet, "valid"))[:-1]

    name, said = "timm:deit_tiny_patch16_224", "was trained with labels of ImageNet-1K (timm's tag)"
    own = ": this set's training images with their classes"
    both = {"teacher": name, "image_encoder": name, "teacher_weights": "a/m.pt", "image_weights": "a/m.pt"}
    assert texts(**both) == [
        (
            NOTE,
            f"{name}, the teacher and the start of the image encoder, {said}, if m.pt holds what the name says{own}",
        )
    ]
    assert texts(teacher=name, teacher_weights="hub") == [(NOTE, f"{name}, the teacher, {said}{own}")]
    assert texts(teacher=name, teacher_weights="") == []
    assert texts(teacher="self") == []
    assert texts(image_encoder=name, image_weights=None) == []
    assert texts(teacher="timm:vit_base_patch16_dinov3.lvd1689m", teacher_weights="hub")[0][0] == UNKNOWN
    [(level, text)] = texts(teacher="data2vec2:/far/away/base.pt")
    assert level == NOTE and "data2vec2:base.pt" in text and "/far" not in text and "on images of" in text


def test_stored_targets_tell_of_their_teacher_alone(pairs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def cached(identity: str) -> list[tuple[str, str]]:
        run = make_run(folder, pairs, teacher="cached:targets", more={"teacher": {"teacher": identity}})
        return found(run, open_split(pairs, "test"))[1:]

    assert "the teacher, was trained with labels of ImageNet-1K" in cached("timm:deit_tiny_patch16_224")[0][1]
    assert "if its file holds what the name says" in cached("timm:deit_tiny_patch16_224")[0][1]
    assert cached("checkpoint")[0][0] == UNKNOWN
    assert "beit3, the teacher, was trained on COCO with texts" in cached("beit3")[0][1]


def test_a_run_without_a_record(pairs: Path, tmp_path: Path) -> None:
    [(level, text)] = found(tmp_path / "lost" / "checkpoint_best.pt", open_split(pairs, "test"))
    assert level == UNKNOWN and "has no record (run.json)" in text


def test_a_teacher_that_was_made_here_is_known_by_its_record(pairs: Path, tmp_path: Path) -> None:
    """It is read as public weights are, but has seen what its run says, and not what they have."""
    teacher = make_run(tmp_path / "teacher", make_set(tmp_path / "others", "flickr8k", train=[b"ten", b"five"]))
    run = make_run(tmp_path / "run", pairs, teacher=f"data2vec2:{teacher}")
    test = open_split(pairs, "test")
    said = found(run, test)
    assert (LEAK, "all 1 images of this split were in training (the teacher)") in said
    assert not any("ImageNet" in text for _, text in said)
    # Without its record it is taken for what its name says, and the table says so, too.
    (tmp_path / "teacher" / "run.json").unlink()
    [brief] = [each.brief for each in find_leakage(read_lineage(run), test) if "ImageNet" in each.text]
    assert brief == "data2vec2:checkpoint_best.pt (by its name ImageNet-1K images)"
