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

from pipeline.checkpoint.architecture import Architecture, Matrix
from pipeline.config.recipes import Budget, KvCache, Pin, SplitFormat
from pipeline.errors import PlanError
from pipeline.planning import experts
from pipeline.planning.memory import Memory, packed_memory, use_memory, weight_memory
from pipeline.planning.recipes import TABLES, Piece, Plan, PlannedMatrix, apply_format, cache_of
from pipeline.planning.sensitivity import Sensitivity
from pipeline.quantize.formats import TensorFormat

_SPLIT_STEPS = 8  # shares of an input's channels at more bits: eighths
_SOLVER_SECONDS = 60.0
_RELATIVE_GAP = 1e-4
_OF = {"bytes": "", "body": " of the body", "memory": " of memory", "packed": " as kernels keep them"}
_COUNTS = (weight_memory, packed_memory)
_CHANNEL_BYTES = 4  # an int32 index per gathered channel
_BESIDE_MATRIX = 32 << 10  # of the file per matrix, at most: two pieces of three tensors on their own pages, and nodes


@dataclass(frozen=True)
class Option:
    """One way to store the matrices that share an input, or a layer's experts.

    `bytes` on disk, `body` those that count as the body's, `memory` in bytes once loaded, `packed`: of them, what
    products read; `cost` in nats.
    """

    planned: tuple[PlannedMatrix, ...]
    bytes: int
    body: int
    memory: int
    packed: int
    cost: float


Choices = Sequence[Sequence[Option]]  # by group of matrices that share their input


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
    """The options of every group of matrices with the same input, the tables first, in a plan's order; all experts of a
    layer are one group, with one format.

    Dominated ones are left out. Raises PlanError when a pin matches nothing, or a format was not measured or fits no
    matrix.
    """
    matrices = _stored(architecture)
    for pin in budget.pin:
        if not any(fnmatchcase(matrix.name, pin.tensors) for matrix in matrices):
            raise PlanError(
                f"pin {pin.tensors!r} matches no tensor of this model; one is called {matrices[-1].name!r}."
            )
    sensitivity.check(matrices)
    return [_options(list(sharing), budget, sensitivity) for _, sharing in groupby(matrices, lambda item: item.choice)]


def _stored(architecture: Architecture) -> list[Matrix]:
    """Every matrix that an artifact holds: the tables, then the body."""
    return [*architecture.tables, *architecture.matrices[:-1]]


def _options(matrices: list[Matrix], budget: Budget, sensitivity: Sensitivity) -> list[Option]:
    if matrices[0].expert is not None:
        alike = [[apply_format(name, matrix) for matrix in matrices] for name in _alike(matrices, budget)]
        return _front([_option(tuple(choice), sensitivity) for choice in alike])
    whole = [[apply_format(chosen, matrix) for chosen in _choices(matrix, budget)] for matrix in matrices]
    plans = [choice for choice in product(*whole) if len({item.widths for item in choice}) == 1]
    if not plans:
        names = ", ".join(matrix.name for matrix in matrices)
        raise PlanError(f"tensors {names} share their input: pin all of them to the same split, or none to one.")
    if budget.splits and matrices[0].role not in TABLES and not any(_pin_of(matrix, budget) for matrix in matrices):
        plans += _splits(matrices, budget.formats)
    return _front([_option(choice, sensitivity) for choice in plans])


def _choices(matrix: Matrix, budget: Budget) -> Sequence[str | SplitFormat]:
    """What a budget may store a matrix in, splits that it finds itself apart."""
    if pin := _pin_of(matrix, budget):
        if matrix.role in TABLES and isinstance(pin.format, SplitFormat):
            raise PlanError(
                f"pin {pin.tensors!r} splits {matrix.name}: embedding and head are stored whole. Pin them to one "
                f"format before this pin: the first that matches counts."
            )
        return (pin.format,)
    if matrix.role == "embedding" and budget.embedding:
        return (budget.embedding,)
    if matrix.expert is not None:
        return experts.usable(budget.formats)
    return budget.tables if matrix.role in TABLES else budget.formats


