"""Which tier gets what, checked on figures worked out by hand."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from typing import Any

import pytest

from pipeline.bundle.tiers import TierBundle, TierRefusal, assign, build_tiers, way_record
from pipeline.config.phones import Tier, TiersConfig, load_tiers
from pipeline.errors import BundleError
from pipeline.planning.devices import Candidate, Figure, Footprint, Way, budget_bytes

TIERS = TiersConfig(
    context=2048,
    runtime_bytes=100,
    resident_fraction=0.001,  # nothing is mapped, unless a test allows it
    tiers={
        "small": Tier(platform="android", ram_bytes=1_000_000, usable_fraction=0.0005),
        "middle": Tier(platform="android", ram_bytes=2_000_000, usable_fraction=0.0005),
        "large": Tier(platform="ios", ram_bytes=6_000_000, usable_fraction=0.0005),
    },
)


def candidate(variant: str, download: int, memory: int, verdict: str, kl_mean: float | None) -> Candidate:
    """A measured variant: all its memory is weights but 40 of activations; a token's cache takes nothing."""
    size, weights, used, loading, packed = (
        Figure(size, "measured") for size in (download, memory - 40, 40, memory - 40, memory - 40)
    )
    return Candidate(Footprint(variant, size, weights, used, 0, loading, packed, "float32", 0), verdict, kl_mean)


Q3 = candidate("q3", 600, 700, "PASS", 0.12)
Q4 = candidate("q4", 800, 900, "PASS", 0.08)
Q4_K_M = candidate("q4_k_m", 900, 1_000, "PASS", 0.05)


@pytest.mark.parametrize("order", itertools.permutations([Q3, Q4, Q4_K_M]))
def test_each_tier_gets_the_best_that_fits(order: tuple[Candidate, ...]) -> None:
    decisions = assign(TIERS, order)
    assert decisions["small"] == TierRefusal(
        platform="android",
        ram_bytes=1_000_000,
        budget_bytes=500,
        shortfall_bytes=300,
        reasons=[
            "q3: verdict PASS, 300 bytes too many with weights private (weights 660, activations 40, KV cache 0 at 256 "
            "tokens, runtime 100)",
            "q4: verdict PASS, 500 bytes too many with weights private (weights 860, activations 40, KV cache 0 at 256 "
            "tokens, runtime 100)",
            "q4_k_m: verdict PASS, 600 bytes too many with weights private (weights 960, activations 40, KV cache 0 at "
            "256 tokens, runtime 100)",
        ],
    )
    # q4 needs exactly the budget of 1,000 and fits; q4_k_m is better but 100 over.
    assert decisions["middle"] == TierBundle(
        platform="android",
        ram_bytes=2_000_000,
        budget_bytes=1_000,
        variant="q4",
        way=way_record(Way(2048, "float32", "private", 64, 4)),
        need_bytes=1_000,
        mapped_bytes=0,
        bundle_bytes=800,
        kl_mean=0.08,
    )
    assert decisions["large"].variant == "q4_k_m" and decisions["large"].budget_bytes == 3_000


@pytest.mark.parametrize("verdict", ["FAIL", "INCONCLUSIVE", "ERROR"])
def test_only_a_pass_ships(verdict: str) -> None:
    best = candidate("q4_k_m", 900, 1_000, verdict, None if verdict == "ERROR" else 0.001)
    assert assign(TIERS, [best, Q4])["large"].variant == "q4"
    refusal = assign(TIERS, [best])["large"]
    assert refusal.shortfall_bytes is None
    figures = "weights 960, activations 40, KV cache 0 at 256 tokens, runtime 100"
    assert refusal.reasons == [f"q4_k_m: verdict {verdict} ({figures})"]


def test_nothing_built_is_a_refusal() -> None:
    assert assign(TIERS, [])["large"].reasons == ["no variant was built"]


def test_equal_quality_goes_to_the_smaller_need() -> None:
    twin = candidate("a", 800, 901, "PASS", Q4.kl_mean)
    assert assign(TIERS, [twin, Q4])["large"].variant == "q4"


@pytest.mark.parametrize("kl", [None, float("nan"), float("inf")])
def test_no_variant_passes_unmeasured(kl: float | None) -> None:
    with pytest.raises(BundleError, match="variant q3 has the verdict PASS but a mean KL of"):
        assign(TIERS, [candidate("q3", 1, 50, "PASS", kl)])


def test_the_document_pins_the_bundles_it_names(maker: Any) -> None:
    fields = {
        "model": "demo",
        "signing": maker.config,
        "key": maker.key.identity,
        "created": datetime(2026, 1, 31, tzinfo=UTC),
        "context": TIERS.context,
        "decisions": assign(TIERS, [Q3, Q4, Q4_K_M]),
    }
    document = build_tiers(**fields, signatures={variant: "e" * 64 for variant in ("q3", "q4", "q4_k_m")})
    assert set(document.bundles) == {"q4", "q4_k_m"} and document.bundles["q4"].release == 7
    assert type(document).model_validate_json(document.model_dump_json()) == document


def test_a_way_is_signed_with_what_makes_it_so() -> None:
    """An app hands `genai` to onnxruntime-genai's Config.overlay, as it is."""
    mapped = way_record(Way(1024, "int8", "mapped", 16, 2))
    assert (mapped.weights, mapped.context, mapped.prefill_chunk, mapped.threads) == ("mapped", 1024, 16, 2)
    assert mapped.genai == {
        "model": {"decoder": {"session_options": {"intra_op_num_threads": 2}}},
        "search": {"chunk_size": 16, "max_length": 1024},
    }


def test_a_large_variant_is_mapped_where_it_stays_in_ram() -> None:
    """Of 900 MB: 150 private of the runtime's, 100 for the app, 600 mapped."""
    mb = 10**6
    tier = Tier(platform="android", ram_bytes=1000 * mb, usable_fraction=0.4)
    config = TiersConfig(context=256, runtime_bytes=100 * mb, resident_fraction=0.9, tiers={"one": tier})
    found = assign(config, [candidate("q4", 500 * mb, 600 * mb, "PASS", 0.1)])["one"]
    assert (found.way.weights, found.need_bytes, found.mapped_bytes) == ("mapped", 250 * mb + 40, 600 * mb - 40)


def test_the_shipped_tiers_keep_their_classes_apart() -> None:
    tiers = load_tiers().tiers
    for platform in ("android", "ios"):
        budgets = [budget_bytes(tier) for tier in tiers.values() if tier.platform == platform]
        assert budgets == sorted(set(budgets)) and budgets
    assert budget_bytes(tiers["android-8gb"]) == 3_850_000_000
    assert budget_bytes(tiers["ios-8gb"]) == 4_800_000_000
