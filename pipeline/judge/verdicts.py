"""Written verdicts: read, described for people, turned into an exit status, escalated."""

from __future__ import annotations

from pipeline.config.models import load_pipeline
from pipeline.errors import EvaluationError
from pipeline.files import read_json
from pipeline.judge.gates import INCONCLUSIVE, GateLine, Verdict, exit_code, worst
from pipeline.judge.sequential import next_look
from pipeline.tasks.registry import load_suite
from pipeline.tasks.task import LOOKS, Task
from pipeline.workspace import Workspace


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
    """Print, for every INCONCLUSIVE line that is judged at looks, its next look, and the command that asks as much."""
    run, waiting = load_pipeline(), False
    pairs = [(model, variant) for model in models for variant in variants]
    verdicts = {f"{model} {variant}": read_verdict(Workspace(model), variant) for model, variant in pairs}
    looking = [(task, part) for task, part in load_suite(run.suite).by_task() if _looks(task)]
    for task, part in looking:
        asked, wanted = getattr(part, task.counted[0]), 0
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
                f"  dvc exp run -S 'configs/evaluation/{run.suite}.yaml:{task.name}.{task.counted[0]}={wanted}'"
            )
    if not waiting:
        titles = " or ".join(task.title for task, _ in looking)
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
