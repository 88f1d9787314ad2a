"""Agreement on the reference's own HumanEval solutions, token by token: finer than whether they pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.calibrate.texts import encoder
from pipeline.errors import EvaluationError
from pipeline.journal import Journal
from pipeline.progress import Progress
from pipeline.tasks import solutions
from pipeline.tasks.forced import ask, force
from pipeline.tasks.statistics import summarise_agreement
from pipeline.tasks.subject import Subject

ITEMS = "agreement.jsonl"


def measure(subject: Subject, folder: Path) -> dict[str, Any]:
    """`agreement` metrics (`statistics.summarise_agreement`), on the first solution of each problem.

    Items by task id lie in `folder`: the reference's have prompt and ids (of its solution), which variants read there;
    all have top and logprob of each token.
    """
    tasks = [problem.task_id for problem in solutions.problems_of(subject)]
    journal, encode = Journal(folder / ITEMS), encoder(subject.folder)
    told = _solutions(subject, tasks)
    left = [task for task in tasks if task not in journal.items]
    texts = {task: (encode(told[task]["prompt"]), told[task]["ids"]) for task in left}
    subject.prepare(lambda decoder: [list(ask(decoder, *text)) for text in texts.values()])
    with Progress(f"agreement {subject.name}", len(tasks), "solutions") as progress:
        progress.advance(len(tasks) - len(left), kept=True)
        for task in left:
            read = force(subject.decoder, *texts[task])
            own = {"top": read.top.tolist(), "logprob": read.logprob.tolist()}
            journal.record(task, (told[task] if subject.reference is None else {}) | own)
            progress.advance()
    items = [journal.items[task] for task in tasks]
    problem = np.repeat(np.arange(len(items)), [len(item["top"]) for item in items])
    if subject.reference is None:
        return summarise_agreement(_joined(items, "logprob"), problem)
    theirs = [told[task] for task in tasks]
    equal = _joined(items, "top") == _joined(theirs, "top")
    return summarise_agreement(_joined(items, "logprob"), problem, _joined(theirs, "logprob"), equal)


def _solutions(subject: Subject, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The reference's solution of each task: prompt, ids; for a variant also what the reference makes of them."""
    if subject.reference:
        found = Journal(subject.reference / ITEMS).items
    else:
        written = Journal((subject.source or Path()) / solutions.ITEMS).items
        found = {task: written.get(solutions.name_of(task)) for task in tasks}
        found = {task: {key: item[key] for key in ("prompt", "ids")} for task, item in found.items() if item}
    if missing := [task for task in tasks if task not in found]:
        raise EvaluationError(
            f"{subject.name}: the reference has {len(tasks) - len(missing)} of {len(tasks)} HumanEval solutions, "
            f"{missing[0]} is not among them. Run `python -m pipeline validate {subject.workspace.model} reference`."
        )
    return found


def _joined(items: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    return np.concatenate([item[key] for item in items])
