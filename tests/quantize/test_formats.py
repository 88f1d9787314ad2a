"""Every format's layout against hand-computed bytes, and the laws of packing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import PlanError
from pipeline.quantize.formats import FAST_BLOCKS, Quantized, TensorFormat, pack, unpack

NAMES = [
    f"w{bits}b{block}{kind}"
    for bits, blocks in FAST_BLOCKS.items()
    for block in blocks
    for kind in ("a" if bits == 6 else "sa")
]


@pytest.mark.parametrize("name", NAMES)
def test_names_round_trip(name: str) -> None:
    fmt = TensorFormat.parse(name)
    assert str(fmt) == name
    assert fmt.top == 2**fmt.bits - 1
    assert fmt.middle == 2 ** (fmt.bits - 1)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("w3b32a", ["'w3b32a'", "2, 4 and 8 bits, and 6 as a sum of two, not 3", "q3.yaml"]),
        ("w5b32a", ["not 5"]),
        ("w6b64s", ["'w6b64s'", "no symmetric blocks", "w6b64a"]),
        ("w6b16a", ["6-bit blocks of 16"]),
        ("w2b16a", ["2-bit blocks of 16", "32, 64, 128"]),
        ("w2b256s", ["2-bit blocks of 256"]),
        ("w4b48s", ["4-bit blocks of 48"]),
        ("q4_0", ["'q4_0'", "such as w4b32s"]),
        ("w4b32", ["'w4b32'"]),
    ],
)
def test_formats_without_a_fast_kernel_are_refused(name: str, parts: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        TensorFormat.parse(name)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("bits", "values", "packed"),
    [
        (2, [1, 2, 3, 0], [0b00_11_10_01]),
        (2, [3, 2, 1, 0, 3], [0b00_01_10_11, 0b11]),  # five zero points: the last byte is padded with zeros
        (2, [1, 1, 1, 1, 2, 2, 2], [0x55, 0b00_10_10_10]),
        (4, [0x1, 0x2, 0xF, 0x0], [0x21, 0x0F]),
        (4, [0x8, 0x7, 0x9], [0x78, 0x09]),
        (8, [0, 128, 255], [0, 128, 255]),
        (6, [0b0001_10, 0b1111_01, 0b1000_00], [0b1111_0001, 0b1000, 0b00_01_10]),  # the upper four, then the lower two
    ],
)
def test_packing_by_hand(bits: int, values: list[int], packed: list[int]) -> None:
    array = np.array([values, values[::-1]], np.uint8)
    got = pack(array, bits)
    assert got[0].tolist() == packed
    np.testing.assert_array_equal(unpack(got, bits, len(values)), array)


@given(st.sampled_from([2, 4, 6, 8]), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_unpack_is_the_inverse_of_pack(bits: int, rows: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count)).astype(np.uint8)
    before = values.copy()
    packed = pack(values, bits)
    planes = TensorFormat(bits, 32, False).planes
    assert packed.shape == (rows, sum(-(-count * plane // 8) for plane in planes))
    np.testing.assert_array_equal(unpack(packed, bits, count), values)
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize(
    ("name", "rows", "columns", "sizes"),
    [
        ("w4b32s", 4096, 4096, (8_388_608, 1_048_576, 0)),  # codes, scales, zeros: 4.5 bits a weight
        ("w4b32a", 4096, 4096, (8_388_608, 1_048_576, 262_144)),
        ("w2b64a", 3, 320, (3 * 80, 3 * 5 * 2, 3 * 2)),  # five 2-bit zero points take two bytes a row
        ("w4b64a", 3, 320, (3 * 160, 3 * 5 * 2, 3 * 3)),
        ("w8b64a", 3, 320, (3 * 320, 3 * 5 * 2, 3 * 5)),
        ("w6b64a", 3, 320, (3 * (160 + 80), 3 * 5 * 2, 3 * (3 + 2))),  # two planes of zero points
    ],
)
def test_bytes(name: str, rows: int, columns: int, sizes: tuple[int, int, int]) -> None:
    fmt = TensorFormat.parse(name)
    assert (fmt.code_bytes(rows, columns), fmt.scale_bytes(rows, columns), fmt.zero_bytes(rows, columns)) == sizes


def test_blocks_are_fitted_to_the_matrix() -> None:
    assert str(TensorFormat.parse("w4b128a").fitted(576)) == "w4b64a"
    assert str(TensorFormat.parse("w4b32a").fitted(4096)) == "w4b32a"
    assert str(TensorFormat.parse("w4b32a").fitted(48)) == "w4b16a"
    with pytest.raises(PlanError, match="no block of at most 64 divides 48"):
        TensorFormat.parse("w2b64a").fitted(48)


def test_dequantize_by_hand() -> None:
    codes = np.array([[0, 1, 2, 3] * 8 + [3] * 32], np.uint8)
    scales, zeros = np.array([[0.5, -2.0]], np.float16), np.array([[0b10_01]], np.uint8)
    values = Quantized(TensorFormat(2, 32, False), pack(codes, 2), scales, zeros).dequantize()
    assert values.dtype == np.float32
    assert values[0, :4].tolist() == [-0.5, 0.0, 0.5, 1.0]
    assert set(values[0, 32:].tolist()) == {-2.0}
    unsigned = Quantized(TensorFormat(2, 32, True), pack(codes, 2), scales, np.empty((1, 0), np.uint8)).dequantize()
    assert unsigned[0, :4].tolist() == [-1.0, -0.5, 0.0, 0.5]
    assert set(unsigned[0, 32:].tolist()) == {-2.0}


def test_planes_under_one_scale_add_up_to_the_weights() -> None:
    """What the runtime adds: the upper plane's product, its scale four times as large, and the lower plane's."""
    rng = np.random.default_rng(0)
    codes, zeros = rng.integers(0, 64, (3, 192), np.uint8), rng.integers(0, 64, (3, 3), np.uint8)
    scales = rng.uniform(0.5, 2, (3, 3)).astype(np.float16)
    whole = Quantized(TensorFormat(6, 64, False), pack(codes, 6), scales, pack(zeros, 6))
    upper, lower, stored, upper_zeros, lower_zeros = whole.stored()
    assert stored is scales
    high = Quantized(TensorFormat(4, 64, False), upper, scales * np.float16(4), upper_zeros).dequantize()
    low = Quantized(TensorFormat(2, 64, False), lower, scales, lower_zeros).dequantize()
    expected = (codes.astype(float) - zeros.repeat(64, axis=1)) * scales.astype(float).repeat(64, axis=1)
    np.testing.assert_array_equal(whole.dequantize(), expected)
    np.testing.assert_array_equal(high.astype(float) + low, expected)
