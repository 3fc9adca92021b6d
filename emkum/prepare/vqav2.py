"""VQA v2 (Goyal et al., 2017): questions about COCO's photos, with ten answers each."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from emkum.errors import UserError
from emkum.prepare.coco import file_names
from emkum.prepare.common import add_common_arguments, add_set_parser, run_set
from emkum.prepare.photos import PhotoFiles, add_images_argument, field_of, read_json
from emkum.prepare.raw_set import ImageSet, RawSample, Skipped
from emkum.prepare.sources import assert_disjoint, parse_splits


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `vqav2`."""
    parser = add_set_parser(
        subparsers,
        "vqav2",
        help="VQA v2: COCO's photos with questions and answers",
        description="VQA v2: one sample an image, without captions. Its JSON holds the image's questions:\n"
        "{question_id, question, question_type, answer_type, answers (ten texts), answer (the commonest of them)}, of\n"
        "test images question_id and question alone. The files of the photos may have the names of 2014/2015\n"
        "(COCO_val2014_000000000042.jpg) or of 2017 (000000000042.jpg).",
        example="  emkum prepare vqav2 --images train2014.zip val2014.zip \\\n"
        "      --questions train=v2_OpenEnded_mscoco_train2014_questions.json \\\n"
        "      --questions valid=v2_OpenEnded_mscoco_val2014_questions.json \\\n"
        "      --annotations train=v2_mscoco_train2014_annotations.json \\\n"
        "      --annotations valid=v2_mscoco_val2014_annotations.json --out data/vqav2",
    )
    add_images_argument(parser)
    parser.add_argument(
        "--questions",
        action="append",
        required=True,
        metavar="NAME=FILE",
        help="v2_OpenEnded_mscoco_*_questions.json; NAME is train, valid (or val, dev) or test; give it once a split",
    )
    parser.add_argument(
        "--annotations",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="v2_mscoco_*_annotations.json, once a split; test alone may do without",
    )
    add_common_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the folder that the arguments of the sub-command describe."""
    questions = parse_splits(args.questions, "--questions")
    annotations = parse_splits(args.annotations, "--annotations")
    run_set(Vqav2(args.images, questions, annotations), args)


class Vqav2(ImageSet):
    """The raw set.

    Args:
        images: folders, zips or tars.
        questions: split -> file of questions.
        annotations: split -> file of answers.

    Raises:
        UserError: a file is missing, malformed or not that of the other's questions, or an image is in two splits.
    """

    name = "vqav2"

    def __init__(self, images: Sequence[Path], questions: Mapping[str, Path], annotations: Mapping[str, Path]) -> None:
        for split in annotations.keys() - questions.keys():
            raise UserError(f"--annotations {split}=... has no --questions {split}=... beside it")
        for split in questions.keys() - annotations.keys() - {"test"}:
            raise UserError(f"--annotations {split}=FILE is missing: only test may do without")
        self.options: dict[str, object] = {}
        self._questions = {name: read_questions(path, annotations.get(name)) for name, path in questions.items()}
        assert_disjoint(self._questions, questions)
        self.counts = {split: len(by_image) for split, by_image in self._questions.items()}
        ids = (image_id for by_image in self._questions.values() for image_id in by_image)
        self._files = PhotoFiles(images, (name for image_id in ids for name in file_names(image_id)))
        self.sources = {f"questions {split}": path for split, path in questions.items()}
        self.sources |= {f"annotations {split}": path for split, path in annotations.items()} | self._files.sources

    def samples(self, split: str, start: int, stop: int) -> Iterator[RawSample | Skipped]:
        """In the order in which the images come in the questions."""
        for image_id, packed in islice(self._questions[split].items(), start, stop):
            key = f"{image_id:012d}"
            image = self._files.read(key, *file_names(image_id))
            if isinstance(image, Skipped):
                yield image
            else:
                yield RawSample(key, image, image_id=image_id, meta={"questions": json.loads(packed)})


def read_questions(questions: Path, annotations: Path | None) -> dict[int, bytes]:
    """JSON of each image's list of questions: as objects those of the whole set would take gigabytes.

    Args:
        questions: file of the questions.
        annotations: file of their answers; None = they have none.

    Raises:
        UserError: a file is missing or malformed, a question is listed twice, or in one of two files alone.
    """
    answers = {} if annotations is None else read_answers(annotations)
    by_image: dict[int, list[bytes]] = {}
    seen: set[int] = set()
    for number, entry in enumerate(field_of(read_json(questions), "questions", list, questions)):
        where = f"{questions}, questions[{number}]"
        question_id = field_of(entry, "question_id", int, where)
        if question_id in seen:
            raise UserError(f"{where}: question {question_id} is listed twice")
        seen.add(question_id)
        question: dict[str, Any] = {"question_id": question_id, "question": field_of(entry, "question", str, where)}
        question |= json.loads(answers.get(question_id, b"{}"))
        by_image.setdefault(field_of(entry, "image_id", int, where), []).append(_pack(question))
    one_sided = seen ^ answers.keys() if annotations is not None else ()
    if one_sided:
        raise UserError(
            f"{annotations} does not belong to {questions}: {len(one_sided)} question ids are in one of them alone, "
            f"such as {min(one_sided)}"
        )
    if not by_image:
        raise UserError(f"{questions} holds no questions")
    return {image_id: b"[" + b",".join(packed) + b"]" for image_id, packed in by_image.items()}


def read_answers(path: Path) -> dict[int, bytes]:
    """JSON of what each question's annotation adds to it: question_type, answer_type, answers and answer.

    Raises:
        UserError: the file is missing or malformed.
    """
    # Each of the ten answers becomes its text while the file is parsed: as objects they would take gigabytes.
    content = read_json(path, lambda entry: entry["answer"] if entry.keys() >= {"answer", "answer_id"} else entry)
    answers = {}
    for number, entry in enumerate(field_of(content, "annotations", list, path)):
        where = f"{path}, annotations[{number}]"
        texts = field_of(entry, "answers", list, where)
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: want answers with answer and answer_id")
        added = {name: field_of(entry, name, str, where) for name in ("question_type", "answer_type")}
        answer = field_of(entry, "multiple_choice_answer", str, where)
        answers[field_of(entry, "question_id", int, where)] = _pack({**added, "answers": texts, "answer": answer})
    return answers


def _pack(value: dict[str, Any]) -> bytes:
    # What was not UTF-8 becomes a question mark: such texts cannot be stored.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", errors="replace")
