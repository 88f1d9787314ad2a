"""Scale and zero-point searches: rows of float32 weights in, stored bytes out. Pure, compiled, deterministic.

`nearest` is the control: the block's range divided evenly. `weighted` minimises Σ m_j (w_j − ŵ_j)² over each block,
m_j being the second moment of input channel j, which is the block's share of the output error when channels are
uncorrelated. For a number of candidate ranges and zero points it rounds, solves for the least-squares scale in closed
form and keeps the best; then it looks half a step to both sides, and rounds once more under the best scale: the
algorithm of llama.cpp's make_qkx2_quants and make_qx_quants, restricted to the one scale and integer zero point that a
MatMulNBits block has. A block keeps its nearest codes when the search, once its scale is rounded to float16, is no
better.

The compiled loops take 32 blocks side by side, as lanes (transposed to [position, lane]): they vectorise without
reordering any sum, so the result is the same to the bit on any vector width. They run on the calling thread, without
Python's lock: rows are independent, so callers work on many at once.
"""

from __future__ import annotations

import numpy as np

from pipeline.compiled import compiled
from pipeline.quantize.formats import Quantized, TensorFormat

LANES = 32
# A channel that calibration never excited must not become free to destroy: a floor far below its block's mean.
_FLOOR = np.float32(1e-3)
TINIEST = np.float32(2**-24)
"""The smallest scale that float16 holds."""


def nearest(weights: np.ndarray, fmt: TensorFormat) -> Quantized:
    """Round to nearest: float32 [rows, columns] to `fmt`, the range of each block divided evenly."""
    plain = np.array([[1, 0]], np.float32)
    return _quantized(weights, np.ones(weights.shape[1], np.float32), fmt, plain, np.float32(0))


def weighted(weights: np.ndarray, moments: np.ndarray, fmt: TensorFormat) -> Quantized:
    """Search scale and zero point of each block of float32 [rows, columns] under `moments`, [columns], all ≥ 0."""
    # The codes of a symmetric block reach one step further down than up: its extreme may take either end. The zero
    # point of an asymmetric one may lie beside that of its range.
    ways = [(1, 0), (-1, 0)] if fmt.symmetric else [(1, 0), (1, -1), (1, 1)]
    starts = np.array([(sign * share, nudge) for share in fmt.ranges for sign, nudge in ways], np.float32)
    half_step = np.float32((fmt.ranges[0] - fmt.ranges[1]) / 2)
    return _quantized(weights, floored(moments, fmt.block), fmt, starts, half_step)


def floored(moments: np.ndarray, block: int) -> np.ndarray:
    """What `weighted` weighs errors with: moments relative to their block's mean plus a floor, float32 [columns]."""
    blocks = moments.astype(np.float64).reshape(-1, block)
    mean = blocks.mean(axis=1, keepdims=True)
    relative = np.divide(blocks, mean, out=np.ones_like(blocks), where=mean > 0)
    return (relative.astype(np.float32) + _FLOOR).reshape(-1)


