"""Phones: what a model needs there, what fits a tier, what would make it fit, how fast it can decode at most.

One arithmetic for `python -m pipeline plan`, tiers.json and release.json. An app's peak is

    max(weights + activations + KV cache at the context, loading) + runtime

in private bytes, which the system can only take back by killing the app. Every figure says where it comes from. What
does not fit is tried in the other ways that an app can run it (a shorter context, int8 keys and values, weights mapped
from a prepacked file); only what the arithmetic finds to fit is suggested.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from pipeline.config.phones import Efficiency, Tier, TiersConfig
from pipeline.config.recipes import KvCache

# Private bytes of a process whose weights are mapped from a prepacked file, activations and cache aside. Measured: 34
# to 148 MB from 0.1 to 14.7 billion parameters (benchmarks/README.md).
PREPACKED_PRIVATE = 150_000_000
# Tokens below which no shorter context is suggested: one chunk of prefill.
LEAST_CONTEXT = 256
_INT8_SHARE = 4  # float32 keys and values take so many times the bytes of int8 ones

Basis = Literal["measured", "computed", "bound", "assumed"]
Change = Literal["shorter-context", "int8-kv", "prepacked", "smaller-model"]
WAYS: tuple[Change, ...] = ("prepacked", "int8-kv", "shorter-context")


@dataclass(frozen=True)
class Figure:
    """Bytes, and where they come from.

    measured: of the written file in the runtime that ships; computed: from shapes; bound: from shapes, at most so
    much, because a recipe with a budget is not solved before the sensitivity stage; assumed: from configs/tiers.yaml.
    """

    bytes: int
    basis: Basis


@dataclass(frozen=True)
class Footprint:
    """What a variant takes, before a context is chosen.

    Attributes:
        download: graph and data parts.
        weights: private bytes once loaded.
        activations: what use adds without the cache: a chunk of prefill with its logits.
        loading: the peak while it loads, weights included.
        packed: of the weights, what each token reads; a prepacked file maps it.
        kv_cache: type of the keys and values.
        cache_bytes: of one token's keys and values.
        read: bytes that decoding one token reads at least, its cache aside; None where nobody asks for speed.
    """

    variant: str
    download: Figure
    weights: Figure
    activations: Figure
    loading: Figure
    packed: Figure
    kv_cache: KvCache
    cache_bytes: int
    read: Figure | None = None

    def token_bytes(self, kv_cache: KvCache) -> int:
        """Bytes of one token's keys and values of a type; int8 is what its recipe would have with `kv_cache: int8`."""
        if kv_cache == self.kv_cache:
            return self.cache_bytes
        return self.cache_bytes // _INT8_SHARE if kv_cache == "int8" else self.cache_bytes * _INT8_SHARE


@dataclass(frozen=True)
class Candidate:
    """A variant that a tier may get.

    `verdict` is the gates' word, `kl_mean` in nats per token; both None where nothing was measured.
    """

    footprint: Footprint
    verdict: str | None = None
    kl_mean: float | None = None

    @property
    def variant(self) -> str:
        """Its name."""
        return self.footprint.variant

    @property
    def releasable(self) -> bool:
        """Whether the gates let it through, or have not been asked."""
        return self.verdict in (None, "PASS")


@dataclass(frozen=True)
class Way:
    """How an app runs a variant: tokens of context, the type of keys and values, weights private or mapped."""

    context: int
    kv_cache: KvCache
    prepacked: bool = False


@dataclass(frozen=True)
class Need:
    """What a variant takes in one way, by its parts: `private` bytes at the peak, and what is mapped besides."""

    way: Way
    parts: dict[str, Figure]
    private: int
    mapped: int

    @property
    def basis(self) -> Basis:
        """The weakest of what it is made of; the runtime's share is assumed always and does not count."""
        kinds = {figure.basis for name, figure in self.parts.items() if name not in {"runtime", "kv_cache"}}
        return next(kind for kind in ("bound", "computed", "measured", "assumed") if kind in kinds)


