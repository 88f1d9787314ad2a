"""What decides a task's results, as digests by name: results are kept for as long as these are the same.

Code is followed through imports (`pipeline.keys`), so a module that a task starts to use counts from then on.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from pipeline import keys
from pipeline.config.sources import load_datasets
from pipeline.files import read_json, sha256_of
from pipeline.keys.closure import Closure, modules
from pipeline.keys.configuration import fields_read
from pipeline.tasks.subject import Subject
from pipeline.tasks.task import Task
from pipeline.workspace import PLAN_FILE, REFERENCE, Workspace

RECORD = "section.json"


@dataclass(frozen=True)
class Key:
    """What decides each item, and what besides decides the metrics over all of them: SHA-256 by name."""

    items: dict[str, str]
    metrics: dict[str, str]


def key_of(task: Task, subject: Subject, files: dict[str, str]) -> Key:
    """Of one task. `files`: the SHA-256 of what is measured, by file."""
    part, pinned = subject.wanted.model_dump(mode="json"), load_datasets().datasets
    number = [part.pop(name) for name in task.counted]
    closure = Closure.of(*_roots(task, subject))
    code, summary = closure.hashes() | _measuring(task), "pipeline/tasks/statistics.py"
    reference = _recorded(subject.reference)
    items = {
        "files": files,
        "suite": part,
        "model": fields_read(subject.entry, closure.attributes),
        "data": {name: pinned[name].model_dump(mode="json") for name in task.datasets(subject.wanted)},
        "code": {name: digest for name, digest in code.items() if name != summary},
        "libraries": closure.libraries(),
        "reference": reference if task.against_reference else None,
        "source": _recorded(subject.source),
        "machine": task.machine(subject.wanted),
        "device": subject.device if task.runs_graph or task.writes else None,
    }
    metrics = {"number": number, "reference": reference, "statistics": code.get(summary)}
    return Key(*({name: keys.digest(value) for name, value in part.items()} for part in (items, metrics)))


def _measuring(task: Task) -> dict[str, str]:
    """The digest of a task's own module without the statement that says what of it is judged and shown."""
    path = modules()[f"pipeline.tasks.{task.name}"]
    lines = path.read_text(encoding="utf-8").splitlines()
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TASK":
            del lines[node.lineno - 1 : node.end_lineno]
    return {f"pipeline/tasks/{path.name}": keys.digest(lines)}


def _roots(task: Task, subject: Subject) -> list[str]:
    """The modules that a task's results come from."""
    whole = subject.variant == REFERENCE
    runs = {
        "layered" if whole else "session": task.runs_graph,
        "layered_writer" if whole else "generate": task.writes,
    }
    return [f"pipeline.tasks.{task.name}", *(f"pipeline.runtime.{name}" for name, does in runs.items() if does)]


def measured_files(subject: Subject) -> dict[str, str]:
    """SHA-256 of what is measured, by file; a reference's weights as its source lock has them."""
    if subject.variant != REFERENCE:
        return {file.name: sha256_of(file) for file in subject.folder.iterdir() if file.name != PLAN_FILE}
    workspace = Workspace(subject.model)
    weights = {file.name: file.sha256 for file in workspace.read_lock().files}
    return weights | {file.name: sha256_of(file) for file in workspace.export.iterdir()}


def _recorded(folder: Path | None) -> dict[str, str] | None:
    """SHA-256 of a finished task's items, as its own validation recorded them; None where there is none."""
    return read_json(folder / RECORD)["sha256"] if folder else None
