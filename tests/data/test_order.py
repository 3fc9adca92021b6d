"""The order of an epoch: every sample as often as its weight says, well shuffled, front to back within a window."""

import numpy as np
import pytest

from emkum.data.order import batches_by_length, epoch_order, parse_weights, shuffled


def generator(seed: int = 0) -> np.random.RandomState:
    return np.random.RandomState(seed)


def test_the_default_is_numpys_permutation() -> None:
    np.testing.assert_array_equal(epoch_order([600, 400], generator(5)), np.random.RandomState(5).permutation(1000))


@pytest.mark.parametrize("window", [0, 1, 7, 100, 5000])
def test_every_sample_comes_once(window: int) -> None:
    order = epoch_order([1003], generator(), window=window)
    np.testing.assert_array_equal(np.sort(order), np.arange(1003))
    np.testing.assert_array_equal(order, epoch_order([1003], generator(), window=window))
    assert (order != epoch_order([1003], generator(1), window=window)).mean() > 0.9 or window == 5000


@pytest.mark.parametrize("window", [0, 10])
def test_weights_are_passes(window: int) -> None:
    lengths, weights = [400, 300, 200], [2.5, 0.0, 1.0]
    order = epoch_order(lengths, generator(), weights, window)
    counts = np.bincount(order, minlength=900)
    assert set(counts[:400]) == {2, 3} and (counts[:400] == 3).sum() == 200
    assert set(counts[400:700]) == {0}
    assert set(counts[700:]) == {1}
    other = np.bincount(epoch_order(lengths, generator(1), weights, window), minlength=900)
    # The fraction is another one each epoch.
    assert 50 < (counts[:400] != other[:400]).sum() < 350


def test_a_window_is_read_front_to_back() -> None:
    window = 50
    order = epoch_order([1000], generator(), window=window, open_windows=8)
    for run in range(1000 // window):
        positions = np.flatnonzero(order // window == run)
        assert (np.diff(order[positions]) == 1).all()
        # A run is used up within the span of those that are read beside it.
        assert positions[-1] - positions[0] < 8 * window


def test_windows_are_well_mixed() -> None:
    window, open_windows, batch = 100, 16, 64
    order = epoch_order([20_000], generator(), window=window, open_windows=open_windows)
    runs = order // window
    same = (runs[1:] == runs[:-1]).mean()
    assert same < 1.5 / open_windows
    batches = runs[: len(runs) // batch * batch].reshape(-1, batch)
    different = np.mean([len(set(row)) for row in batches])
    assert different > 0.85 * open_windows
    # Runs themselves come in random order: no correlation between place in the set and in the epoch.
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.15


def test_shuffled_single_samples_are_a_permutation_of_any_order() -> None:
    runs = np.stack([np.arange(4), np.arange(4) + 1], axis=1)
    rng = generator()
    seen = {tuple(shuffled(runs, 64, rng)) for _ in range(1000)}
    assert len(seen) == 24


def test_batches_by_length() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 2050)
    order = generator(1).permutation(2050)
    batches = batches_by_length(order, lengths, 64, generator(2), pool=10)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(2050))
    assert [len(batch) for batch in batches] == [64] * 32 + [2]
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches[:-1]])
    plain = np.mean([np.ptp(lengths[order[i : i + 64]]) for i in range(0, 2048, 64)])
    assert spread < plain / 4
    # Short and long batches alternate at random instead of growing.
    means = np.array([lengths[batch].mean() for batch in batches[:10]])
    assert (np.diff(means) > 0).any() and (np.diff(means) < 0).any()


def test_parse_weights() -> None:
    assert parse_weights("", 3) == [1.0, 1.0, 1.0]
    assert parse_weights("2,0.5", 2) == [2.0, 0.5]
    for text in ("1", "1,x", "1,-1", "0,0", "1,nan"):
        with pytest.raises(ValueError):
            parse_weights(text, 2)
