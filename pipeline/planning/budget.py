"""A byte budget solved for: of all plans that fit, the one whose matrices' damages add up to the least.

The damage of a matrix in a format is measured (`Sensitivity`): the KL divergence that one format causes in it, times
how much more or less calibrated error another one leaves. Damages are added over matrices, which is exact for small
ones and keeps their order for large ones. Choosing one option per group of matrices under linear limits is a
multiple-choice knapsack, solved by branch and bound (HiGHS, https://highs.dev) with a bound on what is left to gain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby, product

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from pipeline.checkpoint.architecture import Architecture, Matrix
from pipeline.config import Budget, KvCache, Pin
from pipeline.errors import PlanError
from pipeline.planning.memory import weight_memory
from pipeline.planning.recipes import Piece, Plan, PlannedMatrix, apply_format, cache_of
from pipeline.quantize.formats import TensorFormat

_SPLIT_STEPS = 8  # shares of an input's channels at more bits: eighths
_SOLVER_SECONDS = 60.0
_RELATIVE_GAP = 1e-4
_OF = {"bytes": "", "body": " of the body", "memory": " of memory"}
_CHANNEL_BYTES = 4  # an int32 index per gathered channel


@dataclass(frozen=True)
class Sensitivity:
    """What was measured of a model.

    Attributes:
        errors: matrix → format → E[x²]·Σ(w − ŵ)² of each input channel, float32 [columns].
        order: input → its channels, the most important first, int32 [columns].
        nats: matrix → mean KL divergence, nats per token, with it alone in the format `damage[matrix]`.
        damage: matrix → that format.
    """

    errors: Mapping[str, Mapping[str, np.ndarray]]
    order: Mapping[str, np.ndarray]
    nats: Mapping[str, float]
    damage: Mapping[str, str]

    def cost(self, planned: PlannedMatrix) -> float:
        """Predicted KL divergence of one planned matrix, nats per token. Raises PlanError for a format not measured."""
        matrix = planned.matrix
        kinds = [self._columns(matrix, piece.format) for piece in planned.pieces]
        if planned.split:
            order, high = self.order[matrix.input], planned.pieces[0].columns
            error = kinds[0][order[:high]].sum() + kinds[1][order[high:]].sum()
        else:
            error = kinds[0].sum()
        measured = float(self.errors[matrix.name][self.damage[matrix.name]].sum(dtype=np.float64))
        return max(self.nats[matrix.name], 0.0) * float(error) / measured if measured else 0.0

    def _columns(self, matrix: Matrix, fmt: TensorFormat) -> np.ndarray:
        found = self.errors[matrix.name].get(str(fmt))
        if found is None:
            raise PlanError(
                f"tensor {matrix.name}: no error was measured for {fmt} (measured: "
                f"{', '.join(self.errors[matrix.name])}). Add it to `formats` in configs/sensitivity.yaml."
            )
        return found


@dataclass(frozen=True)
class Option:
    """One way to store the matrices that share an input.

    `bytes` on disk, `body` those that count as the body's, `memory` in bytes once loaded, `cost` in nats.
    """

    planned: tuple[PlannedMatrix, ...]
    bytes: int
    body: int
    memory: int
    cost: float


@dataclass(frozen=True)
class Solution:
    """A plan, what it is predicted to lose (nats per token), and the least that any plan within the limits could."""

    plan: Plan
    cost: float
    bound: float

    @property
    def gap(self) -> float:
        """How much of the predicted loss a better plan could save at most, as a share."""
        return max(0.0, 1 - self.bound / self.cost) if self.cost > 0 else 0.0


def groups(architecture: Architecture, budget: Budget, sensitivity: Sensitivity) -> list[list[Option]]:
    """The options of every group of matrices with the same input, the tables first, in a plan's order.

    Dominated ones are left out. Raises PlanError when a pin matches nothing, or a format was not measured or fits no
    matrix.
    """
    tables = architecture.tables
    body = [matrix for layer in range(architecture.layers) for matrix in architecture.body(layer)]
    _check_pins(budget.pin, [matrix.name for matrix in (*tables, *body)])
    found = [_options([table], budget.tables, False, budget, sensitivity) for table in tables]
    for _, sharing in groupby(body, key=lambda matrix: matrix.input):
        found.append(_options(list(sharing), budget.formats, budget.splits, budget, sensitivity))
    return found


def _check_pins(pins: Sequence[Pin], names: Sequence[str]) -> None:
    for pin in pins:
        if not any(fnmatchcase(name, pin.tensors) for name in names):
            raise PlanError(f"pin {pin.tensors!r} matches no tensor of this model; one is called {names[-1]!r}.")


def _options(
    matrices: list[Matrix], formats: Sequence[str], splits: bool, budget: Budget, sensitivity: Sensitivity
) -> list[Option]:
    pinned = [_pin_of(matrix, budget.pin) for matrix in matrices]
    whole = [
        [apply_format(name, matrix) for name in ([pin.format] if pin else formats)]
        for matrix, pin in zip(matrices, pinned, strict=True)
    ]
    plans = [choice for choice in product(*whole) if len({_cut(item) for item in choice}) == 1]
    if not plans:
        names = ", ".join(matrix.name for matrix in matrices)
        raise PlanError(f"tensors {names} share their input: pin all of them to the same split, or none to one.")
    if splits and not any(pinned):
        plans += _splits(matrices, formats)
    return _front([_option(choice, sensitivity) for choice in plans])


def _pin_of(matrix: Matrix, pins: Sequence[Pin]) -> Pin | None:
    return next((pin for pin in pins if fnmatchcase(matrix.name, pin.tensors)), None)


def _cut(planned: PlannedMatrix) -> tuple[int, ...]:
    return tuple(piece.columns for piece in planned.pieces)


def _splits(matrices: list[Matrix], formats: Sequence[str]) -> Iterator[tuple[PlannedMatrix, ...]]:
    """Every pair of formats with different bits, at every share of the channels that is whole blocks of both."""
    columns = matrices[0].columns
    kinds = list(dict.fromkeys(TensorFormat.parse(name) for name in formats))
    for high, low in product(kinds, kinds):
        step = max(high.block, low.block)
        shares = {round(part * columns / _SPLIT_STEPS / step) * step for part in range(1, _SPLIT_STEPS)}
        for count in sorted(shares - {0}) if high.bits > low.bits else ():
            if columns % step == 0 and count < columns:
                pieces = Piece(high, count), Piece(low, columns - count)
                yield tuple(PlannedMatrix(matrix, pieces) for matrix in matrices)


def _option(planned: tuple[PlannedMatrix, ...], sensitivity: Sensitivity) -> Option:
    gathered = _CHANNEL_BYTES * planned[0].matrix.columns if planned[0].split else 0
    return Option(
        planned,
        sum(item.bytes for item in planned) + gathered,
        sum(item.bytes for item in planned if item.matrix.role not in {"embedding", "head"}),
        sum(weight_memory(item) for item in planned) + gathered,
        sum(sensitivity.cost(item) for item in planned),
    )


def _front(options: Sequence[Option]) -> list[Option]:
    """Options that no other one beats in bytes, memory and cost at once, the smallest first."""
    ordered = sorted(options, key=lambda option: (option.bytes, option.memory, option.cost))
    kept: list[Option] = []
    for option in ordered:
        if not any(other.memory <= option.memory and other.cost <= option.cost for other in kept):
            kept.append(option)
    return kept


def solve(
    architecture: Architecture, choices: Sequence[Sequence[Option]], limits: Mapping[str, int],
    kv_cache: KvCache = "float32",
) -> Solution:  # fmt: skip
    """The plan of least cost among `groups` whose options together stay within `limits`: bytes by the name of an
    option's figure, `bytes`, `body` or `memory`.

    Raises PlanError, with the least that is possible, when none fits.
    """
    for name, limit in limits.items():
        least = sum(min(getattr(option, name) for option in options) for options in choices)
        if least > limit:
            raise PlanError(
                f"no plan fits: with these formats the matrices take at least {least:,} bytes"
                f"{_OF[name]}, {least - limit:,} more than the {limit:,} left for them. Raise "
                f"the budget, or allow fewer bits or larger blocks in `formats` and `tables`."
            )
    chosen, cost, bound = _knapsack(choices, limits)
    planned = [item for option in chosen for item in option.planned]
    tables = len(architecture.tables)
    first, head, body = planned[0], planned[tables - 1], tuple(planned[tables:])
    plan = Plan(
        PlannedMatrix(architecture.embedding, first.pieces),
        body,
        head,
        architecture.tied,
        cache_of(architecture, kv_cache),
    )
    return Solution(plan, cost, bound)


def _knapsack(choices: Sequence[Sequence[Option]], limits: Mapping[str, int]) -> tuple[list[Option], float, float]:
    flat = [option for options in choices for option in options]
    owner = np.repeat(np.arange(len(choices)), [len(options) for options in choices])
    costs = np.array([option.cost for option in flat])
    unit = costs.sum() or 1.0  # nats are small next to the solver's tolerances
    one_each = LinearConstraint((owner == np.arange(len(choices))[:, None]).astype(float), 1, 1)
    within = [
        LinearConstraint(np.array([[getattr(option, name) / limit for option in flat]]), -np.inf, 1)
        for name, limit in limits.items()
    ]
    options = {"mip_rel_gap": _RELATIVE_GAP, "time_limit": _SOLVER_SECONDS}
    result = milp(
        costs / unit * len(flat),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[one_each, *within],
        options=options,
    )
    if result.x is None:
        raise PlanError(f"the budget could not be solved ({result.message}). Allow fewer formats, or raise the budget.")
    taken = [flat[index] for index in np.flatnonzero(result.x > 0.5)]
    return taken, sum(option.cost for option in taken), float(result.mip_dual_bound) * unit / len(flat)
