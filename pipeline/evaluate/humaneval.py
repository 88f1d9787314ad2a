"""HumanEval: 164 function signatures with docstrings, to be completed and judged by running their tests.

Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code" (arXiv 2107.03374), and the format of its
`HumanEval.jsonl.gz`. Solutions may use the standard library's computing modules (named in `pipeline.evaluate.worker`),
not numpy.
"""

from __future__ import annotations

import builtins
import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.errors import EvaluationError
from pipeline.evaluate.referee import Outcome, judge_program


@dataclass(frozen=True)
class Problem:
    """One line of the data file; all fields are Python source except `task_id` and `entry_point`."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


def load_problems(path: Path) -> list[Problem]:
    """Read `HumanEval.jsonl.gz`, in the file's order.

    Raises:
        EvaluationError: the file is absent, damaged, empty, or a line is not a problem.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            problems = [_problem(json.loads(line)) for line in file if line.strip()]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise EvaluationError(
            f"{path} is not HumanEval's gzipped JSON lines: {error}. Remove the file and run the download stage again."
        ) from error
    if not problems or len({problem.task_id for problem in problems}) != len(problems):
        raise EvaluationError(f"{path} holds {len(problems)} problems, none at all or with repeated task ids.")
    return problems


def _problem(record: Any) -> Problem:
    names = [field.name for field in fields(Problem)]
    missing = [name for name in names if not isinstance(record, dict) or not isinstance(record.get(name), str)]
    if missing:
        raise ValueError(f"a line lacks the text field(s) {', '.join(missing)}")
    return Problem(**{name: record[name] for name in names})


def spread(problems: Sequence[Problem], n: int) -> list[Problem]:
    """`n` problems evenly spread over the set, in its order; a smaller `n` chooses a subset of a larger one.

    Positions follow the van der Corput sequence in base 2 (0, 1/2, 1/4, 3/4, …).

    Raises:
        EvaluationError: `n` is not between 1 and the number of problems.
    """
    if not 1 <= n <= len(problems):
        raise EvaluationError(f"cannot choose {n} of {len(problems)} HumanEval problems; choose 1 to {len(problems)}.")
    bits = len(problems).bit_length()
    chosen: set[int] = set()
    for k in range(1 << bits):
        position = int(f"{k:0{bits}b}"[::-1], 2) * len(problems) >> bits
        chosen.add(position)
        if len(chosen) == n:
            break
    return [problems[i] for i in sorted(chosen)]


# --- judging ---------------------------------------------------------------------------------------------------------


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
