"""Scale and zero-point searches: rows of float32 weights in, codes out. Pure, compiled, deterministic.

`nearest` is the control: the block's range divided evenly. `weighted` minimises Σ m_j (w_j − ŵ_j)² over each block,
m_j being the second moment of input channel j, which is the block's share of the output error when channels are
uncorrelated. For a number of candidate ranges it rounds, solves for the least-squares scale in closed form and keeps
the best; the algorithm of llama.cpp's make_qkx2_quants and make_qx_quants, restricted to the one scale and integer
zero point that a MatMulNBits block has. Rows are independent, so the result does not depend on the thread count.
"""

from __future__ import annotations

import numba
import numpy as np

from pipeline.quantize.formats import Quantized, TensorFormat

# Shrinking the range by up to a quarter finds the optimum of 2-bit blocks; 4 and 8 bits need less but are as cheap.
CANDIDATES = 24
_SHRINK = {2: 0.50, 4: 0.30, 8: 0.05}


def nearest(weights: np.ndarray, fmt: TensorFormat) -> Quantized:
    """Round to nearest: float32 [rows, columns] to `fmt`, the range of each block divided evenly."""
    return _quantize(weights, np.ones(weights.shape[1], np.float32), fmt, candidates=1)


def weighted(weights: np.ndarray, moments: np.ndarray, fmt: TensorFormat) -> Quantized:
    """Search scale and zero point of each block under `moments`, float32 [columns], all ≥ 0."""
    return _quantize(weights, moments.astype(np.float32), fmt, candidates=CANDIDATES)


def _quantize(weights: np.ndarray, moments: np.ndarray, fmt: TensorFormat, candidates: int) -> Quantized:
    rows, columns = weights.shape
    if columns % fmt.block:
        raise ValueError(f"{columns} columns are not a multiple of the block, {fmt.block}")
    # A channel that calibration never excited must not become free to destroy: a floor far below the block's mean.
    blocks = moments.reshape(-1, fmt.block)
    importance = (blocks + 1e-3 * blocks.mean(axis=1, keepdims=True) + 1e-20).astype(np.float32).reshape(-1)
    scales = np.empty((rows, columns // fmt.block), np.float32)
    zeros = np.full(scales.shape, fmt.middle, np.uint8)
    search = _search_symmetric if fmt.symmetric else _search_asymmetric
    search(weights, importance, fmt.block, fmt.top, candidates, _SHRINK[fmt.bits], scales, zeros)
    stored = scales.astype(np.float16)
    codes = np.empty(weights.shape, np.uint8)
    _round(weights, stored.astype(np.float32), zeros, fmt.block, fmt.top, codes)
    return Quantized(fmt, codes, stored, zeros)


@numba.njit(inline="always")
def _try(w, m, inverse, zero, top):
    """Weighted sums of one candidate: (Σ m w c, Σ m c²) for centred codes c = clip(round(w/s) + zero) − zero."""
    cross = np.float32(0)
    square = np.float32(0)
    low = np.float32(-zero)
    high = np.float32(top - zero)
    for j in range(w.size):
        c = min(max(np.rint(w[j] * inverse), low), high)
        cross += m[j] * w[j] * c
        square += m[j] * c * c
    return cross, square


@numba.njit(parallel=True, cache=True, fastmath={"contract"})
def _search_asymmetric(weights, moments, block, top, candidates, shrink, scales, zeros):
    for row in numba.prange(weights.shape[0]):
        for index in range(scales.shape[1]):
            w = weights[row, index * block : (index + 1) * block]
            m = moments[index * block : (index + 1) * block]
            low = min(w.min(), np.float32(0))
            high = max(w.max(), np.float32(0))
            if high == low:
                scales[row, index] = 1
                zeros[row, index] = 0
                continue
            best = np.float32(-1)
            for k in range(candidates):
                # Candidate 0 is the full range, which alone is round-to-nearest.
                part = np.float32(1) - np.float32(shrink) * np.float32(k) / np.float32(candidates)
                scale = (high - low) * part / np.float32(top)
                middle = -low * part / scale
                for nudge in range(-1 if candidates > 1 else 0, 2 if candidates > 1 else 1):
                    zero = int(np.rint(middle)) + nudge
                    if zero < 0 or zero > top:
                        continue
                    cross, square = _try(w, m, np.float32(1) / scale, zero, top)
                    if square <= 0:
                        continue
                    gain = cross * cross / square
                    if gain > best:
                        best = gain
                        zeros[row, index] = zero
                        scales[row, index] = cross / square if candidates > 1 else scale


@numba.njit(parallel=True, cache=True, fastmath={"contract"})
def _search_symmetric(weights, moments, block, top, candidates, shrink, scales, zeros):
    middle = (top + 1) // 2
    for row in numba.prange(weights.shape[0]):
        for index in range(scales.shape[1]):
            w = weights[row, index * block : (index + 1) * block]
            m = moments[index * block : (index + 1) * block]
            extreme = np.float32(0)
            for j in range(block):
                if abs(w[j]) > abs(extreme):
                    extreme = w[j]
            if extreme == 0:
                scales[row, index] = 1
                continue
            best = np.float32(-1)
            for k in range(candidates):
                part = np.float32(1) - np.float32(shrink) * np.float32(k) / np.float32(candidates)
                # The codes reach one step further down than up: the extreme takes the lowest code, whatever its sign.
                scale = -extreme * part / np.float32(middle)
                for sign in range(2 if candidates > 1 else 1):
                    signed = -scale if sign else scale
                    cross, square = _try(w, m, np.float32(1) / signed, middle, top)
                    if square <= 0:
                        continue
                    gain = cross * cross / square
                    if gain > best:
                        best = gain
                        scales[row, index] = cross / square if candidates > 1 else signed


@numba.njit(parallel=True, cache=True)
def _round(weights, scales, zeros, block, top, codes):
    """Codes for scales as they are stored: rounding comes after the scale's own rounding to float16."""
    for row in numba.prange(weights.shape[0]):
        for index in range(scales.shape[1]):
            scale = scales[row, index]
            zero = np.float32(zeros[row, index])
            inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
            for j in range(index * block, (index + 1) * block):
                code = np.rint(weights[row, j] * inverse) + zero
                codes[row, j] = np.uint8(min(max(code, np.float32(0)), np.float32(top)))
