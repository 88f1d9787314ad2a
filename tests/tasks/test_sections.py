"""What decides a task's results: code is followed through imports, configuration field by field."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.blobs import Store
from pipeline.config.models import load_model
from pipeline.keys.closure import Closure
from pipeline.tasks import sections as keys
from pipeline.tasks.ifbench import IfbenchConfig
from pipeline.tasks.registry import load_suite, suite_type, tasks
from pipeline.tasks.sections import Key, key_of
from pipeline.tasks.subject import Subject
from pipeline.tasks.task import Task
from pipeline.workspace import REFERENCE
from tests.real_configs import architecture_of

FILES = {"model.onnx": "0" * 64}


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    """A variant that exists in configuration only."""
    architecture, entry = architecture_of("mimo-8b", tmp_path), load_model("mimo-8b")
    return Subject("mimo-8b", "q4", tmp_path, tmp_path / "x.onnx", architecture, entry, Store())


def changed(before: Key, after: Key) -> tuple[set[str], set[str]]:
    """Names of what differs in (items, metrics)."""
    first, second = (
        {name for name in a if a[name] != b[name]}
        for a, b in ((before.items, after.items), (before.metrics, after.metrics))
    )
    return first, second


IFBENCH = IfbenchConfig(prompts=10, max_new_tokens=8, max_chat_tokens=8, max_think_tokens=8)
SUITE = load_suite("release").model_copy(update={"ifbench": IFBENCH})


def asked(subject: Subject, task: Task, **changes: Any) -> Subject:
    """The subject as a task of the release suite sees it."""
    return replace(subject, wanted=getattr(SUITE, task.part).model_copy(update=changes))


def test_every_part_of_a_suite_is_a_task_s() -> None:
    parts = [task.part for task in tasks() if not task.reads]
    assert sorted(parts) == sorted(set(suite_type().model_fields) - {"reference", "talking"})
    places = {task.name: task.place for task in tasks()}
    assert len(set(places.values())) == len(places)
    assert all(task.reads in parts and places[task.reads] < task.place for task in tasks() if task.reads)


@pytest.mark.parametrize(
    ("name", "within", "without"),
    [
        ("mmlu", {"tasks/mmlu_scoring", "calibrate/texts"}, {"tasks/humaneval", "judge/gates", "tasks/registry"}),
        ("humaneval", {"confine/worker", "tasks/humaneval_answers", "runtime/generate"}, {"tasks/agreement"}),
        ("agreement", {"tasks/written"}, {"runtime/generate", "tasks/humaneval", "tasks/mmlu_scoring"}),
        ("divergence", {"tasks/divergence_scores", "calibrate/windows"}, {"tasks/mmlu", "confine/sandbox"}),
        ("speed", {"runtime/speed"}, {"tasks/divergence", "runtime/generate"}),
        ("ifbench", {"runtime/generate"}, {"confine/sandbox", "tasks/humaneval"}),
    ],
)
def test_code_is_what_a_task_imports(name: str, within: set[str], without: set[str]) -> None:
    code = {
        path.removeprefix("pipeline/").removesuffix(".py") for path in Closure.of(f"pipeline.tasks.{name}").hashes()
    }
    assert within <= code
    assert not without & code


def test_code_that_runs_models_counts_where_it_runs_them(subject: Subject) -> None:
    """Whichever way the reference runs: its results are the same."""
    runners = (subject, "session", "generate"), (replace(subject, variant=REFERENCE), "layered", "layered_writer")
    for one, decoder, writer in runners:
        for task in tasks():
            roots = keys._roots(task, one)
            assert (f"pipeline.runtime.{decoder}" in roots) == task.runs_graph
            assert (f"pipeline.runtime.{writer}" in roots) == task.writes


def test_the_statistics_decide_metrics_and_no_item(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {task.name: key_of(task, asked(subject, task), FILES) for task in tasks()}
    hashes = Closure.hashes
    edited = {"pipeline/tasks/statistics.py": "edited"}
    monkeypatch.setattr(Closure, "hashes", lambda self: hashes(self) | edited)
    for task in tasks():
        assert changed(before[task.name], key_of(task, asked(subject, task), FILES)) == (set(), {"statistics"})


@pytest.mark.parametrize(
    ("part", "changes", "differs"),
    [
        ("mmlu", {"questions": 1425}, (set(), {"number"})),
        ("mmlu", {"seed": 1}, ({"suite"}, set())),
        ("humaneval", {"problems": 100}, (set(), {"number"})),
        ("humaneval", {"k": (1, 5)}, (set(), {"number"})),
        ("humaneval", {"max_new_tokens": 7}, ({"suite"}, set())),
        ("divergence", {"window": 77}, ({"suite"}, set())),
        ("speed", {"repeats": 7}, ({"suite"}, set())),
    ],
)
def test_a_part_of_the_suite_decides_its_own_task(
    subject: Subject, part: str, changes: dict[str, Any], differs: tuple[set[str], set[str]]
) -> None:
    for task in tasks():
        edit = changes if task.part == part else {}
        want = differs if task.part == part else (set(), set())
        before, after = (key_of(task, asked(subject, task, **new), FILES) for new in ({}, edit))
        assert changed(before, after) == want


def test_other_files_decide_all_and_descriptions_nothing(subject: Subject) -> None:
    described, letters = (
        replace(subject, entry=subject.entry.model_copy(update=edit))
        for edit in ({"title": "Other", "note": "x"}, {"mmlu_mode": "cloze"})
    )
    for task in tasks():
        key = key_of(task, asked(subject, task), FILES)
        assert changed(key, key_of(task, asked(subject, task), {"model.onnx": "1" * 64})) == ({"files"}, set())
        assert key_of(task, asked(described, task), FILES) == key
        differs = {"model"} if task.name == "mmlu" else set()
        assert changed(key, key_of(task, asked(letters, task), FILES))[0] == differs


def test_the_references_items_decide_what_is_compared_with_them(subject: Subject, tmp_path: Path) -> None:
    """Each KL is measured against them; a drop in accuracy is a matter of the metrics alone."""
    before: dict[str, Key] = {}
    for digest, differs in (("a", None), ("b", {True: ({"reference"}, {"reference"}), False: (set(), {"reference"})})):
        (tmp_path / keys.RECORD).write_text(f'{{"sha256": {{"items.jsonl": "{digest}"}}}}')
        for task in tasks():
            key = key_of(task, replace(asked(subject, task), reference=tmp_path), FILES)
            if differs:
                assert changed(before[task.name], key) == differs[task.against_reference]
            before[task.name] = key


def test_solutions_decide_the_agreement_made_from_them(subject: Subject, tmp_path: Path) -> None:
    task, found = next(task for task in tasks() if task.reads), []
    for digest in ("a", "b"):
        (tmp_path / keys.RECORD).write_text(f'{{"sha256": {{"items.jsonl": "{digest}"}}}}')
        found.append(key_of(task, replace(asked(subject, task), source=tmp_path), FILES))
    assert changed(*found) == ({"source"}, set())


@pytest.mark.parametrize(("name", "counts"), [("divergence", True), ("humaneval", True), ("speed", False)])
def test_what_computed_the_model_counts_where_it_was_asked(name: str, counts: bool, subject: Subject) -> None:
    task = next(task for task in tasks() if task.name == name)
    one = asked(subject, task)
    items, metrics = changed(key_of(task, one, FILES), key_of(task, replace(one, device="cuda NVIDIA T4"), FILES))
    assert (items, metrics) == ({"device"} if counts else set(), set())
