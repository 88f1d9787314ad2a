"""Scale and zero-point searches: rows of float32 weights in, codes out. Pure, compiled, deterministic.

`nearest` is the control: the block's range divided evenly. `weighted` minimises Σ m_j (w_j − ŵ_j)² over each block,
m_j being the second moment of input channel j, which is the block's share of the output error when channels are
uncorrelated. For a number of candidate ranges it rounds, solves for the least-squares scale in closed form and keeps
the best; the algorithm of llama.cpp's make_qkx2_quants and make_qx_quants, restricted to the one scale and integer
zero point that a MatMulNBits block has. A block keeps its nearest codes when the search, once its scale is rounded to
float16, is no better.

The compiled loops run over the blocks of a row side by side (weights transposed to [position, block]): they vectorise
without reordering any sum, so the result is the same to the bit on any thread count and vector width.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

from pipeline.quantize.formats import Quantized, TensorFormat

# Ranges to try, as shares of the full one. Few bits gain from clipping far, 8 bits hardly; finer steps gain < 0.2 %.
_RANGES = {
    2: np.linspace(1.0, 0.5, 24, dtype=np.float32),
    4: np.linspace(1.0, 0.7, 24, dtype=np.float32),
    8: np.linspace(1.0, 0.95, 24, dtype=np.float32),
}
_FULL_RANGE = np.ones(1, np.float32)
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
    worse = ~(errors[0] < errors[1])
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
    transposed = np.ascontiguousarray(importance.reshape(-1, fmt.block).T)
    search = _search_symmetric if fmt.symmetric else _search_asymmetric
    search(weights, transposed, fmt.top, ranges, refine, scales, zeros)
    with np.errstate(over="ignore"):  # an infinite scale is the caller's to report: it knows the tensor's name
        return scales.astype(np.float16).astype(np.float32), zeros


def _rounded(weights: np.ndarray, scales: np.ndarray, zeros: np.ndarray, fmt: TensorFormat) -> Quantized:
    """Codes for scales as they are stored: rounding comes after the scale's own rounding to float16."""
    codes = np.empty(weights.shape, np.uint8)
    _round(weights, scales, zeros, fmt.top, codes)
    with np.errstate(over="ignore"):
        return Quantized(fmt, codes, scales.astype(np.float16), zeros)


def _compiled(**options: bool) -> Callable[[Callable], Callable]:
    """numba.njit with its on-disk cache, and without where no cache folder is writable (numba refuses to import)."""

    def wrap(function: Callable) -> Callable:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:
            return numba.njit(**options)(function)

    return wrap


@_compiled(noalias=True)
def _sums(w, m, inverse, low, high, cross, square):
    """Per block: cross = Σ m w c and square = Σ m c² for centred codes c = clip(round(w·inverse), low, high)."""
    cross[:] = 0
    square[:] = 0
    for j in range(w.shape[0]):
        for b in range(w.shape[1]):
            c = np.rint(w[j, b] * inverse[b])
            c = high[b] if c > high[b] else c
            c = low[b] if c < low[b] else c
            t = m[j, b] * c
            cross[b] += t * w[j, b]
            square[b] += t * c


@_compiled()
def _keep_better(cross, square, scale, zero, refine, best, scales, zeros):
    """The error of a candidate with its least-squares scale is Σ m w² − cross²/square: keep the largest quotient."""
    for b in range(best.size):
        if square[b] > 0:
            gain = cross[b] * cross[b] / square[b]
            if gain > best[b]:
                best[b] = gain
                scales[b] = cross[b] / square[b] if refine else scale[b]
                zeros[b] = zero[b]


@_compiled(parallel=True)
def _search_asymmetric(weights, moments, top, ranges, refine, scales, zeros):
    block, count = moments.shape
    for row in numba.prange(weights.shape[0]):
        w = weights[row].reshape(count, block).T.copy()
        bottom, step, middle, zero = np.zeros((4, count), np.float32)
        scale, inverse, low, high, cross, square, best = np.zeros((7, count), np.float32)
        for b in range(count):
            bottom[b] = min(w[:, b].min(), np.float32(0))
            step[b] = (max(w[:, b].max(), np.float32(0)) - bottom[b]) / np.float32(top)
            middle[b] = np.rint(-bottom[b] / step[b]) if step[b] > 0 else np.float32(0)
            # A block of zeros stays at this scale: its codes are its zero point.
            scales[row, b] = 1
            zeros[row, b] = 0
        best[:] = -1
        for k in range(ranges.size):
            for nudge in range(-1 if refine else 0, 2 if refine else 1):
                for b in range(count):
                    scale[b] = step[b] * ranges[k]
                    inverse[b] = np.float32(1) / scale[b] if scale[b] > 0 else np.float32(0)
                    zero[b] = min(max(middle[b] + np.float32(nudge), np.float32(0)), np.float32(top))
                    low[b] = -zero[b]
                    high[b] = np.float32(top) - zero[b]
                _sums(w, moments, inverse, low, high, cross, square)
                _keep_better(cross, square, scale, zero, refine, best, scales[row], zeros[row])


@_compiled(parallel=True)
def _search_symmetric(weights, moments, top, ranges, refine, scales, zeros):
    block, count = moments.shape
    middle = np.float32((top + 1) // 2)
    for row in numba.prange(weights.shape[0]):
        w = weights[row].reshape(count, block).T.copy()
        extreme, scale, inverse, low, high, zero, cross, square, best = np.zeros((9, count), np.float32)
        low[:] = -middle
        high[:] = np.float32(top) - middle
        zero[:] = middle
        for b in range(count):
            for j in range(block):
                if abs(w[j, b]) > abs(extreme[b]):
                    extreme[b] = w[j, b]
            scales[row, b] = 1
        best[:] = -1
        for k in range(ranges.size):
            # The codes reach one step further down than up: the extreme takes the lowest code, whatever its sign.
            for sign in range(2 if refine else 1):
                for b in range(count):
                    scale[b] = extreme[b] * ranges[k] / (middle if sign else -middle)
                    inverse[b] = np.float32(1) / scale[b] if scale[b] != 0 else np.float32(0)
                _sums(w, moments, inverse, low, high, cross, square)
                _keep_better(cross, square, scale, zero, refine, best, scales[row], zeros[row])


@_compiled()
def _code(value, inverse, zero, top):
    return min(max(np.rint(value * inverse) + zero, np.float32(0)), np.float32(top))


@_compiled(parallel=True)
def _errors(weights, importance, scales, zeros, top, errors):
    """Σ m (w − ŵ)² of each block under stored scales; infinite where the scale is."""
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


@_compiled(parallel=True)
def _round(weights, scales, zeros, top, codes):
    block = weights.shape[1] // scales.shape[1]
    for row in numba.prange(weights.shape[0]):
        for b in range(scales.shape[1]):
            scale = scales[row, b]
            inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
            for j in range(b * block, (b + 1) * block):
                codes[row, j] = np.uint8(_code(weights[row, j], inverse, np.float32(zeros[row, b]), top))
