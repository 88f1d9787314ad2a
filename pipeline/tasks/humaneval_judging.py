"""Verdicts on solutions: each problem's own test, run here, on answers that come from a sandboxed worker.

Solutions may use the standard library's computing modules (named in `pipeline.confine.worker`), not numpy.
"""

from __future__ import annotations

import builtins
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

from pipeline.confine.referee import Outcome, judge_program
from pipeline.tasks.humaneval_problems import Problem


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
            yield from pool.map(lambda pair: judge(*pair, timeout_seconds, level), pairs)
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
