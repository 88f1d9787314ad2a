"""What decides a section's results, as digests by name: results are kept for as long as these are the same.

Code is followed through imports (`pipeline.keys`), so a module that a section starts to use counts from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import keys
from pipeline.config.sources import load_datasets
from pipeline.files import read_json, sha256_of
from pipeline.keys.closure import Closure
from pipeline.keys.configuration import fields_read
from pipeline.machine import cores, processor
from pipeline.tasks.subject import Subject
from pipeline.workspace import PLAN_FILE, REFERENCE

RECORD = "section.json"

_SUMMARY = "tasks/statistics.py"


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
    number = [asked.pop(name) for name in section.counted]
    closure = Closure.of(*_roots(section, subject))
    code, summary = closure.hashes(), f"pipeline/{_SUMMARY}"
    reference = _recorded(subject.reference)
    items = {
        "files": files,
        "suite": asked,
        "model": fields_read(subject.entry, closure.attributes),
        "data": {
            name: source.model_dump(mode="json")
            for name, source in load_datasets().datasets.items()
            if name in closure.strings | asked.get("texts", {}).keys()
        },
        "code": {name: digest for name, digest in code.items() if name != summary},
        "libraries": closure.libraries(),
        "reference": reference if section.against_reference else None,
        "source": _recorded(subject.source),
        "machine": [processor(), cores()] if section.name == "speed" else None,
        "isolation": subject.isolation if section.name == "humaneval" else None,
    }
    metrics = {"number": number, "reference": reference, "statistics": code.get(summary)}
    return Key(*({name: keys.digest(value) for name, value in part.items()} for part in (items, metrics)))


def _roots(section: Section, subject: Subject) -> list[str]:
    """The modules that a section's results come from."""
    roots = [f"pipeline.tasks.{section.name}"]
    if section.runs_graph:
        roots.append("pipeline.runtime.layered" if subject.variant == REFERENCE else "pipeline.runtime.session")
    return roots


def measured_files(subject: Subject) -> dict[str, str]:
    """SHA-256 of what is measured, by file; a reference's weights as its source lock has them."""
    if subject.variant != REFERENCE:
        return {file.name: sha256_of(file) for file in subject.folder.iterdir() if file.name != PLAN_FILE}
    weights = {file.name: file.sha256 for file in subject.workspace.read_lock().files}
    return weights | {file.name: sha256_of(file) for file in subject.workspace.export.iterdir()}


def _recorded(folder: Path | None) -> dict[str, str] | None:
    """SHA-256 of a finished section's items, as its own validation recorded them; None where there is none."""
    return folder and read_json(folder / RECORD)["sha256"]
