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
    Need,
    Way,
    decide,
    decode_speed,
    excess,
    fitting,
    need,
    parts_in_words,
    ways,
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
    """Megabytes; 50 of activations, of which half a megabyte for each token of a chunk; half as much to download as to
    load, the cache in bytes per token."""
    return Footprint(
        variant,
        download=Figure(weights * MB // 2, "computed"),
        weights=Figure(weights * MB, "computed"),
        activations=Figure(50 * MB, "computed"),
        prompt_token=MB // 2,
        loading=Figure(max(weights, loading) * MB, "computed"),
        packed=Figure(weights * MB, "computed"),
        kv_cache="float32",
        cache_bytes=cache,
        read=Figure(weights * MB // 2, "computed"),
    )


AS_LOADED = Way(1000, "float32", "private", 64, 4)
MAPPED = replace(AS_LOADED, weights="mapped")


def taken(found: Footprint, way: Way = AS_LOADED) -> Need:
    return need(found, way, TIERS.runtime_bytes)


def test_the_peak_is_in_use_or_in_loading_with_the_runtime_on_top() -> None:
    assert taken(footprint()).private == (700 + 50 + 200 + 100) * MB
    assert taken(footprint(loading=1200)).private == (1200 + 100) * MB
    assert taken(footprint(), replace(AS_LOADED, prefill_chunk=16)).private == (700 + 26 + 200 + 100) * MB
    mapped = taken(footprint(loading=1200), MAPPED)
    assert (mapped.private, mapped.mapped) == (PREPACKED_PRIVATE + (50 + 200 + 100) * MB, 700 * MB)


def test_a_budget_is_held_to_the_byte() -> None:
    exact = taken(footprint(weights=650))
    assert exact.private == 1000 * MB and excess(exact, SMALL, TIERS) == 0
    assert excess(replace(exact, private=exact.private + 1), SMALL, TIERS) == 1
    # Mapped weights count only against what stays in RAM: 1,300 MB of 2,000.
    mapped = taken(footprint(), MAPPED)
    assert excess(replace(mapped, private=900 * MB, mapped=400 * MB), SMALL, TIERS) == 0
    assert excess(replace(mapped, private=900 * MB, mapped=400 * MB + 1), SMALL, TIERS) == 1
    assert excess(replace(mapped, private=1000 * MB + 1, mapped=0), SMALL, TIERS) == 1


def test_the_words_are_the_sum() -> None:
    assert parts_in_words(taken(footprint())) == (
        "weights 700,000,000, activations 50,000,000, KV cache 200,000,000 at 1,000 tokens, runtime 100,000,000"
    )
    assert parts_in_words(taken(footprint(loading=1200))) == "loading 1,200,000,000, runtime 100,000,000"
    assert parts_in_words(taken(footprint(), MAPPED)).endswith("runtime 100,000,000, and 700,000,000 mapped")


def test_the_basis_is_the_weakest() -> None:
    assert taken(replace(footprint(), weights=Figure(1, "bound"))).basis == "bound"
    assert taken(footprint()).basis == "computed"
    assert taken(replace(footprint(), packed=Figure(1, "bound")), MAPPED).basis == "bound"


# --- ways ------------------------------------------------------------------------------------------------------------


def way(found: Footprint, context: int = 1000) -> tuple[int, str, int] | None:
    held = fitting(found, SMALL, TIERS, context)
    if held is None:
        return None
    assert excess(held, SMALL, TIERS) <= 0
    return held.way.context, held.way.weights, held.way.prefill_chunk


def test_a_tier_runs_a_variant_in_the_first_way_that_fits() -> None:
    """1,000 MB may be private. As loaded: weights + 50 + 200 + 100; chunks of 32 or 16 tokens save 16 or 24 MB. Mapped:
    1,300 hold weights + 150 + 50 + 200 + 100."""
    assert way(footprint(weights=650)) == (1000, "private", 64)
    assert way(footprint(weights=660)) == (1000, "private", 32)
    assert way(footprint(weights=670)) == (1000, "private", 16)
    assert way(footprint(weights=700)) == (1000, "mapped", 64)
    assert way(footprint(weights=820)) == (1000, "mapped", 16)
    assert fitting(footprint(), SMALL, TIERS, 1000).way.threads == SMALL.threads  # type: ignore[union-attr]


def test_less_context_is_the_last_way_and_as_long_as_memory_allows() -> None:
    """900 MB mapped leave 1,300 − 900 − 150 − 26 − 100 = 124 MB for the cache: 620 tokens."""
    found = footprint(weights=900)
    assert way(found) == (620, "mapped", 16)
    longer = need(found, Way(621, "float32", "mapped", 16, 4), TIERS.runtime_bytes)
    assert excess(longer, SMALL, TIERS) > 0
    assert way(footprint(weights=970)) == (270, "mapped", 16)
    assert way(footprint(weights=975)) is None  # 245 tokens


def test_what_loads_with_a_peak_can_still_be_mapped() -> None:
    assert way(footprint(weights=100, loading=950)) == (1000, "mapped", 64)


# --- the choice ------------------------------------------------------------------------------------------------------


def chosen(*candidates: Candidate, tier: Tier = SMALL) -> str | None:
    found = decide(candidates, tier, TIERS, 1000).chosen
    return found.candidate.variant if found else None


def test_measured_quality_decides_before_size_and_a_failed_gate_excludes() -> None:
    small, big = footprint("q4", 300), footprint("q8", 500)
    assert chosen(Candidate(small), Candidate(big)) == "q8"
    assert chosen(Candidate(big), Candidate(small, "PASS", 0.2)) == "q4"
    assert chosen(Candidate(big, "FAIL", 0.01), Candidate(small)) == "q4"
    assert chosen(Candidate(big, "INCONCLUSIVE", 0.01)) is None


def test_quality_decides_between_ways_but_not_below_the_context() -> None:
    good, poor = Candidate(footprint("q4", 760), "PASS", 0.1), Candidate(footprint("q3", 300), "PASS", 0.4)
    assert chosen(poor, good) == "q4"  # mapped, where q3 would load as it is
    too_large = Candidate(footprint("q4", 900), "PASS", 0.1)
    assert chosen(poor, too_large) == "q3"
    assert chosen(too_large) == "q4"  # with 620 tokens


def test_a_variant_runs_on_every_class_that_holds_it() -> None:
    assert ways(Candidate(footprint(weights=1700), "FAIL", 9.0), TIERS) == {"large": MAPPED}
    assert ways(Candidate(footprint(weights=100)), TIERS) == {
        "small": AS_LOADED, "large": AS_LOADED,
    }  # fmt: skip


def test_a_refusal_falls_back_to_the_largest_smaller_model_that_fits() -> None:
    huge = [Candidate(footprint("q4", 5000)), Candidate(footprint("q3", 4000)), Candidate(footprint("q2", 1), "FAIL")]
    smaller = {"middle": [Candidate(footprint("q4", 900))], "little": [Candidate(footprint("q4", 100))]}
    decision = decide(huge, SMALL, TIERS, 1000, smaller)
    assert decision.chosen is None and decision.closest is not None and decision.instead is not None
    assert decision.closest.candidate.variant == "q3"
    assert excess(decision.closest.need, SMALL, TIERS) == (4000 + 150 + 26 + 100 - 1300) * MB + 256 * 200_000
    assert (decision.instead.model, decision.instead.need.way.context) == ("middle", 620)
    assert decision.runs == decision.instead


# --- speed, bounds-------------------------------------------------------------------------------------------


def test_speed_is_bandwidth_over_bytes_read() -> None:
    """350 MB of weights read, 200 MB of cache at its end; 11 GB/s."""
    speed = decode_speed(footprint(), 1000, 11_000 * MB, Efficiency(low=0.4, high=0.6, source="a test"))
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
