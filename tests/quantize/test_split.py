"""Which input channels get more bits."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.quantize.split import channel_importance, split_channels, squared_norms


def test_importance_by_hand() -> None:
    moments = np.array([1.0, 2.0, 0.5], np.float32)
    norms = [np.array([1.0, 1.0, 4.0]), np.array([0.0, 2.0, 4.0])]
    assert channel_importance(moments, norms).tolist() == [1.0, 6.0, 4.0]


def test_ties_go_to_the_lower_index() -> None:
    high, low = split_channels(np.array([1.0, 3.0, 1.0, 3.0, 1.0]), 3)
    assert high.tolist() == [0, 1, 3]
    assert low.tolist() == [2, 4]
    assert high.dtype == low.dtype == np.int32


@given(st.integers(2, 200), st.integers(0, 2**32 - 1), st.data())
def test_halves_are_a_partition_by_importance(channels: int, seed: int, data: st.DataObject) -> None:
    importance = np.random.default_rng(seed).random(channels)
    count = data.draw(st.integers(1, channels - 1))
    high, low = split_channels(importance, count)
    assert sorted([*high, *low]) == list(range(channels))
    assert (np.diff(high) > 0).all()
    assert (np.diff(low) > 0).all()
    assert importance[high].min() >= importance[low].max()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_norms_are_summed_in_float64(rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = (rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-20, 15, (rows, columns))).astype(np.float32)
    squares = weights.astype(np.float64) ** 2
    np.testing.assert_allclose(squared_norms(weights), squares.sum(axis=0), rtol=1e-12)
    if columns > 1:  # to the bit as row by row, so that a channel order does not depend on the machine
        assert (squared_norms(weights) == np.add.accumulate(squares)[-1]).all()
