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
import re
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.errors import EvaluationError
from pipeline.evaluate.referee import Outcome, judge_program
from pipeline.evaluate.sandbox import require_isolation


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


# --- prompting -------------------------------------------------------------------------------------------------------


def completion_prompt(problem: Problem) -> str:
    """What a model is asked to continue; with the trailing newline most models would stop after two tokens."""
    return problem.prompt.rstrip("\n")


# What the scanner must step over or count, in this order; text between matches is irrelevant.
_TOKENS = re.compile(
    r"""
    (?P<text> \"{3} (?:\\.|[^\\])*? (?:\"{3}|\\?\Z) | '{3} (?:\\.|[^\\])*? (?:'{3}|\\?\Z)
            | "(?:\\.|[^"\\\n])*"? | '(?:\\.|[^'\\\n])*'? | \#[^\n]* )
  | (?P<open> [(\[{] ) | (?P<close> [)\]}] )
  | (?P<line> \n (?=[^\s)\]}]) )
    """,
    re.VERBOSE | re.DOTALL,
)
_NEW_DEFINITION = re.compile(r"\n(?:(?:async\s+)?def|class)\b|\n@|\n```|\n<")


def extract_completion(problem: Problem, text: str) -> str:
    """The body in a raw continuation of `completion_prompt`, to be appended to `problem.prompt`.

    The body ends before the first line that starts in column 0, as the usual stop sequences (`\\ndef`, `\\nclass`,
    `\\nif`, `\\nprint`, `\\n#`, a code fence) would have it, unless that line is inside a string or a bracket.
    """
    del problem  # every prompt ends after its docstring, so all continuations are cut alike
    text = text if text.startswith("\n") else "\n" + text
    return text[: _body_end(text)].lstrip("\n").rstrip() + "\n"


def should_stop(text: str) -> bool:
    """Whether a continuation, as far as it is generated, already holds its whole body."""
    return _body_end(text) < len(text)


def _body_end(text: str) -> int:
    """Offset of the newline before the first column-0 line outside strings and brackets, or `len(text)`."""
    depth = 0
    for token in _TOKENS.finditer(text):
        if token["open"]:
            depth += 1
        elif token["close"]:
            depth = max(0, depth - 1)
        elif token["line"] and (depth == 0 or _NEW_DEFINITION.match(text, token.start())):
            return token.start()
    return len(text)


# --- judging ---------------------------------------------------------------------------------------------------------


def judge(problem: Problem, completion: str, timeout_seconds: float, allow_unsafe: bool = False) -> Outcome:
    """Run the problem's test against `problem.prompt + completion`.

    The verdict is a function of the completion, up to its running time: tests that draw random inputs draw the same
    ones each time.

    Args:
        completion: generated source, as from `extract_completion`; hostile.
        timeout_seconds: wall time for all of the test's calls together.
        allow_unsafe: run even where the machine cannot contain hostile code.

    Raises:
        EvaluationError: isolation is not available, or the worker could not be started. Never a verdict.
    """
    level = require_isolation(allow_unsafe)
    program = problem.prompt + completion
    return judge_program(program, problem.entry_point, lambda call: _check(problem, call), timeout_seconds, level)


def judge_all(
    pairs: Sequence[tuple[Problem, str]], timeout_seconds: float, workers: int = 2, allow_unsafe: bool = False
) -> list[Outcome]:
    """`judge` for each (problem, completion), `workers` at a time, in the order given; same errors."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            return list(pool.map(lambda pair: judge(*pair, timeout_seconds, allow_unsafe), pairs))
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
