"""What an INCONCLUSIVE verdict asks for: more items, which `validate` asks by itself as far as the suite allows, and
beyond that the command that asks them."""

from __future__ import annotations

import math

from pipeline.config.models import load_pipeline
from pipeline.judge.gates import Policy, decide
from pipeline.judge.policy import class_rows, gate_row
from pipeline.judge.sequential import next_look
from pipeline.judge.verdicts import FAIL, INCONCLUSIVE, GateLine, read_verdict
from pipeline.tasks.registry import load_suite
from pipeline.tasks.task import LOOKS, Metrics, Task
from pipeline.workspace import REFERENCE, Workspace


def judged(task: Task, model: str) -> bool:
    """Whether a row that may judge the model's variants judges a task at looks."""
    gates = [gate for gate in task.gates if gate.kind == LOOKS]
    return any(getattr(row, gate.limit) is not None for row in class_rows(model).values() for gate in gates)


def waits(task: Task, model: str, variant: str, metrics: Metrics) -> bool:
    """Whether a task's gates wait for the next look, and what was measured so far leaves a PASS possible.

    `metrics`: the variant's, as far as they are measured.
    """
    if not _looks(task):
        return False
    workspace = Workspace(model)
    reference = workspace.read(workspace.measurements(REFERENCE), "validate", REFERENCE)
    name, limits = gate_row(model, variant)
    lines = decide(metrics, reference, Policy(name, limits, None, math.inf, None), {}).lines
    waiting = any(line.verdict == INCONCLUSIVE and line.name in _looks(task) for line in lines)
    return waiting and all(line.verdict != FAIL for line in lines)


def escalate(models: list[str], variants: list[str]) -> None:
    """Print, for every INCONCLUSIVE line that is judged at looks, its next look, and the command that asks as much."""
    run, waiting = load_pipeline(), False
    pairs = [(model, variant) for model in models for variant in variants]
    verdicts = {f"{model} {variant}": read_verdict(Workspace(model), variant) for model, variant in pairs}
    looking = [(task, part, task.stops) for task, part in load_suite(run.suite).by_task() if task.stops]
    for task, part, stops in looking:
        asked, wanted = stops(part)[-1], 0
        for name, verdict in verdicts.items():
            for line in verdict.lines:
                if line.name in _looks(task) and line.verdict == INCONCLUSIVE:
                    look = next_look(line.n or 0)
                    print(f"{name}: {_escalation(task, line, look, asked)}")
                    wanted = max(wanted, look or 0)
        if wanted:
            waiting, subjects = True, len(run.models) * (len(run.variants) + 1)
            print(
                f"{subjects} models and variants share the suite {run.suite!r}, references included: "
                f"{max(0, wanted - asked) * subjects:,} new {task.unit} in all; answers that are kept are not asked "
                f"again.\n"
                f"  dvc exp run -S 'configs/evaluation/{run.suite}.yaml:{task.name}.most={wanted}'"
            )
    if not waiting:
        titles = " or ".join(task.title for task, *_ in looking)
        print(f"No INCONCLUSIVE {titles} line waits for a further look.")


def _looks(task: Task) -> set[str]:
    """A task's gates that are judged at looks."""
    return {gate.name for gate in task.gates if gate.kind == LOOKS}


def _escalation(task: Task, line: GateLine, look: int | None, asked: int) -> str:
    begin = f"{task.title} is INCONCLUSIVE"
    if look is None:
        return f"{begin} after all {line.n:,} {task.unit}: improve the variant, or justify another margin."
    more = max(0, look - asked)
    return f"{begin} at {line.n:,} {task.unit}; next look {look:,}, {more:,} more than the suite asks."
