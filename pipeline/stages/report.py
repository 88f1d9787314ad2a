"""report: one table, one page and one plot for everything the run measured and decided."""

from __future__ import annotations

from rich.console import Console

from pipeline.bundle.release import CONTENT
from pipeline.config.models import load_model, load_pipeline
from pipeline.config.signing import load_signing
from pipeline.files import read_json
from pipeline.judge.verdicts import read_verdict
from pipeline.keys.commit import git, uncommitted
from pipeline.report import samples
from pipeline.report.rows import Report, Row, build
from pipeline.report.terminal import show
from pipeline.report.write import write
from pipeline.tasks.registry import load_suite
from pipeline.workspace import ARTIFACTS, REFERENCE, Workspace

FOLDER = ARTIFACTS / "report"


def run() -> None:
    """Write artifacts/report: report.html, pareto.png, pareto.json, report.txt."""
    print(f"report: {write(_collect(), FOLDER)}")


def show_report() -> None:
    """Print the table of what was measured, and where the page is."""
    show(_collect(), Console())
    print(f"report: {FOLDER / 'report.html'}")


def _collect() -> Report:
    pipeline = load_pipeline()
    asked = [(Workspace(model), variant) for model in pipeline.models for variant in (REFERENCE, *pipeline.variants)]
    rows = [_row(workspace, variant) for workspace, variant in asked if workspace.measurements(variant).exists()]
    notes = {model: note for model in pipeline.models if (note := load_model(model).note)}
    return build(rows, pipeline.models, pipeline.variants, notes, _about(pipeline.suite))


def _about(suite: str) -> dict[str, str]:
    """Facts about the run: the commit and whether what decides results differs from it, what was asked, and what a
    release of it would be."""
    signing, asked = load_signing(), [task.asks(part) for task, part in load_suite(suite).by_task()]
    head = git("log", "-1", "--format=%H of %cI") or "unknown: not a git repository"
    return {
        "commit": head + ", with uncommitted changes" * bool(uncommitted()),
        "suite": f"{suite}: {', '.join(filter(None, asked))}",
        "release": f"number {signing.release}, channel {signing.channel}, signing key {signing.key_id}",
    }


def _row(workspace: Workspace, variant: str) -> Row:
    metrics, bundle = read_json(workspace.measurements(variant)), workspace.bundle(variant)
    answers = samples.read(workspace.evaluation(variant), metrics)
    if variant == REFERENCE:
        return Row(workspace.model, variant, metrics, answers=answers)
    refusal = bundle / CONTENT / "refusal.json"
    delivery = f"no bundle: {'; '.join(read_json(refusal)['reasons'])}" if refusal.exists() else f"bundle: {bundle}"
    return Row(workspace.model, variant, metrics, read_verdict(workspace, variant), delivery, answers)
