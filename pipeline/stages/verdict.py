"""verdict: gates applied to measurements. Fast, so that limits can be tuned without measuring again."""

from __future__ import annotations

from pipeline import config
from pipeline.errors import EvaluationError
from pipeline.evaluate.gates import Verdict, decide, exit_code, worst
from pipeline.files import read_json, write_json
from pipeline.stages.workspace import REFERENCE, Workspace


def run(model: str, variant: str) -> None:
    """Write artifacts/verdicts/<model>/<variant>.json. Any verdict is a result: the stage succeeds."""
    workspace = Workspace(model)
    limits = config.load_gates().classes[config.load_model(model).gate_class].variants[variant]
    verdict = decide(
        read_json(workspace.metrics(variant)),
        read_json(workspace.metrics(REFERENCE)),
        limits,
        read_json(workspace.parity),
    )
    write_json(workspace.verdict(variant), verdict.to_json())
    print(f"{model} {variant}: {verdict.verdict}")


def read_verdict(workspace: Workspace, variant: str) -> Verdict:
    """A written verdict. Raises EvaluationError when there is none."""
    path = workspace.verdict(variant)
    try:
        return Verdict.from_json(read_json(path))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: no readable verdict ({error}). Run `dvc repro` first.") from None


def gate(models: list[str], variants: list[str]) -> int:
    """Print each verdict and what decided it; return the worst one's exit code (0 PASS, 1 FAIL, 2 INCONCLUSIVE, 3 ERROR)."""
    found = []
    for model in models:
        for variant in variants:
            verdict = read_verdict(Workspace(model), variant)
            found.append(verdict.verdict)
            print(f"{model} {variant}: {verdict.verdict}")
            for line in verdict.lines:
                if line.verdict == verdict.verdict != "PASS":
                    print(f"  {line.name}: {line.verdict}, {line.estimate} against {line.limit} {line.note}".rstrip())
    return exit_code(worst(found))
