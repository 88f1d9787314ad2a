"""Which verdicts wait for a further look."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.judge import escalation
from pipeline.judge.verdicts import GateLine, Verdict
from pipeline.tasks.registry import tasks

MMLU, SPEED = (next(task for task in tasks() if task.name == name) for name in ("mmlu", "speed"))


@pytest.mark.parametrize(
    ("task", "verdicts", "expected"),
    [
        (MMLU, {"mmlu": "INCONCLUSIVE", "humaneval": "ERROR"}, True),  # what was not measured yet says nothing
        (MMLU, {"mmlu": "INCONCLUSIVE", "kl_mean": "FAIL"}, False),
        (MMLU, {"mmlu": "PASS", "kl_mean": "INCONCLUSIVE"}, False),
        (SPEED, {"mmlu": "INCONCLUSIVE"}, False),
    ],
)
def test_a_task_waits_while_its_gates_do_and_a_pass_is_possible(
    task: Any, verdicts: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = tuple(GateLine(name, verdict) for name, verdict in verdicts.items())
    monkeypatch.setattr(escalation, "decide", lambda *_: Verdict("", lines, ""))
    monkeypatch.setattr(escalation.Workspace, "read", lambda *_: {})
    assert escalation.waits(task, "phi-4", "q4", {}) is expected
