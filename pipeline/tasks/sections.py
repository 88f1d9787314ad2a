"""What decides a section's results, as digests by name: results are kept for as long as these are the same.

Code is followed through imports, so a module that a section starts to use counts from then on: those that score, cut
graphs or prepare text (`_SCORING`). Other layers reach a measurement through the files that it measures.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import pipeline
from pipeline.config.sources import load_datasets
from pipeline.files import read_json, sha256_of
from pipeline.machine import cores, processor
from pipeline.tasks.subject import Subject
from pipeline.workspace import PLAN_FILE, REFERENCE

RECORD = "section.json"

_PACKAGE = Path(pipeline.__file__).parent
_SCORING = ("calibrate", "confine", "graph", "runtime", "tasks")
_NEUTRAL = {"tasks/subject.py"}  # hands a model over; what runs it is listed by `Section.runs_graph`
_SUMMARY = "tasks/statistics.py"
_DESCRIPTIVE = {"title", "note", "source", "gate_class", "base_model", "licence_page"}  # of a model's entry


@dataclass(frozen=True)
class Section:
    """One section of a validation.

    Attributes:
        name: of the section, its part of the suite and its metrics.
        measure: (subject, folder of items) → metrics. Every item that lies in the folder is taken as it is.
        counted: fields of its part of the suite that say how many items there are, each of which is the same whatever
            their number, or what is said over all of them.
        runs_graph: whether it asks the graph in ONNX Runtime; the others run the folder in onnxruntime-genai.
        against_reference: whether each of a variant's items is a comparison with the reference's.
        reads: another section, whose part of the suite decides this one too, and whose items of the reference it is
            made from. It has no part of its own.
    """

    name: str
    measure: Callable[[Subject, Path], dict[str, Any]]
    counted: tuple[str, ...] = ()
    runs_graph: bool = False
    against_reference: bool = False
    reads: str | None = None

    @property
    def part(self) -> str:
        """The part of the suite that decides it."""
        return self.reads or self.name


@dataclass(frozen=True)
class Key:
    """What decides each item, and what besides decides the metrics over all of them: SHA-256 by name."""

    items: dict[str, str]
    metrics: dict[str, str]


def key_of(section: Section, subject: Subject, files: dict[str, str]) -> Key:
    """Of one section. `files`: the SHA-256 of what is measured, by file."""
    asked = getattr(subject.suite, section.part).model_dump(mode="json")
    texts = asked.get("texts", ())
    number = [asked.pop(name) for name in section.counted]
    code = _code(section, subject)
    reference = _recorded(subject.reference)
    items = {
        "files": files,
        "suite": asked,
        "model": _entry(section, subject),
        "data": {
            name: source.model_dump(mode="json")
            for name, source in load_datasets().datasets.items()
            if name in texts or not name.startswith("text-")
        },
        "code": {name: sha256_of(_PACKAGE / name) for name in code if name != _SUMMARY},
        "libraries": _libraries(code),
        "reference": reference if section.against_reference else None,
        "source": _recorded(subject.source),
        "machine": [processor(), cores()] if section.name == "speed" else None,
        "isolation": subject.isolation if section.name == "humaneval" else None,
    }
    metrics = {"number": number, "reference": reference, "statistics": sha256_of(_PACKAGE / _SUMMARY)}
    return Key(*({name: _digest(value) for name, value in part.items()} for part in (items, metrics)))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def measured_files(subject: Subject) -> dict[str, str]:
    """SHA-256 of what is measured, by file; a reference's weights as its source lock has them."""
    if subject.variant != REFERENCE:
        return {file.name: sha256_of(file) for file in subject.folder.iterdir() if file.name != PLAN_FILE}
    weights = {file.name: file.sha256 for file in subject.workspace.read_lock().files}
    return weights | {file.name: sha256_of(file) for file in subject.workspace.export.iterdir()}


def _recorded(folder: Path | None) -> dict[str, str] | None:
    """SHA-256 of a finished section's items, as its own validation recorded them; None where there is none."""
    return folder and read_json(folder / RECORD)["sha256"]


def _entry(section: Section, subject: Subject) -> dict[str, Any]:
    """What may decide this section's results in the model's entry: nothing that only describes, no `mmlu_mode` for
    others than MMLU."""
    others = tuple(f"{name}_" for name in type(subject.suite).model_fields if name != section.part)
    entry = subject.entry.model_dump(mode="json")
    return {name: value for name, value in entry.items() if name not in _DESCRIPTIVE and not name.startswith(others)}


def _code(section: Section, subject: Subject) -> list[str]:
    """The modules that a section's results come from, as paths in the package."""
    roots = [f"tasks/{section.name}.py"]
    if section.runs_graph:
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
