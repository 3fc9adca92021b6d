"""The map of both modalities and the gap between them."""

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from emkum.evaluation.map_figure import feature_map, modality_gap, principal_plane
from tests.figure_checks import assert_readable


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def features() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40, 8))
    return unit(images), unit(images + rng.normal(size=(40, 8)) + 1)


def test_gap_against_loops(features: tuple[np.ndarray, np.ndarray]) -> None:
    images, texts = features
    gap = modality_gap(images, texts)
    assert gap.distance == pytest.approx(math.dist(images.mean(0), texts.mean(0)))
    assert gap.pairs == pytest.approx(np.mean([i @ t for i, t in zip(images, texts, strict=True)]))
    others = [images[a] @ texts[b] for a in range(40) for b in range(40) if a != b]
    assert gap.others == pytest.approx(np.mean(others))
    one = modality_gap(images[:1], -images[:1])
    assert one.distance == pytest.approx(2) and one.pairs == pytest.approx(-1) and math.isnan(one.others)


def test_plane_is_that_of_scikit_learn(features: tuple[np.ndarray, np.ndarray]) -> None:
    plane = principal_plane(*features)
    pca = PCA(2).fit(np.concatenate(features))
    expected = pca.transform(np.concatenate(features))
    points = np.concatenate([plane.images, plane.texts])
    np.testing.assert_allclose(np.abs(points), np.abs(expected), atol=1e-9)
    np.testing.assert_allclose(plane.shares, pca.explained_variance_ratio_)
    # The sign is fixed.
    assert (points.max(axis=0) == np.abs(points).max(axis=0)).all()


def test_equal_features_and_one_channel_have_a_plane() -> None:
    plane = principal_plane(np.ones((3, 4)), np.ones((3, 4)))
    assert np.abs(plane.images).max() < 1e-9 and plane.shares == (0.0, 0.0)
    line = principal_plane(np.array([[1.0], [2.0]]), np.array([[3.0], [4.0]]))
    assert line.images.shape == (2, 2) and line.shares == pytest.approx((1.0, 0.0))


@pytest.mark.parametrize("count", [1, 40])
def test_the_picture_is_readable_and_joins_pairs(
    tmp_path: Path, drawn: list[Figure], features: tuple[np.ndarray, np.ndarray], count: int
) -> None:
    images, texts = (part[:count] for part in features)
    plane, joined = principal_plane(images, texts), np.arange(min(count, 3))
    feature_map(tmp_path / "map", plane, modality_gap(images, texts), joined, "component")
    assert_readable(drawn[0])
    lines = [line.get_xydata() for line in drawn[0].axes[0].lines if len(line.get_xydata()) == 2]
    np.testing.assert_allclose(lines, np.stack([plane.images[joined], plane.texts[joined]], axis=1))
