"""The searches: golden blocks, and laws that hold for any weights."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.quantize import search
from pipeline.quantize.formats import Quantized, TensorFormat
from pipeline.quantize.search import floored, nearest, weighted

FORMATS = ["w2b32s", "w2b64a", "w4b32s", "w4b32a", "w4b16a", "w6b64a", "w8b32s", "w8b64a"]
GOLDEN = {
    # name: (block, codes, scale, zero), every number a power of two times an integer, so exact in float16
    "w4b32a": (np.arange(-4, 12) * 0.25, range(16), 0.25, 4),
    "w4b32s": (np.arange(-8, 8) * 0.5, range(16), 0.5, 8),
    "w2b32a": (np.array([-0.5, 0.0, 0.5, 1.0] * 4), [0, 1, 2, 3] * 4, 0.5, 1),
    "w2b32s": (np.array([2.0, 1.0, 0.0, -1.0] * 4), [0, 1, 2, 3] * 4, -1.0, 2),  # a positive extreme: scale < 0
    "w6b32a": (np.array([*range(-5, 55, 4), 58]) * 0.25, [*range(0, 60, 4), 63], 0.25, 5),
    "w8b32s": (np.arange(-128, 128, 16) / 128, range(0, 256, 16), 2.0**-7, 128),
    "w8b32a": (np.arange(0, 256, 17) * 2.0, range(0, 256, 17), 2.0, 0),
}


def error(weights: np.ndarray, quantized: Quantized, importance: np.ndarray) -> np.ndarray:
    """Weighted squared error of each block in float64."""
    delta = (weights.astype(np.float64) - quantized.dequantize()) ** 2 * importance
    return delta.reshape(len(weights), -1, quantized.format.block).sum(axis=2)


def same(a: Quantized, b: Quantized) -> bool:
    return all(np.array_equal(getattr(a, part), getattr(b, part)) for part in ("codes", "scales", "zeros"))


def sample(seed: int, rows: int = 3, columns: int = 192, tails: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    """Heavy-tailed weights and log-normal channel moments."""
    rng = np.random.default_rng(seed)
    return rng.standard_t(tails, (rows, columns)).astype(np.float32), np.exp(rng.standard_normal(columns))


@pytest.mark.parametrize("name", GOLDEN)
def test_blocks_on_the_grid_are_kept_exactly(name: str) -> None:
    block, codes, scale, zero = GOLDEN[name]
    weights = np.array([np.tile(block, 2)], np.float32)
    fmt = TensorFormat.parse(name)
    plain = nearest(weights, fmt)
    assert fmt.unpack(plain.codes, 32)[0].tolist() == list(codes) * 2
    assert plain.scales.tolist() == [[scale]]
    assert fmt.symmetric or fmt.unpack(plain.zeros, 1).tolist() == [[zero]]
    assert not fmt.symmetric or zero == fmt.middle
    for quantized in (plain, weighted(weights, np.arange(1.0, 33.0), fmt)):
        np.testing.assert_array_equal(quantized.dequantize(), weights)


@settings(max_examples=60)
@given(st.sampled_from(FORMATS), st.integers(0, 2**32 - 1), st.sampled_from([1e-8, 1e-4, 1.0, 3e3]))
def test_weighted_is_never_worse_than_nearest(name: str, seed: int, size: float) -> None:
    """Under the weights that it minimises, with scales as stored, block by block; tiny blocks meet float16's end."""
    fmt = TensorFormat.parse(name)
    weights, moments = sample(seed)
    weights *= np.float32(size)
    importance = floored(moments, fmt.block).astype(np.float64)
    found = error(weights, weighted(weights, moments, fmt), importance)
    control = error(weights, nearest(weights, fmt), importance)
    assert (found <= control * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("name", "gain"), [("w2b64a", 0.75), ("w4b32a", 0.95), ("w4b64a", 0.95), ("w6b64a", 0.97), ("w8b32s", 0.97)]
)
def test_weighted_is_much_better_than_nearest_on_real_shapes(name: str, gain: float) -> None:
    weights, moments = sample(0, rows=64, columns=512, tails=8)
    fmt = TensorFormat.parse(name)
    ratio = (
        error(weights, weighted(weights, moments, fmt), moments).sum()
        / error(weights, nearest(weights, fmt), moments).sum()
    )
    assert ratio**0.5 < gain