def _alike(matrices: Sequence[Matrix], budget: Budget) -> Sequence[str | SplitFormat]:
    """What the experts of a layer may be stored in together. Raises PlanError when they are pinned differently."""
    found = {tuple(map(str, _choices(matrix, budget))): matrix for matrix in matrices}
    if len(found) > 1:
        names = ", ".join(matrix.name for matrix in found.values())
        raise PlanError(f"tensors {names} are experts of one layer: pin all of them to one format, or none.")
    return _choices(matrices[0], budget)


def _pin_of(matrix: Matrix, budget: Budget) -> Pin | None:
    return next((pin for pin in budget.pin if fnmatchcase(matrix.name, pin.tensors)), None)


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
        sum(item.bytes for item in planned if item.matrix.role not in TABLES),
        sum(weight_memory(item) for item in planned) + gathered,
        sum(packed_memory(item) for item in planned) + gathered,
        sum(sensitivity.cost(item) for item in planned),
    )


def _front(options: Sequence[Option]) -> list[Option]:
    """Options that no other one beats in every figure at once, the smallest first."""

    def figures(option: Option) -> tuple[float, ...]:
        return option.bytes, option.body, option.memory, option.packed, option.cost

    kept: list[Option] = []
    for option in sorted(options, key=figures):
        if not any(all(a <= b for a, b in zip(figures(other), figures(option), strict=True)) for other in kept):
            kept.append(option)
    return kept


def smallest(architecture: Architecture, choices: Choices, kv_cache: KvCache = "float32") -> Plan:
    """The plan of fewest bytes among `groups`."""
    return _plan(architecture, [min(options, key=lambda option: option.bytes) for options in choices], kv_cache)


def _plan(architecture: Architecture, chosen: Sequence[Option], kv_cache: KvCache) -> Plan:
    planned = [item for option in chosen for item in option.planned]
    tables = len(architecture.tables)
    first, head, body = planned[0], planned[tables - 1], tuple(planned[tables:])
    embedding = PlannedMatrix(architecture.embedding, first.pieces)
    return Plan(embedding, body, head, architecture.tied, cache_of(architecture, kv_cache))


def solve(
    architecture: Architecture, choices: Choices, limits: Mapping[str, int], kv_cache: KvCache = "float32"
) -> Solution:
    """The plan of least cost among `groups` whose options together stay within `limits`: bytes by the name of an
    option's figure, `bytes`, `body`, `memory` or `packed`.

    Raises PlanError, with the least that is possible, when none fits.
    """
    for name, limit in limits.items():
        _require_room(name, limit, sum(min(getattr(option, name) for option in options) for options in choices))
    chosen, bound = _knapsack(choices, limits)
    room = dict(limits)
    while over := _over(chosen, limits):  # by the solver's tolerance, a millionth: kilobytes of gigabytes
        room = {name: most - over.get(name, 0) for name, most in room.items()}
        chosen, _ = _knapsack(choices, room)
    return Solution(_plan(architecture, chosen, kv_cache), sum(option.cost for option in chosen), bound)


def _require_room(name: str, limit: int, least: int) -> None:
    if least > limit:
        raise PlanError(
            f"no plan fits: with these formats the matrices take at least {least:,} bytes"
            f"{_OF[name]}, {max(limit, 0):,} are left for them. Raise the budget by {least - limit:,} "
            f"or more, or allow fewer bits or larger blocks in `formats` and `tables`."
        )


def _over(chosen: Sequence[Option], limits: Mapping[str, int]) -> dict[str, int]:
    """The limits that are exceeded, and by how many bytes."""
    sums = {name: sum(getattr(option, name) for option in chosen) for name in limits}
    return {name: sums[name] - limit for name, limit in limits.items() if sums[name] > limit}


