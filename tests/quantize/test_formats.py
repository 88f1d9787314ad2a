"""Every format against bytes computed by hand, and the laws of packing. A new format brings its vector."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import PlanError
from pipeline.quantize.formats import FORMATS, Node, Operand, Plane, Quantized, TensorFormat

KINDS = [f"w{bits}b{{}}{end}" for bits, kind in FORMATS.items() for end in ("sa" if len(kind.planes) == 1 else "a")]
NAMES = [kind.format(block) for kind in KINDS for block in FORMATS[int(kind[1])].blocks]
# Two blocks of codes, their zero points; what lies in the file, hexadecimal; the first weights of each block, whose
# scales are 0.5 and -2.
GOLDEN = {
    "w2b32s": ([0, 1, 2, 3] * 16, None, {".codes": "e4" * 16}, ([-1.0, -0.5, 0.0, 0.5], [4.0, 2.0, 0.0, -2.0])),
    "w2b32a": ([0, 1, 2, 3] * 16, [1, 2], {".codes": "e4" * 16, ".zeros": "09"}, ([-0.5, 0.0, 0.5], [4.0, 2.0, 0.0])),
    "w4b32s": ([*range(16)] * 4, None, {".codes": "1032547698badcfe" * 4}, ([-4.0, -3.5, -3.0], [16.0, 14.0])),
    "w4b32a": (
        [*range(16)] * 4, [3, 14], {".codes": "1032547698badcfe" * 4, ".zeros": "e3"}, ([-1.5, -1.0], [28.0, 26.0])
    ),
    # The upper four bits of 0, 1, …, 63, then the lower two.
    "w6b32a": (
        [*range(64)], [33, 6],
        {
            ".bits4.codes": "0000111122223333444455556666777788889999aaaabbbbccccddddeeeeffff",
            ".bits2.codes": "e4" * 16,
            ".bits4.zeros": "18",
            ".bits2.zeros": "09",
        },
        ([-16.5, -16.0], [-52.0, -54.0]),
    ),
    "w8b32s": (
        [*range(0, 256, 4)], None, {".codes": bytes(range(0, 256, 4)).hex()}, ([-64.0, -62.0], [0.0, -8.0])
    ),
    "w8b32a": (
        [*range(0, 256, 4)], [1, 255], {".codes": bytes(range(0, 256, 4)).hex(), ".zeros": "01ff"},
        ([-0.5, 1.5], [254.0, 246.0]),
    ),
}  # fmt: skip


def golden(name: str) -> Quantized:
    codes, zeros, *_ = GOLDEN[name]
    scales, zeros = np.array([[0.5, -2.0]], np.float16), np.array([zeros or [0, 0]], np.uint8)
    return Quantized.of(TensorFormat.parse(name), np.array([codes], np.uint8), scales, zeros)


def test_every_format_that_ships_has_a_vector() -> None:
    assert {name.format(32) for name in KINDS} == set(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes_and_weights(name: str) -> None:
    _, _, expected, firsts = GOLDEN[name]
    quantized = golden(name)
    tensors = quantized.format.tensors(1, 64)
    stored = dict(zip((tensor.name for tensor in tensors), quantized.stored(), strict=True))
    assert {key: array.tobytes().hex() for key, array in stored.items()} == expected | {".scales": "003800c0"}
    assert [(array.dtype.name, array.shape) for array in stored.values()] == [(t.dtype, t.shape) for t in tensors]
    weights = quantized.dequantize()
    assert weights.dtype == np.float32 and weights.shape == (1, 64)
    for block, first in zip((weights[0, :32], weights[0, 32:]), firsts, strict=True):
        assert block[: len(first)].tolist() == first


@pytest.mark.parametrize(("name", "counts"), [("w4b32s8", "c07f"), ("w4b32a8", "80ff")])
def test_short_scales_are_shares_of_the_largest_of_their_row(name: str, counts: str) -> None:
    """Golden: -64 of 127 and the whole; 128 of 255 and the whole. What is stored gives them again."""
    fmt, shares = TensorFormat.parse(name), int(counts[2:], 16)
    first = np.float32(-1 if fmt.symmetric else 1) * round(shares / 2) / (shares + 1)
    scales = np.array([[0.501 * np.sign(first), 1.0]]) * shares / (shares + 1)
    codes = np.array([[*range(16)] * 4], np.uint8)
    found = Quantized.of(fmt, codes, scales.astype(np.float16), np.array([[3, 14]], np.uint8))
    assert found.scales.tolist() == [[first, shares / (shares + 1)]] and found.scales.dtype == np.float32
    stored = dict(zip((tensor.name for tensor in fmt.tensors(1, 64)), found.stored(), strict=True))
    assert {key: stored[key].tobytes().hex() for key in (".scales", ".largest")} == {
        ".scales": counts,
        ".largest": "003c",
    }
    assert [(array.dtype.name, array.shape) for array in stored.values()] == [
        (t.dtype, t.shape) for t in fmt.tensors(1, 64)
    ]
    read = fmt.read_scales(lambda ending: stored[ending].tobytes(), 1)
    np.testing.assert_array_equal(read, found.scales.astype(np.float16))


@given(st.integers(0, 2**32 - 1), st.sampled_from(["w4b32s8", "w2b64a8"]), st.sampled_from([1e-6, 1e-2, 30.0]))
def test_short_scales_are_near_and_keep_what_they_are(seed: int, name: str, size: float) -> None:
    fmt, rng = TensorFormat.parse(name), np.random.default_rng(seed)
    scales = (size * np.exp(0.5 * rng.standard_normal((4, 6)))).astype(np.float16)
    used = rng.random((4, 6)) < 0.8
    short = fmt.shorten(scales, used)
    step = np.where(used, scales, 0).max(axis=1, keepdims=True) / fmt.shares
    assert (np.abs(short - scales)[used] <= 0.51 * np.broadcast_to(step, used.shape)[used] + 2.0**-24).all()
    assert (short[~used] == 0).all() and (short[used] > 0).all()
    np.testing.assert_array_equal(fmt.shorten(short, used), short)


@pytest.mark.parametrize("name", [*NAMES, "w4b64a8", "w2b128s8"])
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
        ("w6b64s", ["'w6b64s'", "planes of 4 and 2", "no symmetric blocks", "w6b64a"]),
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
        (2, [3, 2, 1, 0, 3], [0b00_01_10_11, 0b11]),  # five zero points: the last byte is padded with zeros
        (2, [1, 1, 1, 1, 2, 2, 2], [0x55, 0b00_10_10_10]),
        (4, [0x8, 0x7, 0x9], [0x78, 0x09]),
        (8, [0, 128, 255], [0, 128, 255]),
        (6, [0b0001_10, 0b1111_01, 0b1000_00], [0b1111_0001, 0b1000, 0b00_01_10]),  # the upper four, then the lower two
    ],
)
def test_rows_that_do_not_fill_bytes(bits: int, values: list[int], packed: list[int]) -> None:
    fmt = FORMATS[bits](32, False)
    array = np.array([values, values[::-1]], np.uint8)
    got = fmt.pack(array)
    assert got[0].tolist() == packed
    np.testing.assert_array_equal(fmt.unpack(got, len(values)), array)


@given(st.sampled_from(sorted(FORMATS)), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_unpack_is_the_inverse_of_pack(bits: int, rows: int, count: int, seed: int) -> None:
    fmt = FORMATS[bits](32, False)
    values = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count)).astype(np.uint8)
    before = values.copy()
    packed = fmt.pack(values)
    assert packed.shape == (rows, sum(-(-count * plane.bits // 8) for plane in fmt.planes))
    np.testing.assert_array_equal(fmt.unpack(packed, count), values)
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize(
    ("name", "rows", "columns", "sizes"),
    [
        ("w4b32s", 4096, 4096, [8_388_608, 1_048_576]),  # codes, scales, zeros: 4.5 bits a weight
        ("w4b32a", 4096, 4096, [8_388_608, 1_048_576, 262_144]),
        ("w2b64a", 3, 320, [3 * 80, 3 * 5 * 2, 3 * 2]),  # five 2-bit zero points take two bytes a row
        ("w4b64a", 3, 320, [3 * 160, 3 * 5 * 2, 3 * 3]),
        ("w8b64a", 3, 320, [3 * 320, 3 * 5 * 2, 3 * 5]),
        ("w6b64a", 3, 320, [3 * 160, 3 * 80, 3 * 5 * 2, 3 * 3, 3 * 2]),  # two planes of codes and of zero points
    ],
)
def test_bytes(name: str, rows: int, columns: int, sizes: list[int]) -> None:
    fmt = TensorFormat.parse(name)
    assert [tensor.bytes for tensor in fmt.tensors(rows, columns)] == sizes
    assert fmt.bytes(rows, columns) == sum(sizes)


def test_blocks_are_fitted_to_the_matrix() -> None:
    assert str(TensorFormat.parse("w4b128a").fitted(576)) == "w4b64a"
    assert str(TensorFormat.parse("w4b32a").fitted(4096)) == "w4b32a"
    assert str(TensorFormat.parse("w4b32a").fitted(48)) == "w4b16a"
    with pytest.raises(PlanError, match="no block of at most 64 divides 48"):
        TensorFormat.parse("w2b64a").fitted(48)


def test_planes_under_one_scale_add_up_to_the_weights() -> None:
    """What the runtime adds: the upper plane's product, its scale four times as large, and the lower plane's."""
    whole = golden("w6b32a")
    upper, lower, scales, upper_zeros, lower_zeros = whole.stored()
    high = Quantized(TensorFormat.parse("w4b32a"), upper, scales * np.float16(4), upper_zeros).dequantize()
    low = Quantized(TensorFormat.parse("w2b32a"), lower, scales, lower_zeros).dequantize()
    np.testing.assert_array_equal(high.astype(float) + low, whole.dequantize())


def test_the_nodes_of_a_plane_say_what_they_read() -> None:
    """The rest is proved by what ONNX Runtime makes of them: tests/artifact/test_write.py."""
    upper, lower = TensorFormat.parse("w6b64a").product(10, 192)
    assert upper == Node(
        "MatMulNBits", ".bits4",
        (None, Operand(".bits4.codes", (10, 3, 32)), Operand(".scales", unit=4), Operand(".bits4.zeros")),
        {"K": 192, "N": 10, "bits": 4, "block_size": 64, "accuracy_level": 4},
    )  # fmt: skip
    assert lower.inputs[1:] == (Operand(".bits2.codes", (10, 3, 16)), Operand(".scales"), Operand(".bits2.zeros"))
    (lookup,) = TensorFormat.parse("w8b32s").lookup()
    assert lookup == Node(
        "GatherBlockQuantized", "", (Operand(".codes"), None, Operand(".scales")),
        {"bits": 8, "block_size": 32, "gather_axis": 0, "quantize_axis": 1},
    )  # fmt: skip


class ThreeBits(TensorFormat):
    """A format that does not ship: two planes of the 2-bit kernel, the lower with one bit unused."""

    bits, blocks, ranges = 3, (64,), np.linspace(1.0, 0.5, 4)
    planes = (Plane(2, 2), Plane(2))

    def pack(self, values: np.ndarray) -> np.ndarray:
        """The lower plane has one bit."""
        return np.hstack([TWO.pack(values >> 1), TWO.pack(values & 1)])


TWO = TensorFormat.parse("w2b64a")


def test_a_new_format_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, searched, compensated, stored and described by nothing but its class."""
    from pipeline.quantize.factor import factor
    from pipeline.quantize.gptq import compensated
    from pipeline.quantize.search import weighted

    monkeypatch.setitem(FORMATS, 3, ThreeBits)
    fmt = TensorFormat.parse("w3b64a")
    rng = np.random.default_rng(0)
    weights, x = rng.standard_normal((8, 192)).astype(np.float32), rng.standard_normal((500, 192)).astype(np.float32)
    (found,) = compensated(weights, factor(x.T @ x, 0.1), [(fmt, 192)])
    for quantized in (weighted(weights, np.ones(192), fmt), found):
        levels = np.abs(weights - quantized.dequantize()).reshape(8, 3, 64).max(axis=2)
        assert (levels < np.abs(quantized.scales.astype(np.float32)) * 2.5).all()
        assert sum(array.nbytes for array in quantized.stored()) == fmt.bytes(8, 192)
    assert fmt.results == 3
    assert fmt.packed_bytes(8 * 192) == 2 * 8 * 192 * 3 // 8
