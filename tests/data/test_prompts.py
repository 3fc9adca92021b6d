"""Names and templates of classes from files of all forms, and what does not fit."""

import json
from pathlib import Path
from typing import Any

import pytest

from emkum.data.labels import read_classes
from emkum.data.prompts import fill, read_prompts
from emkum.errors import UserError
from emkum.prepare.cifar import CIFAR10_CLASSES

CLASSES = {
    "class_name": ["golden_retriever", "crane", "crane", "tench, Tinca tinca"],
    "wnid": ["n1", "n2", "n3", "n4"],
    "group": [0, 1, 2, 3],
}


def prepared(folder: Path, classes: dict[str, Any] = CLASSES) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "classes.json").write_text(json.dumps(classes))
    return folder


def names_of(tmp_path: Path, content: Any, classes: dict[str, Any] = CLASSES) -> list[tuple[str, ...]]:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(content))
    return list(read_prompts(prepared(tmp_path / "set", classes), path).names)


def test_the_set_alone(tmp_path: Path) -> None:
    prompts = read_prompts(prepared(tmp_path / "set"))
    texts, owners = prompts.texts([3, 0])
    assert texts == ["a photo of a tench.", "a photo of a golden retriever."] and owners == [3, 0]
    assert read_classes(tmp_path / "set") == CLASSES


def test_names_and_templates_are_all_combined(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    names = {"n1": ["retriever", "dog {c}"], "n2": "bird", "n3": "machine", "tench": "fish", "other": "never"}
    path.write_text(json.dumps({"classes": names, "templates": ["a {}.", "the {c}, {}"]}))
    prompts = read_prompts(prepared(tmp_path / "set"), path)
    assert prompts.names == (("retriever", "dog {c}"), ("bird",), ("machine",), ("fish",))
    texts, owners = prompts.texts(range(4))
    assert texts[:4] == ["a retriever.", "the retriever, retriever", "a dog {c}.", "the dog {c}, dog {c}"]
    assert texts[4:] == ["a bird.", "the bird, bird", "a machine.", "the machine, machine", "a fish.", "the fish, fish"]
    assert owners == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_places_of_the_name() -> None:
    assert fill("{}{c} {x}", "{}") == "{}{} {x}"


def test_a_list_by_name_or_by_order(tmp_path: Path) -> None:
    simple = {"class_name": ["ant", "bee_fly", "cat"]}
    assert names_of(tmp_path, {"classes": ["Cat", "dog", "bee fly", "ANT"]}, simple) == [
        ("ANT",),
        ("bee fly",),
        ("Cat",),
    ]
    assert names_of(tmp_path, {"classnames": ["insect", "fly", "cat"]}, simple) == [("insect",), ("fly",), ("cat",)]
    # One name that is another class's is a synonym, more of them a wrong order.
    assert names_of(tmp_path, {"classes": ["ant", "bee fly", "bee fly"]}, simple)[2] == ("bee fly",)
    with pytest.raises(UserError, match="lists 'cat' as class 1, in .* it is class 2"):
        names_of(tmp_path, {"classes": ["insect", "cat", "bee fly"]}, simple)


def test_missing_parts_are_the_defaults(tmp_path: Path) -> None:
    own = [("golden retriever",), ("crane",), ("crane",), ("tench",)]
    assert names_of(tmp_path, {"templates": ["{}"]}) == own
    assert names_of(tmp_path, {"classnames": None, "classes": None, "templates": ["{c}"]}) == own
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"classes": ["a", "b", "c", "d"]}))
    assert read_prompts(tmp_path / "set", path).templates == ("a photo of a {}.",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (["a {}"], "is no file of prompts"),
        ({"names": ["a"]}, "is no file of prompts"),
        ({"classes": ["a", "b"]}, "lists 2 classes, .* has 4"),
        ({"classes": ["a", "b", "c", ""]}, "must be a list of names, or an object"),
        ({"classes": "abcd"}, "must be a list of names, or an object"),
        ({"classes": ["a"] * 4, "classnames": ["a"] * 4}, "has both classes and classnames"),
        ({"templates": ["a {}.", "a photo"]}, "template 'a photo' has no place for the class's name"),
        ({"templates": []}, "list of one or more texts"),
        ({"templates": "a {}"}, "list of one or more texts"),
        ({"classes": {"n1": "a", "n2": []}}, "class 'n2' must have a name or a list of names"),
        ({"classes": {"n1": "a", "n2": "b", "crane": "c", "n4": "d"}}, "names no class 'crane' or 'n3' of "),
        ({"classes": {"n1": "a"}}, "names no class 'crane' or 'n2' and 2 more classes of .* has 4"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        names_of(tmp_path, content)
    assert "\n" not in error.value.message and str(tmp_path) in error.value.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "set")
    with pytest.raises(UserError, match="no such file of prompts"):
        read_prompts(folder, tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_prompts(folder, tmp_path / "bad.json")
    with pytest.raises(UserError, match=r"has no classes\.json"):
        read_prompts(tmp_path)


def test_the_prompts_of_clip(tmp_path: Path, shared_data: Path) -> None:
    cifar = read_prompts(
        prepared(tmp_path / "cifar", {"class_name": CIFAR10_CLASSES}), shared_data / "cifar10_prompts.json"
    )
    assert [names[0] for names in cifar.names] == CIFAR10_CLASSES and len(cifar.templates) == 18
    sample = shared_data / "imagenet_sample"
    words = [line.split(" ", 1) for line in (sample / "synset_words.txt").read_text().splitlines()]
    classes = {"class_name": [text for _, text in words], "wnid": [wnid for wnid, _ in words]}
    imagenet = read_prompts(prepared(tmp_path / "imagenet", classes), sample / "clip_prompts.json")
    texts, owners = imagenet.texts(range(1000))
    assert len(texts) == len(owners) == 80_000
    assert texts[owners.index(134)] == "a bad photo of a crane bird."
    # The same list for the set in another order of labels.
    turned = {key: values[::-1] for key, values in classes.items()}
    with pytest.raises(UserError, match="in the order of its labels"):
        read_prompts(prepared(tmp_path / "turned", turned), sample / "clip_prompts.json")
