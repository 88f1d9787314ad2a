"""Error compensation: each weight is rounded after the errors of the columns before it have been moved into it.

GPTQ (Frantar et al. 2023, arXiv 2210.17323) for the formats that ship and for matrices split along their channels.
The paper takes the Cholesky factor U of the inverse Hessian, H⁻¹ = UᵀU. Here H = N D Nᵀ, N unit upper triangular, D
diagonal: the same numbers (N D^½ is U⁻¹) for a quarter of the work, never inverting. With e = w − ŵ, the errors made,

    column j is rounded from    w_j + Σ_{i<j} N_ij e_i                         (what GPTQ has there),
    a row's output error is     eᵀHe = Σ_j D_j (e_j + Σ_{i<j} N_ij e_i)²       (for any e, whoever made it).

So the compensated row's error falls out of the rounding, that of `weighted` costs one product with N, and a row keeps
the better of the two. Scales and zero points are searched by `weighted` when their block is reached; beyond the paper,
the block is then rounded with its compensation under some variants of them, and the one with the least Σ D gap² stays.

Sums run over earlier columns, in panels, by matrix products of one shape: a BLAS rounds differently for another number
of rows, so rows are taken in tiles of 512, the last one padded. The result depends neither on how rows are chunked nor
on the number of BLAS threads (LAPACK's Cholesky would; the factor's own products do on some processors, and get one).
Rows are independent: callers work on many at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from pipeline.compiled import compiled
from pipeline.quantize.factor import Factor, inverse
from pipeline.quantize.formats import Quantized, TensorFormat, stacked
from pipeline.quantize.search import LANES, round_scales, set_grid, weighted

TILE = 512  # rows of a product
_PANEL = 128  # columns of a product
# What is tried once errors are compensated, as shares of the searched scale and nudges of its zero point, and how
# often the best one's scale is solved for. On correlated inputs it leaves 1 to 9 % less error than the searched grid.
_SHARES = [(share, 0) for share in (1, 0.84, 0.88, 0.92, 0.96, 1.04, 1.08, 1.12, 1.16)]
_STARTS = {True: np.array(_SHARES, np.float32), False: np.array([*_SHARES, (1, -1), (1, 1)], np.float32)}
_REFITS = 2


def compensated(weights: np.ndarray, factor: Factor, formats: Sequence[tuple[TensorFormat, int]]) -> list[Quantized]:
    """Quantize float32 [rows, columns], columns in the factor's order, the first `formats[0][1]` of them to
    `formats[0][0]`, and so on: one Quantized per format.

    No row has more error under the factor's (damped) Hessian than `weighted` leaves. A scale beyond float16 is
    infinite, as it is in `weighted`. Memory: 20 bytes per weight of 512 rows, and the result. Runs on the calling
    thread, apart from BLAS's own, and most of it without Python's lock. One row at least.
    """
    columns = sum(count for _, count in formats)
    if weights.ndim != 2 or not len(weights) or not weights.shape[1] == len(factor.unit) == columns:
        raise ValueError(f"weights {weights.shape}, factor of {len(factor.unit)} columns, formats for {columns}")
    if wrong := [(fmt, count) for fmt, count in formats if count % fmt.block]:
        raise ValueError(f"{wrong[0][1]} columns are not a multiple of the block of {wrong[0][0]}")
    parts = [_tile(weights[start : start + TILE], factor, formats) for start in range(0, len(weights), TILE)]
    return [stacked(pieces) for pieces in zip(*parts, strict=True)]


def _tile(weights: np.ndarray, factor: Factor, formats: Sequence[tuple[TensorFormat, int]]) -> list[Quantized]:
    rows, columns = weights.shape
    original = np.zeros((columns, TILE), np.float32)
    original[:, :rows] = weights.T
    with np.errstate(invalid="ignore", over="ignore"):  # an infinite scale: its row is NaN from there on
        found, cost = _rounded(original, factor, formats)
        control = []
        for (fmt, _), (start, stop) in zip(formats, bounds(formats), strict=True):
            control.append(weighted(weights[:, start:stop], factor.moments[start:stop], fmt))
            original[start:stop, :rows] -= control[-1].dequantize().T
        worse = ~_costs_no_more(cost, original, factor)[:rows]
    for mine, plain in zip(found, control, strict=True):
        for part in ("codes", "scales", "zeros"):
            getattr(mine, part)[:rows][worse] = getattr(plain, part)[worse]
    return [piece.rows(slice(rows)) for piece in found]


def bounds(formats: Sequence[tuple[TensorFormat, int]]) -> list[tuple[int, int]]:
    """The columns [start, stop) of each format."""
    stops = list(accumulate(count for _, count in formats))
    return list(zip([0, *stops], stops, strict=False))


def _costs_no_more(limit: np.ndarray, errors: np.ndarray, factor: Factor) -> np.ndarray:
    """Whether `limit`, float64 [rows], is at most eᵀHe of float32 [columns, rows]. The sum only grows: stop early."""
    cost = np.zeros(len(limit))
    for start in range(0, len(errors), _PANEL):
        stop = min(start + _PANEL, len(errors))
        moved = factor.unit[:stop, start:stop].T @ errors[:stop]
        cost += factor.pivots[start:stop] @ moved.astype(np.float64) ** 2
        if (limit <= cost).all():
            break
    return limit <= cost


def _rounded(
    original: np.ndarray, factor: Factor, formats: Sequence[tuple[TensorFormat, int]]
) -> tuple[list[Quantized], np.ndarray]:
    """Compensated pieces of a tile, float32 [columns, rows], and eᵀHe of each row, float64."""
    errors, cost, found = np.empty_like(original), np.zeros(original.shape[1]), []
    for (fmt, _), (begin, end) in zip(formats, bounds(formats), strict=True):
        blocks, step = [], max(_PANEL, fmt.block)  # panels are whole blocks of one piece
        for start in range(begin, end, step):
            stop = min(start + step, end)
            panel = original[start:stop] + factor.unit[:start, start:stop].T @ errors[:start]
            for first in range(start, stop, fmt.block):
                block = slice(first, first + fmt.block)
                now = panel[first - start : first - start + fmt.block]
                if first > start:
                    now += factor.unit[start:first, block].T @ errors[start:first]
                blocks.append(_round_block(original[block], now, factor, fmt, block, errors[block], cost))
        codes, scales, zeros = zip(*blocks, strict=True)
        cells = np.ascontiguousarray(np.vstack(codes).T)
        found.append(Quantized.of(fmt, cells, np.stack(scales, 1), np.stack(zeros, 1)))
    return found, cost


def _round_block(
    original: np.ndarray, now: np.ndarray, factor: Factor, fmt: TensorFormat, block: slice, errors: np.ndarray,
    cost: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Round a block, float32 [block, rows]; `now` has the errors of the columns before it. Fills `errors`, adds to
    `cost`.

    Returns codes, uint8 [block, rows], scales, float16 [rows], and zero points, uint8 [rows].
    """
    moves = np.ascontiguousarray(factor.unit[block, block].T)
    # Where the paper's weights stand when a block is reached: all of it is moved to make up for the columns before, not
    # each column for itself.
    aim = original + inverse(moves).astype(np.float32) @ (now - original)
    grid = weighted(np.ascontiguousarray(aim.T), factor.moments[block], fmt)
    # Without correlations inside the block the search has had the last word.
    starts = _STARTS[fmt.symmetric][: None if np.tril(moves, -1).any() else 1]
    lines = np.stack([grid.scales[:, 0], grid.zero_points()[:, 0]]).astype(np.float32)
    codes = np.empty(original.shape, np.uint8)
    _round_lanes(original, now, moves, factor.pivots[block], lines, starts, np.float32(fmt.top), codes, errors, cost)
    return codes, lines[0].astype(np.float16), lines[1].astype(np.uint8)