def one_start_is_best(weights: np.ndarray, moments: np.ndarray, fmt: TensorFormat) -> np.ndarray:
    """Whether one of the ranges and zero points that a search starts from leaves less error than all others, in
    float64: bool [rows, blocks]. Two are equal when they give the same codes, most often where weights are few."""
    w, m = (
        weights.reshape(-1, fmt.block),
        np.tile(floored(moments, fmt.block).reshape(-1, fmt.block), (len(weights), 1)),
    )
    w, m, low, high = w.astype(float), m.astype(float), np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    if fmt.symmetric:
        unit, zero = np.where(high > -low, high, low) / -fmt.middle, np.full(len(w), fmt.middle)
        ways = [(1, 0), (-1, 0)]
    else:
        unit, zero = (high - low) / fmt.top, np.rint(-low * fmt.top / (high - low))
        ways = [(1, 0), (1, -1), (1, 1)]
    errors = []
    for share, nudge in ((sign * share, nudge) for share in fmt.ranges for sign, nudge in ways):
        centre = np.clip(zero + nudge, 0, fmt.top)[:, None]
        levels = np.clip(np.rint(w / (unit * share)[:, None]) + centre, 0, fmt.top) - centre
        scale = (m * w * levels).sum(1) / np.maximum((m * levels**2).sum(1), 1e-300)
        errors.append((m * (w - scale[:, None] * levels) ** 2).sum(1))
    first, second = np.sort(errors, axis=0)[:2]
    return (second > first * (1 + 1e-4)).reshape(len(weights), -1)


@settings(max_examples=30)
@given(st.sampled_from(FORMATS), st.integers(0, 2**32 - 1))
def test_the_order_of_channels_inside_a_block_does_not_matter_but_for_ties(name: str, seed: int) -> None:
    """Where two starts are equally good, the rounding of a sum decides which of them is refined, and its neighbours may
    be 10 % better than the other's: so it is for 'w4b16a' and 162459711. No order is worse than `nearest` there either
    (`test_weighted_is_never_worse_than_nearest`). Another rule at ties would change the bytes of released artifacts."""
    fmt = TensorFormat.parse(name)
    weights, moments = sample(seed)
    rng = np.random.default_rng(seed)
    order = np.concatenate([start + rng.permutation(fmt.block) for start in range(0, 192, fmt.block)])
    assert np.array_equal(nearest(weights[:, order], fmt).dequantize(), nearest(weights, fmt).dequantize()[:, order])
    importance = floored(moments, fmt.block).astype(np.float64)
    a = error(weights, weighted(weights, moments, fmt), importance)
    b = error(weights[:, order], weighted(weights[:, order], moments[order], fmt), importance[order])
    alone = one_start_is_best(weights, moments, fmt)
    np.testing.assert_allclose(a[alone], b[alone], rtol=5e-3)  # a scale may be one float16 off


def test_most_blocks_have_one_best_start() -> None:
    """So the law above says something, and the seed that broke the old one shows a tie."""
    shares = {name: one_start_is_best(*sample(1, rows=50), TensorFormat.parse(name)).mean() for name in FORMATS}
    assert min(shares.values()) > 0.9, shares
    assert not one_start_is_best(*sample(162459711), TensorFormat.parse("w4b16a"))[1, 0]


@settings(max_examples=30)
@given(st.sampled_from(FORMATS), st.integers(0, 2**32 - 1), st.integers(-6, 6))
def test_scaling_weights_scales_only_scales(name: str, seed: int, power: int) -> None:
    fmt = TensorFormat.parse(name)
    weights, moments = sample(seed)
    a, b = weighted(weights, moments, fmt), weighted(weights * np.float32(2.0**power), moments, fmt)
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_array_equal(a.zeros, b.zeros)
    np.testing.assert_array_equal(a.scales.astype(np.float32) * 2.0**power, b.scales.astype(np.float32))


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
def test_scaling_moments_changes_nothing(factor: float) -> None:
    weights, moments = sample(1)
    fmt = TensorFormat.parse("w4b32a")
    assert same(weighted(weights, moments, fmt), weighted(weights, moments * factor, fmt))


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_that_calibration_never_excited_are_searched_evenly(name: str) -> None:
    weights, _ = sample(2)
    fmt = TensorFormat.parse(name)
    assert same(weighted(weights, np.zeros(192), fmt), weighted(weights, np.ones(192), fmt))


def test_a_silent_channel_is_not_free_to_destroy() -> None:
    weights, moments = sample(3)
    moments[::7] = 0
    got = weighted(weights, moments, TensorFormat.parse("w4b32a")).dequantize()
    assert np.abs(got - weights)[:, ::7].max() < 0.35 * np.abs(weights).max()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.3, -777.7, 6e4, 1e-3])
def test_constant_blocks(name: str, value: float) -> None:
    """A constant is a multiple of a scale, up to the scale's 11 bits, fewer below float16's normal range."""
    fmt = TensorFormat.parse(name)
    weights = np.full((2, 64), value, np.float32)
    for quantized in (nearest(weights, fmt), weighted(weights, np.ones(64), fmt)):
        np.testing.assert_allclose(quantized.dequantize(), weights, rtol=2.0**-10, atol=fmt.top * 2.0**-25)
        assert np.isfinite(quantized.scales).all()


