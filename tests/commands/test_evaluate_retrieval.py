"""`emkum evaluate retrieval` on a student of random weights, against pairs that are compared one by one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emkum.checkpoint import load
from emkum.cli import main
from emkum.commands.evaluate import encode_split
from emkum.data.decoding import decode
from emkum.data.shards import open_split
from emkum.data.tokenizers import encode
from emkum.errors import UserError
from emkum.evaluation.pair_scores import cosine_scores
from emkum.evaluation.retrieval import average_median_rank, recall_metrics, retrieval_metrics
from emkum.objectives.late_interaction import late_interaction
from emkum.outputs import PairScores
from tests.commands.small_students import LONGEST, save_student
from tests.evaluation.test_ranks import naive_ranks


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory, run_prepare: Callable[..., None]) -> Path:
    """24 scenes, of which the training part, 19 or so, is scored."""
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    run_prepare("scenes", "--out", folder, "--num-images", 24, "--seed", 1, "--image-size", 32, "--vocab-size", 110)
    return folder


@pytest.fixture(scope="module")
def save_run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that writes a run's folder with a student of random weights, trained with the named objectives."""

    def save(names: str, **options: Any) -> Path:
        return save_student(tmp_path_factory.mktemp("run"), scenes, names, **options)

    return save


@pytest.fixture(scope="module")
def run(save_run: Callable[..., Path]) -> Path:
    return save_run("itc,cmli,itm", cmli_dim=8)


