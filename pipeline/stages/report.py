"""report: one table, one page and one plot for everything the run measured and decided."""

from __future__ import annotations

from rich.console import Console

from pipeline import config
from pipeline.bundle.release import CONTENT
from pipeline.files import read_json
from pipeline.report.rows import Report, Row, build
from pipeline.report.terminal import show
from pipeline.report.write import write
from pipeline.stages.verdict import read_verdict
from pipeline.stages.workspace import ARTIFACTS, REFERENCE, Workspace

FOLDER = ARTIFACTS / "report"


def run() -> None:
    """Write artifacts/report: report.html, pareto.png, pareto.json, report.txt."""
    print(f"report: {write(_collect(), FOLDER)}")


def show_report() -> None:
    """Print the table of what was measured, and where the page is."""
    show(_collect(), Console())
    print(f"report: {FOLDER / 'report.html'}")


def _collect() -> Report:
    pipeline = config.load_pipeline()
    rows = [_row(model, variant) for model in pipeline.models for variant in (REFERENCE, *pipeline.variants)]
    notes = {model: note for model in pipeline.models if (note := config.load_model(model).note)}
    return build([row for row in rows if row], pipeline.models, pipeline.variants, notes)


def _row(model: str, variant: str) -> Row | None:
    workspace = Workspace(model)
    metrics = workspace.metrics(variant)
    if not metrics.exists():
        return None
    if variant == REFERENCE:
        return Row(model, variant, read_json(metrics))
    bundle, refusal = workspace.bundle(variant), workspace.bundle(variant) / CONTENT / "refusal.json"
    refused = "; ".join(read_json(refusal)["reasons"]) if refusal.exists() else None
    return Row(
        model,
        variant,
        read_json(metrics),
        read_verdict(workspace, variant),
        bundle=None if refused else str(bundle),
        refusal=refused,
    )
