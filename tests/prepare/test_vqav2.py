"""VQA v2 from its questions and annotations."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emkum.data.shards import available_splits, open_split
from emkum.errors import UserError
from emkum.prepare.vqav2 import Vqav2

# Image id -> its questions.
QUESTIONS = {458752: ["What is this?", "Is it red?"], 9: ["How many café tables?"], 42: ["Is it day?"], 1: ["Who?"]}
SPLITS = {"train": ("train2014", [458752, 9]), "val": ("val2014", [42]), "test": ("test2015", [1])}


def _jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def _answers(question_id: int) -> list[str]:
    return [f"answer {(question_id + n) % 3}" for n in range(10)]


def _question(image_id: int, place: int, answered: bool = True) -> dict:
    """What the sample holds of a question."""
    question_id = 1000 * image_id + place
    question = {"question_id": question_id, "question": QUESTIONS[image_id][place]}
    if answered:
        question |= {"question_type": "what is", "answer_type": "other", "answers": _answers(question_id)}
        question["answer"] = "answer 0"
    return question


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder of photos a split, questions and annotations in the official layout."""
    folder = tmp_path / "raw"
    for split, (part, ids) in SPLITS.items():
        (folder / part).mkdir(parents=True)
        for i in ids:
            (folder / part / f"COCO_{part}_{i:012d}.jpg").write_bytes(_jpeg(i))
        places = [(i, place) for i in ids for place in range(len(QUESTIONS[i]))]
        # The questions of an image do not follow one another.
        places = places[::2] + places[1::2]
        questions = [
            {"image_id": i, "question": QUESTIONS[i][place], "question_id": 1000 * i + place} for i, place in places
        ]
        annotations = [
            {
                "question_type": "what is",
                "multiple_choice_answer": "answer 0",
                "answers": [
                    {"answer": text, "answer_confidence": "yes", "answer_id": n}
                    for n, text in enumerate(_answers(1000 * i + place), start=1)
                ],
                "image_id": i,
                "answer_type": "other",
                "question_id": 1000 * i + place,
            }
            for i, place in places[::-1]
        ]
        head = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": part, "license": {}}
        (folder / f"{split}_questions.json").write_text(json.dumps({**head, "questions": questions}))
        if split != "test":
            (folder / f"{split}_annotations.json").write_text(json.dumps({**head, "annotations": annotations}))
    return folder


def _arguments(raw: Path, splits: tuple[str, ...] = ("train", "val", "test")) -> list[object]:
    arguments = ["vqav2", "--workers", 1, "--images", *(raw / part for part, _ in SPLITS.values())]
    arguments += [f"--questions={name}={raw / name}_questions.json" for name in splits]
    return arguments + [f"--annotations={name}={raw / name}_annotations.json" for name in splits if name != "test"]


@pytest.mark.parametrize("year", [2014, 2017])
def test_samples(raw, tmp_path, run_prepare, year) -> None:
    arguments = _arguments(raw)
    if year == 2017:
        (raw / "all2017").mkdir()
        for i in QUESTIONS:
            (raw / "all2017" / f"{i:012d}.jpg").write_bytes(_jpeg(i))
        arguments[4:7] = [raw / "all2017"]
    out = tmp_path / "out"
    run_prepare(*arguments, "--out", out)
    assert available_splits(out) == ["train", "valid", "test"]
    for (_, ids), split in zip(SPLITS.values(), available_splits(out), strict=True):
        samples = list(open_split(out, split, require_captions=False))
        assert [(s.key, s.image_id, s.captions, s.image) for s in samples] == [
            (f"{i:012d}", i, (), _jpeg(i)) for i in ids
        ]
        for sample, i in zip(samples, ids, strict=True):
            expected = [_question(i, place, split != "test") for place in range(len(QUESTIONS[i]))]
            assert sample.meta == {"questions": expected}


