"""Phones: the way that a tier runs a variant in, what that takes, how fast it can decode at most.

One arithmetic for `python -m pipeline plan`, tiers.json and release.json. An app's peak is

    max(weights + activations + KV cache at the context, loading) + runtime

in private bytes, which the system can only take back by killing the app. Weights that the phone has prepacked are
mapped from its storage: they are not private, but have to stay in RAM. Every figure says where it comes from. A tier
gets the best variant that fits in any way; a refusal is what is left when none does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.config.phones import PREFILL_CHUNKS, Efficiency, Tier, TiersConfig, Weights
from pipeline.config.recipes import KvCache

# Private bytes of a process whose weights are mapped from a prepacked file, activations and cache aside. Measured: 34
# to 148 MB from 0.1 to 14.7 billion parameters (benchmarks/README.md).
PREPACKED_PRIVATE = 150_000_000
# Tokens below which no context is worth a download: four of the longest chunks of prefill.
LEAST_CONTEXT = 256

Basis = Literal["measured", "computed", "bound", "assumed"]
WEIGHTS: tuple[Weights, ...] = ("private", "mapped")


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
    """What a variant takes, before a way is chosen.

    Attributes:
        download: graph and data parts.
        weights: private bytes once loaded.
        activations: what use adds without the cache, with chunks of `PREFILL_CHUNKS[0]` tokens.
        prompt_token: of the activations, bytes for each token of a chunk.
        loading: the peak while it loads, weights included.
        packed: of the weights, what products read; a phone that has prepacked them maps it.
        kv_cache: type of the keys and values.
        cache_bytes: of one token's keys and values.
        read: bytes that decoding one token reads at least, its cache aside: of a mixture the experts that it wakes;
            None where nobody asks for speed.
        speculative: private bytes that speculative decoding adds; None where the recipe has none.
    """

    variant: str
    download: Figure
    weights: Figure
    activations: Figure
    prompt_token: int
    loading: Figure
    packed: Figure
    kv_cache: KvCache
    cache_bytes: int
    read: Figure | None = None
    speculative: int | None = None


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
    """How an app runs a variant: tokens of context, the type of its keys and values, weights private or mapped, tokens
    of a prompt that are read at a time, threads."""

    context: int
    kv_cache: KvCache
    weights: Weights
    prefill_chunk: int
    threads: int


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
    cache, loading, weights = footprint.cache_bytes * way.context, footprint.loading, footprint.weights
    saved = footprint.prompt_token * (PREFILL_CHUNKS[0] - way.prefill_chunk)
    activations = replace(footprint.activations, bytes=max(0, footprint.activations.bytes - saved))
    mapped = Figure(0, "measured")
    if way.weights == "mapped":
        weights = loading = Figure(PREPACKED_PRIVATE, "computed")
        mapped = footprint.packed
    parts = {
        "weights": weights,
        "activations": activations,
        "kv_cache": Figure(cache, "computed"),
        "loading": loading,
        "runtime": Figure(runtime_bytes, "assumed"),
        "mapped": mapped,
    }
    private = max(weights.bytes + activations.bytes + cache, loading.bytes) + runtime_bytes
    return Need(way, parts, private, mapped.bytes)


def parts_in_words(found: Need) -> str:
    """`weights 1, activations 2, KV cache 3 at 2,048 tokens, runtime 4`: what the peak is the sum of, in bytes."""
    sizes = {name: figure.bytes for name, figure in found.parts.items()}
    if found.private == sizes["loading"] + sizes["runtime"]:
        words = [f"loading {sizes['loading']:,}"]
    else:
        words = [f"{name} {sizes[name]:,}" for name in ("weights", "activations")]
        words.append(f"KV cache {sizes['kv_cache']:,} at {found.way.context:,} tokens")
    words.append(f"runtime {sizes['runtime']:,}")
    return ", ".join(words) + (f", and {found.mapped:,} mapped" if found.mapped else "")


def budget_bytes(tier: Tier) -> int:
    """Private bytes that the app may use at its peak on a phone at the lower edge of the tier."""
    return math.floor(tier.ram_bytes * tier.usable_fraction)


def resident_bytes(tier: Tier, tiers: TiersConfig) -> int:
    """Private and mapped bytes together that stay in RAM there; more of them is read from storage at every token."""
    return math.floor(tier.ram_bytes * tiers.resident_fraction)


def room_bytes(tier: Tier, tiers: TiersConfig, weights: Weights) -> int:
    """Bytes that private and mapped memory may take together, where weights are mapped, or private memory alone."""
    return resident_bytes(tier, tiers) if weights == "mapped" else budget_bytes(tier)


def excess(found: Need, tier: Tier, tiers: TiersConfig) -> int:
    """Bytes by which a need exceeds what the tier holds; negative where there is room."""
    together = found.private + found.mapped - room_bytes(tier, tiers, found.way.weights)
    return max(found.private - budget_bytes(tier), together)


def rank(candidate: Candidate) -> tuple[bool, float, int, str]:
    """Best first: what was measured by its divergence, then the unmeasured by their bytes, the most first."""
    size = candidate.footprint.download.bytes
    if candidate.kl_mean is None:
        return True, -size, 0, candidate.variant
    return False, candidate.kl_mean, candidate.footprint.weights.bytes, candidate.variant


# --- ways ------------------------------------------------------------------------------------------------------------


def needs(footprint: Footprint, tier: Tier, tiers: TiersConfig, context: int) -> Iterator[Need]:
    """What a variant takes in every way with so much context, the ways in order of preference: private weights load
    from what was downloaded; longer chunks read a prompt faster."""
    for weights in WEIGHTS:
        for chunk in PREFILL_CHUNKS:
            yield need(footprint, Way(context, footprint.kv_cache, weights, chunk, tier.threads), tiers.runtime_bytes)


def fitting(footprint: Footprint, tier: Tier, tiers: TiersConfig, context: int) -> Need | None:
    """The first way with `context` tokens that the tier holds, or else the one with most tokens; None if that has fewer
    than `LEAST_CONTEXT`."""
    for found in needs(footprint, tier, tiers, context):
        if excess(found, tier, tiers) <= 0:
            return found
    lengths = {weights: _tokens(footprint, tier, tiers, weights) for weights in WEIGHTS}
    weights = max(WEIGHTS, key=lambda one: lengths[one])
    if lengths[weights] < LEAST_CONTEXT:
        return None
    way = Way(lengths[weights], footprint.kv_cache, weights, PREFILL_CHUNKS[-1], tier.threads)
    return need(footprint, way, tiers.runtime_bytes)


def _tokens(footprint: Footprint, tier: Tier, tiers: TiersConfig, weights: Weights) -> int:
    """The most tokens of context that the tier holds with the shortest chunks; negative when not even none."""
    way = Way(0, footprint.kv_cache, weights, PREFILL_CHUNKS[-1], tier.threads)
    empty = need(footprint, way, tiers.runtime_bytes)
    if excess(empty, tier, tiers) > 0:
        return -1
    used = empty.parts["weights"].bytes + empty.parts["activations"].bytes + tiers.runtime_bytes
    left = min(budget_bytes(tier) - used, room_bytes(tier, tiers, weights) - used - empty.mapped)
    return left // max(1, footprint.cache_bytes)


def speculates(footprint: Footprint, tier: Tier, tiers: TiersConfig, context: int) -> bool:
    """Whether a tier holds a variant with what speculative decoding adds. Its weights are private: no graph over
    prepacked ones verifies drafts."""
    if footprint.speculative is None:
        return False
    way = Way(context, footprint.kv_cache, "private", PREFILL_CHUNKS[-1], tier.threads)
    return excess(need(footprint, way, tiers.runtime_bytes), tier, tiers) + footprint.speculative <= 0


def nearest(footprint: Footprint, tier: Tier, tiers: TiersConfig) -> Need:
    """What a variant takes in the way that comes nearest to fitting, with as little context as makes sense."""
    return min(needs(footprint, tier, tiers, LEAST_CONTEXT), key=lambda found: excess(found, tier, tiers))


def ways(candidate: Candidate, tiers: TiersConfig) -> dict[str, Way]:
    """The way in which each tier that holds a variant runs it, at the tiers' context or less, be it the best or not."""
    found = {name: fitting(candidate.footprint, tier, tiers, tiers.context) for name, tier in tiers.tiers.items()}
    return {name: held.way for name, held in found.items() if held}


