"""HumanEval: solutions that the model writes, judged in the sandbox.

Verdicts come from each problem's own test, run here, on answers that come from a sandboxed worker. Solutions may use
the standard library's computing modules (named in `pipeline.confine.worker`), not numpy.
"""

from __future__ import annotations

import builtins
import platform
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from pipeline.calibrate.texts import dataset
from pipeline.confine.isolation import SAFE_LEVELS, require_isolation
from pipeline.confine.referee import Outcome, judge_program
from pipeline.engine import chosen
from pipeline.errors import EvaluationError
from pipeline.journal import Journal
from pipeline.tasks import humaneval_answers as answers
from pipeline.tasks import task, written
from pipeline.tasks.humaneval_problems import PROMPT_TOKENS, Problem, load_problems, problems_of
from pipeline.tasks.statistics import summarise_humaneval
from pipeline.tasks.subject import Subject, fill
from pipeline.tasks.task import percent, share
from pipeline.tasks.writing import write

VERDICTS = "humaneval.jsonl"


class HumanEvalConfig(written.WritingConfig):
    """HumanEval subset: how many solutions of each problem are drawn and how long they may be, run in the sandbox."""

    problems: int = Field(ge=2, le=164)
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1,), description="pass@k to report beside pass@1")
    timeout_seconds: float = Field(gt=0)
    allow_unsafe: bool = Field(default=False, description="run generated code even where nothing contains it")

    @model_validator(mode="after")
    def _k_can_be_estimated(self) -> HumanEvalConfig:
        if max(self.k, default=1) > self.samples:
            raise ValueError(f"pass@{max(self.k)} needs {max(self.k)} samples of each problem, not {self.samples}")
        return self


def measure(subject: Subject, folder: Path) -> dict[str, Any]:
    """`humaneval` metrics: `statistics.summarise_humaneval`, `written.described`, and

    - `isolation`: the level that solutions ran at; `contained`: whether that level keeps hostile code in.

    Items lie in `folder`, by task id and sample: solutions (`written.write`) and verdicts (completion, correct,
    reason).
    """
    wanted, problems = subject.wanted, {problem.task_id: problem for problem in problems_of(subject)}
    level, names = require_isolation(wanted.allow_unsafe), written.names_of(problems, wanted)
    solutions, verdicts = Journal(folder / written.ITEMS), Journal(folder / VERDICTS)
    ask = answers.completion_prompt if _completes(subject) else answers.chat_request
    requests = {name: ask(problem) for name, problem in problems.items()}
    write(subject, "HumanEval", requests, solutions, answers.should_stop)
    named = {name: problem for problem, row in zip(problems.values(), names, strict=True) for name in row}

    def judged(left: Iterable[str]) -> Iterator[dict[str, Any]]:
        if (here := require_isolation(wanted.allow_unsafe)) != level:
            raise EvaluationError(
                f"worker {platform.node()} isolates generated code by {here}, and others by {level}: judge on machines "
                f"of one kind."
            )
        pairs = [(named[name], _completion(subject, named[name], solutions.items[name])) for name in left]
        outcomes = judge_all(pairs, wanted.timeout_seconds, level)
        for (_, completion), outcome in zip(pairs, outcomes, strict=True):
            yield {"completion": completion, "correct": outcome.passed, "reason": outcome.reason}

    fill(verdicts, list(named), f"judging {subject.name}", "solutions", judged, chosen(wide=True))
    reference = _passed(Journal(subject.reference / VERDICTS), names) if subject.reference else None
    return {
        **summarise_humaneval(_passed(verdicts, names), reference, wanted.k),
        **written.described(subject, solutions, names),
        "isolation": level,
        "contained": level in SAFE_LEVELS,
    }


def _completes(subject: Subject) -> bool:
    return subject.entry.humaneval_prompt == "completion"


def _passed(verdicts: Journal, names: Sequence[Sequence[str]]) -> np.ndarray:
    """bool [problems, samples], of the problems that were judged"""
    rows = [row for row in names if {*row} <= verdicts.items.keys()]
    return np.array([[verdicts.items[name]["correct"] for name in row] for row in rows], np.bool_)