@pytest.fixture
def evaluate(scenes: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function that runs the command on the training part and reads its figures."""

    def command(run: Path, *words: str, split: str = "train") -> dict[str, Any]:
        file = tmp_path / "figures.json"
        options = ["--checkpoint", str(run), "--data", str(scenes), "--split", split, "--json", str(file)]
        torch.set_num_threads(1)
        main(["evaluate", "retrieval", *options, "--batch-size", "8", *words])
        return json.loads(file.read_text())

    return command


def outputs_one_by_one(run: Path, scenes: Path, objective: str) -> tuple[Any, list[Any], list[Any], list[int]]:
    """The objective, and the student's output of each image and of each caption alone, without padding."""
    model = load(run, objectives=[objective])
    samples = open_split(scenes, "train")
    images, texts, owner = [], [], []
    with torch.inference_mode():
        for row in range(len(samples)):
            images += model.image_outputs([decode(samples[row].image)])
            for caption in samples[row].captions:
                ids = torch.tensor([encode(model.tokenizer, caption, LONGEST)])
                texts.append(model.student.encode_text(ids))
                owner.append(row)
    return model.objectives[objective], images, texts, owner


def expected(scores: PairScores, owner: list[int], odds: Tensor | None = None, k: int = 0) -> dict[str, float]:
    """Figures from ranks of loops."""
    images, captions = naive_ranks(scores, torch.tensor(owner), odds, k)
    found = {}
    for way, ranks in (("i2t", images), ("t2i", captions)):
        found |= {f"{way}_r{n}": 100 * sum(rank < n for rank in ranks) / len(ranks) for n in (1, 5, 10)}
        found[f"{way}_mean_rank"] = sum(ranks) / len(ranks) + 1
    return found


def only(figures: dict[str, Any], like: dict[str, float]) -> dict[str, float]:
    return {key: figures[key] for key in like}


def test_cosines_by_default(
    evaluate: Callable[..., dict], run: Path, scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = evaluate(run)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6 and printed[2].startswith("chance") and printed[3].startswith(str(run))
    assert printed[4].startswith("median rank: i2t ") and " of 1 x " in printed[5]
    samples = open_split(scenes, "train")
    encoded = encode_split(load(run), samples)
    want = recall_metrics(encoded.images, encoded.texts, encoded.caption_image)
    score = cosine_scores(encoded.images, encoded.texts)
    assert want == retrieval_metrics(score, encoded.caption_image, len(samples))
    want |= average_median_rank(score, encoded.caption_image, len(samples))
    assert figures == pytest.approx(want | {"scores": "cls", "rerank": None, "split": "train"})
    assert figures["num_images"] == len(samples) == figures["average_median_rank_images"]
    assert 0 < figures["mean_recall"] < 100


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.filterwarnings("ignore:.*nested tensor.*:UserWarning")
def test_late_interaction(
    fraction: float, evaluate: Callable[..., dict], save_run: Callable[..., Path], scenes: Path
) -> None:
    run = save_run("itc,cmli", cmli_dim=8, cmli_top_fraction=fraction)
    objective, images, texts, owner = outputs_one_by_one(run, scenes, "cmli")
    i2t, t2i = torch.zeros(len(images), len(texts)), torch.zeros(len(images), len(texts))
    with torch.inference_mode():
        patches = [objective.image_tokens(image).features for image in images]
        assert patches[0].shape == (1, 16 * fraction, 8)
        for t, text in enumerate(texts):
            special = torch.zeros(text.tokens.shape[:2], dtype=torch.bool)
            special[:, [0, -1]] = True
            tokens = objective.text_tokens(text, special)
            for n, patch in enumerate(patches):
                scores = late_interaction(patch, tokens.features, tokens.special)
                i2t[n, t], t2i[n, t] = scores.image_to_text[0, 0], scores.text_to_image[0, 0]
    want = expected(PairScores(i2t, t2i), owner)
    assert want["t2i_mean_rank"] > 2 and want["i2t_mean_rank"] > 2
    figures = evaluate(run, "--scores", "late_interaction")
    assert only(figures, want) == pytest.approx(want)
    assert figures["scores"] == "late_interaction" and figures["rerank"] is None
    assert only(evaluate(run), want) != pytest.approx(want)


def match_odds(run: Path, scenes: Path) -> tuple[Tensor, list[int]]:
    """(N, T) match probabilities, one pair at a time."""
    objective, images, texts, owner = outputs_one_by_one(run, scenes, "itm")
    judge = objective.classifier
    with torch.inference_mode():
        rows = [[judge(judge.image(i.cls), judge.text(t.cls)).softmax(1)[0, 1] for t in texts] for i in images]
    return torch.tensor(rows), owner


@pytest.mark.parametrize("k", [3, 16])
def test_reranking(k: int, evaluate: Callable[..., dict], run: Path, scenes: Path) -> None:
    odds, owner = match_odds(run, scenes)
    assert odds.std() > 0.01
    encoded = encode_split(load(run), open_split(scenes, "train"))
    similarity = encoded.images @ encoded.texts.T
    want = expected(PairScores(similarity, similarity), owner, odds, k)
    figures = evaluate(run, "--rerank", "itm", "--rerank-k", str(k))
    assert only(figures, want) == pytest.approx(want)
    assert figures["rerank"] == "itm" and figures["rerank_k"] == k and figures["scores"] == "cls"
    plain = evaluate(run)
    assert plain["t2i_r1"] != figures["t2i_r1"] and "rerank_k" not in plain


def test_late_interaction_with_reranking(evaluate: Callable[..., dict], run: Path) -> None:
    """With one candidate it changes nothing; with all of them the first score changes nothing."""
    late = evaluate(run, "--scores", "late_interaction")
    one = evaluate(run, "--scores", "late_interaction", "--rerank", "itm", "--rerank-k", "1")
    assert only(one, late) == late | {"rerank": "itm"}
    every = evaluate(run, "--scores", "late_interaction", "--rerank", "itm", "--rerank-k", "1000")
    cosine = evaluate(run, "--rerank", "itm", "--rerank-k", "1000")
    assert every == cosine | {"scores": "late_interaction"} and every["t2i_mean_rank"] != late["t2i_mean_rank"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scores", "late_interaction"], "was trained with itc, without the objective cmli"),
        (["--rerank", "itm"], "was trained with itc, without the objective itm"),
        (["--rerank", "itm", "--rerank-k", "0"], "--rerank-k 0: want 1 or more"),
    ],
)
def test_what_a_student_cannot_do(
    words: list[str], message: str, evaluate: Callable[..., dict], save_run: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match=message) as error:
        evaluate(save_run("itc"), *words)
    assert "\n" not in str(error.value)


def test_an_objective_that_does_not_fit_its_options(save_run: Callable[..., Path]) -> None:
    folder = save_run("itc,itm")
    state = torch.load(folder / "checkpoint_best.pt", weights_only=True)
    del state["model"]["objectives.itm.classifier.output.weight"]
    torch.save(state, folder / "checkpoint_best.pt")
    assert load(folder).objectives == {}
    with pytest.raises(UserError, match="does not fit its own options.*classifier.output.weight"):
        load(folder, objectives=["itm"])


def test_an_empty_split(evaluate: Callable[..., dict], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `emkum prepare` writes none.
    monkeypatch.setattr("emkum.data.shards.open_split", lambda data, split: [])
    with pytest.raises(UserError, match="split train of .*scenes has no images"):
        evaluate(run)
