"""The second moments of a matrix's inputs as GPTQ uses them: factored, under the damping that unseen text asks for.

H = N D Nᵀ, N unit upper triangular, D diagonal. `pipeline.quantize.gptq` says what for.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy.linalg.blas import strsm
from threadpoolctl import threadpool_limits

from pipeline.compiled import compiled
from pipeline.errors import PlanError
from pipeline.machine import cores

_FACTOR_PANEL = 256  # columns of a product
_STEP, _MOST = 10**0.5, 5  # between the dampings that are tried, and how many at most


@dataclass(frozen=True)
class Factor:
    """H + λ·diag(H) = N D Nᵀ.

    `unit`: N, float32 [columns, columns], zero below its diagonal of ones. `pivots`: D, float64 [columns]. `moments`:
    the diagonal of H, float32 [columns]. `damping`: the λ that was used.
    """

    unit: np.ndarray
    pivots: np.ndarray
    moments: np.ndarray
    damping: float


def expected_damping(columns: int, tokens: int) -> float:
    """The damping that `held_out_damping` begins with, for a sum over so many tokens. On a layer of 1,536 channels
    (`benchmarks.width`) a larger one left up to 2.3 % less error; channels that have more in common want less."""
    return 4 * columns / max(tokens, 1)


def held_out_damping(hessian: np.ndarray, held: np.ndarray, tokens: int) -> float:
    """The damping that text asks for which the sum has not seen.

    Under it channels of held-out tokens are predicted best from those after them: their errors are what GPTQ moves
    along the same predictions. The fewer tokens say what each channel has to do with the others, the less of it holds
    for other text. Of fewer tokens than channels the sum is singular: nothing is tried then, nor with none held out.

    Args:
        hessian: Σ x xᵀ over `tokens` tokens, float32 [columns, columns]. It loses those of `held`.
        held: x of some of these tokens, float32 [tokens, columns].
    """
    first = expected_damping(len(hessian), tokens)
    if tokens < len(hessian) or not len(held):
        return first
    lost: list[float] = []

    def lose(start: int) -> None:
        panel = slice(start, start + _FACTOR_PANEL)
        hessian[panel] -= held[:, panel].T @ held

    # Each product on one thread: the result does not depend on the number of cores.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(cores()) as pool:
        list(pool.map(lose, range(0, len(hessian), _FACTOR_PANEL)))
        while len(lost) < 2 or (lost[-1] < lost[-2] and len(lost) < _MOST):
            dampings = [first / _STEP ** len(lost)] if lost else [first, first / _STEP]
            lost += pool.map(lambda damping: _unpredicted(hessian, held, damping), dampings)
    return first / _STEP ** int(np.argmin(lost))


def _unpredicted(hessian: np.ndarray, held: np.ndarray, damping: float) -> float:
    """What those after it leave of a channel's moment, Σ over all channels."""
    found = factor(hessian, damping)
    left = strsm(1, found.unit.T, held.T, lower=1, trans_a=1, diag=1) ** 2  # N⁻¹ x; scipy's solver would copy N
    alive = found.moments > 0
    return float((left[alive].sum(axis=1, dtype=np.float64) / found.moments[alive]).sum())


@threadpool_limits.wrap(limits=1, user_api="blas")
def factor(hessian: np.ndarray, damping: float) -> Factor:
    """Factor Σ x xᵀ of a matrix's inputs, float32 [columns, columns], symmetric; it is left as it is.

    `damping` (> 0) is the share of each channel's own moment that is added to it: the mean's, as in the paper, is that
    of a few outlier channels and drowns all others. It is raised to 1 if the sum is not positive definite. Channels
    that were never excited are uncorrelated with all others.

    Memory: one more matrix of the same size and 6 KiB a column.

    Raises PlanError when the matrix is not finite, or not positive definite under the largest damping.
    """
    columns = len(hessian)
    if hessian.shape != (columns, columns):
        raise ValueError(f"a square matrix is needed, not {hessian.shape}")
    moments = hessian.diagonal().astype(np.float32)
    alive = moments[moments > 0].astype(np.float64)
    mean = float(alive.mean()) if len(alive) else 1.0
    for share in sorted({damping, max(damping, 1.0)}) if np.isfinite(mean) else ():
        unit = np.array(hessian, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # refused below
            pivots = _factor_in_place(unit, moments, mean, share)
        if pivots is not None:
            return Factor(unit, pivots, np.maximum(moments, np.float32(0)), share)
    raise PlanError(
        f"the second moments of {columns} input channels (mean {mean:.4g}) are not finite or not positive definite, "
        f"even with their diagonal doubled: the calibration is damaged. Calibrate again."
    )


def _factor_in_place(matrix: np.ndarray, moments: np.ndarray, mean: float, share: float) -> np.ndarray | None:
    """H to N, and D × mean as the result; None when not positive definite. Panels run from the last to the first."""
    # Relative to the mean, so that products neither overflow nor vanish whatever the number of tokens.
    matrix *= np.float32(1 / mean)
    matrix[moments == 0, :] = 0
    matrix[:, moments == 0] = 0
    own = np.where(moments == 0, 1, moments / mean).astype(np.float32)
    matrix[np.diag_indices(len(matrix))] += np.float32(share) * own
    pivots = np.empty(len(matrix), np.float64)
    for stop in range(len(matrix), 0, -_FACTOR_PANEL):
        start = max(0, stop - _FACTOR_PANEL)
        panel = matrix[:stop, start:stop]
        # N D Nᵀ of the columns behind: what is already factored.
        panel -= matrix[:stop, stop:] @ (matrix[start:stop, stop:] * pivots[stop:].astype(np.float32)).T
        corner = panel[start:].astype(np.float64)
        if not np.isfinite(corner).all() or not _factor_corner(corner, pivots[start:stop]):
            return None
        panel[start:] = corner.T
        panel[:start] = panel[:start] @ (inverse(corner) / pivots[start:stop]).astype(np.float32)
        matrix[stop:, start:stop] = 0
    pivots *= mean
    return pivots


@compiled(nogil=True)
def _factor_corner(a, pivots):
    """The lower triangle of float64 [n, n] to Nᵀ, `pivots` to D, from the last column on; False: not definite."""
    for j in range(len(a) - 1, -1, -1):
        pivots[j] = a[j, j]
        if not (pivots[j] > 0 and np.isfinite(pivots[j])):
            return False
        for i in range(j):
            share = a[j, i] / pivots[j]
            for k in range(i + 1):
                a[i, k] -= share * a[j, k]
        a[j, :j] /= pivots[j]
        a[j, j] = 1
        a[j, j + 1 :] = 0
    return True


@compiled(nogil=True)
def inverse(lower):
    """Of a lower triangular matrix with ones on its diagonal, float64 [n, n]."""
    inverse = np.eye(len(lower))
    for j in range(len(lower)):
        for i in range(j):
            for k in range(i + 1):
                inverse[j, k] -= lower[j, i] * inverse[i, k]
    return inverse
