"""Which bundle each class of phones gets, or why it gets none: tiers.json.

The choice is a pure function of the tiers' budgets and the variants' measurements. A tier without a bundle is a
refusal with the figures, because a model that is killed while loading is worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipeline.bundle.release import Record, Stamp, make
from pipeline.config.phones import Tier, TiersConfig
from pipeline.config.recipes import KvCache
from pipeline.config.signing import SigningConfig
from pipeline.config.typed_yaml import Name, Sha256
from pipeline.errors import BundleError
from pipeline.planning import devices
from pipeline.planning.devices import Candidate, Change, Need, Suggestion

Bytes = Annotated[int, Field(ge=0)]


class _Budget(Record):
    platform: Literal["android", "ios"]
    ram_bytes: Bytes
    budget_bytes: Bytes


class TierBundle(_Budget):
    """The tier gets `variant`, which needs `need_bytes` of its `budget_bytes`."""

    decision: Literal["bundle"] = "bundle"
    variant: Name
    need_bytes: Bytes
    bundle_bytes: Bytes
    kl_mean: float


class TierSuggestion(Record):
    """A way to run a variant that the tier does hold: its changes, the fewest first, and what it takes then.

    `need_bytes` are private; `mapped_bytes` of weights in a prepacked file must stay in RAM besides.
    """

    variant: Name
    changes: list[Change] = Field(min_length=1)
    context: int = Field(gt=0)
    kv_cache: KvCache
    need_bytes: Bytes
    mapped_bytes: Bytes


class TierRefusal(_Budget):
    """The tier gets nothing. `smallest_need_bytes` is None when no variant passed its gates."""

    decision: Literal["refuse"] = "refuse"
    smallest_need_bytes: Bytes | None
    shortfall_bytes: Bytes | None
    reasons: list[str] = Field(min_length=1)
    suggestions: list[TierSuggestion] = Field(default=[])


Decisions = dict[str, TierBundle | TierRefusal]


class BundleReference(Record):
    """A bundle, pinned by the SHA-256 of its signature file and its release number."""

    signature_sha256: Sha256
    release: int = Field(ge=1)


class TiersDocument(Stamp):
    """tiers.json: a decision for every tier, and the bundles that the decisions name. `context` is in tokens."""

    file_name: ClassVar[str] = "tiers.json"

    kind: Literal["tiers"] = "tiers"
    context: int = Field(gt=0)
    tiers: dict[Name, Annotated[TierBundle | TierRefusal, Field(discriminator="decision")]] = Field(min_length=1)
    bundles: dict[Name, BundleReference]


def _reason(candidate: Candidate, found: Need, budget: int) -> str:
    over = f", {found.private - budget:,} over the budget" if found.private > budget else ""
    takes = f"needs {found.private:,} bytes{over} ({devices.parts_in_words(found)})"
    return f"{candidate.variant}: verdict {candidate.verdict}, {takes}"


def _suggestion(found: Suggestion) -> TierSuggestion:
    variant, way, need = found.candidate.variant, found.need.way, found.need
    takes: dict[str, Any] = {"kv_cache": way.kv_cache, "need_bytes": need.private, "mapped_bytes": need.mapped}
    return TierSuggestion(variant=variant, changes=list(found.changes), context=way.context, **takes)


def _decide(tier: Tier, tiers: TiersConfig, candidates: Sequence[Candidate]) -> TierBundle | TierRefusal:
    budget, found = devices.budget_bytes(tier), devices.decide(candidates, tier, tiers, tiers.context)
    common: dict[str, Any] = {"platform": tier.platform, "ram_bytes": tier.ram_bytes, "budget_bytes": budget}
    needs = {variant: need.private for variant, need in found.needs.items()}
    if (chosen := found.chosen) and chosen.kl_mean is not None:  # `assign` refused candidates without
        common |= {"variant": chosen.variant, "need_bytes": needs[chosen.variant]}
        return TierBundle(**common, bundle_bytes=chosen.footprint.download.bytes, kl_mean=chosen.kl_mean)
    smallest = needs[found.closest.variant] if found.closest else None
    common |= {"smallest_need_bytes": smallest, "shortfall_bytes": None if smallest is None else smallest - budget}
    reasons = [_reason(candidate, found.needs[candidate.variant], budget) for candidate in candidates]
    suggestions = [_suggestion(suggestion) for suggestion in found.suggestions]
    return TierRefusal(**common, reasons=reasons or ["no variant was built"], suggestions=suggestions)


def assign(tiers: TiersConfig, candidates: Sequence[Candidate]) -> Decisions:
    """For each tier the passing candidate of lowest mean KL that fits its budget, else a refusal with the numbers.

    What a candidate needs is the arithmetic of `pipeline.planning.devices`; ties go to the lighter weights.
    Independent of the candidates' order. Each is another variant, and has a verdict.

    Raises:
        BundleError: a candidate passed its gates without a finite KL.
    """
    ordered = sorted(candidates, key=lambda candidate: candidate.variant)
    for candidate in ordered:
        if candidate.verdict == "PASS" and (candidate.kl_mean is None or not math.isfinite(candidate.kl_mean)):
            passed = f"variant {candidate.variant} has the verdict PASS but a mean KL of {candidate.kl_mean}"
            raise BundleError(f"{passed}: no variant passes unmeasured. Validate it again.")
    return {name: _decide(tier, tiers, ordered) for name, tier in tiers.tiers.items()}


def build_tiers(
    *, model: str, signing: SigningConfig, decisions: Decisions, signatures: Mapping[str, str], **fields: Any
) -> TiersDocument:
    """tiers.json for `decisions`, with each named bundle pinned by `signatures`: variant → SHA-256 of its model.sig.

    The other `fields` are `context` and those that `release.make` takes for every document.

    Raises:
        BundleError: a field is not valid.
    """
    chosen = sorted({decision.variant for decision in decisions.values() if isinstance(decision, TierBundle)})
    pins = {name: BundleReference(signature_sha256=signatures[name], release=signing.release) for name in chosen}
    return make(TiersDocument, model=model, signing=signing, tiers=decisions, bundles=pins, **fields)