def _completion(subject: Subject, problem: Problem, item: Mapping[str, Any]) -> str:
    if _completes(subject):
        return answers.extract_completion(item["text"])
    return answers.extract_answer(problem, written.answer(item, subject.entry))


# --- verdicts --------------------------------------------------------------------------------------------------------


def judge(problem: Problem, completion: str, timeout_seconds: float, level: str) -> Outcome:
    """Run the problem's test against `problem.prompt + completion`.

    The verdict is a function of the completion, up to its running time: tests that draw random inputs draw the same
    ones each time.

    Args:
        completion: generated source, as from `answers.extract_completion`; hostile.
        timeout_seconds: wall time for all of the test's calls together.
        level: isolation to run it at, from `isolation.require_isolation`.

    Raises:
        EvaluationError: the worker could not be started or confined. Never a verdict.
    """
    program = problem.prompt + completion
    return judge_program(program, problem.entry_point, lambda call: _check(problem, call), timeout_seconds, level)


def judge_all(
    pairs: Sequence[tuple[Problem, str]], timeout_seconds: float, level: str, workers: int = 2
) -> Iterator[Outcome]:
    """`judge` for each (problem, completion), `workers` at a time, in the order given, as they fall; same errors."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield from pool.map(lambda pair: judge(pair[0], pair[1], timeout_seconds, level), pairs)
        finally:
            pool.shutdown(cancel_futures=True)


def _check(problem: Problem, candidate: Callable[..., Any]) -> None:
    """Run the trusted test in a namespace that holds the prompt's own helper functions and the candidate."""
    namespace: dict[str, Any] = {"__builtins__": {**vars(builtins), "__import__": _seeded_import(problem.task_id)}}
    exec(problem.prompt, namespace)
    namespace[problem.entry_point] = candidate  # some tests call the solution by its name
    exec(problem.test, namespace)
    namespace["check"](candidate)


def _seeded_import(seed: str) -> Callable[..., Any]:
    """An `__import__` that gives this one test its own `random`, seeded; other threads' draws do not disturb it."""
    generator: Any = random.Random(seed)
    generator.Random = random.Random

    def seeded(name: str, *context: Any) -> ModuleType | random.Random:
        return generator if name == "random" else builtins.__import__(name, *context)

    return seeded


# --- the task --------------------------------------------------------------------------------------------------------


def _conditions(section: task.Metrics) -> str:
    drawn = written.how_drawn(section) + ("" if section.get("temperature") else " solution")
    unsafe = "" if section.get("contained", True) else ", which does not contain hostile code"
    return (
        f"HumanEval: pass@1 of {drawn} each, prompt {section.get('prompt', 'unknown')}, run under "
        f"{section.get('isolation', 'unknown isolation')}{unsafe}"
    )


def _detail(section: task.Metrics, texts: Sequence[str]) -> str:
    del texts
    asked = "greedy" if section.get("temperature") == 0 else f"temperature {section.get('temperature')}"
    return f"HumanEval, {section.get('prompt')} prompts, {asked}, {section.get('n')} problems"


TASK = task.Task(
    name="humaneval",
    title="HumanEval",
    place=3,
    measure=measure,
    config=HumanEvalConfig,
    counted=("problems", "k"),
    unit="problems",
    machine=lambda part: require_isolation(part.allow_unsafe),
    datasets=lambda part: ("humaneval",),
    texts=lambda part, store: [("humaneval", [item.text for item in load_problems(dataset("humaneval", store))])],
    writes=True,
    cost=lambda part, entry: part.cost(entry, part.problems, PROMPT_TOKENS),
    asks=lambda part: f"{part.problems} HumanEval problems",
    pairing=task.items_of("pass_at_1"),
    gates=(task.margin_gate("humaneval", task.FLOOR, "pass_at_1", "HumanEval drop"),),
    columns=(task.interval_column("pass@1", "pass_at_1", share, percent, n=True),),
    notes=(task.Note(lambda own: "HumanEval solutions cut short by their limit of tokens", written.cut_short),),
    conditions=_conditions,
    measures=(task.Measure("pass_at_1", "HumanEval pass@1", "share", "pass@1"),),
    detail=_detail,
    dataset=("HumanEval", "openai/openai_humaneval"),
)
