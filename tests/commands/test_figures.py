"""`emkum figures` and `emkum report` on a student of random weights: what the pictures show, against loops."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from emkum.checkpoint import load
from emkum.cli import main
from emkum.commands.figures_tokens import find_word
from emkum.data.decoding import decode
from emkum.data.shards import open_split
from emkum.errors import UserError
from emkum.layers.nearest_code import NearestCentroid
from emkum.models.teacher_builders import build_teacher
from emkum.objectives.target_codes import write_centroids
from emkum.teachers.base import TeacherConfig, TeacherInput
from tests.commands.small_students import save_student
from tests.figure_checks import assert_readable

SIDE = 32
LOG = [
    ("train_inner", {"kd_image_loss": 2.0, "kd_text_loss": 3.0, "loss": 5.0}),
    ("valid", {"valid_kd_image_loss": 1.5, "valid_kd_text_loss": 2.5, "valid_loss": 4.0, "valid_mean_recall": 7.0}),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, run_prepare: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    run_prepare("scenes", "--out", folder, "--num-images", 24, "--seed", 1, "--image-size", SIDE, "--vocab-size", 110)
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, with a log."""
    folder = save_student(tmp_path_factory.mktemp("run"), data, "itc,cmli", cmli_dim=8)
    lines = [
        f"2026-01-01 00:00:00 | INFO | {tag} | {json.dumps(values | {f'{tag}_num_updates': step, 'num_updates': step})}"
        for step in (1, 2)
        for tag, values in LOG
    ]
    (folder / "train.log").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def draw(data: Path, run: Path, tmp_path: Path, drawn: list[Figure]) -> Callable[..., dict[str, Any]]:
    """A function that runs a kind of figure on the training part and reads what it shows."""

    def command(kind: str, *words: object, checkpoint: Path = run) -> dict[str, Any]:
        torch.set_num_threads(1)
        student = ["--checkpoint", checkpoint, "--data", data, "--split", "train"]
        own = student if kind in ("retrieval", "attention", "matches", "map") else []
        main(["figures", kind, *map(str, [*own, *words]), "--out", str(tmp_path / "figure.png")])
        assert sorted(path.name for path in tmp_path.glob("figure*")) == ["figure.json", "figure.png", "figure.svg"]
        assert_readable(drawn[-1])
        return json.loads((tmp_path / "figure.json").read_text())

    return command


def cosines(run: Path, data: Path) -> tuple[np.ndarray, list[str], list[str], list[int]]:
    """(N, T) of all pairs, keys, captions and their images, one by one."""
    model, samples = load(run), open_split(data, "train")
    images = np.stack([model.encode_image([decode(samples[row].image)])[0].numpy() for row in range(len(samples))])
    captions = [(caption, row) for row in range(len(samples)) for caption in samples[row].captions]
    texts = np.stack([model.encode_text([caption])[0].numpy() for caption, _ in captions])
    keys = [samples[row].key for row in range(len(samples))]
    return images @ texts.T, keys, [caption for caption, _ in captions], [row for _, row in captions]


def test_retrieval(draw: Callable[..., dict], run: Path, data: Path) -> None:
    facts = draw("retrieval", "--examples", 3, "--candidates", 4, "--seed", 5)
    scores, keys, captions, owner = cosines(run, data)
    assert len(facts["i2t"]) == len(facts["t2i"]) == 3
    for example in facts["i2t"]:
        row = keys.index(example["query"])
        order = np.argsort(-scores[row])
        assert example["found"] == [captions[place] for place in order[:4]]
        assert example["rank"] == 1 + min(place for place, caption in enumerate(order) if owner[caption] == row)
    for example in facts["t2i"]:
        order = np.argsort(-scores[:, captions.index(example["query"])])
        assert example["found"] == [keys[place] for place in order[:4]]
    assert draw("retrieval", "--examples", 3, "--candidates", 4, "--seed", 5) == facts
    assert draw("retrieval", "--examples", 3, "--candidates", 4, "--seed", 6)["i2t"] != facts["i2t"]


