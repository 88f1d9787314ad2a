"""verdict: gates applied to measurements. Fast, so that limits can be tuned without measuring again."""

from __future__ import annotations

from typing import Any

from pipeline.checkpoint.architecture import TALKING
from pipeline.config.models import load_model
from pipeline.config.signing import ReleasedBuild, load_released, load_signing
from pipeline.errors import ConfigError, EvaluationError
from pipeline.files import sha256_of, write_json
from pipeline.judge import evidence, summary
from pipeline.judge.gates import Policy, decide
from pipeline.judge.policy import gate_row, load_gates
from pipeline.judge.verdicts import digests
from pipeline.runtime.session import runtimes
from pipeline.workspace import PLAN_FILE, REFERENCE, Workspace

_KINDS = {False: "real", True: "talking"}


def run(model: str, variant: str) -> None:
    """Write artifacts/verdicts/<model>/<variant>.json and the figures that DVC compares. Any verdict is a result: the
    stage succeeds.

    Raises ConfigError when the model is judged by the limits of another size, or a talking one as a real one.
    """
    workspace = Workspace(model)
    metrics = workspace.read(workspace.measurements(variant), "validate", variant)
    reference = workspace.read(workspace.measurements(REFERENCE), "validate", REFERENCE)
    _check_class(model, metrics)
    row, limits = gate_row(model, variant)
    policy = Policy(row, limits, limits.permits(model), load_gates().ratchet, _last_release(model, variant))
    verdict = decide(metrics, reference, policy, workspace.read(workspace.parity, "parity"))
    plan = workspace.require(workspace.artifact(variant) / PLAN_FILE, "quantize", variant)
    if problem := evidence.problem_of(metrics, reference, sha256_of(plan), runtimes()):
        verdict = evidence.refused(verdict, problem)
    write_json(workspace.verdict(variant), verdict.to_json() | {"judged": digests(workspace, variant)})
    write_json(workspace.metrics(variant), summary.results(metrics, verdict.verdict))
    write_json(workspace.speed(variant), summary.speeds(metrics))
    print(f"{model} {variant}: {verdict.verdict}")


def _check_class(model: str, metrics: Any) -> None:
    classes, name = load_gates().classes, load_model(model).gate_class
    try:
        parameters, talking = int(metrics["size"]["parameters"]), TALKING in (metrics.get("identity") or {})
    except (KeyError, TypeError, ValueError, AttributeError):
        raise EvaluationError(
            f"the metrics of {model} do not say how many parameters it has. Validate again."
        ) from None
    fitting = [
        other
        for other, row in classes.items()
        if row.parameters[0] <= parameters <= row.parameters[1] and row.talking == talking
    ]
    if name not in fitting:
        least, most = classes[name].parameters
        way_out = f"Use {' or '.join(fitting)}." if fitting else "Add a class to configs/gates.yaml."
        raise ConfigError(
            f"configs/models/{model}.yaml: gate_class {name!r} judges {_KINDS[classes[name].talking]} models of "
            f"{least:,} to {most:,} parameters, and this {_KINDS[talking]} one has {parameters:,}. {way_out}"
        )


def _last_release(model: str, variant: str) -> ReleasedBuild | None:
    """The latest recorded release before the number in configs/signing.yaml: recording one changes no verdict on it."""
    builds = load_released().models.get(model, {}).get(variant, ())
    earlier = [build for build in builds if build.release < load_signing().release]
    return max(earlier, key=lambda build: build.release, default=None)
