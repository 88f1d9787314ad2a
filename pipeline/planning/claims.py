"""Figures that somebody claimed, beside what arithmetic says of them. No opinion, and no figure of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config.phones import Claim, Device, MemoryClaim, RateClaim, RuleClaim, SizeClaim
from pipeline.planning.devices import Footprint


@dataclass(frozen=True)
class Check:
    """A claim as it came, what is known of it, and whether it can be true (None: nothing here can tell)."""

    claim: str
    check: str
    possible: bool | None


@dataclass(frozen=True)
class Facts:
    """What claims are held against: parameters by model, footprints by model and variant, phones by name."""

    parameters: Mapping[str, int]
    footprints: Mapping[tuple[str, str], Footprint]
    devices: Mapping[str, Device]

    def file(self, model: str, variant: str) -> int:
        """Bytes of a variant's download, at most."""
        return self.footprints[model, variant].download.bytes


def check(claim: Claim, facts: Facts) -> Check:
    """One claim beside the arithmetic. Raises KeyError for a model, variant or device that `facts` lacks."""
    if isinstance(claim, SizeClaim):
        return _size(claim, facts)
    if isinstance(claim, MemoryClaim):
        return _memory(claim, facts)
    if isinstance(claim, RateClaim):
        return _rate(claim, facts)
    if isinstance(claim, RuleClaim):
        return _rule(claim, facts)
    return Check(claim.text, "It came without a source; measured here only where a report says so", None)


def wanted(claim: Claim) -> set[tuple[str, str]]:
    """Models and variants whose footprints a claim is held against."""
    if isinstance(claim, SizeClaim):
        return {(claim.model, claim.variant)}
    if isinstance(claim, MemoryClaim):
        return {(model, claim.variant) for model in claim.models}
    if isinstance(claim, RuleClaim):
        return {(model, variant) for model in claim.models for variant in claim.below_bytes}
    return set()


def _size(claim: SizeClaim, facts: Facts) -> Check:
    parameters, planned = facts.parameters[claim.model], facts.file(claim.model, claim.variant)
    text = (
        f"{claim.bytes:,} bytes over {parameters:,} parameters are {8 * claim.bytes / parameters:.2f} bits each; "
        f"{claim.model} {claim.variant} takes {planned:,} bytes, {8 * planned / parameters:.2f} bits each"
    )
    return Check(claim.text, text, claim.bytes >= planned)


def _memory(claim: MemoryClaim, facts: Facts) -> Check:
    files = {model: facts.file(model, claim.variant) for model in claim.models}
    sentences = []
    for value in claim.bytes:
        larger = [f"{model} {claim.variant} ({size:,})" for model, size in files.items() if size > value]
        beside = f"less than the file of {' and of '.join(larger)}" if larger else "no less than these models' files"
        sentences.append(f"{value:,} bytes are {beside}")
    possible = min(claim.bytes) >= min(files.values())
    return Check(claim.text, f"{'; '.join(sentences)}: weights in use cannot take less", possible)


def _rate(claim: RateClaim, facts: Facts) -> Check:
    device, needed = facts.devices[claim.device], claim.tokens_per_second * claim.bytes
    text = (
        f"{claim.tokens_per_second} × {claim.bytes / 1e9:.1f} GB read per token = {needed / 1e9:.0f} GB/s; "
        f"{device.title} has {device.memory_bandwidth / 1e9:.1f} GB/s, which is "
        f"{device.memory_bandwidth / claim.bytes:.1f} tokens/s at most"
    )
    return Check(claim.text, text, needed <= device.memory_bandwidth)


def _rule(claim: RuleClaim, facts: Facts) -> Check:
    sentences, possible = [], False
    for variant, limit in claim.below_bytes.items():
        files = {model: facts.file(model, variant) for model in claim.models}
        possible |= any(size < limit for size in files.values())
        sizes = " and ".join(f"{size / 1e9:.2f} GB for {model}" for model, size in files.items())
        sentences.append(f"under {limit / 1e9:.1f} GB are meant, but {variant} is a file of {sizes}")
    return Check(claim.text, "; ".join(sentences), possible)
