"""The recipes of configs/recipes as they ship: what they promise at full shapes, before any weight is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.artifact.plans import budget_bound
from pipeline.artifact.write import draft
from pipeline.config.phones import load_tiers
from pipeline.config.recipes import BudgetRecipe, RecipeConfig, load_recipe
from pipeline.errors import PlanError
from pipeline.graph.decoder import build_decoder
from pipeline.planning.budget import groups, solve
from pipeline.planning.devices import PREPACKED_PRIVATE, resident_bytes
from pipeline.planning.memory import packed_memory
from pipeline.planning.recipes import PlannedMatrix, make_plan, use_more_bits
from tests.planning.measured import measured
from tests.real_configs import architecture_of, references


def rules(name: str) -> RecipeConfig:
    recipe = load_recipe(name)
    assert isinstance(recipe, RecipeConfig)
    return recipe


@pytest.mark.parametrize(
    ("variant", "model", "size"),
    [
        ("q4", "mimo-8b", 4_170_572_991),
        ("q4", "phi-4", 7_825_245_504),
        ("q4", "phi-4-mini", 2_169_189_936),
        ("q4_k_m", "mimo-8b", 4_524_579_984),
        ("q4_k_m", "phi-4", 8_748_932_280),
        ("q4_k_m", "phi-4-mini", 2_395_518_631),
    ],
)
def test_the_sizes_that_the_readme_states(variant: str, model: str, size: int, tmp_path: Path) -> None:
    architecture, recipe = architecture_of(model, tmp_path), rules(variant)
    source, _ = build_decoder(architecture, references(architecture), 4096)
    stem = f"{model}_{variant}".replace("-", "_")
    assert draft(source, make_plan(architecture, recipe), stem, recipe.part_bytes).bytes == size


def bits(planned: PlannedMatrix) -> set[int]:
    return {piece.format.bits for piece in planned.pieces}


@pytest.mark.parametrize("model", ["smollm2-135m", "mimo-8b", "phi-4"])  # 30, 36 and 40 layers
def test_q4_k_m_is_llama_cpp_s_allocation_layer_by_layer(model: str, tmp_path: Path) -> None:
    architecture = architecture_of(model, tmp_path)
    for item in make_plan(architecture, rules("q4_k_m")).body:
        more = item.matrix.role in {"v_proj", "qkv_proj", "down_proj"}
        expected = 6 if more and use_more_bits(item.matrix.layer, architecture.layers) else 4
        assert bits(item) == {expected}, item.matrix.name


def test_q3_keeps_its_bits_and_its_head(tmp_path: Path) -> None:
    """Whatever is measured of a model: the sensitivities here are drawn."""
    recipe, architecture = load_recipe("q3"), architecture_of("mimo-8b", tmp_path)
    assert isinstance(recipe, BudgetRecipe)
    sensitivity = measured(architecture, formats=[*recipe.budget.formats, *recipe.budget.tables])
    weights = sum(m.rows * m.columns for layer in range(architecture.layers) for m in architecture.body(layer))
    limit = int(recipe.budget.body_bits * weights / 8)
    plan = solve(architecture, groups(architecture, recipe.budget, sensitivity), {"body": limit}).plan
    assert 3.4 < plan.body_bits <= 3.5
    assert (plan.embedding.formats, plan.head.formats) == ("w4b32a8", "w6b64a8")
    assert any(item.split for item in plan.body)
    assert set().union(*map(bits, plan.body)) == {2, 4, 8}


@pytest.mark.parametrize(("model", "tier"), [("mimo-8b", "android-8gb"), ("phi-4", "android-12gb")])
def test_q3_aims_at_the_smallest_class_that_holds_the_model(model: str, tier: str, tmp_path: Path) -> None:
    """Mapped: private memory with cache and activations at 2,048 tokens, and packed weights, fill what stays in RAM."""
    architecture, recipe, tiers = architecture_of(model, tmp_path), load_recipe("q3"), load_tiers()
    assert isinstance(recipe, BudgetRecipe)
    most = budget_bound(recipe, architecture)
    private = tiers.runtime_bytes + PREPACKED_PRIVATE + most.memory.cache + most.memory.activations
    assert most.packed + private == resident_bytes(tiers.tiers[tier], tiers)
    sensitivity = measured(architecture, formats=[*recipe.budget.formats, *recipe.budget.tables])
    choices = groups(architecture, recipe.budget, sensitivity)
    plan = solve(architecture, choices, {"packed": most.packed}, recipe.kv_cache).plan
    assert 0.97 * most.packed < sum(map(packed_memory, plan.tables)) <= most.packed


def test_a_budget_names_a_tier_that_there_is_and_leaves_room(tmp_path: Path) -> None:
    architecture, recipe = architecture_of("phi-4", tmp_path), load_recipe("q3")
    assert isinstance(recipe, BudgetRecipe)
    for changes, message in (
        ({"tier": "android-9gb"}, "tier 'android-9gb' is not in configs/tiers.yaml .*, nor is it 'smallest'"),
        ({"tier": "android-4gb", "context": 20_000}, r"leave -[\d,]+ bytes of memory for weights. Lower `context`"),
    ):
        changed = recipe.model_copy(update={"budget": recipe.budget.model_copy(update=changes)})
        with pytest.raises(PlanError, match=message):
            budget_bound(changed, architecture)