def _knapsack(choices: Choices, limits: Mapping[str, int]) -> tuple[list[Option], float]:
    """One option of each group, and the least cost that any choice could have."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    flat = [option for options in choices for option in options]
    owner = np.repeat(np.arange(len(choices)), [len(options) for options in choices])
    costs = np.array([option.cost for option in flat])
    unit = costs.sum() or 1.0  # nats are small next to the solver's tolerances
    constraints = [LinearConstraint((owner == np.arange(len(choices))[:, None]).astype(float), 1, 1)]  # one of each
    for name, limit in limits.items():
        shares = np.array([[getattr(option, name) / limit for option in flat]])
        constraints.append(LinearConstraint(shares, -np.inf, 1))
    # HiGHS's presolve prints to the process's stdout when it transforms a solution back, whatever it is told.
    options = {"mip_rel_gap": _RELATIVE_GAP, "time_limit": _SOLVER_SECONDS, "presolve": False}
    costs, integers = costs / unit * len(flat), np.ones(len(flat))
    result = milp(costs, integrality=integers, bounds=Bounds(0, 1), constraints=constraints, options=options)
    if result.status == 2:  # infeasible
        raise PlanError(f"no plan fits {' and '.join(limits)} at once, though one fits each alone: raise one of them.")
    if result.x is None:
        raise PlanError(f"the budget could not be solved ({result.message}). Allow fewer formats, or raise the budget.")
    taken = [flat[index] for index in np.flatnonzero(result.x > 0.5)]
    return taken, float(result.mip_dual_bound) * unit / len(flat)


@dataclass(frozen=True)
class Bound:
    """What any plan within a budget takes at most.

    `bytes` on disk; `memory` in use; `packed`: of its weights, those that products read; `read`: as stored, the bytes
    that a token reads, of experts those that it wakes.
    """

    bytes: int
    memory: Memory
    packed: int
    read: int


def bound(
    architecture: Architecture, budget: Budget, limits: Mapping[str, int], context: int, kv_cache: KvCache = "float32"
) -> Bound:
    """The most that a plan within `limits` (as for `solve`) can take, from shapes alone; `context` in tokens.

    Raises PlanError where no plan can fit: hours before `solve` would.
    """
    matrices, tables = _stored(architecture), len(architecture.tables)
    kinds = [[apply_format(name, matrix) for name in _whole(matrix, budget)] for matrix in matrices]
    largest = [max(item.bytes for item in choices) for choices in kinds]
    for name, limit in limits.items():
        count = {"memory": weight_memory, "packed": packed_memory}.get(name, _stored_bytes)
        counted = kinds[tables:] if name == "body" else kinds
        rest = 4 * (architecture.parameters - sum(matrix.rows * matrix.columns for matrix in matrices))  # norms, biases
        _require_room(name, limit - rest * (name == "bytes"), sum(min(map(count, choices)) for choices in counted))
    body_bytes = min([sum(largest[tables:]), *(limits[name] for name in ("bytes", "body") if name in limits)])
    beside = _CHANNEL_BYTES * sum({matrix.input: matrix.columns for matrix in matrices[tables:]}.values())
    beside += _BESIDE_MATRIX * len({item.name if item.expert is None else item.choice for item in matrices})
    beside += 4 * (architecture.parameters - sum(matrix.rows * matrix.columns for matrix in matrices))
    size = min(limits.get("bytes", 1 << 62), sum(largest[:tables]) + body_bytes + beside)
    most = [max(count(item) / item.bytes for found in kinds[tables:] for item in found) for count in _COUNTS]
    loaded, packed = (int(body_bytes * ratio) for ratio in most)
    packed = min(limits.get("packed", 1 << 62), packed + max(map(packed_memory, kinds[tables - 1])))
    # What limits packed bytes limits the whole: scales are no more than so much of them.
    loaded = min(
        loaded,
        int(packed * max(weight_memory(item) / packed_memory(item) for found in kinds[tables:] for item in found)),
    )
    table_memory = sum(max(map(weight_memory, choices)) for choices in kinds[:tables])
    weights = min(limits.get("memory", 1 << 62), loaded + table_memory)
    memory = Memory(weights, *use_memory(architecture, context, kv_cache), max(largest))
    packed = min(weights, packed)
    shares = [1 if item.expert is None else architecture.experts_per_token / architecture.experts for item in matrices]
    woken = sum(int(most * share) for most, share in zip(largest[tables:], shares[tables:], strict=True))
    return Bound(size, memory, packed, min(size, largest[tables - 1] + min(body_bytes, woken) + beside))


def _stored_bytes(planned: PlannedMatrix) -> int:
    return planned.bytes


def _whole(matrix: Matrix, budget: Budget) -> Sequence[str]:
    """Every whole format that a budget may give to a matrix or to a part of its channels."""
    choices = _choices(matrix, budget)
    return [name for item in choices for name in ((item,) if isinstance(item, str) else (item.high, item.low))]
