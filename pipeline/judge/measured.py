"""Variants as they were measured and judged, for planning on phones."""

from __future__ import annotations

from pipeline.errors import PipelineError
from pipeline.judge.verdicts import read_verdict
from pipeline.planning.devices import Candidate, Figure, Footprint
from pipeline.tasks.task import Metrics
from pipeline.workspace import Workspace


def judged(workspace: Workspace, variant: str) -> Candidate:
    """A variant as it was measured and judged. Raises PipelineError when `validate` or `verdict` has not run."""
    metrics = workspace.read(workspace.measurements(variant), "validate", variant)
    return measured_candidate(variant, metrics, read_verdict(workspace, variant).verdict)


def measured_candidate(variant: str, metrics: Metrics, verdict: str | None, read: Figure | None = None) -> Candidate:
    """From a variant's metrics and its verdict. Raises PipelineError when the metrics lack a figure."""
    try:
        return Candidate(measured(variant, metrics, read), verdict, metrics["divergence"]["kl_mean"])
    except (KeyError, TypeError) as error:
        raise PipelineError(
            f"the metrics of {variant} lack a figure ({error!r}). Run the validate stage again."
        ) from None


def measured(variant: str, metrics: Metrics, read: Figure | None = None) -> Footprint:
    """From a variant's metrics. Weights are the process's private bytes at the peak of loading, the interpreter's share
    included; use is what its peak of private and mapped memory adds, with the short cache that it had then: both err
    on the safe side."""
    size, speed = metrics["size"], metrics["speed"]
    loaded = speed["load_peak_private_bytes"]
    return Footprint(
        variant=variant,
        download=Figure(size["bytes_on_disk"], "measured"),
        weights=Figure(loaded, "measured"),
        activations=Figure(max(0, speed["peak_memory_bytes"] - loaded), "measured"),
        prompt_token=size["prompt_token_bytes"],
        loading=Figure(loaded + speed["load_peak_mapped_bytes"], "measured"),
        packed=Figure(loaded, "measured"),
        kv_cache=size["kv_cache"]["type"],
        cache_bytes=size["kv_cache"]["bytes_per_token"],
        read=read,
    )
