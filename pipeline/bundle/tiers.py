"""Which bundle each class of phones gets, or why it gets none: tiers.json.

The choice is a pure function of the tiers' budgets and the variants' measurements. A tier without a bundle is a
refusal with the figures, because a model that is killed while loading is worse than none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.bundle.release import KeyIdentity, Record, Stamp, make, stamp
from pipeline.config import Name, Sha256, SigningConfig, Tier, TiersConfig
from pipeline.errors import BundleError

Bytes = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Candidate:
    """A variant that a tier may get.

    `bundle_bytes` is the download; `memory_bytes` the model's own peak (weights as loaded, KV cache at the tiers'
    context, activations) without TiersConfig.runtime_bytes; `verdict` the gates' word; `kl_mean` in nats per token,
    None where it could not be measured.
    """

    variant: str
    bundle_bytes: int
    memory_bytes: int
    verdict: str
    kl_mean: float | None


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


class TierRefusal(_Budget):
    """The tier gets nothing. `smallest_need_bytes` is None when no variant passed its gates."""

    decision: Literal["refuse"] = "refuse"
    smallest_need_bytes: Bytes | None
    shortfall_bytes: Bytes | None
    reasons: list[str] = Field(min_length=1)


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


def budget_bytes(tier: Tier) -> int:
    """Bytes that the app may use at its peak on a phone at the lower edge of the tier."""
    return math.floor(tier.ram_bytes * tier.usable_fraction)


def fitting_tiers(candidate: Candidate, tiers_config: TiersConfig) -> list[str]:
    """Names of the tiers whose budget holds `candidate` and `runtime_bytes`, in the configuration's order."""
    need = candidate.memory_bytes + tiers_config.runtime_bytes
    return [name for name, tier in tiers_config.tiers.items() if need <= budget_bytes(tier)]


def _reasons(needs: Mapping[Candidate, int], budget: int) -> list[str]:
    if not needs:
        return ["no variant was built"]
    reasons = []
    for candidate, need in needs.items():
        over = f"needs {need:,} bytes, {need - budget:,} over the budget" if need > budget else f"needs {need:,} bytes"
        reasons.append(f"{candidate.variant}: verdict {candidate.verdict}, {over}")
    return reasons


def _decide(tier: Tier, needs: Mapping[Candidate, int]) -> TierBundle | TierRefusal:
    budget = budget_bytes(tier)
    passing = {candidate: need for candidate, need in needs.items() if candidate.verdict == "PASS"}
    fitting = [candidate for candidate, need in passing.items() if need <= budget]
    if fitting:
        best = min(fitting, key=lambda candidate: (candidate.kl_mean, needs[candidate], candidate.variant))
        return TierBundle(
            platform=tier.platform,
            ram_bytes=tier.ram_bytes,
            budget_bytes=budget,
            variant=best.variant,
            need_bytes=needs[best],
            bundle_bytes=best.bundle_bytes,
            kl_mean=best.kl_mean,
        )
    smallest = min(passing.values(), default=None)
    return TierRefusal(
        platform=tier.platform,
        ram_bytes=tier.ram_bytes,
        budget_bytes=budget,
        smallest_need_bytes=smallest,
        shortfall_bytes=None if smallest is None else smallest - budget,
        reasons=_reasons(needs, budget),
    )


def assign(tiers: TiersConfig, candidates: Sequence[Candidate]) -> dict[str, TierBundle | TierRefusal]:
    """For each tier the passing candidate of lowest mean KL that fits its budget, else a refusal with the numbers.

    The need of a candidate is its memory plus the tiers' `runtime_bytes`; ties go to the smaller need. Independent of
    the candidates' order.

    Raises:
        BundleError: a variant is given twice, or one passed its gates without a finite KL.
    """
    ordered = sorted(candidates, key=lambda candidate: candidate.variant)
    for first, second in itertools.pairwise(ordered):
        if first.variant == second.variant:
            raise BundleError(f"variant {first.variant} is a candidate twice; give each variant once.")
    for candidate in ordered:
        if candidate.verdict == "PASS" and (candidate.kl_mean is None or not math.isfinite(candidate.kl_mean)):
            raise BundleError(
                f"variant {candidate.variant} has the verdict PASS but a mean KL of {candidate.kl_mean}: no variant "
                f"passes unmeasured. Validate it again."
            )
    needs = {candidate: candidate.memory_bytes + tiers.runtime_bytes for candidate in ordered}
    return {name: _decide(tier, needs) for name, tier in tiers.tiers.items()}


def build_tiers(
    *,
    model: str,
    signing: SigningConfig,
    key: KeyIdentity,
    created: datetime,
    context: int,
    decisions: Mapping[str, TierBundle | TierRefusal],
    signatures: Mapping[str, str],
) -> TiersDocument:
    """tiers.json for `decisions`, with each named bundle pinned by `signatures`: variant → SHA-256 of its model.sig.

    Raises:
        BundleError: a decision names a variant without a signature, or a field is not valid.
    """
    chosen = sorted({decision.variant for decision in decisions.values() if isinstance(decision, TierBundle)})
    if unsigned := [variant for variant in chosen if variant not in signatures]:
        raise BundleError(f"tiers.json of {model} names {', '.join(unsigned)} without a signed bundle. Sign it first.")
    bundles = {
        variant: BundleReference(signature_sha256=signatures[variant], release=signing.release) for variant in chosen
    }
    fields = stamp(model, signing, key, created) | {
        "context": context,
        "tiers": dict(decisions),
        "bundles": bundles,
    }
    return make(TiersDocument, fields)
