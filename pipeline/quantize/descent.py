"""Coordinate descent: codes and scales changed one at a time, as long as a row's output error falls.

QuantEase (Behdin et al. 2023, arXiv 2309.01885), started from what error compensation leaves. GPTQ rounds a column
before those behind it have errors; here each column is seen again with all others in place, and scales too. With H the
damped second moments of the inputs, e = w − ŵ and ŵ = s·q, the levels q being codes less their zero point, a row's
output error eᵀHe is quadratic in one level and in one scale, so the best value of one, all others fixed, is

    level   q_j + (He)_j / (H_jj s), rounded, and clipped to the format's codes,
    scale   s + qᵀ(He)_B / qᵀH_BB q of the block B, rounded to float16, and taken if it helps.

Neither raises the error. Short scales are rounded to 8 bits before the last sweep, whose levels are chosen for them.
That rounding may raise it, by less than the sweeps take off wherever it was measured. A sweep costs a product with H, 2
· columns² a row. Rows are lanes and tiles as in `gptq`, so bytes depend neither on chunks nor on threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.compiled import compiled
from pipeline.quantize.formats import Quantized, TensorFormat, stacked
from pipeline.quantize.gptq import TILE, bounds, move
from pipeline.quantize.search import LANES, round_scales, set_grid

SWEEPS = 3


def descended(weights: np.ndarray, hessian: np.ndarray, damping: float, pieces: Sequence[Quantized]) -> list[Quantized]:
    """Improve float32 [rows, columns] that were quantized to `pieces`, one behind the other; zero points stay.

    `hessian`: Σ x·xᵀ, float32 [columns, columns], symmetric, channels in the columns' order. `damping` is the share of
    each channel's own moment that is added to it, as in `gptq.factor`.

    A row with a scale that is not finite is left as it is, and so are channels that were never excited. Memory: 12
    bytes per weight of 512 rows, and the result. Runs on the calling thread, apart from BLAS's own, and most of it
    without Python's lock.
    """
    columns = sum(piece.columns for piece in pieces)
    if weights.shape != (len(pieces[0].codes), columns) or hessian.shape != (columns, columns):
        raise ValueError(f"weights {weights.shape}, a matrix {hessian.shape}, pieces of {columns} columns")
    parts = [slice(start, start + TILE) for start in range(0, len(weights), TILE)]
    tiles = [_tile(weights[rows], hessian, damping, [piece.rows(rows) for piece in pieces]) for rows in parts]
    return [stacked(parts) for parts in zip(*tiles, strict=True)]


def _lanes(values: np.ndarray) -> np.ndarray:
    """[rows, n] as float32 [n, TILE], with zeros behind the rows."""
    padded = np.zeros((values.shape[1], TILE), np.float32)
    padded[:, : len(values)] = values.T
    return padded


def _tile(weights: np.ndarray, hessian: np.ndarray, damping: float, pieces: Sequence[Quantized]) -> list[Quantized]:
    usable = np.flatnonzero(np.isfinite(np.hstack([piece.scales for piece in pieces])).all(axis=1))
    if not len(usable):
        return list(pieces)
    chosen = [piece.rows(usable) for piece in pieces]
    errors = _lanes(weights[usable] - np.hstack([piece.dequantize() for piece in chosen]))
    # Levels, [columns, TILE]; of each block, [blocks, TILE], scale and zero point. `_descend` changes the first two.
    grids = [[_lanes(part) for part in (piece.levels(), piece.scales, piece.zero_points())] for piece in chosen]
    places = bounds([(piece.format, piece.columns) for piece in pieces])
    # Relative to the mean, so that nothing overflows or vanishes whatever the number of tokens.
    own = hessian.diagonal()
    unit = np.float32(1 / own[own > 0].mean(dtype=np.float64)) if (own > 0).any() else np.float32(1)
    extra = np.float32(damping) * (own * unit)
    for sweep in range(SWEEPS):
        for piece, (levels, scales, zeros), (first, stop) in zip(pieces, grids, places, strict=True):
            fmt = piece.format
            final = fmt.short and sweep == SWEEPS - 1
            if final:  # scales as they are stored; their last sweep is the codes' alone
                _shorten(fmt, levels, scales, errors[first:stop])
            for k, start in enumerate(range(first, stop, fmt.block)):
                block, mine = (slice(begin, begin + fmt.block) for begin in (start, start - first))
                moves = hessian[block, block] * unit
                moves[np.diag_indices(len(moves))] += extra[block]
                pull = hessian[block] @ errors
                pull *= unit
                pull += extra[block, None] * errors[block]
                _descend(pull, moves, levels[mine], errors[block], scales[k], zeros[k], np.float32(fmt.top), final)
    found = []
    for piece, (levels, scales, zeros) in zip(pieces, grids, strict=True):
        cells = (levels + np.repeat(zeros, piece.format.block, axis=0))[:, : len(usable)].T
        codes, halves = piece.codes.copy(), piece.scales.copy()
        codes[usable] = piece.format.pack(np.ascontiguousarray(cells, np.uint8))
        halves[usable] = scales[:, : len(usable)].T
        found.append(Quantized(piece.format, codes, halves, piece.zeros))
    return found


def _shorten(fmt: TensorFormat, levels: np.ndarray, scales: np.ndarray, errors: np.ndarray) -> None:
    """Round scales, [blocks, rows], to what 8 bits hold, and change the errors, [columns, rows], by what that moves."""
    used = np.logical_or.reduce(levels.reshape(len(scales), fmt.block, -1), axis=1)
    short = np.ascontiguousarray(fmt.shorten(scales.T, used.T).T)
    errors -= levels * np.repeat(short - scales, fmt.block, axis=0)
    scales[:] = short


@compiled(nogil=True)
def _descend(pull, moves, levels, errors, scales, zeros, top, final):
    """Levels and errors of a block, float32 [block, rows], one column after the other, then its scales, [rows], unless
    they are `final`.

    `pull` is He as the block is reached, `moves` H_BB. What the steps d of earlier columns add to a column's pull is
    added when it is reached; of the symmetric products qᵀH_BB q and qᵀH_BB d only the lower half is summed.
    """
    block = len(pull)
    steps, kept = np.zeros((block, LANES), np.float32), np.zeros((block, LANES), np.float32)
    lanes = np.zeros(9 * LANES, np.float32)  # scale, 1/scale, zero, pull, slope, level, step, cross, square
    pulls, slopes, level = lanes[3 * LANES : 4 * LANES], lanes[4 * LANES : 5 * LANES], lanes[5 * LANES : 6 * LANES]
    change = np.zeros(LANES, np.float32)
    for start in range(0, pull.shape[1], LANES):
        strip = slice(start, start + LANES)
        set_grid(scales[strip], zeros[strip], lanes)
        lanes[7 * LANES :] = 0
        for j in range(block):
            pulls[:], slopes[:], level[:] = pull[j, strip], 0, levels[j, strip]
            move(moves, steps, j, pulls)
            move(moves, kept, j, slopes)
            _step(lanes, moves[j, j], top)
            kept[j] = level
            steps[j] = lanes[6 * LANES : 7 * LANES]
            levels[j, strip] = level
        if not final:
            _rescale(lanes, change, scales[strip])
        errors[:, strip] += steps - change * kept


@compiled(nogil=True)
def _step(lanes, own, top):
    """One column of a strip to its best levels, and its part of the sums that the scale is solved from."""
    inverse = np.float32(1) / own if own > 0 else np.float32(0)
    for lane in range(LANES):
        zero, pull, slope = lanes[2 * LANES + lane], lanes[3 * LANES + lane], lanes[4 * LANES + lane]
        level = lanes[5 * LANES + lane]
        best = np.rint(level + pull * inverse * lanes[LANES + lane])
        best = top - zero if best > top - zero else best
        best = -zero if best < -zero else best
        step = lanes[lane] * (level - best)
        lanes[5 * LANES + lane] = best
        lanes[6 * LANES + lane] = step
        lanes[7 * LANES + lane] += best * (pull + own * step) + step * slope
        lanes[8 * LANES + lane] += best * (own * best + np.float32(2) * slope)


@compiled(nogil=True)
def _rescale(lanes, change, scales):
    """The least-squares scales of a block, rounded to float16, where they lose less; `change` is what they grew."""
    aim, rounded = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    cross, square = lanes[7 * LANES : 8 * LANES], lanes[8 * LANES :]
    for lane in range(LANES):
        aim[lane] = scales[lane] + (cross[lane] / square[lane] if square[lane] > 0 else np.float32(0))
    round_scales(aim, rounded)
    for lane in range(LANES):
        grown = rounded[lane] - scales[lane]
        better = grown * (grown * square[lane] - np.float32(2) * cross[lane]) < 0
        change[lane] = grown if better else np.float32(0)
        scales[lane] = rounded[lane] if better else scales[lane]
