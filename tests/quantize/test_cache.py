"""Ranges of cached keys and values: they hold at every position, and no scale is unusable."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.quantize.cache import FLOOR, magnitudes, scales

HEADS, TOKENS, CHANNELS = 2, 50, 16


def keys(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.standard_normal((HEADS, 1, CHANNELS)))
    return (rng.standard_normal((HEADS, TOKENS, CHANNELS)) * spread).astype(np.float32)


def turned(values: np.ndarray, angle: float, rotary: int) -> np.ndarray:
    """Every pair of the first `rotary` channels, as complex numbers, turned by `angle`."""
    half = rotary // 2
    pairs = (values[..., :half] + 1j * values[..., half:rotary]) * np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag, values[..., rotary:]], axis=-1)


@pytest.mark.parametrize("rotary", [16, 12])
def test_no_position_leaves_the_range_of_a_key(rotary: int) -> None:
    values = keys()
    angles = np.linspace(0, 2 * np.pi, 721)
    seen = np.max([np.abs(turned(values, angle, rotary)).max(axis=1) for angle in angles], axis=0).reshape(-1)
    got = magnitudes(values, rotary)
    assert got.dtype == np.float32
    assert (seen <= got * (1 + 1e-6)).all()
    assert (seen >= got * (1 - 1e-4)).all()  # and no wider than needed


def test_values_are_not_turned() -> None:
    values = keys(1)
    want = [max(abs(float(value)) for value in values[head, :, i]) for head in range(HEADS) for i in range(CHANNELS)]
    assert magnitudes(values).tolist() == want


def test_damage_is_passed_on() -> None:
    values = keys(2)
    values[1, 3, 5] = np.nan
    assert np.isnan(magnitudes(values, CHANNELS)).sum() == 2  # both channels of the pair
    assert np.isnan(magnitudes(values)).sum() == 1


def test_scales_reach_the_range_and_none_is_zero() -> None:
    ranges = np.array([0, 1e-30, 0.5, 127], np.float32)
    got = scales(ranges)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.array([FLOOR * 127, FLOOR * 127, 0.5, 127]) / 127, rtol=1e-6)
    values = np.array([0.01, -0.02, -0.5, 127], np.float32)  # the first two were never excited
    codes = np.clip(np.rint(values / got), -128, 127)
    assert (np.abs(codes * got - values) <= 0.5001 * got).all()
