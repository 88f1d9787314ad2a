"""What float16 scales lose, counted on tensors that a reader can check by hand, and over every format."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.quantize.formats import FORMATS, TensorFormat
from pipeline.quantize.lost import energy, plain, subnormal, suspects, vanished
from pipeline.quantize.search import nearest, weighted

NAMES = [f"w{bits}b{kind.blocks[1]}{way}" for bits, kind in FORMATS.items() for way in ("as" if bits != 6 else "a")]


def test_counts_by_hand() -> None:
    scales = np.array([[0, 1, 1, 1, 0, 6e-8, 6.2e-5, -6e-8]], np.float16)
    weights = np.zeros((1, 32), np.float32)
    weights[0, 1] = 1e-9  # block 0: scale 0
    weights[0, 4:7] = 1e-42  # block 1: scale 1, a float32 subnormal
    weights[0, 8] = 7.5  # block 2: scale 1, meant so; block 3 is zero
    weights[0, 28:] = -1e-9  # block 7: scale -2⁻²⁴
    assert vanished(weights, scales).tolist() == [[1, 3, 0, 0, 0, 0, 0, 4]]
    assert suspects(scales).tolist() == [[True] * 6 + [False, True]]
    assert subnormal(scales) == 2
    assert not plain(scales) and plain(np.array([6.2e-5, -2], np.float16)) and not plain(np.array([6e-5], np.float16))
    assert energy(np.full(4, 1e-30, np.float32)) == pytest.approx(4e-60)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("magnitude", [0, 1e-44, 1e-12, 1e-9, 1e-8, 1e-7, 1e-6, 1e-3, 1.0, 3e3])
@pytest.mark.parametrize("searched", [False, True])
def test_vanished_is_what_decodes_to_zero(name: str, magnitude: float, searched: bool) -> None:
    fmt, rng = TensorFormat.parse(name), np.random.default_rng(3)
    weights = (rng.standard_normal((8, 4 * fmt.block)) * magnitude).astype(np.float32)
    weights[:, : fmt.block] = 0  # a block of zeros is none that vanished
    weights[1, fmt.block :] = rng.standard_normal(3 * fmt.block)
    found = weighted(weights, np.ones(len(weights[0]), np.float32), fmt) if searched else nearest(weights, fmt)
    zero = ~found.dequantize().reshape(8, 4, -1).any(axis=-1)
    expected = np.where(zero, np.count_nonzero(weights.reshape(8, 4, -1), axis=-1), 0)
    np.testing.assert_array_equal(vanished(weights, found.scales), expected)
    assert not expected[:, 0].any() and not expected[1].any()
    assert expected.any() == (0 < magnitude < 1e-8) or magnitude == 1e-8  # where weights of 3e-8 stay


def test_the_scales_of_a_large_model_are_plain() -> None:
    """16 million scales are a billion weights: those of MiMo take a second together, its quantizing an hour."""
    assert plain(np.full((1 << 12, 1 << 12), 0.01, np.float16))