@compiled(nogil=True)
def _round_lanes(original, now, moves, pivots, grid, starts, top, codes, errors, cost):
    """Round [block, rows] under the best grid of those tried; `moves`[j, i] of the error in i goes to j.

    `grid` is scale and zero by row, and becomes those that were taken; `starts` its variants. Rows are lanes, 32 at a
    time: vectorised without reordering any sum. Each lane tries the starts, then twice the least-squares scale of its
    codes.
    """
    block = len(original)
    scale, work = np.zeros(LANES, np.float32), np.zeros((block, LANES), np.float32)
    # What is tried and the best so far: loss, scale, zero point, then the levels of all columns and their gaps.
    trial, best = np.zeros((2, 3 + 2 * block, LANES), np.float32)
    shares = (pivots / pivots.max()).astype(np.float32)
    for start in range(0, original.shape[1], LANES):
        strip = slice(start, start + LANES)
        given = grid[:, strip]
        old, new = np.ascontiguousarray(original[:, strip]), np.ascontiguousarray(now[:, strip])
        for k in range(len(starts) + (_REFITS if len(starts) > 1 else 0)):
            if k < len(starts):
                for lane in range(LANES):
                    scale[lane] = given[0, lane] * starts[k, 0]
                    trial[2, lane] = min(max(given[1, lane] + starts[k, 1], np.float32(0)), top)
            else:
                _refit(best, moves, shares, scale)
                trial[2] = best[2]
            round_scales(scale, trial[1])
            _round_columns(old, new, moves, shares, top, work, trial)
            if k == 0:
                best[:] = trial
            else:
                _keep(trial, best)
        levels, gaps = best[3 : 3 + block], best[3 + block :]
        for j in range(block):
            for lane in range(LANES):
                errors[j, start + lane] = old[j, lane] - levels[j, lane] * best[1, lane]
                codes[j, start + lane] = np.uint8(np.int32(levels[j, lane] + best[2, lane]))
                gap = np.float64(gaps[j, lane])
                cost[start + lane] += pivots[j] * gap * gap
        given[:] = best[1:3]


