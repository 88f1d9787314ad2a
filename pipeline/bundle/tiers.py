"""Which bundle each class of phones gets, or why it gets none: tiers.json.

The choice is a pure function of the tiers' budgets and the variants' measurements. A tier without a bundle is a
refusal with the figures, because a model that is killed while loading is worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipeline.bundle.release import Record, Stamp, WayRecord, make
from pipeline.config.phones import Tier, TiersConfig
from pipeline.config.signing import SigningConfig
from pipeline.config.typed_yaml import Name, Sha256
from pipeline.errors import BundleError
from pipeline.planning import devices
from pipeline.planning.devices import Candidate, Way

Bytes = Annotated[int, Field(ge=0)]


class _Budget(Record):
    platform: Literal["android", "ios"]
    ram_bytes: Bytes
    budget_bytes: Bytes


class TierBundle(_Budget):
    """The tier gets `variant`, run in a `way`: `need_bytes` are private, of the `budget_bytes`; `mapped_bytes` of
    weights have to stay in RAM besides."""

    decision: Literal["bundle"] = "bundle"
    variant: Name
    way: WayRecord
    need_bytes: Bytes
    mapped_bytes: Bytes
    bundle_bytes: Bytes
    kl_mean: float


class TierRefusal(_Budget):
    """The tier gets nothing. `shortfall_bytes` are what is missing for the variant that comes nearest, in the way that
    comes nearest; None when no variant passed its gates."""

    decision: Literal["refuse"] = "refuse"
    shortfall_bytes: Bytes | None
    reasons: list[str] = Field(min_length=1)


Decisions = dict[str, TierBundle | TierRefusal]


class BundleReference(Record):
    """A bundle, pinned by the SHA-256 of its signature file and its release number."""

    signature_sha256: Sha256
    release: int = Field(ge=1)


class TiersDocument(Stamp):
    """tiers.json: a decision for every tier, and the bundles that the decisions name. `context` is in tokens: what a
    tier gets where its memory allows."""

    file_name: ClassVar[str] = "tiers.json"

    kind: Literal["tiers"] = "tiers"
    context: int = Field(gt=0)
    tiers: dict[Name, Annotated[TierBundle | TierRefusal, Field(discriminator="decision")]] = Field(min_length=1)
    bundles: dict[Name, BundleReference]


def way_record(way: Way) -> WayRecord:
    """A way as it is signed, with what genai's Config.overlay lays over genai_config.json."""
    session = {"intra_op_num_threads": way.threads}
    genai: dict[str, Any] = {"model": {"decoder": {"session_options": session}}}
    genai["search"] = {"chunk_size": way.prefill_chunk, "max_length": way.context}
    return WayRecord(**asdict(way), genai=genai)


def _reason(candidate: Candidate, tier: Tier, tiers: TiersConfig) -> str:
    found = devices.nearest(candidate.footprint, tier, tiers)
    over = devices.excess(found, tier, tiers)
    lacks = f", {over:,} bytes too many with weights {found.way.weights}" if over > 0 else ""
    return f"{candidate.variant}: verdict {candidate.verdict}{lacks} ({devices.parts_in_words(found)})"


def _decide(tier: Tier, tiers: TiersConfig, candidates: Sequence[Candidate]) -> TierBundle | TierRefusal:
    budget, found = devices.budget_bytes(tier), devices.decide(candidates, tier, tiers, tiers.context)
    common: dict[str, Any] = {"platform": tier.platform, "ram_bytes": tier.ram_bytes, "budget_bytes": budget}
    if (chosen := found.chosen) and chosen.candidate.kl_mean is not None:  # `assign` refused candidates without
        one, need = chosen.candidate, chosen.need
        common |= {"variant": one.variant, "way": way_record(need.way), "kl_mean": one.kl_mean}
        common |= {"need_bytes": need.private, "mapped_bytes": need.mapped}
        return TierBundle(**common, bundle_bytes=one.footprint.download.bytes)
    lacks = devices.excess(found.closest.need, tier, tiers) if found.closest else None
    reasons = [_reason(candidate, tier, tiers) for candidate in candidates]
    return TierRefusal(**common, shortfall_bytes=lacks, reasons=reasons or ["no variant was built"])


def assign(tiers: TiersConfig, candidates: Sequence[Candidate]) -> Decisions:
    """For each tier the passing candidate of lowest mean KL that fits in any way, else a refusal with the numbers.

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
