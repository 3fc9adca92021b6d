"""`emkum bench retrieval`: that all variants do the same work, not how fast this machine is."""

import json
from pathlib import Path

import pytest
import torch

from emkum.cli import main
from emkum.commands import bench_retrieval
from emkum.commands.bench_retrieval import FAISS, NOTHING, OURS, TOPK, VARIANTS, make_features, measure
from emkum.errors import UserError
from emkum.evaluation.retrieval import recall_metrics


def test_features_are_unit_vectors_of_captions_near_their_images() -> None:
    image, text, owner = make_features(1100, 2300, 16)
    assert image.shape == (1100, 16) and text.shape == (2300, 16)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(1100))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(2300))
    counts = torch.bincount(owner, minlength=1100)
    assert counts.min() >= 2 and counts.max() <= 3 and (owner.diff() >= 0).all()
    own = (image[owner] * text).sum(1)
    assert own.mean() > 0.4 and (image[owner.roll(900)] * text).sum(1).abs().mean() < 0.3
    assert len({tuple(row) for row in image[:, :3].tolist()}) == 1100


def test_variants_find_the_same() -> None:
    features = make_features(60, 300, 24)
    want = recall_metrics(*features)
    assert 20 < want["t2i_r10"] < 100
    for name in (OURS, TOPK, FAISS):
        if name == FAISS:
            pytest.importorskip("faiss")
        found = VARIANTS[name](*features)
        assert found == pytest.approx({key: want[key] for key in ("i2t_r10", "t2i_r10")}), name
    assert VARIANTS[NOTHING](*features) == {}


def test_each_runs_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(bench_retrieval, "VARIANTS", {name: VARIANTS[name] for name in (NOTHING, OURS)})
    file = tmp_path / "bench.json"
    main(["bench", "retrieval", "--images", "40", "--captions", "90", "--dim", "8", "--json", str(file)])
    record = json.loads(file.read_text())
    nothing, ours = record["variants"]
    assert (nothing["name"], ours["name"]) == (NOTHING, OURS)
    assert nothing["recalls"] == {} and set(ours["recalls"]) == {"i2t_r10", "t2i_r10"}
    assert 0 <= nothing["seconds"] < ours["seconds"] and nothing["threads"] == 1
    assert min(nothing["peak_bytes"], ours["peak_bytes"]) > 50e6
    assert record["settings"] == {"images": 40, "captions": 90, "dim": 8} and record["machine"]["cores"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert "40 images, 90 captions, 8 channels" in lines[2] and len(lines) == 5
    assert lines[3].startswith(NOTHING) and lines[3].endswith("-") and lines[4].startswith(OURS)


def test_without_faiss_its_line_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_retrieval, "find_spec", lambda name: None)
    monkeypatch.setattr(bench_retrieval, "VARIANTS", {FAISS: VARIANTS[FAISS]})
    assert measure(10, 10, 2) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "9"], "--images 9: want 10 or more"),
        (["--images", "20", "--captions", "19"], "--captions 19: want 20 or more"),
        (["--dim", "0"], "--dim 0: want 1 or more"),
    ],
)
def test_bad_sizes(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["bench", "retrieval", *words])