def need(footprint: Footprint, way: Way, runtime_bytes: int) -> Need:
    """The peak of a variant that runs in this way."""
    cache = footprint.token_bytes(way.kv_cache) * way.context
    activations, loading, weights = footprint.activations, footprint.loading, footprint.weights
    if way.prepacked:
        weights = loading = Figure(PREPACKED_PRIVATE, "computed")
    parts = {
        "weights": weights,
        "activations": activations,
        "kv_cache": Figure(cache, "computed"),
        "loading": loading,
        "runtime": Figure(runtime_bytes, "assumed"),
    }
    private = max(weights.bytes + activations.bytes + cache, loading.bytes) + runtime_bytes
    return Need(way, parts, private, footprint.packed.bytes if way.prepacked else 0)


def parts_in_words(found: Need) -> str:
    """`weights 1, activations 2, KV cache 3 at 2,048 tokens, runtime 4`: what the peak is the sum of, in bytes."""
    sizes = {name: figure.bytes for name, figure in found.parts.items()}
    if found.private == sizes["loading"] + sizes["runtime"]:
        words = [f"loading {sizes['loading']:,}"]
    else:
        words = [f"{name} {sizes[name]:,}" for name in ("weights", "activations")]
        words.append(f"KV cache {sizes['kv_cache']:,} at {found.way.context:,} tokens")
    return ", ".join([*words, f"runtime {sizes['runtime']:,}"])


def budget_bytes(tier: Tier) -> int:
    """Private bytes that the app may use at its peak on a phone at the lower edge of the tier."""
    return math.floor(tier.ram_bytes * tier.usable_fraction)


def resident_bytes(tier: Tier, tiers: TiersConfig) -> int:
    """Private and mapped bytes together that stay in RAM there; more of them is read from storage at every token."""
    return math.floor(tier.ram_bytes * tiers.resident_fraction)


def fits(found: Need, tier: Tier, tiers: TiersConfig) -> bool:
    """Whether a tier holds a need."""
    kept = not found.mapped or found.private + found.mapped <= resident_bytes(tier, tiers)
    return found.private <= budget_bytes(tier) and kept


def as_made(candidate: Candidate, context: int, tiers: TiersConfig) -> Need:
    """What a variant takes when it runs as the artifact is made, loaded by default."""
    return need(candidate.footprint, Way(context, candidate.footprint.kv_cache), tiers.runtime_bytes)


def fitting_tiers(candidate: Candidate, tiers: TiersConfig) -> tuple[str, ...]:
    """Tiers that hold a variant at the tiers' context, in their order, whatever is best there."""
    found = as_made(candidate, tiers.context, tiers)
    return tuple(name for name, tier in tiers.tiers.items() if fits(found, tier, tiers))


def rank(candidate: Candidate) -> tuple[bool, float, int, str]:
    """Best first: what was measured by its divergence, then the unmeasured by their bytes, the most first."""
    size = candidate.footprint.download.bytes
    if candidate.kl_mean is None:
        return True, -size, 0, candidate.variant
    return False, candidate.kl_mean, candidate.footprint.weights.bytes, candidate.variant


# --- what would fit --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Suggestion:
    """A variant that a tier holds after some changes, and what it takes in the way that they make.

    `model` is another one's name, None for the model that was asked about.
    """

    candidate: Candidate
    changes: tuple[Change, ...]
    need: Need
    model: str | None = None


def suggest(
    candidates: Sequence[Candidate], tier: Tier, tiers: TiersConfig, context: int, fewest: int = 1
) -> list[Suggestion]:
    """Ways to run this model on a tier with at least `fewest` changes, the fewest first.

    A way is left out when a variant at least as good fits with some of its changes alone.
    """
    ordered = sorted((candidate for candidate in candidates if candidate.releasable), key=rank)
    found: list[Suggestion] = []
    for count in range(fewest, len(WAYS) + 1):
        for candidate in ordered:
            for changes in combinations(WAYS, count):
                as_good = (set(other.changes) for other in found if rank(other.candidate) <= rank(candidate))
                if any(some <= set(changes) for some in as_good):
                    continue
                if fitting := _changed(candidate.footprint, changes, tier, tiers, context):
                    found.append(Suggestion(candidate, changes, fitting))
    return found


