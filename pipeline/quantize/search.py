"""Scale and zero-point searches: rows of float32 weights in, codes out. Pure, compiled, deterministic.

`nearest` is the control: the block's range divided evenly. `weighted` minimises Σ m_j (w_j − ŵ_j)² over each block,
m_j being the second moment of input channel j, which is the block's share of the output error when channels are
uncorrelated. For a number of candidate ranges it rounds, solves for the least-squares scale in closed form and keeps
the best; the algorithm of llama.cpp's make_qkx2_quants and make_qx_quants, restricted to the one scale and integer
zero point that a MatMulNBits block has. A block keeps its nearest codes when the search, once its scale is rounded to
float16, is no better.

The compiled loops take 32 blocks side by side, as lanes (transposed to [position, lane]): they vectorise without
reordering any sum, so the result is the same to the bit on any thread count and vector width.
"""

from __future__ import annotations

import numba
import numpy as np

from pipeline.compiled import compiled
from pipeline.quantize.formats import Quantized, TensorFormat

# Ranges to try, as shares of the full one: few bits gain from clipping far, 8 bits hardly. On Gaussian and Student-t
# weights, 24 steps in place of these lower the error by less than 0.1 %, at twice the time.
_RANGES = {
    2: np.linspace(1.0, 0.3, 12, dtype=np.float32),
    4: np.linspace(1.0, 0.7, 12, dtype=np.float32),
    8: np.linspace(1.0, 0.95, 16, dtype=np.float32),
}
_FULL_RANGE = np.ones(1, np.float32)
_LANES = 32
# A channel that calibration never excited must not become free to destroy: a floor far below its block's mean.
_FLOOR = np.float32(1e-3)


def nearest(weights: np.ndarray, fmt: TensorFormat) -> Quantized:
    """Round to nearest: float32 [rows, columns] to `fmt`, the range of each block divided evenly."""
    _check(weights, fmt)
    return _rounded(weights, *_nearest_grid(weights, fmt), fmt)


def weighted(weights: np.ndarray, moments: np.ndarray, fmt: TensorFormat) -> Quantized:
    """Search scale and zero point of each block of float32 [rows, columns] under `moments`, [columns], all ≥ 0."""
    _check(weights, fmt)
    importance = floored(moments, fmt.block)
    scales, zeros = _grid(weights, importance, fmt, _RANGES[fmt.bits], True)
    plain_scales, plain_zeros = _nearest_grid(weights, fmt)
    errors = np.empty((2, *scales.shape), np.float32)
    _errors(weights, importance, scales, zeros, fmt.top, errors[0])
    _errors(weights, importance, plain_scales, plain_zeros, fmt.top, errors[1])
    worse = ~np.isfinite(errors[0]) | (errors[0] >= errors[1])
    scales[worse], zeros[worse] = plain_scales[worse], plain_zeros[worse]
    return _rounded(weights, scales, zeros, fmt)


def floored(moments: np.ndarray, block: int) -> np.ndarray:
    """What `weighted` weighs errors with: moments relative to their block's mean plus a floor, float32 [columns]."""
    blocks = moments.astype(np.float64).reshape(-1, block)
    mean = blocks.mean(axis=1, keepdims=True)
    relative = np.divide(blocks, mean, out=np.ones_like(blocks), where=mean > 0)
    return (relative.astype(np.float32) + _FLOOR).reshape(-1)


def _check(weights: np.ndarray, fmt: TensorFormat) -> None:
    if weights.shape[1] % fmt.block:
        raise ValueError(f"{weights.shape[1]} columns are not a multiple of the block, {fmt.block}")


def _nearest_grid(weights: np.ndarray, fmt: TensorFormat) -> tuple[np.ndarray, np.ndarray]:
    return _grid(weights, np.ones(weights.shape[1], np.float32), fmt, _FULL_RANGE, False)


