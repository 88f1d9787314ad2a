"""Error compensation: the paper in float64 as the reference, and laws that hold for any weights and inputs."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.errors import PlanError
from pipeline.quantize import factor as factors
from pipeline.quantize import gptq
from pipeline.quantize.factor import Factor, expected_damping, held_out_damping
from pipeline.quantize.formats import Quantized, TensorFormat
from pipeline.quantize.gptq import compensated
from pipeline.quantize.search import weighted

WHOLE = ["w2b32s", "w2b64a", "w4b32a", "w4b64s", "w4b256a", "w8b32s", "w8b64a"]
COLUMNS = 512

DAMPING = 0.3

Formats = list[tuple[TensorFormat, int]]


def formats(*pieces: str | int) -> Formats:
    return [(TensorFormat.parse(name), count) for name, count in zip(pieces[::2], pieces[1::2], strict=True)]


SPLITS = {
    "whole": formats("w4b64s", 512),
    "high first": formats("w4b64s", 320, "w2b64a", 192),
    "low first": formats("w2b64a", 192, "w4b64s", 320),
    "three": formats("w8b32s", 64, "w4b32a", 192, "w2b128a", 256),
}


def activations(seed: int, columns: int, tokens: int, correlation: float) -> np.ndarray:
    """An autoregressive process with log-normal channel scales, float64 [tokens, columns]."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((tokens, columns))
    for j in range(1, columns):
        inputs[:, j] = correlation * inputs[:, j - 1] + (1 - correlation**2) ** 0.5 * inputs[:, j]
    return inputs * np.exp(0.5 * rng.standard_normal(columns))


def hessian(seed: int = 0, columns: int = COLUMNS, tokens: int = 2000, correlation: float = 0.8) -> np.ndarray:
    """Their Σ x xᵀ."""
    inputs = activations(seed, columns, tokens, correlation)
    return (inputs.T @ inputs).astype(np.float32)


def sample(seed: int = 0, rows: int = 24, columns: int = COLUMNS) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(6, (rows, columns)).astype(np.float32)


def factor(matrix: np.ndarray, damping: float = DAMPING) -> Factor:
    return factors.factor(matrix, damping)


def damped(matrix: np.ndarray, share: float = DAMPING) -> np.ndarray:
    return matrix.astype(np.float64) + share * np.diag(np.diag(matrix).astype(np.float64))


def values(pieces: list[Quantized]) -> np.ndarray:
    return np.hstack([piece.dequantize() for piece in pieces])


