"""Correlations on the disk: E[x·xᵀ] within float16's rounding, for any number of channels."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.calibrate.correlations import packed, stored_bytes, unpacked


@pytest.mark.parametrize("channels", [1, 255, 256, 257, 600])
def test_what_is_packed_is_read_again(channels: int) -> None:
    rng = np.random.default_rng(channels)
    x = (rng.standard_normal((1000, channels)) * np.exp(3 * rng.standard_normal(channels))).astype(np.float32)
    x[:, channels // 2] = 0  # a channel that nothing excites
    products = x.T @ x
    products = (products + products.T) / 2
    moments = products.diagonal() / np.float32(1000)
    values = packed(products)
    assert values.dtype == np.float16 and values.nbytes == stored_bytes(channels)
    found = unpacked(values, moments)
    assert found.dtype == np.float32
    assert (found == found.T).all() and (found.diagonal() == moments).all()
    norms = np.sqrt(np.outer(moments, moments))
    np.testing.assert_array_less(np.abs(found - products / 1000), norms * 2**-11 + 1e-30)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_activations_does_not_matter(scale: float) -> None:
    x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    products = (x.T @ x) * np.float32(scale)
    np.testing.assert_allclose(packed(products), packed(x.T @ x), atol=1e-3)
