"""`emkum fit-clusters`: the clusters it finds, and what it refuses."""

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from emkum.cli import main
from emkum.commands.fit_clusters import fit_centroids, read_features
from emkum.errors import UserError
from emkum.layers.nearest_code import nearest_by_distance
from emkum.outputs import TeacherOutput
from emkum.provenance import write_json
from emkum.teachers.base import TeacherInput
from emkum.teachers.cached import MANIFEST_NAME, CachedTeacher, CacheManifest, written_shard

WIDTH, CLUSTERS, SAMPLES, VIEWS, SHARD_SIZE = 6, 4, 20, 2, 7
TEACHER = {"teacher": "tiny", "mean": [0.5, 0.1]}


@pytest.fixture(autouse=True)
def quiet_and_alone() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    # The command silences other libraries for the whole process.
    logging.disable(logging.NOTSET)


def centers() -> np.ndarray:
    return 10 * np.eye(WIDTH, dtype=np.float32)[:CLUSTERS]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of 20 images in 2 views around 4 centers, with patches beside them; and 3 of the split valid."""
    folder = tmp_path_factory.mktemp("cache")
    crops = {"views": VIEWS, "min_scale": 0.5, "flip": False, "seed": 1}
    splits = {"train": {"data_hash": "0", "samples": SAMPLES, "crops": crops}}
    splits["valid"] = {"data_hash": "1", "samples": 3, "crops": {"views": 0}}
    parts = {"features": {"width": WIDTH}, "patches": {"grid": [2, 2], "width": WIDTH}}
    manifest = CacheManifest(TEACHER, "float32", parts, SHARD_SIZE, splits)
    write_json(folder / MANIFEST_NAME, manifest.as_json())
    for shard in manifest.shards():
        (folder / shard.split).mkdir(exist_ok=True)
        rows = np.arange(shard.start, shard.stop)
        noise = np.random.default_rng([shard.view, shard.number]).normal(0, 0.3, (len(rows), WIDTH))
        features = torch.from_numpy(centers()[rows % CLUSTERS] + noise.astype(np.float32))
        with written_shard(folder, manifest, shard) as write:
            output = TeacherOutput(features, patches=torch.zeros(len(rows), 4, WIDTH))
            write(output, TeacherInput(None, torch.from_numpy(rows), torch.full((len(rows),), shard.view), shard.split))
    return folder


def cached_features(cache: Path) -> np.ndarray:
    """All of the training split, view after view, as the cached teacher gives them."""
    teacher, ids = CachedTeacher(cache), torch.arange(SAMPLES)
    images = torch.zeros(SAMPLES, 3, 1, 1)
    views = [teacher(TeacherInput(images, ids, torch.full_like(ids, view), "train")) for view in range(VIEWS)]
    return torch.cat([output.features for output in views]).numpy()


def test_features_are_those_of_the_teacher(cache: Path) -> None:
    whole = cached_features(cache)
    assert np.array_equal(read_features(CachedTeacher(cache), "train", 1000, 1), whole)
    drawn = read_features(CachedTeacher(cache), "train", 11, 1)
    places = [int(np.flatnonzero((whole == row).all(1))[0]) for row in drawn]
    assert len(drawn) == 11 and places == sorted(set(places)) and places != list(range(11))
    assert np.array_equal(drawn, read_features(CachedTeacher(cache), "train", 11, 1))
    assert not np.array_equal(drawn, read_features(CachedTeacher(cache), "train", 11, 2))
    assert len(read_features(CachedTeacher(cache), "valid", 1000, 1)) == 3


@pytest.mark.parametrize("spherical", [False, True])
def test_command_finds_the_clusters(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture, spherical: bool
) -> None:
    pytest.importorskip("faiss")
    out = tmp_path / "centroids.safetensors"
    words = ["fit-clusters", str(cache), "--clusters", str(CLUSTERS), "--out", str(out), "--seed", "1"]
    main(words + (["--spherical"] if spherical else []))
    printed = capsys.readouterr().out
    assert "4 centroids of 40 features" in printed and "10 to 10 features a cluster" in printed
    assert printed.count("\n") == 1 and f"--kd-cluster-centroids {out} --kd-cluster-clusters 4" in printed
    with safe_open(out, "pt") as file:
        centroids, identity = file.get_tensor("centroids"), json.loads(file.metadata()["teacher"])
    assert identity == TEACHER and centroids.dtype == torch.float32
    features = torch.from_numpy(cached_features(cache))
    codes = nearest_by_distance(features, centroids)
    expected = torch.arange(SAMPLES).repeat(VIEWS) % CLUSTERS
    assert len({(int(a), int(b)) for a, b in zip(codes, expected, strict=True)}) == CLUSTERS
    rows = torch.nn.functional.normalize(features, dim=1) if spherical else features
    means = torch.stack([rows[codes == code].mean(0) for code in range(CLUSTERS)])
    means = torch.nn.functional.normalize(means, dim=1) if spherical else means
    torch.testing.assert_close(centroids, means, rtol=1e-4, atol=1e-4)
    if spherical:
        torch.testing.assert_close(centroids.norm(dim=1), torch.ones(CLUSTERS))
    before = out.read_bytes()
    main(words + (["--spherical"] if spherical else []))
    assert out.read_bytes() == before, "the same seed gives the same file"


def test_error_and_sizes() -> None:
    pytest.importorskip("faiss")
    features = np.array([[0.0], [2.0], [10.0]], np.float32)
    fit = fit_centroids(features, 2, iterations=10, seed=1, spherical=False)
    assert sorted(fit.centroids[:, 0].tolist()) == [1.0, 10.0]
    assert sorted(fit.sizes.tolist()) == [1, 2] and fit.error == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--clusters", "41"], "--clusters 41: split 'train' of .* has 40 features alone"),
        (["--clusters", "0"], "--clusters 0: want 1 or more"),
        (["--iterations", "0"], "--iterations 0: want 1 or more"),
        (["--split", "test"], "--split 'test': .* has train, valid"),
        (["--out", "x.npy"], "--out x.npy: the name must end in .safetensors"),
    ],
)
def test_mistakes(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str) -> None:
    if "faiss" not in sys.modules:
        monkeypatch.setitem(sys.modules, "faiss", object())  # it is not needed before these
    out = tmp_path / "c.safetensors"
    with pytest.raises(UserError, match=message):
        main(["fit-clusters", str(cache), "--clusters", "4", "--out", str(out), *words])
    assert not out.exists()


def test_without_faiss(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="fit-clusters needs faiss: pip install"):
        main(["fit-clusters", str(cache), "--out", str(tmp_path / "c.safetensors")])


def test_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "faiss" not in sys.modules:
        monkeypatch.setitem(sys.modules, "faiss", object())
    with pytest.raises(UserError, match="no teacher cache at"):
        main(["fit-clusters", str(tmp_path / "none"), "--out", str(tmp_path / "c.safetensors")])
