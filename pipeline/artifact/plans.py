"""Recipes as plans of a model: the rules applied, or the budget solved with what the sensitivity stage measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import onnx

from pipeline.artifact.speculative import Speculation, speculation
from pipeline.artifact.write import Draft, draft
from pipeline.checkpoint.architecture import Architecture
from pipeline.config.phones import load_tiers
from pipeline.config.recipes import BudgetRecipe, Recipe
from pipeline.errors import PlanError
from pipeline.planning.budget import Bound, Solution, bound, groups, smallest, solve
from pipeline.planning.devices import PREPACKED_PRIVATE, room_bytes
from pipeline.planning.memory import Memory, packed_memory, plan_memory, use_memory
from pipeline.planning.recipes import Plan, apply_format, make_plan, rotated
from pipeline.planning.sensitivity import Sensitivity, read_sensitivity
from pipeline.workspace import Workspace

SMALLEST = "smallest"  # the tier of a budget that is the smallest which can hold the model
_ATTEMPTS = 8
_LEAST_BITS = 3.2  # per weight of the body in memory: fewer are hardly better than a smaller model


@dataclass(frozen=True)
class Planned:
    """A recipe's draft, what it will take in memory, how it was solved (None for rules), and what it adds for
    speculative decoding, which no budget counts."""

    draft: Draft
    memory: Memory
    context: int
    solution: Solution | None
    speculation: Speculation | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all graphs and parts."""
        return self.draft.bytes + (self.speculation.bytes if self.speculation else 0)


def plan_recipe(
    recipe: Recipe, architecture: Architecture, source: onnx.ModelProto, variant: str, model: str
) -> Planned:
    """The plan of a recipe for a model, laid out with exact bytes.

    Raises PlanError when nothing fits a budget or a multi-token head is asked for that the model lacks, PipelineError
    when the sensitivity stage has not run.
    """
    workspace = Workspace(model)
    planned = _plan(recipe, architecture, source, workspace, variant)
    if recipe.speculative is None:
        return planned
    with _naming(workspace, variant):
        added = speculation(
            recipe.speculative, planned.draft, architecture, planned.context, workspace.export, recipe.part_bytes
        )
    return replace(planned, speculation=added)


@contextmanager
def _naming(workspace: Workspace, variant: str) -> Iterator[None]:
    try:
        yield
    except PlanError as error:
        raise PlanError(f"{workspace.model} {variant}: {error}") from None


def _plan(
    recipe: Recipe, architecture: Architecture, source: onnx.ModelProto, workspace: Workspace, variant: str
) -> Planned:
    stem = workspace.file_stem(variant)
    if not isinstance(recipe, BudgetRecipe):
        context = load_tiers().context
        drafted = draft(source, make_plan(architecture, recipe), stem, recipe.part_bytes)
        return Planned(drafted, plan_memory(drafted.plan, architecture, context), context, None)

    def drafts(plan: Plan) -> Draft:
        return draft(source, rotated(plan, recipe), stem, recipe.part_bytes)

    with _naming(workspace, variant):
        return _solve(recipe, architecture, read_sensitivity(workspace), drafts)


def _solve(
    recipe: BudgetRecipe, architecture: Architecture, measured: Sensitivity, drafts: Callable[[Plan], Draft]
) -> Planned:
    context = recipe.budget.context or load_tiers().context
    choices, limits = groups(architecture, recipe.budget, measured), _limits(recipe, architecture, context)
    room, used = dict(limits), sum(use_memory(architecture, context, recipe.kv_cache)[:2])
    if "bytes" in limits:
        least = smallest(architecture, choices, recipe.kv_cache)
        room["bytes"] -= drafts(least).bytes - sum(item.bytes for item in least.tables)
    first: Solution | None = None
    for attempt in range(_ATTEMPTS):
        solution = solve(architecture, choices, room, recipe.kv_cache)
        first = first or solution
        drafted, memory = drafts(solution.plan), plan_memory(solution.plan, architecture, context)
        # What sums over matrices do not tell: a split adds nodes to the graph, loading holds the largest matrix twice.
        sizes = {"bytes": drafted.bytes, "memory": memory.peak - used}
        over = {name: size - limits[name] for name, size in sizes.items() if size > limits.get(name, size)}
        if not over:  # later attempts have less room than the budget gives: the bound is the first's
            return Planned(drafted, memory, context, replace(solution, bound=first.bound))
        # Another plan has another graph: what it lacks is taken away twice over at every further attempt.
        room = {name: most - (over.get(name, 0) << attempt) for name, most in room.items()}
    excess = ", ".join(f"{name} by {size:,} bytes" for name, size in over.items())
    raise PlanError(f"after {_ATTEMPTS} attempts the plan still exceeds {excess}. Raise the budget by 1 %.")


def _limits(recipe: BudgetRecipe, architecture: Architecture, context: int) -> dict[str, int]:
    """What the matrices together may take, by the name of an option's figure."""
    budget, limits = recipe.budget, dict[str, int]()
    if budget.bytes is not None:
        limits["bytes"] = budget.bytes
    if budget.body_bits is not None:
        weights = sum(matrix.rows * matrix.columns for matrix in architecture.matrices[:-1])
        limits["body"] = int(budget.body_bits * weights / 8)
    used = sum(use_memory(architecture, context, recipe.kv_cache)[:2])
    if budget.memory is not None:
        limits["memory"] = budget.memory - used
    if budget.packed is not None:
        limits["packed"] = budget.packed
    if budget.tier is not None:
        name, left = _tier_room(recipe, architecture, used)
        limits[name] = min(limits.get(name, left), left)
    for name in ("memory", "packed"):
        if limits.get(name, 1) <= 0:
            raise PlanError(
                f"the KV cache and activations at {context:,} tokens ({used:,} bytes) leave {limits[name]:,} bytes of "
                f"memory for weights. Lower `context`, or name a larger budget."
            )
    return limits


def _tier_room(recipe: BudgetRecipe, architecture: Architecture, used: int) -> tuple[str, int]:
    """What a budget's tier leaves for weights, and the figure of an option that this limits; cache and activations take
    `used` bytes."""
    budget, config = recipe.budget, load_tiers()
    mapped = budget.weights == "mapped"
    beside = used + config.runtime_bytes + (PREPACKED_PRIVATE if mapped else 0)
    rooms = {name: room_bytes(tier, config, budget.weights) - beside for name, tier in config.tiers.items()}
    if budget.tier == SMALLEST:
        head = min(packed_memory(apply_format(name, architecture.head)) for name in budget.tables)
        body = sum(matrix.rows * matrix.columns for matrix in architecture.matrices[:-1])
        least = head + _LEAST_BITS * body / 8
        enough = [size for size in rooms.values() if size >= least]
        found = min(enough, default=max(rooms.values()))
    elif budget.tier in rooms:
        found = rooms[budget.tier]
    else:
        raise PlanError(
            f"tier {budget.tier!r} is not in configs/tiers.yaml (there: {', '.join(rooms)}), nor is it {SMALLEST!r}."
        )
    return ("packed" if mapped else "memory"), found


def budget_bound(recipe: BudgetRecipe, architecture: Architecture, context: int | None = None) -> Bound:
    """What the artifact of a budget takes at most, before anything is measured of the model.

    `context` in tokens, where the budget names none; by default that of configs/tiers.yaml. Raises PlanError for a
    budget that the cache alone exceeds.
    """
    tokens = recipe.budget.context or context or load_tiers().context
    limits = _limits(recipe, architecture, tokens)
    return bound(architecture, recipe.budget, limits, tokens, recipe.kv_cache)