# --- the answer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A variant and what it takes in the way that a tier runs it; `model` is another one's name, None for the model
    that was asked about."""

    candidate: Candidate
    need: Need
    model: str | None = None


@dataclass(frozen=True)
class Decision:
    """What a tier gets of a model: `chosen`, or nothing and the smaller model that it holds (`instead`), if any.

    `closest` is what comes nearest to fitting, of the variants that may be released.
    """

    chosen: Choice | None
    closest: Choice | None
    instead: Choice | None

    @property
    def runs(self) -> Choice | None:
        """What a phone of this tier can run."""
        return self.chosen or self.instead


def decide(
    candidates: Sequence[Candidate],
    tier: Tier,
    tiers: TiersConfig,
    context: int,
    smaller: Mapping[str, Sequence[Candidate]] | None = None,
) -> Decision:
    """One model on one tier: the best variant that it holds at `context` tokens, else the one with the longest context.

    `smaller`: other models, the largest first. What a tier refuses falls back to the first of them that it holds.
    """
    releasable = [candidate for candidate in candidates if candidate.releasable]
    if chosen := _best(releasable, tier, tiers, context):
        return Decision(chosen, None, None)
    all_nearest = [Choice(one, nearest(one.footprint, tier, tiers)) for one in releasable]
    closest = min(all_nearest, key=lambda choice: excess(choice.need, tier, tiers), default=None)
    held = ((model, _best(others, tier, tiers, context)) for model, others in (smaller or {}).items())
    instead = next((replace(choice, model=model) for model, choice in held if choice), None)
    return Decision(None, closest, instead)


def _best(candidates: Sequence[Candidate], tier: Tier, tiers: TiersConfig, context: int) -> Choice | None:
    found = [(one, fitting(one.footprint, tier, tiers, context)) for one in candidates if one.releasable]
    held = [Choice(one, taken) for one, taken in found if taken]
    return min(held, key=lambda choice: (-choice.need.way.context, rank(choice.candidate)), default=None)


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


def decode_speed(footprint: Footprint, context: int, bandwidth: int, efficiency: Efficiency) -> Speed | None:
    """Bandwidth, in bytes per second, over the bytes that a token reads (`pipeline.runtime.roofline`) with up to
    `context` tokens in the cache; None without them."""
    if footprint.read is None:
        return None
    empty = bandwidth / footprint.read.bytes
    full = bandwidth / (footprint.read.bytes + footprint.cache_bytes * context)
    return Speed(empty, full, efficiency.low * full, efficiency.high * empty)
