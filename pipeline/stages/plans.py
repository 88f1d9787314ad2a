"""Recipes as plans of a model: the rules applied, or the budget solved with what the sensitivity stage measured."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from pipeline import config
from pipeline.artifact.write import Draft, draft
from pipeline.bundle.tiers import budget_bytes
from pipeline.checkpoint.architecture import Architecture
from pipeline.config import BudgetRecipe, Recipe
from pipeline.errors import PlanError
from pipeline.planning.budget import Solution, groups, solve
from pipeline.planning.memory import Memory, plan_memory, use_memory
from pipeline.planning.recipes import make_plan
from pipeline.stages.sensitivity import read_sensitivity
from pipeline.stages.workspace import Workspace

_ATTEMPTS = 8


@dataclass(frozen=True)
class Planned:
    """A recipe's draft, what it will take in memory, and how it was solved (None for rules)."""

    draft: Draft
    memory: Memory
    context: int
    solution: Solution | None


def plan_recipe(
    recipe: Recipe, architecture: Architecture, source: onnx.ModelProto, variant: str, model: str
) -> Planned:
    """The plan of a recipe for a model, laid out with exact bytes.

    Raises PlanError when nothing fits a budget, PipelineError when the sensitivity stage has not run.
    """
    workspace = Workspace(model)
    stem = workspace.file_stem(variant)
    if not isinstance(recipe, BudgetRecipe):
        context = config.load_tiers().context
        drafted = draft(source, make_plan(architecture, recipe), stem, recipe.part_bytes)
        return Planned(drafted, plan_memory(drafted.plan, architecture, context), context, None)
    budget = recipe.budget
    context = budget.context or config.load_tiers().context
    choices = groups(architecture, budget, read_sensitivity(workspace))
    limits = _limits(recipe, architecture, context)
    wanted = limits.pop("bytes", None)
    spare = wanted
    for _ in range(_ATTEMPTS):  # the graph's own bytes depend on the plan: a split adds nodes
        solution = solve(architecture, choices, limits | ({"bytes": spare} if spare else {}), recipe.kv_cache)
        drafted = draft(source, solution.plan, stem, recipe.part_bytes)
        if wanted is None or spare is None or drafted.bytes <= wanted:
            return Planned(drafted, plan_memory(solution.plan, architecture, context), context, solution)
        spare -= drafted.bytes - wanted
    raise PlanError(f"{model} {variant}: no plan of at most {wanted:,} bytes was found. Raise `bytes` by 1 %.")


def _limits(recipe: BudgetRecipe, architecture: Architecture, context: int) -> dict[str, int]:
    """What the matrices together may take, by the name of an option's figure."""
    budget, limits = recipe.budget, dict[str, int]()
    if budget.bytes is not None:
        limits["bytes"] = budget.bytes
    if budget.body_bits is not None:
        weights = sum(m.rows * m.columns for layer in range(architecture.layers) for m in architecture.body(layer))
        limits["body"] = int(budget.body_bits * weights / 8)
    memory = [budget.memory] if budget.memory is not None else []
    if budget.tier is not None:
        tiers = config.load_tiers()
        if budget.tier not in tiers.tiers:
            raise PlanError(f"tier {budget.tier!r} is not in configs/tiers.yaml (there: {', '.join(tiers.tiers)}).")
        memory.append(budget_bytes(tiers.tiers[budget.tier]) - tiers.runtime_bytes)
    if memory:
        used = sum(use_memory(architecture, context, recipe.kv_cache))
        limits["memory"] = min(memory) - used
        if limits["memory"] <= 0:
            raise PlanError(
                f"{min(memory):,} bytes of memory are less than the KV cache and activations at {context:,} tokens "
                f"({used:,} bytes). Lower `context`."
            )
    return limits


def bytes_bound(recipe: BudgetRecipe, architecture: Architecture) -> int:
    """What the artifact of a budget takes at most on the disk, before anything is measured of the model."""
    limits = _limits(recipe, architecture, recipe.budget.context or config.load_tiers().context)
    tables = sum(2 * matrix.rows * matrix.columns for matrix in architecture.tables)
    return min(limits.get("bytes", limits.get("memory", 1 << 62)), limits.get("body", 1 << 62) + tables)
