"""Experts in plans: one format a layer, what a token reads of them, and Phi-tiny-MoE's figures from its shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.artifact.write import Draft, draft
from pipeline.checkpoint.architecture import Architecture, expected_architecture
from pipeline.config.phones import Shapes
from pipeline.config.recipes import Budget, RecipeConfig, load_recipe
from pipeline.errors import PlanError
from pipeline.graph.decoder import build_decoder
from pipeline.planning.budget import bound, groups, smallest, solve
from pipeline.planning.memory import packed_memory, plan_memory, weight_memory
from pipeline.planning.recipes import Plan, apply_format, make_plan
from pipeline.runtime.roofline import traffic
from tests.planning.measured import measured
from tests.real_configs import references

TINY = expected_architecture(
    Shapes(
        family="phimoe", layers=32, hidden=4096, heads=16, kv_heads=4, head_dim=128, intermediate=448, vocab=32064,
        rotary_dims=128, tied=False, biases=("q_proj", "k_proj", "v_proj", "o_proj", "head"), experts=16,
        experts_per_token=2,
    )
)  # fmt: skip
SMALL = replace(TINY, layers=3, experts=4)
FORMATS = ("w2b64a8", "w4b64a8", "w4b32a8", "w6b64a8", "w8b32s8")


def drafted(architecture: Architecture, plan: Plan) -> Draft:
    source, _ = build_decoder(architecture, references(architecture), 64)
    return draft(source, plan, "tiny", 1_400_000_000)


def experts_of(plan: Plan) -> list[tuple[int, str]]:
    return [(item.matrix.layer, item.formats) for item in plan.body if item.matrix.expert is not None]


def test_phi_tiny_moe_in_numbers() -> None:
    """3.76 billion parameters on the disk and in memory; a token reads a sixth of the experts' and all of the rest."""
    recipe = load_recipe("q4")
    assert isinstance(recipe, RecipeConfig)
    plan = make_plan(TINY, recipe)
    found = drafted(TINY, plan)
    reads, memory = traffic(found.model), plan_memory(plan, TINY, 2048)
    experts = sum(item.bytes for item in plan.body if item.matrix.expert is not None)
    assert 2 * TINY.parameters == 7_510_440_576
    assert set(experts_of(plan)) == {(layer, "w4b64a8") for layer in range(32)}
    weights = 3 * 4096 * 448 * 16 * 32
    # Codes, scales and zero points, and float16's largest scale of each row.
    assert experts == weights * (4 + 8 / 64) // 8 + 32 * 16 * (896 * 32 + 4096 * 4) + 2 * 32 * 16 * (896 + 4096)
    assert 1.9e9 < found.bytes < 2.1e9
    everything = sum(item.bytes for item in (*plan.body, plan.head))
    assert 0 < reads.weight_bytes - (everything - experts + experts // 8) < 12_000_000  # routers, norms, biases, scales
    assert 0.6e9 < reads.weight_bytes < 0.7e9
    assert memory.weights == sum(map(weight_memory, plan.tables))
    assert memory.loading == max(*(item.bytes for item in plan.tables), experts // 32)


def test_a_budget_gives_the_experts_of_a_layer_one_format() -> None:
    sensitivity = measured(SMALL, formats=FORMATS)
    wanted = Budget(body_bits=5.0, formats=FORMATS)
    choices = groups(SMALL, wanted, sensitivity)
    weights = sum(matrix.rows * matrix.columns for matrix in SMALL.matrices[:-1])
    plan = solve(SMALL, choices, {"body": 5 * weights // 8}).plan
    found = experts_of(plan)
    assert len(set(found)) == SMALL.layers
    assert {name for _, name in found} <= {"w4b64a8", "w4b32a8", "w8b32s8"}
    assert 4.4 < plan.body_bits <= 5
    assert [item.matrix for item in plan.body] == SMALL.matrices[:-1]
    drafted(SMALL, plan)  # the graph takes it


def test_the_cost_of_a_layers_experts_is_their_sum() -> None:
    sensitivity = measured(SMALL, formats=FORMATS)
    choices = groups(SMALL, Budget(body_bits=5.0, formats=FORMATS), sensitivity)
    option = next(options[0] for options in choices if options[0].planned[0].matrix.expert is not None)
    assert len(option.planned) == 3 * SMALL.experts
    assert option.cost == pytest.approx(sum(sensitivity.cost(item) for item in option.planned))
    assert option.packed == sum(map(packed_memory, option.planned))


def test_pins_hold_for_all_experts_of_a_layer_or_none() -> None:
    sensitivity, gate = measured(SMALL, formats=FORMATS), "model.layers.1.*.experts.2.w1.weight"
    for pattern, format_, message in (
        (gate, "w8b32s8", r"layers\.1\..*experts\.2\.w1\.weight.* are experts of one layer: pin all of them"),
        ("*.experts.*", "w2b64a8", r"format w2b64a8: experts are multiplied in 4 or 8 bits"),
    ):
        pinned = Budget(body_bits=5.0, formats=FORMATS, pin=[{"tensors": pattern, "format": format_}])
        with pytest.raises(PlanError, match=message):
            groups(SMALL, pinned, sensitivity)
    pinned = Budget(body_bits=5.0, formats=FORMATS, pin=[{"tensors": "*layers.1.*.experts.*", "format": "w8b32s8"}])
    plan = smallest(SMALL, groups(SMALL, pinned, sensitivity))
    assert {name for layer, name in experts_of(plan) if layer == 1} == {"w8b32s8"}
    assert {name for layer, name in experts_of(plan) if layer != 1} == {"w4b64a8"}


def test_a_budget_below_what_experts_can_have_is_refused_before_anything_is_measured() -> None:
    wanted, weights = Budget(body_bits=3.5, formats=FORMATS), sum(m.rows * m.columns for m in TINY.matrices[:-1])
    with pytest.raises(PlanError, match="no plan fits: with these formats the matrices take at least"):
        bound(TINY, wanted, {"body": int(3.5 * weights / 8)}, 2048)
    with pytest.raises(PlanError, match=r"none of the budget's formats \(w2b64a8\) can be an expert's"):
        bound(TINY, Budget(body_bits=3.5, formats=["w2b64a8"]), {"body": weights}, 2048)


def test_the_bound_of_a_budget_holds() -> None:
    weights = sum(matrix.rows * matrix.columns for matrix in SMALL.matrices[:-1])
    limits = {"body": 6 * weights // 8}
    most = bound(SMALL, Budget(body_bits=6, formats=FORMATS), limits, 2048)
    plan = solve(
        SMALL, groups(SMALL, Budget(body_bits=6, formats=FORMATS), measured(SMALL, formats=FORMATS)), limits
    ).plan
    reads = traffic(drafted(SMALL, plan).model).weight_bytes
    assert reads < most.read < 1.6 * reads
    assert sum(map(packed_memory, plan.tables)) <= most.packed


def test_blocks_divide_an_expert_both_ways_and_twice() -> None:
    gate = next(matrix for matrix in replace(TINY, intermediate=128).body(0) if matrix.expert is not None)
    assert apply_format("w4b128a8", gate).formats == "w4b64a8"
