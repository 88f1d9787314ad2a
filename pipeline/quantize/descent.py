"""Coordinate descent: codes and scales changed one at a time, as long as a row's output error falls.

QuantEase (Behdin et al. 2023, arXiv 2309.01885), started from what error compensation leaves. GPTQ rounds a column
before those behind it have errors; here each column is seen again with all others in place, and scales too. With H the
damped second moments of the inputs, e = w − ŵ and ŵ = s·q, the levels q being codes less their zero point, a row's
output error eᵀHe is quadratic in one level and in one scale, so the best value of one, all others fixed, is

    level   q_j + (He)_j / (H_jj s), rounded, and clipped to the format's codes,
    scale   s + qᵀ(He)_B / qᵀH_BB q of the block B, rounded to float16, and taken if it helps.

Neither raises the error. A sweep costs a product with H, 2 · columns² a row. Rows are lanes and tiles as in `gptq`, so
bytes depend neither on chunks nor on threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.compiled import compiled
from pipeline.quantize.formats import Quantized, stacked
from pipeline.quantize.gptq import TILE, bounds, move
from pipeline.quantize.search import LANES, round_scales

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


class _Grid:
    """A piece of a tile, rows as lanes: `levels` float32 [columns, TILE]; of each block, [blocks, TILE], its `scales`
    and `zeros`, float32, and `halves`, the scales' float16 as uint16. Lanes without a row are 0."""

    def __init__(self, piece: Quantized):
        self.format = piece.format
        self.levels = _lanes(piece.levels())
        self.scales, self.halves = _lanes(piece.scales.astype(np.float32)), _lanes(piece.scales.view(np.uint16))
        self.zeros = _lanes(piece.zero_points().astype(np.float32))

    def stored(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Packed codes and scales of the first rows."""
        codes = self.levels[:, :rows] + np.repeat(self.zeros[:, :rows], self.format.block, axis=0)
        packed = self.format.pack(np.ascontiguousarray(codes.T.astype(np.uint8)))
        return packed, np.ascontiguousarray(self.halves[:, :rows].T).view(np.float16)


def _lanes(values: np.ndarray) -> np.ndarray:
    """[rows, n] as [n, TILE], with zeros behind the rows."""
    padded = np.zeros((values.shape[1], TILE), values.dtype)
    padded[:, : len(values)] = values.T
    return padded


def _tile(weights: np.ndarray, hessian: np.ndarray, damping: float, pieces: Sequence[Quantized]) -> list[Quantized]:
    usable = np.flatnonzero(np.isfinite(np.hstack([piece.scales for piece in pieces])).all(axis=1))
    if not len(usable):
        return list(pieces)
    chosen = [piece.rows(usable) for piece in pieces]
    errors = _lanes(weights[usable] - np.hstack([piece.dequantize() for piece in chosen]))
    grids = [_Grid(piece) for piece in chosen]
    # Relative to the mean, so that nothing overflows or vanishes whatever the number of tokens.
    own = hessian.diagonal()
    unit = np.float32(1 / own[own > 0].mean(dtype=np.float64)) if (own > 0).any() else np.float32(1)
    for _ in range(SWEEPS):
        for grid, (start, stop) in zip(grids, bounds([(p.format, p.columns) for p in pieces]), strict=True):
            _sweep(hessian, unit, damping, grid, range(start, stop, grid.format.block), errors)
    found = []
    for piece, grid in zip(pieces, grids, strict=True):
        codes, scales = piece.codes.copy(), piece.scales.copy()
        codes[usable], scales[usable] = grid.stored(len(usable))
        found.append(Quantized(piece.format, codes, scales, piece.zeros))
    return found


def _sweep(
    hessian: np.ndarray, unit: np.float32, damping: float, grid: _Grid, starts: range, errors: np.ndarray
) -> None:
    """Every block of a piece once, those of the columns from `starts` on. Changes `grid` and `errors`, float32
    [columns, TILE]."""
    for k, start in enumerate(starts):
        block, mine = slice(start, start + starts.step), slice(start - starts[0], start - starts[0] + starts.step)
        moves = hessian[block, block] * unit
        extra = np.float32(damping) * moves.diagonal()
        moves[np.diag_indices(len(moves))] += extra
        pull = hessian[block] @ errors
        pull *= unit
        pull += extra[:, None] * errors[block]
        top = np.float32(grid.format.top)
        _descend(pull, moves, grid.levels[mine], errors[block], grid.scales[k], grid.zeros[k], grid.halves[k], top)


@compiled(nogil=True)
def _descend(pull, moves, levels, errors, scales, zeros, halves, top):
    """Levels and errors of a block, float32 [block, rows], one column after the other, then its scales, [rows].

    `pull` is He as the block is reached, `moves` H_BB. What the steps d of earlier columns add to a column's pull is
    added when it is reached; of the symmetric products qᵀH_BB q and qᵀH_BB d only the lower half is summed.
    """
    block = len(pull)
    steps, kept = np.zeros((block, LANES), np.float32), np.zeros((block, LANES), np.float32)
    lanes = np.zeros(9 * LANES, np.float32)  # pull, slope, level, step, scale, 1/scale, zero, cross, square
    change, half = np.zeros(LANES, np.float32), np.zeros(LANES, np.uint16)
    for start in range(0, pull.shape[1], LANES):
        strip = slice(start, start + LANES)
        for lane in range(LANES):
            scale = scales[start + lane]
            lanes[4 * LANES + lane] = scale
            lanes[5 * LANES + lane] = np.float32(1) / scale if scale != 0 else np.float32(0)
            lanes[6 * LANES + lane] = zeros[start + lane]
        lanes[7 * LANES :] = 0
        for j in range(block):
            lanes[:LANES] = pull[j, strip]
            lanes[LANES : 2 * LANES] = 0
            lanes[2 * LANES : 3 * LANES] = levels[j, strip]
            move(moves, steps, j, lanes[:LANES])
            move(moves, kept, j, lanes[LANES : 2 * LANES])
            _step(lanes, moves[j, j], top)
            kept[j] = lanes[2 * LANES : 3 * LANES]
            steps[j] = lanes[3 * LANES : 4 * LANES]
            levels[j, strip] = kept[j]
        _rescale(lanes, change, half, scales[strip], halves[strip])
        for j in range(block):
            for lane in range(LANES):
                errors[j, start + lane] += steps[j, lane] - change[lane] * kept[j, lane]


@compiled(nogil=True)
def _step(lanes, own, top):
    """One column of a strip to its best levels, and its part of the sums that the scale is solved from."""
    inverse = np.float32(1) / own if own > 0 else np.float32(0)
    for lane in range(LANES):
        pull, slope, level = lanes[lane], lanes[LANES + lane], lanes[2 * LANES + lane]
        zero = lanes[6 * LANES + lane]
        best = np.rint(level + pull * inverse * lanes[5 * LANES + lane])
        best = top - zero if best > top - zero else best
        best = -zero if best < -zero else best
        step = lanes[4 * LANES + lane] * (level - best)
        lanes[2 * LANES + lane] = best
        lanes[3 * LANES + lane] = step
        lanes[7 * LANES + lane] += best * (pull + own * step) + step * slope
        lanes[8 * LANES + lane] += best * (own * best + np.float32(2) * slope)


@compiled(nogil=True)
def _rescale(lanes, change, half, scales, halves):
    """The least-squares scales of a block, rounded to float16, where they lose less; `change` is what they grew."""
    aim, rounded = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    for lane in range(LANES):
        cross, square = lanes[7 * LANES + lane], lanes[8 * LANES + lane]
        aim[lane] = scales[lane] + (cross / square if square > 0 else np.float32(0))
    round_scales(aim, half, rounded)
    for lane in range(LANES):
        cross, square = lanes[7 * LANES + lane], lanes[8 * LANES + lane]
        grown = rounded[lane] - scales[lane]
        better = grown * (grown * square - np.float32(2) * cross) < 0
        change[lane] = grown if better else np.float32(0)
        scales[lane] = rounded[lane] if better else scales[lane]
        halves[lane] = half[lane] if better else halves[lane]
