"""What fits a phone and what would, on figures worked out by hand; speeds; bounds of budgets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.phones import (
    Efficiency,
    Tier,
    TiersConfig,
)
from pipeline.config.recipes import load_recipe
from pipeline.planning.budget import bound, groups, solve
from pipeline.planning.devices import (
    PREPACKED_PRIVATE,
    Candidate,
    Figure,
    Footprint,
    Way,
    decide,
    decode_speed,
    fits,
    fitting_tiers,
    longest_context,
    need,
    parts_in_words,
    suggest,
)
from pipeline.planning.memory import plan_memory
from tests.planning.measured import measured
from tests.real_configs import architecture_of

MB = 10**6
TIERS = TiersConfig(
    context=1000,
    runtime_bytes=100 * MB,
    resident_fraction=0.65,
    tiers={
        "small": Tier(platform="android", ram_bytes=2000 * MB, usable_fraction=0.5),
        "large": Tier(platform="android", ram_bytes=4000 * MB, usable_fraction=0.5),
    },
)
SMALL, LARGE = TIERS.tiers.values()


def footprint(variant: str = "q4", weights: int = 700, cache: int = 200_000, loading: int = 0) -> Footprint:
    """Megabytes; 50 of activations, half as much to download as to load, the cache in bytes per token."""
    return Footprint(
        variant,
        download=Figure(weights * MB // 2, "computed"),
        weights=Figure(weights * MB, "computed"),
        activations=Figure(50 * MB, "computed"),
        loading=Figure(max(weights, loading) * MB, "computed"),
        packed=Figure(weights * MB, "computed"),
        kv_cache="float32",
        cache_bytes=cache,
        read=Figure(weights * MB // 2, "computed"),
    )


def private(found: Footprint, **changes: object) -> int:
    return need(found, replace(Way(1000, found.kv_cache), **changes), TIERS.runtime_bytes).private  # type: ignore[arg-type]


def test_the_peak_is_in_use_or_in_loading_with_the_runtime_on_top() -> None:
    assert private(footprint()) == (700 + 50 + 200 + 100) * MB
    assert private(footprint(loading=1200)) == (1200 + 100) * MB
    assert private(footprint(), kv_cache="int8") == (700 + 50 + 50 + 100) * MB
    mapped = need(footprint(), Way(1000, "float32", prepacked=True), TIERS.runtime_bytes)
    assert (mapped.private, mapped.mapped) == (PREPACKED_PRIVATE + (50 + 200 + 100) * MB, 700 * MB)


def test_an_int8_variant_stays_one() -> None:
    found = replace(footprint(cache=50_000), kv_cache="int8")
    assert found.token_bytes("int8") == 50_000
    assert found.token_bytes("float32") == 200_000
    assert private(found) == (700 + 50 + 50 + 100) * MB


def test_a_budget_is_held_to_the_byte() -> None:
    exact = need(footprint(weights=650), Way(1000, "float32"), TIERS.runtime_bytes)
    assert exact.private == 1000 * MB and fits(exact, SMALL, TIERS)
    assert not fits(replace(exact, private=exact.private + 1), SMALL, TIERS)
    # Mapped weights count only against what stays in RAM: 1,300 MB of 2,000.
    assert fits(replace(exact, private=900 * MB, mapped=400 * MB), SMALL, TIERS)
    assert not fits(replace(exact, private=900 * MB, mapped=400 * MB + 1), SMALL, TIERS)


def test_the_words_are_the_sum() -> None:
    found = need(footprint(), Way(1000, "float32"), TIERS.runtime_bytes)
    assert parts_in_words(found) == (
        "weights 700,000,000, activations 50,000,000, KV cache 200,000,000 at 1,000 tokens, runtime 100,000,000"
    )
    loading = need(footprint(loading=1200), Way(1000, "float32"), TIERS.runtime_bytes)
    assert parts_in_words(loading) == "loading 1,200,000,000, runtime 100,000,000"


def test_the_basis_is_the_weakest() -> None:
    found = replace(footprint(), weights=Figure(1, "bound"))
    assert need(found, Way(1, "float32"), 0).basis == "bound"
    assert need(footprint(), Way(1, "float32"), 0).basis == "computed"


# --- the choice ------------------------------------------------------------------------------------------------------


def test_measured_quality_decides_before_size_and_a_failed_gate_excludes() -> None:
    small, big = footprint("q4", 300), footprint("q8", 500)
    assert decide([Candidate(small), Candidate(big)], SMALL, TIERS, 1000).chosen == Candidate(big)
    judged = Candidate(small, "PASS", 0.2)
    assert decide([Candidate(big), judged], SMALL, TIERS, 1000).chosen == judged
    assert decide([Candidate(big, "FAIL", 0.01), Candidate(small)], SMALL, TIERS, 1000).chosen == Candidate(small)
    assert decide([Candidate(big, "INCONCLUSIVE", 0.01)], SMALL, TIERS, 1000).chosen is None


def test_fitting_tiers_ask_nothing_but_memory() -> None:
    assert fitting_tiers(Candidate(footprint(), "FAIL", 9.0), TIERS) == ("large",)
    assert fitting_tiers(Candidate(footprint(weights=100)), TIERS) == ("small", "large")


# --- suggestions -----------------------------------------------------------------------------------------------------


def changes(found: Footprint, context: int = 1000) -> list[tuple[str, ...]]:
    return [suggestion.changes for suggestion in suggest([Candidate(found)], SMALL, TIERS, context)]


def test_only_what_fits_is_suggested_with_the_fewest_changes() -> None:
    """700 MB: 50 MB too many. An int8 cache saves 150 MB, a shorter context up to 200 MB; mapped: 500 + 700 ≤ 1,300."""
    found = suggest([Candidate(footprint())], SMALL, TIERS, 1000)
    assert [one.changes for one in found] == [("prepacked",), ("int8-kv",), ("shorter-context",)]
    assert found[2].need.way.context == 750  # 1,000 − 700 − 50 − 100 = 150 MB of 200,000 bytes a token
    assert all(fits(one.need, SMALL, TIERS) for one in found)


def test_the_longest_context_is_the_longest() -> None:
    found = footprint()
    for way in (Way(0, "float32"), Way(0, "int8"), Way(0, "float32", True), Way(0, "int8", True)):
        tokens = longest_context(found, way, SMALL, TIERS)
        assert fits(need(found, replace(way, context=tokens), TIERS.runtime_bytes), SMALL, TIERS)
        assert not fits(need(found, replace(way, context=tokens + 1), TIERS.runtime_bytes), SMALL, TIERS)


def test_changes_combine_where_one_alone_does_not_do() -> None:
    """900 MB mapped leave 1,300 − 900 − 150 − 50 − 100 = 100 MB for the cache: 500 tokens, or 2,000 in int8."""
    assert changes(footprint(weights=900)) == [("prepacked", "int8-kv"), ("prepacked", "shorter-context")]
    assert changes(footprint(weights=1100)) == []


def test_no_context_below_a_chunk_is_suggested() -> None:
    assert ("shorter-context",) in changes(footprint(weights=790))  # 60 MB: 300 tokens
    assert ("shorter-context",) not in changes(footprint(weights=800))  # 50 MB: 250 tokens


def test_a_worse_variant_is_suggested_only_for_fewer_changes() -> None:
    good, poor = Candidate(footprint("q4", 900), "PASS", 0.1), Candidate(footprint("q3", 760), "PASS", 0.4)
    found = suggest([poor, good], SMALL, TIERS, 1000)
    assert [(one.candidate.variant, one.changes) for one in found] == [
        ("q3", ("prepacked",)),
        ("q3", ("int8-kv",)),
        ("q3", ("shorter-context",)),
        ("q4", ("prepacked", "int8-kv")),
        ("q4", ("prepacked", "shorter-context")),
    ]


def test_a_refusal_falls_back_to_the_largest_smaller_model_that_fits() -> None:
    huge = [Candidate(footprint("q4", 5000))]
    smaller = {"middle": [Candidate(footprint("q4", 900))], "little": [Candidate(footprint("q4", 100))]}
    decision = decide(huge, SMALL, TIERS, 1000, smaller)
    (only,) = decision.suggestions
    assert (only.model, only.changes) == ("middle", ("smaller-model", "prepacked", "int8-kv"))
    assert decision.chosen is None and decision.closest == huge[0] and decision.runs == only
    assert decide(huge, LARGE, TIERS, 1000, smaller).suggestions[0].changes == ("smaller-model",)


def test_a_choice_runs_as_it_is() -> None:
    decision = decide([Candidate(footprint())], LARGE, TIERS, 1000)
    assert decision.runs is not None
    assert (decision.runs.changes, decision.runs.need.way) == ((), Way(1000, "float32"))
    assert decision.suggestions == ()


# --- speed, bounds-------------------------------------------------------------------------------------------


def test_speed_is_bandwidth_over_bytes_read() -> None:
    """350 MB of weights read, 200 MB of cache at its end; 11 GB/s."""
    speed = decode_speed(footprint(), Way(1000, "float32"), 11_000 * MB, Efficiency(low=0.4, high=0.6, source="a test"))
    assert speed is not None
    assert (speed.most_full, speed.most_empty) == pytest.approx((20, 11_000 / 350))
    assert (speed.low, speed.high) == pytest.approx((8, 0.6 * 11_000 / 350))


def test_no_solved_budget_exceeds_its_bound(tmp_path: Path) -> None:
    recipe, architecture = load_recipe("q3"), architecture_of("smollm2-135m", tmp_path)
    sensitivity = measured(architecture, formats=[*recipe.budget.formats, *recipe.budget.tables])
    weights = sum(m.rows * m.columns for layer in range(architecture.layers) for m in architecture.body(layer))
    limits = {"body": int(3.5 * weights / 8)}
    most = bound(architecture, recipe.budget, limits, 2048)
    plan = solve(architecture, groups(architecture, recipe.budget, sensitivity), limits).plan
    memory, stored = plan_memory(plan, architecture, 2048), sum(item.bytes for item in plan.tables)
    assert 0.8 * most.bytes < stored < most.bytes
    assert 0.7 * most.memory.peak < memory.peak <= most.memory.peak
    assert most.packed < most.memory.weights  # the tied table is looked up as it is stored, besides
