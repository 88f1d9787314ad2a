"""Coordinate descent: its fixed points in float64, and laws that hold for any weights and inputs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.quantize import descent
from pipeline.quantize.descent import descended
from pipeline.quantize.formats import Quantized, stacked
from pipeline.quantize.gptq import compensated
from pipeline.quantize.search import weighted
from tests.quantize.test_gptq import (
    COLUMNS,
    DAMPING,
    SPLITS,
    WHOLE,
    Formats,
    assert_same,
    damped,
    factor,
    formats,
    hessian,
    output_error,
    sample,
    values,
)

ALL = [*SPLITS.values(), *(formats(name, COLUMNS) for name in (*WHOLE, "w6b64a", "w4b64a8"))]


def sweep(weights: np.ndarray, matrix: np.ndarray, pieces: list[Quantized]) -> tuple[np.ndarray, list[np.ndarray]]:
    """One sweep as the paper has it, a row and a column at a time in float64: levels, and the scales of each piece."""
    levels = np.hstack([piece.levels() for piece in pieces]).astype(np.float64)
    scales = [piece.scales.astype(np.float64) for piece in pieces]
    for row in range(len(weights)):
        start = 0
        for piece, own in zip(pieces, scales, strict=True):
            fmt, zeros = piece.format, piece.zero_points()
            for b in range(own.shape[1]):
                block = slice(start, start + fmt.block)
                spread = np.concatenate(
                    [np.repeat(s[row], p.format.block) for p, s in zip(pieces, scales, strict=True)]
                )
                for j in range(block.start, block.stop):
                    pull = matrix[j] @ (weights[row] - levels[row] * spread)
                    best = np.rint(levels[row, j] + pull / (matrix[j, j] * own[row, b]))
                    levels[row, j] = np.clip(best, -float(zeros[row, b]), fmt.top - float(zeros[row, b]))
                q = levels[row, block]
                pull = matrix[block] @ (weights[row] - levels[row] * spread)
                square = q @ matrix[block, block] @ q
                scale = float(np.float16(own[row, b] + q @ pull / square))
                grown = scale - own[row, b]
                if grown * (grown * square - 2 * q @ pull) < 0:
                    own[row, b] = scale
                start += fmt.block
    return levels, scales


@pytest.mark.parametrize("pieces", [SPLITS["three"], SPLITS["high first"], formats("w4b32a", COLUMNS)], ids=str)
def test_it_is_the_paper(pieces: Formats, monkeypatch: pytest.MonkeyPatch) -> None:
    """A level on a rounding edge may fall to the other side in float32, and what follows in its row with it."""
    monkeypatch.setattr(descent, "SWEEPS", 1)
    matrix, weights = hessian(), sample(rows=12)
    start = compensated(weights, factor(matrix), pieces)
    found = descended(weights, matrix, DAMPING, start)
    levels, scales = sweep(weights, damped(matrix), start)
    same = (np.hstack([piece.levels() for piece in found]) == levels).all(axis=1)
    assert same.mean() > 0.6
    for piece, expected in zip(found, scales, strict=True):
        np.testing.assert_allclose(piece.scales[same].astype(np.float64), expected[same], rtol=1e-3)


@pytest.mark.parametrize("correlation", [0.05, 0.95])
@pytest.mark.parametrize("pieces", ALL, ids=str)
def test_no_row_has_more_error(pieces: Formats, correlation: float) -> None:
    matrix, weights = hessian(correlation=correlation), sample()
    start = compensated(weights, factor(matrix), pieces)
    found = descended(weights, matrix, DAMPING, start)
    before, after = (output_error(weights, values(part), damped(matrix)) for part in (start, found))
    assert (after <= before * (1 + 1e-5)).all()
    if correlation > 0.9:
        assert after.sum() < 0.97 * before.sum()
    for mine, other in zip(found, start, strict=True):
        assert mine.format == other.format
        np.testing.assert_array_equal(mine.zeros, other.zeros)


@pytest.mark.parametrize("name", ["w4b32a", "w4b64s", "w2b64a"])
def test_short_scales_cost_next_to_nothing(name: str) -> None:
    """Codes are chosen for the scales as they are stored; what is returned is stored without another change."""
    matrix, weights, lost = hessian(), sample(), []
    for pieces in (formats(name, COLUMNS), formats(f"{name}8", COLUMNS)):
        (found,) = descended(weights, matrix, DAMPING, compensated(weights, factor(matrix), pieces))
        lost.append(output_error(weights, found.dequantize(), damped(matrix)).sum())
    assert lost[1] < 1.01 * lost[0]
    used = found.levels().reshape(*found.scales.shape, -1).any(axis=-1)
    np.testing.assert_array_equal(found.format.shorten(found.scales, used), found.scales)


def test_more_sweeps_lose_less_and_come_to_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, weights, pieces = hessian(), sample(), SPLITS["three"]
    found = compensated(weights, factor(matrix), pieces)
    errors = []
    for sweeps in (1, 2, 100):
        monkeypatch.setattr(descent, "SWEEPS", sweeps)
        rested = descended(weights, matrix, DAMPING, found)
        errors.append(output_error(weights, values(rested), damped(matrix)).sum())
    assert errors[0] > errors[1] > errors[2]
    again = output_error(weights, values(descended(weights, matrix, DAMPING, rested)), damped(matrix)).sum()
    assert again == pytest.approx(errors[2], rel=1e-3)


def test_uncorrelated_inputs_leave_nothing_to_gain() -> None:
    """Codes are the nearest and scales the best already, but where the search kept its own weighing of channels."""
    weights = sample()
    start = [weighted(weights, np.ones(COLUMNS, np.float32), SPLITS["whole"][0][0])]
    found = descended(weights, np.eye(COLUMNS, dtype=np.float32), DAMPING, start)
    before, after = (((weights - values(part)) ** 2).sum(axis=1) for part in (start, found))
    assert (after <= before * (1 + 1e-6)).all() and after.sum() > 0.99 * before.sum()


def test_the_result_does_not_depend_on_chunks_or_threads() -> None:
    matrix, weights, pieces = hessian(columns=320), sample(rows=530, columns=320), formats("w4b32a", 128, "w2b64a", 192)
    start = compensated(weights, factor(matrix), pieces)
    whole = descended(weights, matrix, DAMPING, start)

    def chunk(bounds: tuple[int, int]) -> list[Quantized]:
        rows = slice(*bounds)
        return descended(weights[rows], matrix, DAMPING, [piece.rows(rows) for piece in start])

    with ThreadPoolExecutor(4) as pool:
        chunks = list(pool.map(chunk, [(0, 1), (1, 38), (38, 300), (300, 530)]))
    assert_same([stacked(parts) for parts in zip(*chunks, strict=True)], whole)


@pytest.mark.parametrize("scale", [2.0**-90, 2.0**90])
def test_the_number_of_tokens_changes_nothing(scale: float) -> None:
    matrix, weights = hessian(), sample()
    start = compensated(weights, factor(matrix), SPLITS["three"])
    assert_same(
        descended(weights, matrix, DAMPING, start), descended(weights, matrix * np.float32(scale), DAMPING, start)
    )


def test_inputs_are_left_as_they_are() -> None:
    matrix, weights = hessian(), sample()
    start = compensated(weights, factor(matrix), SPLITS["whole"])
    copies = matrix.copy(), weights.copy(), [part.copy() for part in (start[0].codes, start[0].scales, start[0].zeros)]
    descended(weights, matrix, DAMPING, start)
    np.testing.assert_array_equal(matrix, copies[0])
    np.testing.assert_array_equal(weights, copies[1])
    assert_same(start, [Quantized(start[0].format, *copies[2])])


def test_dead_channels_keep_their_codes() -> None:
    matrix, weights = hessian(), sample()
    dead = np.arange(5, COLUMNS, 37)
    matrix[dead], matrix[:, dead] = 0, 0
    start = compensated(weights, factor(matrix), SPLITS["whole"])
    (found,) = descended(weights, matrix, DAMPING, start)
    np.testing.assert_array_equal(found.levels()[:, dead], start[0].levels()[:, dead])
    silent = np.zeros_like(matrix)
    assert_same(descended(weights, silent, DAMPING, start), start)


def test_a_row_with_an_infinite_scale_is_left_and_harms_no_other() -> None:
    matrix, weights = hessian(), sample()
    kept = values(descended(weights, matrix, DAMPING, compensated(weights, factor(matrix), SPLITS["whole"])))
    weights[7, 100] = 1e9
    start = compensated(weights, factor(matrix), SPLITS["whole"])
    (found,) = descended(weights, matrix, DAMPING, start)
    assert_same([found.rows(slice(7, 8))], [start[0].rows(slice(7, 8))])
    others = np.arange(len(weights)) != 7
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(found.dequantize()[others], kept[others])
    weights[:] = 1e9
    start = compensated(weights, factor(matrix), SPLITS["whole"])
    assert_same(descended(weights, matrix, DAMPING, start), start)


def test_what_does_not_fit_together_is_refused() -> None:
    start = compensated(sample(), factor(hessian()), SPLITS["whole"])
    for weights, matrix in ((sample(rows=23), hessian()), (sample(), hessian(columns=256))):
        with pytest.raises(ValueError, match="columns"):
            descended(weights, matrix, DAMPING, start)