def test_report(run: Path, data: Path, tmp_path: Path, drawn: list[Figure]) -> None:
    main(["report", f"one={run}", f"two={run}", "--data", str(data), "--split", "train", "--out", str(tmp_path)])
    names = {"report.json", "retrieval.png", "retrieval.svg", "curves.png", "curves.svg"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for figure in drawn:
        assert_readable(figure)
    assert [axes.get_title(loc="left") for axes in drawn[1].axes] == ["mean recall"]


def test_attention(draw: Callable[..., dict], run: Path, data: Path, drawn: list[Figure]) -> None:
    facts = draw("attention", "--examples", 2, "--patch", "2,3", "--layers", "1,last,rollout")
    assert facts["patch"] == [2, 3] and len(facts["images"]) == 2
    model = load(run)
    samples = open_split(data, "train")
    shown = facts["images"][0]
    row = next(row for row in range(len(samples)) if samples[row].key == shown["key"])
    # One block of the encoder and one of the shared encoder: the last layer is what the latter is given.
    captured = {}
    block = model.student.shared_encoder.blocks[0]
    block.attn.qkv.register_forward_hook(lambda module, inputs, output: captured.update(qkv=output))
    next(model.image_outputs([decode(samples[row].image)]))
    query, key, _ = captured["qkv"][0].unflatten(-1, (3, block.attn.num_heads, -1)).permute(1, 2, 0, 3)
    expected = (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1).mean(0)
    for way, token in (("cls", 0), ("token", 1 + 4 + 2)):
        np.testing.assert_allclose(shown["image"]["last layer"][way], expected[token].tolist(), atol=1e-4)
    for layer in ("layer 1", "last layer", "rolled out"):
        assert sum(shown["image"][layer]["cls"]) == pytest.approx(1, abs=0.01)
        assert sum(shown["text"][layer]["token"]) == pytest.approx(1, abs=0.01)
        assert len(shown["text"][layer]["cls"]) == len(shown["tokens"])
    assert len([axes for axes in drawn[-1].axes if len(axes.images) == 2]) == 2 * 2 * 3


def test_matches(draw: Callable[..., dict], run: Path, data: Path) -> None:
    samples = open_split(data, "train")
    key, caption = samples[3].key, samples[3].captions[0]
    facts = draw("matches", "--keys", key)
    assert facts["images"][0]["caption"] == caption and len(facts["images"]) == 1
    model = load(run, objectives=["cmli"])
    objective = model.objectives["cmli"]
    with torch.no_grad():
        patches = objective.image_projection(next(model.image_outputs([decode(samples[3].image)])).tokens[0, 1:])
        output = next(model.text_outputs(model.tokenize([caption])))
        tokens = objective.text_projection(output.output.tokens[0, 1:-1])
    matches = facts["images"][0]["matches"]
    assert [match["token"] for match in matches] == model.tokenizer.texts(model.tokenize([caption])[0][1:-1])
    for match, token in zip(matches, tokens, strict=True):
        similar = [torch.cosine_similarity(token, patch, dim=0).item() for patch in patches]
        best = max(range(16), key=lambda place: similar[place])
        assert match["patch"] == [best // 4 + 1, best % 4 + 1]
        assert match["cosine"] == pytest.approx(similar[best], abs=1e-3)


def test_matches_are_of_the_tokens_that_take_part(draw: Callable[..., dict], data: Path, tmp_path: Path) -> None:
    whole = save_student(tmp_path, data, "itc,cmli", cmli_dim=8)
    matches = draw("matches", "--examples", 1, checkpoint=whole)["images"][0]["matches"]
    # A token that the caption has twice has two matches.
    count = Counter(match["token"] for match in matches)
    every = {match["token"]: match for match in matches if count[match["token"]] == 1}
    assert every
    half = save_student(tmp_path, data, "itc,cmli", cmli_dim=8, cmli_top_fraction=0.5)
    facts = draw("matches", "--examples", 1, checkpoint=half)["images"][0]
    model = load(half, objectives=["cmli"])
    samples = open_split(data, "train")
    row = next(row for row in range(len(samples)) if samples[row].key == facts["key"])
    attention = next(model.image_outputs([decode(samples[row].image)])).cls_attention[0, 1:]
    allowed = {(int(place) // 4 + 1, int(place) % 4 + 1) for place in attention.topk(8).indices}
    assert {tuple(match["patch"]) for match in facts["matches"]} <= allowed
    assert 0 < len(facts["matches"]) < len(model.tokenize([facts["caption"]])[0]) - 2
    for match in facts["matches"]:
        if match["token"] in every and tuple(every[match["token"]]["patch"]) in allowed:
            assert match["cosine"] == pytest.approx(every[match["token"]]["cosine"], abs=1e-3)


def test_map(draw: Callable[..., dict], run: Path, data: Path) -> None:
    facts = draw("map", "--pairs", 3)
    scores, keys, _, owner = cosines(run, data)
    first = [owner.index(row) for row in range(len(keys))]
    square = scores[:, first]
    assert facts["images"] == len(keys) and len(facts["joined"]) == 3 and set(facts["joined"]) <= set(keys)
    assert facts["modality_gap"]["pairs"] == pytest.approx(np.diag(square).mean(), abs=1e-4)
    others = (square.sum() - np.trace(square)) / (len(keys) * (len(keys) - 1))
    assert facts["modality_gap"]["others"] == pytest.approx(others, abs=1e-4)
    assert draw("map", "--examples", 5)["images"] == 5


@pytest.fixture(scope="module")
def codes(data: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Centroids of a small teacher's features, and a quantizer's run with the same codes."""
    folder = tmp_path_factory.mktemp("codes")
    options = TeacherConfig(weights=str(weights), image_size=SIDE)
    teacher = build_teacher("timm:test_vit", options)
    centroids = torch.randn(5, teacher.width, generator=torch.Generator().manual_seed(0))
    write_centroids(folder / "codes.safetensors", centroids, teacher.identity)
    task = {"teacher": "timm:test_vit", "teacher_weights": str(weights), "teacher_image_size": SIDE}
    weight = torch.eye(teacher.width)
    model = {"project.weight": weight, "project.bias": torch.zeros(teacher.width), "codebook.codes": centroids}
    model = {f"quantizer.{name}": value for name, value in model.items()} | {
        "quantizer.codebook.started": torch.tensor(True)
    }
    state = {"cfg": {"task": task}, "model": model, "task_state": {"teacher": teacher.identity}}
    torch.save(state, folder / "checkpoint_last.pt")
    return folder / "codes.safetensors", folder


def test_clusters(draw: Callable[..., dict], codes: tuple[Path, Path], data: Path, weights: Path) -> None:
    centroids, quantizer = codes
    options = ["--teacher", "timm:test_vit", "--teacher-option", f"weights={weights}"]
    options += ["--teacher-option", f"image_size={SIDE}", "--data", data, "--split", "train", "--columns", 3]
    facts = draw("clusters", centroids, *options)
    teacher = build_teacher("timm:test_vit", TeacherConfig(weights=str(weights), image_size=SIDE))
    table = NearestCentroid(5, teacher.width)
    table.fill(centroids=torch.randn(5, teacher.width, generator=torch.Generator().manual_seed(0)))
    samples = open_split(data, "train")
    expected = {}
    for row in range(len(samples)):
        pixels = torch.from_numpy(np.array(decode(samples[row].image))).permute(2, 0, 1)[None]
        batch = TeacherInput(pixels, torch.tensor([0]), torch.tensor([-1]), "test")
        expected[samples[row].key] = int(table(teacher(batch).features))
    assert facts["counts"] == np.bincount(list(expected.values()), minlength=5).tolist()
    assert all(expected[key] == int(code) for code, keys in facts["shown"].items() for key in keys)
    by_cosine = draw("clusters", quantizer, "--data", data, "--split", "train")
    assert sum(by_cosine["counts"]) == len(samples) and by_cosine["used"] >= 1
    assert sum(draw("clusters", quantizer, "--data", data, "--split", "train", "--limit", 4)["counts"]) == 4


def test_curves(draw: Callable[..., dict], run: Path, drawn: list[Figure]) -> None:
    facts = draw("curves", f"one={run}")
    assert facts["keys"] == [["kd_image_loss", "kd_text_loss"]]
    assert list(facts["histories"]) == ["one, training", "one, validation"]
    lines = [[line.get_ydata().tolist() for line in axes.lines] for axes in drawn[-1].axes]
    assert lines == [[[2, 2], [1.5, 1.5]], [[3, 3], [2.5, 2.5]]]
    assert draw("curves", run, "--tags", "valid", "--keys", "loss,mean_recall")["keys"] == ["loss", "mean_recall"]


def test_landscape(draw: Callable[..., dict], tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps({"test": {"mean_recall": 61.5}}))
    table = tmp_path / "models.yaml"
    table.write_text(
        "scores: {coco: 'COCO (%)'}\nmodels:\n"
        "- {name: mine, parameters: 115, pairs: 3.3, coco: mine.json#test/mean_recall}\n"
        "- {name: theirs, parameters: 400, group: others, coco: 70}\n- {name: no score, parameters: 1}\n"
    )
    (tmp_path / "more.csv").write_text("name,parameters,pairs,coco,group\nthird,,12,55.5,others\nfourth,3,,,\n")
    facts = draw("landscape", table, tmp_path / "more.csv", "--score", "coco")
    assert facts["score"] == "COCO (%)"
    models = {model["name"]: (model["score"], model["parameters"], model["pairs"]) for model in facts["models"]}
    assert models == {"mine": (61.5, 115, 3.3), "theirs": (70, 400, None), "third": (55.5, None, 12)}


def test_the_table_of_the_examples(draw: Callable[..., dict]) -> None:
    table = Path(__file__).parents[2] / "examples" / "figures" / "landscape.yaml"
    for score in ("imagenet", "coco", "flickr30k"):
        assert len(draw("landscape", table, "--score", score)["models"]) >= 7


def test_words() -> None:
    tokens = ["a", "bl", "##ue", "\u2581", "##star", "##,", "and", "."]
    assert find_word(tokens, "Blue ") == 1 and find_word(tokens, "star") == 3 and find_word(tokens, "ue") is None
    # The longest one, and of equally long ones the first.
    assert find_word(tokens) == 1 and find_word([]) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attention", "--layers", "9"], "images pass layers 1 to 2; or choose last or rollout"),
        (["attention", "--layers", "first"], "want one to three of last, rollout and numbers"),
        (["attention", "--patch", "5,1"], "each from 1 to 4"),
        (["attention", "--word", "zebra"], "no first caption of split train"),
        (["matches", "--keys", "nothing"], "has no image nothing, but such as"),
        (["retrieval", "--candidates", "9"], "a page has room for 8"),
        (["retrieval", "--examples", "0"], "--examples 0: want 1 or more"),
        (["retrieval", "--split", "nowhere"], "has no split 'nowhere'"),
        (["curves", "nowhere"], "there is no folder nowhere"),
        (["landscape", "nowhere.yaml", "--score", "coco"], "nowhere.yaml"),
    ],
)
def test_mistakes_end_with_one_line(draw: Callable[..., dict], words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        draw(*words)
    assert "\n" not in error.value.message


def test_further_mistakes(
    draw: Callable[..., dict], run: Path, data: Path, codes: tuple[Path, Path], tmp_path: Path
) -> None:
    plain = save_student(tmp_path, data, "itc")
    with pytest.raises(UserError, match="was trained with itc, without the objective cmli"):
        draw("matches", checkpoint=plain)
    multilayer = save_student(tmp_path, data, "itc", shared_kind="mlp", image_layers=1)
    assert draw("attention", "--layers", "last", "--examples", 1, checkpoint=multilayer)
    with pytest.raises(UserError, match="images pass layers 1 to 1"):
        draw("attention", "--layers", "2", checkpoint=multilayer)
    with pytest.raises(UserError, match="another run is called one"):
        draw("curves", f"one={run}", f"one={run}")
    with pytest.raises(UserError, match="--keys lose: the runs logged"):
        draw("curves", run, "--keys", "lose")
    with pytest.raises(UserError, match="--tags test: no such records in .*train.log"):
        draw("curves", run, "--tags", "test")
    centroids, quantizer = codes
    with pytest.raises(UserError, match="name the teacher whose features the codes are of"):
        draw("clusters", centroids, "--data", data)
    with pytest.raises(UserError, match="fitted to another teacher than timm:test_vit .*weights"):
        other = tmp_path / "other.pt"
        state = torch.load(quantizer / "checkpoint_last.pt", weights_only=True)
        state["task_state"]["teacher"]["weights"] = "other"
        torch.save(state, other)
        draw("clusters", other, "--data", data)
    (tmp_path / "bad.csv").write_text("name,parameters,coco\nmine,many,3\n")
    with pytest.raises(UserError, match="bad.csv, model 1: parameters 'many' is no number"):
        draw("landscape", tmp_path / "bad.csv", "--score", "coco")
    (tmp_path / "bad.csv").write_text("name,parameters,coco\nmine,1,3\n")
    with pytest.raises(UserError, match="--score flickr: no model has it .* the tables have coco, name, parameters"):
        draw("landscape", tmp_path / "bad.csv", "--score", "flickr")
