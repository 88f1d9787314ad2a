"""verdict: gates applied to measurements. Fast, so that limits can be tuned without measuring again."""

from __future__ import annotations

from pipeline import config
from pipeline.errors import ConfigError, EvaluationError
from pipeline.evaluate.gates import GateLine, Verdict, decide, exit_code, worst
from pipeline.files import read_json, write_json
from pipeline.stages.workspace import REFERENCE, Workspace


def run(model: str, variant: str) -> None:
    """Write artifacts/verdicts/<model>/<variant>.json. Any verdict is a result: the stage succeeds."""
    workspace = Workspace(model)
    verdict = decide(
        workspace.read(workspace.metrics(variant), "validate", variant),
        workspace.read(workspace.metrics(REFERENCE), "validate", REFERENCE),
        _limits(model, variant),
        workspace.read(workspace.parity, "parity"),
    )
    write_json(workspace.verdict(variant), verdict.to_json())
    print(f"{model} {variant}: {verdict.verdict}")


def _limits(model: str, variant: str) -> config.GateLimits:
    """The row of configs/gates.yaml that judges a variant. Raises ConfigError when there is none."""
    name, classes = config.load_model(model).gate_class, config.load_gates().classes
    if name not in classes or variant not in classes[name].variants:
        there = "; ".join(f"{known}: {', '.join(row.variants)}" for known, row in classes.items())
        raise ConfigError(
            f"configs/gates.yaml: no limits for {variant!r} in class {name!r} of {model} (there: {there})."
        )
    return classes[name].variants[variant]


def read_verdict(workspace: Workspace, variant: str) -> Verdict:
    """A written verdict. Raises EvaluationError when there is none."""
    path = workspace.verdict(variant)
    try:
        return Verdict.from_json(read_json(path))
    except (OSError, ValueError, EvaluationError) as error:
        raise EvaluationError(f"{path}: no readable verdict ({error}). Run `dvc repro` first.") from None


def describe_line(line: GateLine) -> str:
    """One gate for people: `kl_mean 0.738 (90 % interval 0.611 to 0.864), limit 0.39: FAIL`."""

    def number(value: float | None) -> str:
        return "unknown" if value is None else f"{value:.3g}"

    text = f"{line.name} {number(line.estimate)}"
    if line.low is not None:
        text += f" (90 % interval {number(line.low)} to {number(line.high)})"
    if line.limit is not None:
        text += f", limit {number(line.limit)}"
    text += f": {line.verdict}"
    return f"{text}; {line.note}" if line.estimate is None and line.note else text


def gate(models: list[str], variants: list[str]) -> int:
    """Print each verdict and what decided it; return the worst one's exit code (see `gates.exit_code`)."""
    found = []
    for model in models:
        for variant in variants:
            verdict = read_verdict(Workspace(model), variant)
            found.append(verdict.verdict)
            print(f"{model} {variant}: {verdict.verdict}")
            for line in verdict.lines:
                if line.verdict == verdict.verdict != "PASS":
                    print(f"  {describe_line(line)}")
    return exit_code(worst(found))
