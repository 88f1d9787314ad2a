"""What decides a section's results: code is followed through imports, configuration field by field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pipeline.config.evaluation import EvaluationConfig, load_suite

from pipeline.checkpoint.blobs import Store
from pipeline.config.models import load_model
from pipeline.stages.validate import SECTIONS
from pipeline.tasks import sections as keys
from pipeline.tasks.sections import Key, Section, imported, key_of
from pipeline.tasks.subject import Subject
from pipeline.workspace import REFERENCE, Workspace
from tests.real_configs import architecture_of

BY_NAME = {section.name: section for section in SECTIONS}
FILES = {"model.onnx": "0" * 64}


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    """A variant that exists in configuration only."""
    workspace, entry, suite = Workspace("mimo-8b"), load_model("mimo-8b"), load_suite("demo")
    architecture = architecture_of("mimo-8b", tmp_path)
    return Subject(workspace, "q4", tmp_path, tmp_path / "x.onnx", architecture, entry, suite, Store(), "landlock")


def changed(before: Key, after: Key) -> tuple[set[str], set[str]]:
    """Names of what differs in (items, metrics)."""
    first, second = (
        {name for name in a if a[name] != b[name]}
        for a, b in ((before.items, after.items), (before.metrics, after.metrics))
    )
    return first, second


def with_suite(subject: Subject, part: str, **changes: Any) -> Subject:
    suite = subject.suite
    edited = getattr(suite, part).model_copy(update=changes)
    return Subject(**{**vars(subject), "suite": suite.model_copy(update={part: edited})})


def test_every_section_is_a_part_of_the_suite() -> None:
    parts = [section.part for section in SECTIONS if not section.reads]
    assert sorted(parts) == sorted(set(EvaluationConfig.model_fields) - {"reference"})
    assert {section.reads for section in SECTIONS if section.reads} <= set(parts)


@pytest.mark.parametrize(
    ("name", "within", "without"),
    [
        ("mmlu", {"evaluate/mmlu.py", "stages/texts.py"}, {"evaluate/humaneval.py", "evaluate/gates.py"}),
        ("humaneval", {"evaluate/worker.py", "evaluate/sandbox.py", "evaluate/generate.py"}, {"evaluate/runtime.py"}),
        (
            "humaneval",
            {"evaluate/answers.py", "evaluate/isolation.py"},
            {"evaluate/agreement.py", "evaluate/divergence.py"},
        ),
        ("agreement", {"evaluate/agreement.py"}, {"evaluate/generate.py", "evaluate/judging.py", "evaluate/mmlu.py"}),
        ("divergence", {"evaluate/divergence.py", "evaluate/texts.py"}, {"evaluate/mmlu.py"}),
        ("speed", {"evaluate/speed.py"}, {"evaluate/divergence.py", "evaluate/runtime.py", "evaluate/layered.py"}),
    ],
)
def test_code_is_what_a_section_imports(name: str, within: set[str], without: set[str]) -> None:
    code = set(imported([f"stages/validation/{name}.py"]))
    assert within <= code
    assert not without & code


def test_code_that_runs_graphs_counts_where_graphs_are_run(subject: Subject) -> None:
    reference = Subject(**{**vars(subject), "variant": REFERENCE})
    names = {
        (section.name, one.variant): set(keys._code(section, one))
        for section in SECTIONS
        for one in (subject, reference)
    }
    for section in SECTIONS:
        assert ("evaluate/runtime.py" in names[section.name, "q4"]) == section.runs_graph
        assert ("evaluate/layered.py" in names[section.name, REFERENCE]) == section.runs_graph
        assert "evaluate/layered.py" not in names[section.name, "q4"]


def test_an_edited_module_changes_the_sections_that_use_it_and_no_other(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {section.name: key_of(section, subject, FILES) for section in SECTIONS}
    hashed = keys.sha256_of
    monkeypatch.setattr(keys, "sha256_of", lambda path: "edited" if path.name == "generate.py" else hashed(path))
    after = {section.name: key_of(section, subject, FILES) for section in SECTIONS}
    assert changed(before["humaneval"], after["humaneval"]) == ({"code"}, set())
    assert all(before[name] == after[name] for name in ("mmlu", "divergence", "speed"))
    monkeypatch.setattr(keys, "sha256_of", lambda path: "edited" if path.name == "statistics.py" else hashed(path))
    after = {section.name: key_of(section, subject, FILES) for section in SECTIONS}
    assert all(changed(before[name], after[name]) == (set(), {"statistics"}) for name in after)


@pytest.mark.parametrize(
    ("part", "changes", "section", "differs"),
    [
        ("mmlu", {"questions": 1425}, "mmlu", (set(), {"number"})),
        ("mmlu", {"seed": 1}, "mmlu", ({"suite"}, set())),
        ("humaneval", {"problems": 164}, "humaneval", (set(), {"number"})),
        ("humaneval", {"k": (1, 5)}, "humaneval", (set(), {"number"})),
        ("humaneval", {"max_new_tokens": 7}, "humaneval", ({"suite"}, set())),
        ("divergence", {"window": 77}, "divergence", ({"suite"}, set())),
        ("speed", {"repeats": 7}, "speed", ({"suite"}, set())),
    ],
)
def test_a_part_of_the_suite_decides_its_own_section(
    subject: Subject, part: str, changes: dict[str, Any], section: str, differs: tuple[set[str], set[str]]
) -> None:
    edited = with_suite(subject, part, **changes)
    for row in SECTIONS:
        want = differs if row.part == section else (set(), set())
        assert changed(key_of(row, subject, FILES), key_of(row, edited, FILES)) == want


def test_other_files_decide_all_and_descriptions_nothing(subject: Subject) -> None:
    described = Subject(**{**vars(subject), "entry": subject.entry.model_copy(update={"title": "Other", "note": "x"})})
    asked = Subject(**{**vars(subject), "entry": subject.entry.model_copy(update={"mmlu_mode": "cloze"})})
    for section in SECTIONS:
        key = key_of(section, subject, FILES)
        assert changed(key, key_of(section, subject, {"model.onnx": "1" * 64})) == ({"files"}, set())
        assert key_of(section, described, FILES) == key
        assert changed(key, key_of(section, asked, FILES))[0] == ({"model"} if section.name == "mmlu" else set())


def test_the_references_items_decide_what_is_compared_with_them(subject: Subject, tmp_path: Path) -> None:
    """Each KL is measured against them; a drop in accuracy is a matter of the metrics alone."""
    before: dict[str, Key] = {}
    for digest, differs in (("a", None), ("b", {True: ({"reference"}, {"reference"}), False: (set(), {"reference"})})):
        (tmp_path / keys.RECORD).write_text(f'{{"sha256": {{"items.jsonl": "{digest}"}}}}')
        for section in SECTIONS:
            key = key_of(section, subject.of(section.name, tmp_path, tmp_path), FILES)
            if differs:
                assert changed(before[section.name], key) == differs[section.against_reference]
            before[section.name] = key


def test_solutions_decide_the_agreement_made_from_them(subject: Subject, tmp_path: Path) -> None:
    section, keys_found = BY_NAME["agreement"], []
    for digest in ("a", "b"):
        (tmp_path / keys.RECORD).write_text(f'{{"sha256": {{"items.jsonl": "{digest}"}}}}')
        keys_found.append(key_of(section, subject.of(section.name, None, tmp_path, tmp_path), FILES))
    assert changed(*keys_found) == ({"source"}, set())


def test_libraries_are_those_that_the_code_imports(subject: Subject) -> None:
    def libraries(section: Section) -> set[str]:
        return set(keys._libraries(keys._code(section, subject)))

    assert {"numpy", "onnxruntime", "tokenizers"} <= libraries(BY_NAME["mmlu"])
    assert "onnxruntime-genai" not in libraries(BY_NAME["mmlu"])
    assert {"onnxruntime", "onnxruntime-genai"} <= libraries(BY_NAME["speed"]) & libraries(BY_NAME["humaneval"])
    assert "numba" in libraries(BY_NAME["divergence"])