def _changed(
    footprint: Footprint, changes: tuple[Change, ...], tier: Tier, tiers: TiersConfig, context: int
) -> Need | None:
    """What the variant takes with these changes, if the tier holds it and each of them changes something."""
    if "int8-kv" in changes and footprint.kv_cache == "int8":
        return None
    way = Way(context, "int8" if "int8-kv" in changes else footprint.kv_cache, "prepacked" in changes)
    if "shorter-context" in changes:
        tokens = longest_context(footprint, way, tier, tiers)
        if not LEAST_CONTEXT <= tokens < context:
            return None
        way = replace(way, context=tokens)
    found = need(footprint, way, tiers.runtime_bytes)
    return found if fits(found, tier, tiers) else None


def longest_context(footprint: Footprint, way: Way, tier: Tier, tiers: TiersConfig) -> int:
    """Tokens of context that a tier holds when the variant runs otherwise as in `way`; 0 when not even one."""
    empty = need(footprint, replace(way, context=0), tiers.runtime_bytes)
    if not fits(empty, tier, tiers):
        return 0
    used = empty.parts["weights"].bytes + empty.parts["activations"].bytes + tiers.runtime_bytes
    left = budget_bytes(tier) - used
    if empty.mapped:
        left = min(left, resident_bytes(tier, tiers) - used - empty.mapped)
    return max(0, left) // footprint.token_bytes(way.kv_cache)


# --- the answer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """What a tier gets of a model: `chosen` as it is made, or nothing and what would fit.

    `closest` is what comes nearest to fitting: the variant of the smallest need, of those that may be released.
    """

    chosen: Candidate | None
    closest: Candidate | None
    needs: dict[str, Need]
    suggestions: tuple[Suggestion, ...]

    @property
    def runs(self) -> Suggestion | None:
        """What a phone of this tier can run: the choice without a change, else the first suggestion."""
        if self.chosen is None:
            return next(iter(self.suggestions), None)
        return Suggestion(self.chosen, (), self.needs[self.chosen.variant])


def decide(
    candidates: Sequence[Candidate],
    tier: Tier,
    tiers: TiersConfig,
    context: int,
    smaller: Mapping[str, Sequence[Candidate]] | None = None,
) -> Decision:
    """One model on one tier at `context` tokens; `smaller`: other models, the largest first. What a tier refuses falls
    back to the first of them that it holds, as it is or changed."""
    needs = {candidate.variant: as_made(candidate, context, tiers) for candidate in candidates}
    releasable = [candidate for candidate in candidates if candidate.releasable]
    if held := [candidate for candidate in releasable if fits(needs[candidate.variant], tier, tiers)]:
        return Decision(min(held, key=rank), None, needs, ())
    closest = min(releasable, key=lambda candidate: needs[candidate.variant].private, default=None)
    found = suggest(candidates, tier, tiers, context)
    for model, others in (smaller or {}).items():
        if ways := suggest(others, tier, tiers, context, fewest=0):
            found.append(replace(ways[0], changes=("smaller-model", *ways[0].changes), model=model))
            break
    return Decision(None, closest, needs, tuple(found))


# --- speed -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Tokens per second: the most that memory allows with an empty cache and with a full one, and what is expected.

    No promise: kernels, heat and other apps decide where between `low` and `high`, or below.
    """

    most_empty: float
    most_full: float
    low: float
    high: float


def decode_speed(footprint: Footprint, way: Way, bandwidth: int, efficiency: Efficiency) -> Speed | None:
    """Bandwidth, in bytes per second, over the bytes that a token reads (`pipeline.runtime.roofline`); None without
    them."""
    if footprint.read is None:
        return None
    empty = bandwidth / footprint.read.bytes
    full = bandwidth / (footprint.read.bytes + footprint.token_bytes(way.kv_cache) * way.context)
    return Speed(empty, full, efficiency.low * full, efficiency.high * empty)