@pytest.mark.parametrize("name", FORMATS)
def test_the_ends_of_float16(name: str) -> None:
    fmt = TensorFormat.parse(name)
    weights, moments = sample(4)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        for size in (1e-30, 1e-38, 1e-42):  # below float16: weights vanish, nothing is NaN
            got = weighted(weights * np.float32(size), moments, fmt)
            assert np.array_equal(got.dequantize(), np.zeros_like(weights))
        assert not np.isfinite(weighted(weights * np.float32(1e8), moments, fmt).scales).all()  # the caller refuses it


@pytest.mark.parametrize("name", FORMATS)
def test_the_result_does_not_depend_on_chunks_or_threads(name: str) -> None:
    """Any rows at a time, several calls at once, from contiguous memory or not: the same bytes."""
    fmt = TensorFormat.parse(name)
    weights, moments = sample(5, rows=37, columns=576)
    whole = weighted(weights, moments, fmt)
    assert same(whole, weighted(np.asfortranarray(weights), moments, fmt))
    with ThreadPoolExecutor(5) as pool:
        chunks = list(
            pool.map(lambda start: weighted(weights[start : start + 5], moments, fmt), [*range(0, 37, 5)] * 3)
        )
    for again in range(3):
        for part in ("codes", "scales", "zeros"):
            found = np.concatenate([getattr(chunk, part) for chunk in chunks[8 * again : 8 * again + 8]])
            np.testing.assert_array_equal(found, getattr(whole, part))


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_are_those_of_the_format(name: str) -> None:
    fmt = TensorFormat.parse(name)
    weights, moments = sample(6, rows=7, columns=320)
    for quantized in (nearest(weights, fmt), weighted(weights, moments, fmt)):
        assert [(array.dtype.name, array.shape) for array in quantized.stored()] == [
            (tensor.dtype, tensor.shape) for tensor in fmt.tensors(7, 320)
        ]
        assert quantized.dequantize().shape == (7, 320)


def rounded(values: np.ndarray) -> np.ndarray:
    """Bits of what the compiled rounding to float16 gives, as float32; any count."""
    lanes = search.LANES
    padded = np.zeros(-(-len(values) // lanes) * lanes, np.float32)
    padded[: len(values)] = values
    found = np.empty_like(padded)
    for start in range(0, len(padded), lanes):
        search.round_scales(padded[start : start + lanes], found[start : start + lanes])
    return found[: len(values)].view(np.uint32)


def as_numpy_rounds(values: np.ndarray) -> np.ndarray:
    """The same by numpy."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32).view(np.uint32)


def test_scales_are_rounded_to_float16_as_ieee_754_says() -> None:
    """Every float16, the middle between it and the next (a tie), and the float32 on each side of both; both signs."""
    halves = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float32)
    # Beyond the largest float16 numpy's tie is at 65,520: where the next float16 would be 65,536.
    nexts = np.append(halves[1:-1], np.float32(65536))
    ties = ((halves[:-1].astype(np.float64) + nexts) / 2).astype(np.float32)
    centres = np.concatenate([halves, ties, np.float32([1e-45, 1e-38, 7e4, 1e8, 3.4e38])])
    around = [centres, np.nextafter(centres, np.float32(-np.inf)), np.nextafter(centres, np.float32(np.inf))]
    positive = np.abs(np.concatenate(around))
    values = np.concatenate([positive, -positive])
    np.testing.assert_array_equal(rounded(values), as_numpy_rounds(values))


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_any_float32_is_rounded_to_float16(seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << 32, 4096, dtype=np.uint32).view(np.float32)
    values = values[~np.isnan(values)]
    np.testing.assert_array_equal(rounded(values), as_numpy_rounds(values))


def test_columns_must_fill_blocks() -> None:
    with pytest.raises(ValueError, match="48 columns are not a multiple of the block, 32"):
        nearest(np.zeros((1, 48), np.float32), TensorFormat.parse("w4b32s"))


def test_a_package_that_cannot_be_written_still_works(tmp_path: Path) -> None:
    """No cache folder anywhere (both places are under files): functions are compiled in memory."""
    package = tmp_path / "pipeline"
    source = Path(search.__file__).parent
    (package / "quantize").mkdir(parents=True)
    for file in (source.parent / name for name in ("__init__.py", "compiled.py", "errors.py")):
        shutil.copyfile(file, package / file.name)
    for file in source.glob("*.py"):
        shutil.copyfile(file, package / "quantize" / file.name)
    (package / "quantize" / "__pycache__").write_text("a file where the cache would be")
    program = (
        "import numpy as np\n"
        "from pipeline.quantize import search\n"
        "rounded = np.zeros(search.LANES, np.float32)\n"
        "search.round_scales(np.full(search.LANES, 1.0001, np.float32), rounded)\n"
        "print({*rounded.tolist()})\n"
    )
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=nowhere, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{1.0}"