def test_again_does_nothing(raw, tmp_path, run_prepare, capsys, folder_bytes) -> None:
    run_prepare(*_arguments(raw), "--out", tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    run_prepare(*_arguments(raw), "--out", tmp_path / "out")
    assert "nothing to do" in capsys.readouterr().out
    assert folder_bytes(tmp_path / "out") == before


def test_another_process_reads_the_same_samples(raw) -> None:
    questions, annotations = ({"train": raw / f"train_{name}.json"} for name in ("questions", "annotations"))
    raw_set = Vqav2([raw / "train2014"], questions, annotations)
    samples = list(raw_set.samples("train", 0, 2))
    assert [sample.image_id for sample in samples] == [458752, 9]
    assert list(pickle.loads(pickle.dumps(raw_set)).samples("train", 1, 2)) == samples[1:]


def test_limit_and_image_size(raw, tmp_path, run_prepare) -> None:
    run_prepare(*_arguments(raw), "--limit", 1, "--image-size", 8, "--out", tmp_path / "out")
    (sample,) = open_split(tmp_path / "out", "train", require_captions=False)
    assert (sample.image_id, len(sample.meta["questions"])) == (458752, 2)
    assert Image.open(io.BytesIO(sample.image)).size == (12, 8)


def test_missing_image_is_skipped_and_no_text_stops_the_run(raw, tmp_path, run_prepare) -> None:
    (raw / "train2014" / "COCO_train2014_000000000009.jpg").unlink()
    path = raw / "train_questions.json"
    path.write_bytes(path.read_bytes().replace(b"What is this", b"What is th\xeds").replace(b"red?", b"r\\ud83d?"))
    run_prepare(*_arguments(raw), "--max-bad-fraction", 0.5, "--out", tmp_path / "out")
    (sample,) = open_split(tmp_path / "out", "train", require_captions=False)
    assert [question["question"] for question in sample.meta["questions"]] == ["What is th?s?", "Is it r??"]
    (line,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "000000000009"
    assert json.loads(line)["reason"] == "there is no such file among --images"


def _spoil(raw: Path, what: str) -> None:
    paths = raw / "train_questions.json", raw / "train_annotations.json"
    questions, annotations = (json.loads(path.read_text()) for path in paths)
    if what == "no JSON":
        paths[1].write_text("{")
        return
    if what == "swapped":
        questions, annotations = annotations, questions
    elif what == "no question":
        del questions["questions"][1]["question"]
    elif what == "question twice":
        questions["questions"].append(questions["questions"][0])
    elif what == "no questions":
        questions["questions"], annotations["annotations"] = [], []
    elif what == "unanswered":
        del annotations["annotations"][0]
    elif what == "unasked":
        del questions["questions"][1:]
    elif what == "answers of another kind":
        del annotations["annotations"][2]["answers"][3]["answer_id"]
    elif what == "no answer_type":
        del annotations["annotations"][2]["answer_type"]
    elif what == "image in two splits":
        questions["questions"][0]["image_id"] = 42
    for path, content in zip(paths, (questions, annotations), strict=True):
        path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no JSON", "train_annotations.json is no JSON"),
        ("swapped", "train_annotations.json: want a list named annotations"),
        ("no question", r"train_questions.json, questions\[1\]: want a text named question"),
        ("question twice", r"train_questions.json, questions\[3\]: question 458752000 is listed twice"),
        ("no questions", "train_questions.json holds no questions"),
        ("unanswered", "annotations.json does not belong to .*questions.json: 1 .* alone, such as 458752001"),
        ("unasked", "annotations.json does not belong to .*questions.json: 2 .* alone, such as 9000"),
        ("answers of another kind", r"annotations\[2\]: want answers with answer and answer_id"),
        ("no answer_type", r"train_annotations.json, annotations\[2\]: want a text named answer_type"),
        ("image in two splits", "image 42 is listed twice: in .*train_questions.json and in .*val_questions.json"),
    ],
)
def test_mistakes_in_files_leave_nothing(raw, tmp_path, run_prepare, what, message) -> None:
    _spoil(raw, what)
    with pytest.raises(UserError, match=message) as caught:
        run_prepare(*_arguments(raw), "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_mistakes_in_arguments(raw, tmp_path, run_prepare) -> None:
    out = ["--out", tmp_path / "out"]
    with pytest.raises(UserError, match="--annotations train=FILE is missing: only test may do without"):
        run_prepare(*_arguments(raw, ("train",))[:-1], *out)
    with pytest.raises(UserError, match="--annotations valid=... has no --questions valid=..."):
        run_prepare(*_arguments(raw, ("train",)), f"--annotations=val={raw}/val_annotations.json", *out)
    with pytest.raises(UserError, match="--questions tset=.*: want NAME=FILE with NAME one of train, valid"):
        run_prepare(*_arguments(raw), f"--questions=tset={raw}/test_questions.json", *out)
    with pytest.raises(UserError, match="--annotations train=.*: there is no file"):
        run_prepare(*_arguments(raw, ("test",)), "--annotations=train=none.json", *out)


def test_real_photos(shared_data: Path, tmp_path: Path, run_prepare) -> None:
    annotations = shared_data / "coco_mini" / "annotations" / "captions_val2017.json"
    ids = [entry["id"] for entry in json.loads(annotations.read_text())["images"]]
    questions = [{"image_id": i, "question": "What is this?", "question_id": 1000 * i} for i in ids]
    (tmp_path / "questions.json").write_text(json.dumps({"questions": questions}))
    images = shared_data / "coco_mini" / "images.zip"
    run_prepare("vqav2", "--images", images, f"--questions=test={tmp_path}/questions.json", "--out", tmp_path / "out")
    assert open_split(tmp_path / "out", "test", require_captions=False).image_ids.tolist() == ids
