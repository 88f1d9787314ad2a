"""Rotations are orthogonal, the same everywhere, and statistics follow them."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.quantize.rotation import factors, hadamard, rotate, rotate_products, rotated_moments

WIDTHS = (1, 32, 64, 128, 96, 576, 3072, 4096, 5120)
WIDE = (11008, 17920)  # 43 · 256 and 35 · 512


def matrix(width: int) -> np.ndarray:
    return rotate(np.eye(width, dtype=np.float32), width)


@pytest.mark.parametrize("width", WIDTHS)
def test_orthogonal(width: int) -> None:
    some = np.arange(width) if width < 1000 else np.arange(0, width, width // 96)
    rows = rotate(np.eye(width, dtype=np.float32)[some], width).astype(np.float64)
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(some)), atol=1e-6)


@pytest.mark.parametrize("width", WIDE)
def test_products_stay_where_widths_are_odd_multiples(width: int) -> None:
    x = np.random.default_rng(1).standard_normal((8, width)).astype(np.float32)
    turned = rotate(x.copy(), width).astype(np.float64)
    np.testing.assert_allclose(turned @ turned.T, x.astype(np.float64) @ x.T, atol=1e-6 * width)
    assert np.abs(turned).max() < np.abs(x).max() * 2


def test_no_channel_stands_out() -> None:
    """A single loud channel becomes even: at most √2 of the mean, whatever the width."""
    for width in (64, 576, 5120):
        loud = np.zeros((1, width), np.float32)
        loud[0, 5] = 1
        assert np.abs(rotate(loud, width)).max() <= np.sqrt(2.0001 / width)


def test_factors_are_the_matrix() -> None:
    for width in (96, 64, 40):
        signs, mix, order = factors(width)
        np.testing.assert_allclose(matrix(width), signs[:, None] * np.kron(mix, hadamard(order)), atol=1e-6)


GOLDEN = {
    4: [[-1, 5, 0, -2], [-0.5, 0.5, -0.5, 0.5]],
    6: [
        [8.573213577270508, -1.2247447967529297, -4.0, -1.1920928955078125e-07, 0.0, 1.1920928955078125e-07],
        [
            0.40824827551841736,
            -0.40824827551841736,
            0.4999999701976776,
            -0.4999999701976776,
            0.28867512941360474,
            -0.28867512941360474,
        ],
    ],
}


@pytest.mark.parametrize("width", GOLDEN)
def test_golden_vectors(width: int) -> None:
    """1, 2, 3, … and a unit vector; to the bit."""
    x = np.stack([np.arange(1, width + 1), np.eye(width)[1]]).astype(np.float32)
    np.testing.assert_array_equal(rotate(x, width), np.array(GOLDEN[width], np.float32))


def test_rows_are_independent_and_columns_take_the_same_sums() -> None:
    x = np.random.default_rng(2).standard_normal((71, 192)).astype(np.float32)
    whole = rotate(x.copy(), 96)
    for start, stop in ((0, 1), (5, 40), (40, 71)):
        np.testing.assert_array_equal(rotate(x[start:stop].copy(), 96), whole[start:stop])
    turned = np.ascontiguousarray(x.T)
    rotate(turned.T, 96)
    np.testing.assert_array_equal(turned.T, whole)


def test_statistics_follow() -> None:
    x = np.random.default_rng(3).standard_normal((500, 192)).astype(np.float32) * np.linspace(0.1, 3, 192, dtype="f4")
    turned = rotate(x.copy(), 96)
    found = rotate_products(x.T @ x, 96)
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_allclose(found, turned.T @ turned, atol=2e-3)
    moments = np.linspace(0.5, 2, 192).astype(np.float32)
    np.testing.assert_allclose(rotated_moments(moments, 96), np.diag(rotate_products(np.diag(moments), 96)), rtol=1e-5)


def test_refuses_what_does_not_fit() -> None:
    for values in (np.zeros((2, 10), np.float32), np.zeros((2, 12)), np.zeros(12, np.float32)):
        with pytest.raises(ValueError, match="in runs of 6"):
            rotate(values, 6)
