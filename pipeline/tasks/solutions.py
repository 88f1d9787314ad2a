"""What the sections on HumanEval share: the suite's problems, and what their solutions are called."""

from __future__ import annotations

from pipeline.calibrate.texts import dataset
from pipeline.tasks.humaneval_problems import Problem, load_problems, spread
from pipeline.tasks.subject import Subject

ITEMS = "solutions.jsonl"


def problems_of(subject: Subject) -> list[Problem]:
    """The suite's problems, in their order."""
    return spread(load_problems(dataset("humaneval", subject.store)), subject.suite.humaneval.problems)


def name_of(task_id: str, sample: int = 0) -> str:
    """A solution's name among the items."""
    return f"{task_id}#{sample}"
