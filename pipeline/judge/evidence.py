"""Whether measurements are about the bytes and the runtime at hand: a verdict refuses others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.judge.verdicts import ERROR, GateLine, Verdict, overall
from pipeline.tasks.task import Metrics


def problem_of(metrics: Metrics, reference: Metrics, plan_sha256: str, installed: Mapping[str, str]) -> str | None:
    """Why a variant's or its reference's metrics are no evidence about an artifact; None where they are.

    `plan_sha256`: of the artifact's plan.json, which names its bytes; `installed`: as `runtimes` gives.
    """
    measured: dict[str, Any] = metrics.get("identity", {})
    if measured.get("plan_sha256") != plan_sha256:
        return (
            f"the metrics are of the artifact with plan {measured.get('plan_sha256')}, the artifact at hand has "
            f"{plan_sha256}: run `python -m pipeline validate` for this variant"
        )
    for name in installed:
        found = {"variant": measured.get(name), "reference": reference.get("identity", {}).get(name)}
        if other := next((whose for whose, number in found.items() if number != installed[name]), None):
            return (
                f"the {other} was measured in {name} {found[other]}, installed is {installed[name]}: run `python -m "
                f"pipeline validate` for the reference and this variant, or install the measured version"
            )
    return None


def refused(verdict: Verdict, problem: str) -> Verdict:
    """The verdict with an ERROR line before all others that says why nothing was judged."""
    lines = (GateLine("evidence", ERROR, note=problem), *verdict.lines)
    return Verdict(overall(lines), lines, verdict.row)
