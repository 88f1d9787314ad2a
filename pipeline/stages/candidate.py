"""What a variant offers the tiers: its download, its memory on a device, its verdict and its quality."""

from __future__ import annotations

from pipeline.bundle.tiers import Candidate
from pipeline.stages.verdict import read_verdict
from pipeline.stages.workspace import Workspace


def candidate(workspace: Workspace, variant: str, context: int) -> Candidate:
    """What a variant needs on a device: its measured peak in this runtime, plus the KV cache at the tiers' context.

    The measurement already holds an interpreter and a short cache; that errs on the safe side.
    """
    metrics = workspace.read(workspace.metrics(variant), "validate", variant)
    cache = metrics["size"]["kv_cache"]["bytes_per_token"] * context
    return Candidate(
        variant=variant,
        bundle_bytes=metrics["size"]["bytes_on_disk"],
        memory_bytes=metrics["speed"]["peak_memory_bytes"] + cache,
        verdict=read_verdict(workspace, variant).verdict,
        kl_mean=metrics["divergence"]["kl_mean"],
    )
