"""verdict: gates applied to measurements. Fast, so that limits can be tuned without measuring again."""

from __future__ import annotations

from typing import Any

from pipeline import config
from pipeline.config.gates import ReleasedBuild
from pipeline.errors import ConfigError, EvaluationError
from pipeline.evaluate.gates import INCONCLUSIVE, GateLine, Policy, Verdict, decide, exit_code, worst
from pipeline.evaluate.sequential import next_look
from pipeline.files import read_json, write_json
from pipeline.stages.workspace import REFERENCE, Workspace


def run(model: str, variant: str) -> None:
    """Write artifacts/verdicts/<model>/<variant>.json. Any verdict is a result: the stage succeeds.

    Raises ConfigError when the model is judged by the limits of another size.
    """
    workspace = Workspace(model)
    metrics = workspace.read(workspace.metrics(variant), "validate", variant)
    _check_class(model, metrics)
    verdict = decide(
        metrics,
        workspace.read(workspace.metrics(REFERENCE), "validate", REFERENCE),
        _policy(model, variant),
        workspace.read(workspace.parity, "parity"),
    )
    write_json(workspace.verdict(variant), verdict.to_json())
    print(f"{model} {variant}: {verdict.verdict}")


def _check_class(model: str, metrics: Any) -> None:
    classes, name = config.load_gates().classes, config.load_model(model).gate_class
    try:
        parameters = int(metrics["size"]["parameters"])
    except (KeyError, TypeError, ValueError):
        raise EvaluationError(
            f"the metrics of {model} do not say how many parameters it has. Validate again."
        ) from None
    ranges = {other: row.parameters for other, row in classes.items()}
    fitting = [other for other, (least, most) in ranges.items() if least <= parameters <= most]
    if name not in fitting:
        least, most = ranges[name]
        way_out = f"Use {' or '.join(fitting)}." if fitting else "Add a class to configs/gates.yaml."
        raise ConfigError(
            f"configs/models/{model}.yaml: gate_class {name!r} judges models of {least:,} to {most:,} parameters, and "
            f"this one has {parameters:,}. {way_out}"
        )


def _policy(model: str, variant: str) -> Policy:
    row, limits = config.gate_row(model, variant)
    permitted = None if limits.opt_in is None else model in limits.opt_in
    return Policy(row, limits, permitted, config.load_gates().ratchet, _last_release(model, variant))


def _last_release(model: str, variant: str) -> ReleasedBuild | None:
    """The latest recorded release before the number in configs/signing.yaml: recording one changes no verdict on it."""
    builds = config.load_released().models.get(model, {}).get(variant, ())
    earlier = [build for build in builds if build.release < config.load_signing().release]
    return max(earlier, key=lambda build: build.release, default=None)


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

    text = line.name if line.estimate is None else f"{line.name} {number(line.estimate)}"
    if line.low is not None:
        text += f" (90 % interval {number(line.low)} to {number(line.high)})"
    if line.limit is not None:
        text += f", limit {number(line.limit)}"
    text += f": {line.verdict}"
    explained = line.estimate is None or line.verdict == INCONCLUSIVE
    return f"{text}; {line.note}" if explained and line.note else text


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


def escalate(models: list[str], variants: list[str]) -> None:
    """Print, for every INCONCLUSIVE MMLU line, its next look, and the command that asks as many questions."""
    run, wanted = config.load_pipeline(), 0
    suite = config.load_suite(run.suite).mmlu.questions
    for model in models:
        for variant in variants:
            for line in read_verdict(Workspace(model), variant).lines:
                if line.name == "mmlu" and line.verdict == INCONCLUSIVE:
                    look = next_look(line.n or 0)
                    print(f"{model} {variant}: {_escalation(line, look, suite)}")
                    wanted = max(wanted, look or 0)
    if not wanted:
        print("No INCONCLUSIVE MMLU line waits for a further look.")
        return
    subjects = len(run.models) * (len(run.variants) + 1)
    print(
        f"{subjects} models and variants share the suite {run.suite!r}, references included: "
        f"{max(0, wanted - suite) * subjects:,} new questions in all; answers that are kept are not asked again.\n"
        f"  dvc exp run -S 'configs/evaluation/{run.suite}.yaml:mmlu.questions={wanted}'"
    )


def _escalation(line: GateLine, look: int | None, asked: int) -> str:
    if look is None:
        return f"MMLU is INCONCLUSIVE after all {line.n:,} questions: improve the variant, or justify another margin."
    more = max(0, look - asked)
    return f"MMLU is INCONCLUSIVE at {line.n:,} questions; next look {look:,}, {more:,} more than the suite asks."
