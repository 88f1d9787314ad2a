"""One problem, and what each row answered: of the solutions that `validate` wrote and judged; no model runs here.

Evaluations are no dependency of the report's stage, since a release machine would have to fetch them: where they are
not on this machine, or are of other measurements, there is no sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.journal import Journal
from pipeline.report.rows import Answer, ModelReport
from pipeline.tasks import humaneval, written
from pipeline.tasks.kept import read_record

_LINES, _CHARACTERS = 24, 1_600  # of a text that is shown


def read(evaluation: Path, metrics: Mapping[str, Any]) -> dict[str, Answer]:
    """All HumanEval answers in an evaluation's folder, by name; none where they are not what `metrics` tell of."""
    folder = evaluation / "humaneval"
    record = read_record(folder) or {}
    if "metrics" not in record or record["metrics"] != metrics.get("humaneval"):
        return {}
    asked = Journal(folder / written.ITEMS).items
    return {
        name: Answer(asked[name]["prompt"], item["completion"], item["correct"], item["reason"])
        for name, item in Journal(folder / humaneval.VERDICTS).items.items()
        if name in asked
    }


@dataclass(frozen=True)
class Sample:
    """A problem's request, and by row what it answered and whether that passed the tests."""

    title: str
    prompt: str
    answers: Mapping[str, tuple[str, str]]


def choose(model: ModelReport) -> Sample | None:
    """The first problem that all rows with answers have and the reference solves, or else the first of all."""
    answered = {row.variant: row.answers for row in model.rows if row.answers}
    shared = set[str].intersection(*map(set, answered.values())) if answered else set()
    asked = {name: own for name, own in model.reference.answers.items() if name in shared}
    if not asked:
        return None
    solved = [name for name, own in asked.items() if own.correct]
    name = [*solved, *asked][0]
    which = "that the reference solves" if solved else f"of {len(asked)}: the reference solves none"
    answers = {
        variant: (shown(own[name].text), "passed" if own[name].correct else f"failed: {shown(own[name].reason)}")
        for variant, own in answered.items()
    }
    return Sample(f"{name.split('#')[0]}, the first problem {which}", shown(asked[name].prompt), answers)


def shown(text: str) -> str:
    """A model's text for people: what does not print is a mark, and what is long is cut."""
    lines = text.expandtabs(4).strip("\n")[:_CHARACTERS].split("\n")
    cut = len(lines) > _LINES or len(text) > _CHARACTERS
    kept = ["".join(one if one.isprintable() else "\ufffd" for one in line).rstrip() for line in lines[:_LINES]]
    return "\n".join([*kept, "…"] if cut else kept)