def _grid(
    weights: np.ndarray, importance: np.ndarray, fmt: TensorFormat, ranges: np.ndarray, refine: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Scales as stored, float16 values in float32 [rows, blocks], and zeros uint8 alike."""
    scales = np.empty((len(weights), weights.shape[1] // fmt.block), np.float32)
    zeros = np.full(scales.shape, fmt.middle, np.uint8)
    search = _search_symmetric if fmt.symmetric else _search_asymmetric
    blocks, shares = weights.reshape(-1, fmt.block), importance.reshape(-1, fmt.block)
    search(blocks, shares, np.float32(fmt.top), ranges, refine, scales.reshape(-1), zeros.reshape(-1))
    with np.errstate(over="ignore"):  # an infinite scale is the caller's to report: it knows the tensor's name
        return scales.astype(np.float16).astype(np.float32), zeros


def _rounded(weights: np.ndarray, scales: np.ndarray, zeros: np.ndarray, fmt: TensorFormat) -> Quantized:
    """Codes for scales as they are stored: rounding comes after the scale's own rounding to float16."""
    codes = np.empty(weights.shape, np.uint8)
    _round(weights, scales, zeros, fmt.top, codes)
    with np.errstate(over="ignore"):
        return Quantized(fmt, codes, scales.astype(np.float16), zeros)


@compiled()
def _load_lanes(blocks, shares, start, w, m):
    """Blocks from `start` on as columns of w, their importances as columns of m; lanes past the end stay zero."""
    for lane in range(min(_LANES, len(blocks) - start)):
        for j in range(len(w)):
            w[j, lane] = blocks[start + lane, j]
            m[j, lane] = shares[(start + lane) % len(shares), j]


@compiled()
def _sums(w, m, grid, top, sums):
    """Per lane Σ m r², Σ m r c and Σ m c² for codes c = clip(round(w/scale) + zero, 0, top) − zero, r = w − c·scale.

    `grid` is scale, 1/scale and zero, `sums` the results, each one behind the other: with two arrays in place of six
    the compiler can tell that writing one never changes the other, and vectorises.
    """
    sums[:] = 0
    for j in range(len(w)):
        for lane in range(_LANES):
            zero = grid[2 * _LANES + lane]
            c = np.rint(w[j, lane] * grid[_LANES + lane]) + zero
            c = top if c > top else c
            c = np.float32(0) if c < np.float32(0) else c
            c -= zero
            r = w[j, lane] - c * grid[lane]
            t = m[j, lane] * r
            sums[lane] += t * r
            sums[_LANES + lane] += t * c
            sums[2 * _LANES + lane] += m[j, lane] * c * c


@compiled()
def _try(w, m, scale, zero, top, refine, best, chosen):
    """Keep one candidate (scale and zero per lane) where it leaves less error than `best`.

    The least-squares scale of its codes is scale + Σ m r c / Σ m c² and leaves the error Σ m r² − (Σ m r c)² / Σ m c².
    Written with residuals because float32 cannot tell 8-bit candidates apart by what they explain.
    """
    grid, sums = np.zeros(3 * _LANES, np.float32), np.zeros(3 * _LANES, np.float32)
    for lane in range(_LANES):
        grid[lane] = scale[lane]
        grid[_LANES + lane] = np.float32(1) / scale[lane] if scale[lane] != 0 else np.float32(0)
        grid[2 * _LANES + lane] = zero[lane]
    _sums(w, m, grid, top, sums)
    for lane in range(_LANES):
        error, cross, square = sums[lane], sums[_LANES + lane], sums[2 * _LANES + lane]
        if square <= 0:
            continue
        step = cross / square if refine else np.float32(0)
        # Round-to-nearest has one candidate, kept even if its error overflows: the caller sees an infinite scale.
        if not refine or error - step * cross < best[lane]:
            best[lane] = error - step * cross
            chosen[0, lane] = scale[lane] + step
            chosen[1, lane] = zero[lane]


@compiled()
def _store_lanes(start, chosen, scales, zeros):
    for lane in range(min(_LANES, scales.size - start)):
        scales[start + lane] = chosen[0, lane]
        zeros[start + lane] = np.uint8(chosen[1, lane])


@compiled()
def _asymmetric_tile(tile, blocks, shares, top, ranges, refine, scales, zeros):
    w, m = np.zeros((blocks.shape[1], _LANES), np.float32), np.zeros((blocks.shape[1], _LANES), np.float32)
    full, middle, scale, zero = np.zeros((4, _LANES), np.float32)
    best, chosen = np.full(_LANES, np.inf, np.float32), np.zeros((2, _LANES), np.float32)
    chosen[0] = 1  # a block of zeros stays at this scale: its codes are its zero point
    _load_lanes(blocks, shares, tile * _LANES, w, m)
    for lane in range(_LANES):
        low, high = min(w[:, lane].min(), np.float32(0)), max(w[:, lane].max(), np.float32(0))
        full[lane] = (high - low) / top
        middle[lane] = np.rint(-low / full[lane]) if full[lane] > 0 else np.float32(0)
    for k in range(ranges.size):
        for nudge in range(-1 if refine else 0, 2 if refine else 1):
            for lane in range(_LANES):
                scale[lane] = full[lane] * ranges[k]
                zero[lane] = min(max(middle[lane] + np.float32(nudge), np.float32(0)), top)
            _try(w, m, scale, zero, top, refine, best, chosen)
    _store_lanes(tile * _LANES, chosen, scales, zeros)


@compiled()
def _symmetric_tile(tile, blocks, shares, top, ranges, refine, scales, zeros):
    middle = np.float32((top + 1) // 2)
    w, m = np.zeros((blocks.shape[1], _LANES), np.float32), np.zeros((blocks.shape[1], _LANES), np.float32)
    extreme, scale, zero = np.zeros((3, _LANES), np.float32)
    best, chosen = np.full(_LANES, np.inf, np.float32), np.ones((2, _LANES), np.float32)
    zero[:] = middle
    chosen[1] = middle
    _load_lanes(blocks, shares, tile * _LANES, w, m)
    for lane in range(_LANES):
        extreme[lane] = w[np.abs(w[:, lane]).argmax(), lane]
    for k in range(ranges.size):
        # The codes reach one step further down than up: the extreme takes the lowest code, whatever its sign.
        for sign in range(2 if refine else 1):
            for lane in range(_LANES):
                scale[lane] = extreme[lane] * ranges[k] / (middle if sign else -middle)
            _try(w, m, scale, zero, top, refine, best, chosen)
    _store_lanes(tile * _LANES, chosen, scales, zeros)


@compiled(parallel=True)
def _search_asymmetric(blocks, shares, top, ranges, refine, scales, zeros):
    for tile in numba.prange((len(blocks) + _LANES - 1) // _LANES):
        _asymmetric_tile(tile, blocks, shares, top, ranges, refine, scales, zeros)


@compiled(parallel=True)
def _search_symmetric(blocks, shares, top, ranges, refine, scales, zeros):
    for tile in numba.prange((len(blocks) + _LANES - 1) // _LANES):
        _symmetric_tile(tile, blocks, shares, top, ranges, refine, scales, zeros)


@compiled()
def _code(value, inverse, zero, top):
    return min(max(np.rint(value * inverse) + zero, np.float32(0)), np.float32(top))


@compiled(parallel=True)
def _errors(weights, importance, scales, zeros, top, errors):
    """Σ m (w − ŵ)² of each block under stored scales; not finite where the scale is not."""
    block = weights.shape[1] // scales.shape[1]
    for row in numba.prange(weights.shape[0]):
        for b in range(scales.shape[1]):
            scale, zero = scales[row, b], np.float32(zeros[row, b])
            inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
            total = np.float32(0)
            for j in range(b * block, (b + 1) * block):
                delta = weights[row, j] - (_code(weights[row, j], inverse, zero, top) - zero) * scale
                total += importance[j] * delta * delta
            errors[row, b] = total


@compiled(parallel=True)
def _round(weights, scales, zeros, top, codes):
    block = weights.shape[1] // scales.shape[1]
    for row in numba.prange(weights.shape[0]):
        for b in range(scales.shape[1]):
            scale = scales[row, b]
            inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
            for j in range(b * block, (b + 1) * block):
                codes[row, j] = np.uint8(_code(weights[row, j], inverse, np.float32(zeros[row, b]), top))