def output_error(weights: np.ndarray, rounded: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """eᵀHe of each row in float64."""
    errors = weights.astype(np.float64) - rounded
    return ((errors @ matrix) * errors).sum(axis=1)


def controls(weights: np.ndarray, moments: np.ndarray, pieces: Formats) -> list[Quantized]:
    found, start = [], 0
    for fmt, count in pieces:
        found.append(weighted(weights[:, start : start + count], moments[start : start + count], fmt))
        start += count
    return found


def assert_same(a: list[Quantized], b: list[Quantized]) -> None:
    for mine, other in zip(a, b, strict=True):
        for part in ("codes", "scales", "zeros"):
            np.testing.assert_array_equal(getattr(mine, part), getattr(other, part))


def the_paper(weights: np.ndarray, matrix: np.ndarray, pieces: Formats, moments: np.ndarray) -> np.ndarray:
    """Algorithm 1 of arXiv 2210.17323, column by column, float64, with the Cholesky factor of the inverse."""
    upper = np.linalg.cholesky(np.linalg.inv(matrix)).T
    current, rounded, start = weights.astype(np.float64), np.zeros(weights.shape), 0
    for fmt, count in pieces:
        for first in range(start, start + count, fmt.block):
            block = slice(first, first + fmt.block)
            grid = weighted(current[:, block].astype(np.float32), moments[block], fmt)
            scales = grid.scales[:, 0].astype(np.float64)
            zeros = grid.zero_points()[:, 0].astype(np.float64)
            for j in range(first, first + fmt.block):
                codes = np.clip(np.rint(current[:, j] / scales) + zeros, 0, fmt.top)
                rounded[:, j] = (codes - zeros) * scales
                error = (current[:, j] - rounded[:, j]) / upper[j, j]
                current[:, j:] -= np.outer(error, upper[j, j:])
        start += count
    return rounded


@pytest.fixture
def plain_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid that the search finds and no other, as in the paper."""
    monkeypatch.setattr(gptq, "_STARTS", {symmetric: starts[:1] for symmetric, starts in gptq._STARTS.items()})


@pytest.mark.usefixtures("plain_grids")
@pytest.mark.parametrize("pieces", SPLITS.values(), ids=SPLITS)
def test_it_is_the_paper(pieces: Formats) -> None:
    """A code on a rounding edge may fall to the other side in float32, and all that follow in its row with it."""
    matrix, weights = hessian(correlation=0.5), sample()
    found = factor(matrix)
    expected = the_paper(weights, damped(matrix), pieces, found.moments)
    equal = np.isclose(values(compensated(weights, found, pieces)), expected, rtol=1e-6, atol=1e-7).all(axis=1)
    assert equal.mean() > 0.6


@pytest.mark.parametrize("columns", [32, 256, 288, 800])
def test_the_factor_is_the_hessians(columns: int) -> None:
    matrix = hessian(columns=columns)
    found = factor(matrix)
    assert np.array_equal(found.unit, np.triu(found.unit)) and (found.unit.diagonal() == 1).all()
    unit = found.unit.astype(np.float64)
    np.testing.assert_allclose((unit * found.pivots) @ unit.T, damped(matrix), atol=2e-6 * matrix.max())
    np.testing.assert_array_equal(found.moments, matrix.diagonal())
    assert found.damping == DAMPING


def test_the_error_falls_out_of_the_rounding() -> None:
    """What `_rounded` says a row costs is eᵀHe of what it stores."""
    matrix, weights, pieces = hessian(), sample(rows=gptq.TILE), SPLITS["three"]
    found, cost = gptq._rounded(np.ascontiguousarray(weights.T), factor(matrix), pieces)
    np.testing.assert_allclose(cost, output_error(weights, values(found), damped(matrix)), rtol=1e-4)


@pytest.mark.parametrize("name", WHOLE)
def test_uncorrelated_inputs_leave_nothing_to_compensate(name: str) -> None:
    weights, moments = sample(), np.exp(np.random.default_rng(1).standard_normal(COLUMNS)).astype(np.float32)
    pieces = formats(name, COLUMNS)
    for diagonal in (np.ones(COLUMNS, np.float32), moments):
        assert_same(compensated(weights, factor(np.diag(diagonal)), pieces), controls(weights, diagonal, pieces))


@pytest.mark.parametrize("correlation", [0.05, 0.95])
@pytest.mark.parametrize("pieces", [*SPLITS.values(), *(formats(name, COLUMNS) for name in WHOLE)], ids=str)
def test_no_row_is_worse_than_weighted(pieces: Formats, correlation: float) -> None:
    matrix, weights = hessian(correlation=correlation), sample()
    found = factor(matrix, damping=0.01)
    mine = output_error(weights, values(compensated(weights, found, pieces)), damped(matrix, 0.01))
    control = output_error(weights, values(controls(weights, found.moments, pieces)), damped(matrix, 0.01))
    assert (mine <= control * (1 + 1e-5)).all()
    if correlation > 0.9:
        assert (mine.sum() / control.sum()) ** 0.5 < 0.6


def test_a_row_that_compensation_made_worse_is_weighteds(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, weights, pieces = hessian(), sample(), SPLITS["three"]
    found = factor(matrix)
    rounded = gptq._rounded

    def spoiled(*args: object) -> tuple[list[Quantized], np.ndarray]:
        quantized, cost = rounded(*args)
        cost[::3], cost[1] = np.inf, np.nan
        return quantized, cost

    good = compensated(weights, found, pieces)
    monkeypatch.setattr(gptq, "_rounded", spoiled)
    mixed, control = compensated(weights, found, pieces), controls(weights, found.moments, pieces)
    for k, rows in ((0, slice(0, None, 3)), (1, slice(1, 2))):
        assert (values(mixed)[rows] == values(control)[rows]).all(), k
    assert (values(mixed)[2::3] == values(good)[2::3]).all()


def test_other_grids_are_kept_only_where_they_lose_less(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, weights = hessian(), sample(rows=64)
    found = factor(matrix)
    for pieces, gain in ((formats("w4b32a", 512), 0.97), (formats("w2b64a", 512), 0.97), (SPLITS["whole"], 0.98)):
        tried = output_error(weights, values(compensated(weights, found, pieces)), damped(matrix)).sum()
        with monkeypatch.context() as patch:
            patch.setattr(gptq, "_STARTS", {key: starts[:1] for key, starts in gptq._STARTS.items()})
            alone = output_error(weights, values(compensated(weights, found, pieces)), damped(matrix)).sum()
        assert (tried / alone) ** 0.5 < gain


def test_inputs_are_left_as_they_are() -> None:
    matrix, weights = hessian(), sample()
    kept = matrix.copy(), weights.copy()
    compensated(weights, factor(matrix), SPLITS["whole"])
    np.testing.assert_array_equal(matrix, kept[0])
    np.testing.assert_array_equal(weights, kept[1])


def test_the_result_does_not_depend_on_chunks_or_threads() -> None:
    matrix, weights, pieces = hessian(columns=320), sample(rows=530, columns=320), formats("w4b32a", 128, "w2b64a", 192)
    found = factor(matrix)
    whole = compensated(weights, found, pieces)
    bounds = [(0, 1), (1, 38), (38, 300), (300, 530)]
    with ThreadPoolExecutor(4) as pool:
        chunks = list(pool.map(lambda rows: compensated(weights[slice(*rows)], found, pieces), bounds))
    for k, piece in enumerate(whole):
        for part in ("codes", "scales", "zeros"):
            joined = np.concatenate([getattr(chunk[k], part) for chunk in chunks])
            np.testing.assert_array_equal(joined, getattr(piece, part))


def test_the_result_does_not_depend_on_blas_threads() -> None:
    """Sizes at which OpenBLAS does use its threads."""
    program = (
        "import hashlib, numpy as np; from pipeline.quantize.factor import *; from pipeline.quantize.gptq import *\n"
        "from pipeline.quantize.formats import TensorFormat\n"
        "rng = np.random.default_rng(0); x = rng.standard_normal((960, 960)).astype(np.float32)\n"
        "x += np.roll(x, 1, axis=0) + 3 * np.eye(960, dtype=np.float32)\n"
        "h = sum(np.outer(r, r) for r in x[:960:2]); f = factor(h, 0.3)\n"
        "q, = compensated(x[:600], f, [(TensorFormat.parse('w4b64s'), 960)])\n"
        "print(hashlib.sha256(b''.join(x.tobytes() for x in (f.unit, f.pivots, q.codes, q.scales))).hexdigest())"
    )
    found = set()
    for threads in ("1", "2"):
        variables = {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, "PATH": ""}
        run = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True)
        found.add(run.stdout.strip())
    assert len(found) == 1 and len(found.pop()) == 64


@pytest.mark.parametrize("rows", [1, 513])
def test_sizes_are_those_of_the_format(rows: int) -> None:
    pieces = compensated(sample(rows=rows), factor(hessian()), SPLITS["high first"])
    for piece, (fmt, count) in zip(pieces, SPLITS["high first"], strict=True):
        assert [array.shape for array in piece.stored()] == [tensor.shape for tensor in fmt.tensors(rows, count)]


def test_dead_channels_neither_move_nor_are_moved() -> None:
    """Even where the matrix has rounding noise beside a zero diagonal."""
    matrix, weights = hessian(), sample()
    dead = np.arange(5, COLUMNS, 37)
    matrix[dead, dead] = 0
    clean = matrix.copy()
    clean[dead], clean[:, dead] = 0, 0
    noisy, found = factor(matrix), factor(clean)
    np.testing.assert_array_equal(noisy.unit, found.unit)
    assert (found.unit[dead].sum(axis=1) == 1).all() and (found.unit[:, dead].sum(axis=0) == 1).all()
    assert np.isfinite(found.pivots).all() and (found.pivots > 0).all()
    got = values(compensated(weights, found, SPLITS["whole"]))
    assert np.std((got - weights)[:, dead]) < 0.25 * np.std(weights)


def test_nothing_was_ever_excited() -> None:
    weights, silent = sample(), np.zeros((COLUMNS, COLUMNS), np.float32)
    pieces = SPLITS["low first"]
    assert_same(compensated(weights, factor(silent), pieces), controls(weights, np.zeros(COLUMNS), pieces))


def test_fewer_tokens_than_channels() -> None:
    matrix, weights, pieces = hessian(tokens=60), sample(), SPLITS["whole"]
    found = factor(matrix, damping=0.01)
    mine = output_error(weights, values(compensated(weights, found, pieces)), damped(matrix, 0.01))
    control = output_error(weights, values(controls(weights, found.moments, pieces)), damped(matrix, 0.01))
    assert (mine <= control * (1 + 1e-5)).all() and mine.sum() < 0.3 * control.sum()


@pytest.mark.parametrize("scale", [2.0**-90, 2.0**90])
def test_the_number_of_tokens_changes_nothing(scale: float) -> None:
    matrix, weights = hessian(), sample()
    a, b = factor(matrix), factor(matrix * np.float32(scale))
    np.testing.assert_array_equal(a.unit, b.unit)
    assert_same(compensated(weights, a, SPLITS["three"]), compensated(weights, b, SPLITS["three"]))


def test_damping_is_what_held_out_inputs_ask_for() -> None:
    """Fewer tokens than channels and many, judged on tokens that neither has seen: each is best with its own share."""
    pieces, weights, inputs = formats("w4b64a", 256), sample(rows=128, columns=256), activations(1, 256, 12_000, 0.3)
    judge = inputs[4000:].T @ inputs[4000:]

    def held_out(tokens: int, damping: float) -> float:
        seen = (inputs[:tokens].T @ inputs[:tokens]).astype(np.float32)
        return float(output_error(weights, values(compensated(weights, factor(seen, damping), pieces)), judge).sum())

    few, many = 64, 4000
    assert held_out(few, expected_damping(256, few)) < held_out(few, expected_damping(256, many))
    assert held_out(many, expected_damping(256, many)) < held_out(many, expected_damping(256, few))
    for tokens in (few, 512, many):
        held = inputs[:tokens:4].astype(np.float32)
        chosen = held_out_damping((inputs[:tokens].T @ inputs[:tokens]).astype(np.float32), held, tokens)
        tried = [held_out(tokens, chosen * 10.0**power) for power in (-2, -1, 0, 1, 2)]
        assert tried[2] <= 1.02 * min(tried), (tokens, chosen, tried)


def test_an_expert_that_no_token_woke_is_not_compensated() -> None:
    """No sum, no tokens, nothing held out: a finite damping, and every weight is rounded as it is."""
    none, weights = np.zeros((256, 256), np.float32), sample(rows=8, columns=256)
    damping = held_out_damping(none.copy(), np.empty((0, 256), np.float32), 0)
    assert np.isfinite(damping)
    found = factor(none, damping)
    np.testing.assert_array_equal(found.unit, np.eye(256))
    assert np.isfinite(values(compensated(weights, found, formats("w4b64a", 256)))).all()
    assert held_out_damping(np.eye(256, dtype=np.float32), np.empty((0, 256), np.float32), 300) == expected_damping(
        256, 300
    )


@pytest.mark.parametrize(("correlation", "damping"), [(0.9, 0.3), (1.25, 0.3), (1.5, 1.0)])
def test_damping_is_raised_until_the_matrix_is_positive_definite(correlation: float, damping: float) -> None:
    matrix = np.kron(np.eye(150), [[1, correlation], [correlation, 1]]).astype(np.float32)
    found = factor(matrix)
    assert found.damping == damping
    unit = found.unit.astype(np.float64)
    np.testing.assert_allclose((unit * found.pivots) @ unit.T, damped(matrix, damping), atol=1e-6)


@pytest.mark.parametrize(
    "matrix",
    [
        np.array([[1, 5], [5, 1]], np.float32),
        -np.eye(4, dtype=np.float32),
        np.full((3, 3), np.nan, np.float32),
        np.diag(np.array([1, np.inf, 1], np.float32)),
    ],
    ids=["indefinite", "negative", "nan", "infinite"],
)
def test_damaged_calibration_is_refused(matrix: np.ndarray) -> None:
    with np.errstate(all="raise"), pytest.raises(PlanError, match="not finite or not positive definite"):
        factor(matrix)


def test_weights_beyond_float16_have_an_infinite_scale_and_harm_no_other_row() -> None:
    matrix, weights = hessian(), sample()
    found = factor(matrix)
    kept = values(compensated(weights, found, SPLITS["whole"]))
    weights[7, 100] = 1e9
    (got,) = compensated(weights, found, SPLITS["whole"])
    assert not np.isfinite(got.scales[7]).all()
    others = np.arange(len(weights)) != 7
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(got.dequantize()[others], kept[others])


def test_what_does_not_fit_together_is_refused() -> None:
    found: Factor = factor(hessian(columns=64))
    for weights, pieces in (
        (sample(columns=96), formats("w4b32a", 96)),
        (sample(columns=64), formats("w4b32a", 32)),
        (sample(rows=0, columns=64), formats("w4b32a", 64)),
        (sample(columns=64), formats("w4b32a", 48, "w4b16a", 16)),
    ):
        with pytest.raises(ValueError, match="columns"):
            compensated(weights, found, pieces)
    with pytest.raises(ValueError, match="square"):
        factor(np.eye(4, 3, dtype=np.float32))
