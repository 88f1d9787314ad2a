"""HumanEval: 164 function signatures with docstrings, to be completed and judged by running their tests.

Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code" (arXiv 2107.03374), and the format of its
`HumanEval.jsonl.gz`.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from pipeline.calibrate.texts import dataset
from pipeline.errors import EvaluationError
from pipeline.tasks.subject import Subject
from pipeline.tasks.written import spread

PROMPT_TOKENS = 138
"""Mean tokens of a prompt (SmolLM2's tokenizer, 164 problems)."""


@dataclass(frozen=True)
class Problem:
    """One line of the data file; all fields are Python source except `task_id` and `entry_point`."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str

    @property
    def text(self) -> str:
        """The prompt with its solution."""
        return self.prompt + self.canonical_solution


_PROBLEM = TypeAdapter(Problem)


def load_problems(path: Path) -> list[Problem]:
    """Read `HumanEval.jsonl.gz`, in the file's order.

    Raises:
        EvaluationError: the file is absent, damaged, empty, or a line is not a problem.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            problems = [_PROBLEM.validate_json(line) for line in file if line.strip()]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise EvaluationError(
            f"{path} is not HumanEval's gzipped JSON lines: {error}. Remove the file and run the download stage again."
        ) from error
    if not problems or len({problem.task_id for problem in problems}) != len(problems):
        raise EvaluationError(f"{path} holds {len(problems)} problems, none at all or with repeated task ids.")
    return problems


def problems_of(subject: Subject) -> list[Problem]:
    """The suite's problems, in their order."""
    return spread(load_problems(dataset("humaneval", subject.store)), subject.wanted.problems, "HumanEval problems")
