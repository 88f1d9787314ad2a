"""What decides a task's results, as digests by name: results are kept for as long as these are the same.

Code is followed through imports, so a module that a task starts to use counts from then on: those that score, cut
graphs or prepare text (`_SCORING`). Other layers reach a measurement through the files that it measures.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import pipeline
from pipeline.config.sources import load_datasets
from pipeline.files import read_json, sha256_of
from pipeline.tasks.registry import tasks
from pipeline.tasks.subject import Subject
from pipeline.tasks.task import Task
from pipeline.workspace import PLAN_FILE, REFERENCE, Workspace

RECORD = "section.json"

_PACKAGE = Path(pipeline.__file__).parent
_SCORING = ("calibrate", "confine", "graph", "runtime", "tasks")
_NEUTRAL = {"tasks/subject.py", "tasks/task.py"}  # hand over and show; what runs is listed by `Task.runs_graph`
_SUMMARY = "tasks/statistics.py"
_DESCRIPTIVE = {"title", "note", "source", "gate_class", "base_model", "licence_page"}  # of a model's entry


@dataclass(frozen=True)
class Key:
    """What decides each item, and what besides decides the metrics over all of them: SHA-256 by name."""

    items: dict[str, str]
    metrics: dict[str, str]


def key_of(task: Task, subject: Subject, files: dict[str, str]) -> Key:
    """Of one task. `files`: the SHA-256 of what is measured, by file."""
    part, pinned = subject.wanted.model_dump(mode="json"), load_datasets().datasets
    number = [part.pop(name) for name in task.counted]
    code = _code(task, subject)
    reference = _recorded(subject.reference)
    items = {
        "files": files,
        "suite": part,
        "model": _entry(task, subject),
        "data": {name: pinned[name].model_dump(mode="json") for name in task.datasets(subject.wanted)},
        "code": {name: sha256_of(_PACKAGE / name) for name in code if name != _SUMMARY},
        "libraries": _libraries(code),
        "reference": reference if task.against_reference else None,
        "source": _recorded(subject.source),
        "machine": task.machine(subject.wanted),
    }
    metrics = {"number": number, "reference": reference, "statistics": sha256_of(_PACKAGE / _SUMMARY)}
    return Key(*({name: _digest(value) for name, value in part.items()} for part in (items, metrics)))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def measured_files(subject: Subject) -> dict[str, str]:
    """SHA-256 of what is measured, by file; a reference's weights as its source lock has them."""
    if subject.variant != REFERENCE:
        return {file.name: sha256_of(file) for file in subject.folder.iterdir() if file.name != PLAN_FILE}
    workspace = Workspace(subject.model)
    weights = {file.name: file.sha256 for file in workspace.read_lock().files}
    return weights | {file.name: sha256_of(file) for file in workspace.export.iterdir()}


def _recorded(folder: Path | None) -> dict[str, str] | None:
    """SHA-256 of a finished task's items, as its own validation recorded them; None where there is none."""
    return folder and read_json(folder / RECORD)["sha256"]


def _entry(task: Task, subject: Subject) -> dict[str, Any]:
    """What may decide this task's results in the model's entry: nothing that only describes or asks for other tasks."""
    others = tuple(f"{other.name}_" for other in tasks() if other.name != task.part)
    entry = subject.entry.model_dump(mode="json", exclude=_DESCRIPTIVE)
    return {name: value for name, value in entry.items() if name in task.asked or not name.startswith(others)}


def _code(task: Task, subject: Subject) -> list[str]:
    """The modules that a task's results come from, as paths in the package."""
    roots = [f"tasks/{task.name}.py"]
    if task.runs_graph:
        roots.append("runtime/layered.py" if subject.variant == REFERENCE else "runtime/session.py")
    return imported(roots)


def imported(roots: Iterable[str]) -> list[str]:
    """`roots` and all that they import among the code that scores, sorted."""
    found: set[str] = set()
    left = list(roots)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += _imports(name)[0]
    return sorted(found)


@cache
def _imports(name: str) -> tuple[list[str], set[str]]:
    """What a module imports: modules of ours among the code that scores, and the top names of all others."""
    ours, others = [], set()
    for module in _modules(ast.parse((_PACKAGE / name).read_text(encoding="utf-8"))):
        top, _, rest = module.partition(".")
        path = f"{rest.replace('.', '/')}.py"
        if top != _PACKAGE.name:
            others.add(top)
        elif path.startswith(_SCORING) and path not in _NEUTRAL and (_PACKAGE / path).is_file():
            ours.append(path)
    return ours, others


def _modules(tree: ast.AST) -> Iterator[str]:
    """Names that may be modules: `from a import b` may mean a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _libraries(code: Iterable[str]) -> dict[str, str]:
    """Versions of the installed packages that the code imports; ONNX Runtime is beneath onnxruntime-genai."""
    packages = _packages()
    names = {"onnxruntime"}.union(*(_imports(name)[1] for name in code))
    return {package: version(package) for name in names for package in packages.get(name, ())}


@cache
def _packages() -> Mapping[str, list[str]]:
    """Distributions by the modules that they install; half a second of reading."""
    return packages_distributions()
