"""Nearest codes against loops, and tables that checkpoints fill."""

import pytest
import torch

from emkum.layers.nearest_code import NearestCentroid, NearestCode, nearest_by_cosine, nearest_by_distance


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_loops(dtype: torch.dtype) -> None:
    # Lengths differ much, so that distance, cosine and inner product disagree.
    features, codes = torch.randn(40, 5, dtype=dtype), torch.randn(7, 5, dtype=dtype) * torch.arange(1, 8)[:, None]
    distances = [[float((f - c).norm()) for c in codes] for f in features]
    cosines = [[float(f @ c / f.norm() / c.norm()) for c in codes] for f in features]
    products = [[float(f @ c) for c in codes] for f in features]
    by_distance = [row.index(min(row)) for row in distances]
    by_cosine = [row.index(max(row)) for row in cosines]
    assert by_distance != by_cosine != [row.index(max(row)) for row in products]
    assert nearest_by_distance(features, codes).tolist() == by_distance
    assert nearest_by_cosine(features, codes).tolist() == by_cosine


def test_distance_is_cosine_on_the_unit_sphere() -> None:
    features, codes = torch.randn(40, 5), torch.nn.functional.normalize(torch.randn(7, 5), dim=1)
    assert torch.equal(nearest_by_distance(features, codes), nearest_by_cosine(features, codes))


def test_a_table_takes_the_sizes_of_a_checkpoint() -> None:
    full, empty = NearestCode(4, 6), NearestCode(4, 6)
    assert not full.is_filled()
    full.fill(weight=torch.randn(3, 6), bias=torch.randn(3), codes=torch.randn(4, 3))
    assert full.is_filled() and not empty.is_filled()
    model = torch.nn.Sequential(empty)
    model.load_state_dict({f"0.{name}": value for name, value in full.state_dict().items()})
    features = torch.randn(9, 6)
    assert empty.is_filled() and torch.equal(full(features), empty(features))
    empty.load_state_dict(NearestCode(4, 6).state_dict())
    assert not empty.is_filled()


def test_a_table_is_filled_whole() -> None:
    table = NearestCentroid(2, 3)
    with pytest.raises(ValueError, match="want centroids, not codes"):
        table.fill(codes=torch.zeros(2, 3))
    given = torch.randn(2, 3)
    table.fill(centroids=given)
    given.zero_()
    assert table.centroids.abs().sum() > 0, "the table must not share memory with what it was filled from"
    assert list(table.parameters()) == []