def _quantized(
    weights: np.ndarray, importance: np.ndarray, fmt: TensorFormat, starts: np.ndarray, half_step: np.float32
) -> Quantized:
    """`starts`, float32 [k, 2]: share of the full range and nudge of the zero point; the first is round to nearest."""
    rows, columns = weights.shape
    if columns % fmt.block:
        raise ValueError(f"{columns} columns are not a multiple of the block, {fmt.block}")
    blocks = rows * columns // fmt.block
    codes = np.empty((blocks, fmt.block * fmt.cell // 8), np.uint8)
    scales, zeros = np.empty(blocks, np.float32), np.empty(blocks, np.uint8)
    split = np.ascontiguousarray(weights).reshape(blocks, fmt.block)
    shares = importance.reshape(-1, fmt.block)
    _search(split, shares, fmt.top, fmt.cell, fmt.symmetric, starts, half_step, codes, scales, zeros)
    codes, grid = codes.reshape(rows, -1), (rows, columns // fmt.block)
    return Quantized.of(fmt, codes, scales.astype(np.float16).reshape(grid), zeros.reshape(grid), fmt.cell)


@compiled(nogil=True)
def _search(blocks, shares, top, cell, symmetric, starts, half_step, codes, scales, zeros):
    """Codes in cells of so many bits, uint8 [blocks, bytes of a block], scales that float16 holds, and zero points."""
    top = np.float32(top)
    w, m = np.zeros((blocks.shape[1], LANES), np.float32), np.zeros((blocks.shape[1], LANES), np.float32)
    grid, sums = np.zeros(3 * LANES, np.float32), np.zeros(3 * LANES, np.float32)
    trial, kept = np.zeros(3 * LANES, np.float32), np.zeros(4 * LANES, np.float32)
    unit, middle = np.zeros((2, LANES), np.float32)
    packed = np.zeros((codes.shape[1], LANES), np.uint8)
    for start in range(0, len(blocks), LANES):
        count = min(LANES, len(blocks) - start)
        w[:, :count] = blocks[start : start + count].T  # lanes past `count` stay
        for lane in range(count):
            m[:, lane] = shares[(start + lane) % len(shares)]
        _full_range(w, symmetric, top, unit, middle)
        kept[:] = np.inf
        for k in range(len(starts)):
            for lane in range(LANES):
                _aim(lane, starts[k, 0], middle[lane] + starts[k, 1], unit, top, trial)
            _try(w, m, top, len(starts) > 1, trial, kept, grid, sums)
        if len(starts) > 1:
            _refine(w, m, top, half_step, unit, trial, kept, grid, sums)
        round_scales(kept[:LANES], trial[:LANES])
        trial[LANES : 2 * LANES] = kept[LANES : 2 * LANES]
        if len(starts) > 1:
            _keep_nearest(w, m, top, unit, middle, trial, grid, sums)
        set_grid(trial[:LANES], trial[LANES:], grid)
        _pack_codes(w, grid, top, cell, packed)
        for lane in range(count):
            scales[start + lane], zeros[start + lane] = trial[lane], np.uint8(trial[LANES + lane])
            for byte in range(len(packed)):
                codes[start + lane, byte] = packed[byte, lane]


@compiled(nogil=True)
def _full_range(w, symmetric, top, unit, middle):
    """Scale and zero point of the range divided evenly, into steps that float16 holds: where it holds none so short,
    fewer codes are used. A block of zeros has scale 1: its codes are its zero point."""
    low, high = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    for j in range(len(w)):
        for lane in range(LANES):
            low[lane] = min(low[lane], w[j, lane])
            high[lane] = max(high[lane], w[j, lane])
    reach = np.float32((top + 1) // 2)
    for lane in range(LANES):
        if symmetric:
            extreme = high[lane] if high[lane] > -low[lane] else low[lane]
            unit[lane], middle[lane] = extreme / -reach, reach
        else:
            unit[lane] = (high[lane] - low[lane]) / top
            middle[lane] = np.rint(-low[lane] / unit[lane]) if unit[lane] > 0 else np.float32(0)
        if unit[lane] == 0:
            unit[lane] = np.float32(1)
        elif abs(unit[lane]) < TINIEST:  # which would be rounded to 0 or to this
            unit[lane] = np.copysign(TINIEST, unit[lane])
            middle[lane] = reach if symmetric else min(np.rint(-low[lane] / unit[lane]), top)


@compiled(nogil=True)
def _aim(lane, share, zero, unit, top, trial):
    trial[lane] = unit[lane] * share
    trial[LANES + lane] = min(max(zero, np.float32(0)), top)
    trial[2 * LANES + lane] = share


@compiled(nogil=True)
def _refine(w, m, top, half_step, unit, trial, kept, grid, sums):
    """Half a step to both sides of the best range, then the codes that the best scale itself gives."""
    best = kept.copy()
    for side in (-half_step, half_step):
        for lane in range(LANES):
            _aim(lane, best[2 * LANES + lane] + side, best[LANES + lane], unit, top, trial)
        _try(w, m, top, True, trial, kept, grid, sums)
    trial[:] = kept[: 3 * LANES]
    _try(w, m, top, True, trial, kept, grid, sums)


@compiled(nogil=True)
def _try(w, m, top, fit, trial, kept, grid, sums):
    """Keep the candidates of `trial` (scale, zero, share per lane) that leave less error than those of `kept`.

    The least-squares scale of a candidate's codes is scale + Σ m r c / Σ m c² and leaves the error
    Σ m r² − (Σ m r c)² / Σ m c². Written with residuals because float32 cannot tell 8-bit candidates apart by what
    they explain.
    """
    set_grid(trial[:LANES], trial[LANES:], grid)
    _sums(w, m, grid, top, sums)
    for lane in range(LANES):
        cross, square = sums[LANES + lane], sums[2 * LANES + lane]
        step = cross / square if fit and square > 0 else np.float32(0)
        error = sums[lane] - step * cross
        # The first candidate is kept even if its error overflows: the caller sees an infinite scale.
        better = error < kept[3 * LANES + lane] or kept[lane] == np.inf
        kept[lane] = trial[lane] + step if better else kept[lane]
        kept[LANES + lane] = trial[LANES + lane] if better else kept[LANES + lane]
        kept[2 * LANES + lane] = trial[2 * LANES + lane] if better else kept[2 * LANES + lane]
        kept[3 * LANES + lane] = error if better else kept[3 * LANES + lane]


@compiled(nogil=True)
def set_grid(scales, zeros, grid):
    """Scale, 1/scale and zero of each lane, one behind the other in `grid`."""
    for lane in range(LANES):
        grid[lane] = scales[lane]
        grid[LANES + lane] = np.float32(1) / scales[lane] if scales[lane] != 0 else np.float32(0)
        grid[2 * LANES + lane] = zeros[lane]


@compiled(nogil=True)
def _sums(w, m, grid, top, sums):
    """Per lane Σ m r², Σ m r c and Σ m c² for codes c = clip(round(w/scale) + zero, 0, top) − zero, r = w − c·scale.

    `grid` is scale, 1/scale and zero, `sums` the results, each one behind the other: with two arrays in place of six
    the compiler can tell that writing one never changes the other, and vectorises.
    """
    sums[:] = 0
    for j in range(len(w)):
        for lane in range(LANES):
            zero = grid[2 * LANES + lane]
            c = np.rint(w[j, lane] * grid[LANES + lane]) + zero
            c = top if c > top else c
            c = np.float32(0) if c < np.float32(0) else c
            c -= zero
            r = w[j, lane] - c * grid[lane]
            t = m[j, lane] * r
            sums[lane] += t * r
            sums[LANES + lane] += t * c
            sums[2 * LANES + lane] += m[j, lane] * c * c


@compiled(nogil=True)
def _keep_nearest(w, m, top, unit, middle, trial, grid, sums):
    """Take round-to-nearest back where the search, under scales as they are stored, is no better."""
    searched = trial.copy()
    set_grid(trial[:LANES], trial[LANES:], grid)
    _sums(w, m, grid, top, sums)
    left = sums[:LANES].copy()
    round_scales(unit, trial[:LANES])
    trial[LANES : 2 * LANES] = middle
    set_grid(trial[:LANES], trial[LANES:], grid)
    _sums(w, m, grid, top, sums)
    for lane in range(LANES):
        if left[lane] < sums[lane]:
            trial[lane], trial[LANES + lane] = searched[lane], searched[LANES + lane]


@compiled(nogil=True)
def round_scales(scales, rounded):
    """The nearest values that float16 holds, float32 [LANES]: ties to even, overflow and NaN to infinity."""
    bits, values = scales.view(np.uint32), rounded.view(np.uint32)
    for lane in range(LANES):
        sign, size = bits[lane] & np.uint32(0x80000000), bits[lane] & np.uint32(0x7FFFFFFF)
        if size < np.uint32(0x38800000):  # below 2⁻¹⁴: a subnormal, a multiple of 2⁻²⁴
            rounded[lane] = np.rint(scales[lane] * np.float32(16777216)) / np.float32(16777216)
        else:
            size += np.uint32(0xFFF) + ((size >> np.uint32(13)) & np.uint32(1))
            size = size & np.uint32(0xFFFFE000) if size < np.uint32(0x47800000) else np.uint32(0x7F800000)
            values[lane] = size | sign


@compiled(nogil=True)
def _pack_codes(w, grid, top, cell, packed):
    """Codes of all lanes, lowest bits first: uint8 [bytes of a block, lane]."""
    per_byte = 8 // cell
    for byte in range(len(packed)):
        for slot in range(per_byte):
            for lane in range(LANES):
                c = np.rint(w[byte * per_byte + slot, lane] * grid[LANES + lane]) + grid[2 * LANES + lane]
                c = top if c > top else c
                c = np.float32(0) if c < np.float32(0) else c
                code = np.uint8(np.int32(c)) << np.uint8(slot * cell)
                packed[byte, lane] = code if slot == 0 else packed[byte, lane] | code