@compiled(nogil=True)
def _keep(trial, best):
    """Lanes of the trial that lose less than the best so far take its place."""
    better = trial[0] < best[0]
    if better.any():
        for row in range(len(best)):
            for lane in range(LANES):
                best[row, lane] = trial[row, lane] if better[lane] else best[row, lane]


@compiled(nogil=True)
def _refit(best, moves, shares, scale):
    """The scale with which the kept codes leave least error in their block: gaps are linear in it."""
    levels, gaps = best[3 : 3 + len(moves)], best[3 + len(moves) :]
    cross, square = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    slope = np.empty(LANES, np.float32)
    for j in range(len(moves)):
        slope[:] = levels[j]
        move(moves, levels, j, slope)
        for lane in range(LANES):
            pull = shares[j] * slope[lane]
            cross[lane] += pull * gaps[j, lane]
            square[lane] += pull * slope[lane]
    for lane in range(LANES):
        scale[lane] = best[1, lane] + (cross[lane] / square[lane] if square[lane] > 0 else np.float32(0))


@compiled(nogil=True)
def _round_columns(original, now, moves, shares, top, errors, trial):
    """Round a strip of rows column by column under the trial's grid: its levels, gaps, and loss, Σ shares gap²."""
    lanes = np.zeros(6 * LANES, np.float32)  # scale, 1/scale, zero, weight, loss, level
    set_grid(trial[1], trial[2], lanes)
    current = lanes[3 * LANES : 4 * LANES]
    for j in range(len(original)):
        current[:] = now[j]
        move(moves, errors, j, current)
        _round_lane_values(lanes, shares[j], top)
        for lane in range(LANES):
            trial[3 + j, lane] = lanes[5 * LANES + lane]
        trial[3 + len(original) + j] = current
        for lane in range(LANES):
            errors[j, lane] = original[j, lane] - lanes[5 * LANES + lane] * lanes[lane]
    trial[0] = lanes[4 * LANES : 5 * LANES]


@compiled(nogil=True)
def _round_lane_values(lanes, share, top):
    """Weights to their gaps, levels and losses; in one array, so that the compiler sees that nothing overlaps."""
    for lane in range(LANES):
        zero = lanes[2 * LANES + lane]
        c = np.rint(lanes[3 * LANES + lane] * lanes[LANES + lane]) + zero
        c = top if c > top else c
        c = c if c > np.float32(0) else np.float32(0)
        c -= zero
        gap = lanes[3 * LANES + lane] - c * lanes[lane]
        lanes[3 * LANES + lane] = gap
        lanes[4 * LANES + lane] += share * gap * gap
        lanes[5 * LANES + lane] = c


@compiled(nogil=True)
def move(moves, errors, j, current):
    """Add to column j of a strip what the errors of the block's columns before it move there; four at a time, in
    order."""
    i = 0
    while i + 4 <= j:
        a, b, c, d = moves[j, i], moves[j, i + 1], moves[j, i + 2], moves[j, i + 3]
        for lane in range(LANES):
            sum_ = (current[lane] + a * errors[i, lane]) + b * errors[i + 1, lane]
            current[lane] = (sum_ + c * errors[i + 2, lane]) + d * errors[i + 3, lane]
        i += 4
    while i < j:
        for lane in range(LANES):
            current[lane] += moves[j, i] * errors[i, lane]
        i += 1
