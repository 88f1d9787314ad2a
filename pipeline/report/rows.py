"""What a report shows: one row per model × variant and one per model's full-precision reference, in the run's order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import EvaluationError
from pipeline.judge.verdicts import PASS, Verdict
from pipeline.tasks.task import number

REFERENCE = "reference"
Facts = Mapping[str, str]
_FIGURES = {"kl_mean": "kl_mean", "kl_low": "kl_mean_low", "kl_high": "kl_mean_high"}


@dataclass(frozen=True)
class Answer:
    """What a model was asked, what it wrote, whether that passed the problem's tests, and the reason if not."""

    prompt: str
    text: str
    correct: bool
    reason: str


@dataclass(frozen=True)
class Row:
    """One model × variant, or a model's reference (`variant == REFERENCE`, no verdict, no bundle).

    Metrics have the shape that `pipeline.tasks.statistics` defines, plus `size` and `speed`; what a section lacks
    is shown as a dash. `delivery` names the bundle's path, or why there is none; `answers` are to HumanEval's problems,
    by name, where they are on this machine.
    """

    model: str
    variant: str
    metrics: Mapping[str, Any]
    verdict: Verdict | None = None
    delivery: str = ""
    answers: Mapping[str, Answer] = field(default_factory=dict)

    def section(self, name: str) -> Mapping[str, Any]:
        """One section of the metrics; empty where nothing was measured."""
        found = self.metrics.get(name)
        return found if isinstance(found, Mapping) else {}


@dataclass(frozen=True)
class ModelReport:
    """One model's rows, the reference first, and a caveat to print with its figures (or "")."""

    model: str
    reference: Row
    variants: tuple[Row, ...]
    note: str

    @property
    def rows(self) -> tuple[Row, ...]:
        """Reference, then variants."""
        return (self.reference, *self.variants)


@dataclass(frozen=True)
class Report:
    """A complete run, and facts about it by name, to print at its head."""

    models: tuple[ModelReport, ...]
    about: Facts


def build(rows: Sequence[Row], models: Sequence[str], variants: Sequence[str], notes: Facts, about: Facts) -> Report:
    """Order `rows` as the run does, and refuse an incomplete run: a report that omits a variant would hide it.

    Args:
        rows: in any order.
        models, variants: of the run (configs/pipeline.yaml).
        notes: by model, a sentence to print with its figures.
        about: facts about the run by name.

    Raises:
        EvaluationError: a model × variant or a reference is missing or comes twice.
    """
    found = {(row.model, row.variant): row for row in rows}
    expected = [(model, variant) for model in models for variant in (REFERENCE, *variants)]
    if missing := [f"{model}/{variant}" for model, variant in expected if (model, variant) not in found]:
        raise EvaluationError(
            f"the report lacks {len(missing)} of {len(expected)} rows: {', '.join(missing)}. Run the validate stage of "
            f"each (dvc repro), then report again."
        )
    if len(found) != len(rows):
        raise EvaluationError(f"the report was given {len(rows)} rows for {len(found)} variants: some come twice.")
    own = {model: tuple(found[model, name] for name in variants) for model in models}
    reports = [ModelReport(model, found[model, REFERENCE], own[model], notes.get(model, "")) for model in models]
    return Report(tuple(reports), about)


def pareto_points(report: Report) -> list[dict[str, Any]]:
    """Size and divergence of each variant that has both, for `dvc plots`: bytes, nats per token, 90 % interval."""
    points = []
    for row in (row for model in report.models for row in model.variants):
        size, divergence = number(row.section("size"), "bytes_on_disk"), row.section("divergence")
        figures = {name: number(divergence, key) for name, key in _FIGURES.items()}
        if row.verdict and size is not None and figures["kl_mean"] is not None:
            named = {"model": row.model, "variant": row.variant, "bytes": size}
            points.append(named | figures | {"verdict": row.verdict.verdict})
    return points


def front(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of `pareto_points` that passed and that no such other one beats in size and divergence, by size."""
    kept: list[Mapping[str, Any]] = []
    for point in sorted(points, key=lambda one: (one["bytes"], one["kl_mean"])):
        if point["verdict"] == PASS and (not kept or point["kl_mean"] < kept[-1]["kl_mean"]):
            kept.append(point)
    return kept
