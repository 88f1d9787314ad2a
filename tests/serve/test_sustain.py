"""Sustained load: a made-up trace slows a run down as the profile says, and a record becomes a phone's row."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.phones import load_measured
from pipeline.errors import BundleError, ConfigError, EvaluationError
from pipeline.report.phones import lines
from pipeline.report.plan import answer
from pipeline.runtime import sustained
from pipeline.runtime.heat import Governor, load_profile, replayed
from pipeline.runtime.sustained import Sustained, summary
from pipeline.serve import sustain
from tests import tiny
from tests.conftest import ROOT


def record(rate: list[int], **fields: Any) -> dict[str, Any]:
    """A look each second, at which so many tokens had been written."""
    samples = [{"seconds": float(second), "tokens": tokens, "step": 0} for second, tokens in enumerate([0, *rate])]
    given = {"device": "galaxy-s23", "model": "mimo-8b", "variant": "q3", "release": 7, "way": {"weights": "mapped"}}
    whole = {
        "format": 1,
        "kind": "sustained",
        "system": "Android",
        "runtime": "0.18.0",
        "started": "2026-11-30T12:00:00Z",
    }
    return whole | given | {"cold_start_seconds": 4.5, "warm_start_seconds": None, "samples": samples} | fields


@pytest.mark.parametrize(
    ("rate", "first", "last", "after"),
    [
        ([10] * 120, 10, 10, None),
        ([10] * 70 + [6] * 110, 10, 6, 70),
        ([10] * 70 + [6] * 30 + [10] * 80, 10, 10, None),  # it came back
        ([10] * 70 + [9] * 110, 10, 9, None),  # 90 % is not throttled
        ([10] * 30 + [2] * 90, 6, 2, 30),
    ],
)
def test_throttling_is_what_does_not_come_back(rate: list[int], first: float, last: float, after: float | None) -> None:
    row = summary(Sustained.model_validate(record(rate)))
    assert (row.tokens_per_second, row.sustained_tokens_per_second) == (first, last)
    assert row.throttled_after_seconds == after and row.weights == "mapped"


def test_a_short_record_says_nothing() -> None:
    with pytest.raises(EvaluationError, match=r"lasted 20 seconds; sustained load takes 30 or more"):
        summary(Sustained.model_validate(record([10] * 20)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second hand that moves a hundredth for each look at it, and as far as one sleeps."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += 0.01
        return now[0]

    monkeypatch.setattr(sustain.time, "monotonic", monotonic)
    monkeypatch.setattr(sustain.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))


@pytest.mark.usefixtures("clock")
def test_a_hot_trace_slows_down() -> None:
    """Pauses of 0, 20 and 100 ms beside 10 ms for a token, then nothing."""
    governor, trace = Governor(load_profile()), [30.0, 36.0, 43.0, 46.0]
    samples = sustain.observe(itertools.repeat(1), governor, 100, lambda share: replayed(trace, share))
    by_step = {step: [one.tokens for one in samples if one.step == step][2:-2] for step in range(4)}
    assert set(by_step[0]) <= {99, 100, 101} and set(by_step[1]) <= {33, 34} and set(by_step[2]) <= {9, 10}
    assert [one.celsius for one in samples if one.step == 3][-1] == 46


def test_a_model_is_measured(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sustain, "_INTERVAL", 0.02)
    monkeypatch.setattr(sustained, "WINDOW", 0.1)
    sustain.run(model_folder, minutes=1 / 60, celsius="30,43", target=tmp_path, unverified=True)
    found = Sustained.model_validate_json((tmp_path / "sustained.json").read_bytes())
    assert found.warm_start_seconds and sum(one.tokens for one in found.samples) > 3
    assert {one.step for one in found.samples} == {0, 2} and {one.celsius for one in found.samples} == {30.0, 43.0}
    assert (tmp_path / "sustained.png").read_bytes().startswith(b"\x89PNG")
    for trace in ("warm", "", "30,nan", "inf"):
        with pytest.raises(ConfigError, match="no list of temperatures"):
            sustain.run(model_folder, celsius=trace, target=tmp_path, unverified=True)
    monkeypatch.setattr(sustained, "WINDOW", 100.0)
    with pytest.raises(EvaluationError):
        sustain.run(model_folder, minutes=1 / 600, target=tmp_path / "short", unverified=True)
    assert not (tmp_path / "short").exists()


def test_a_phones_record_becomes_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.copy_configs(tmp_path))
    file = tmp_path / "sustained.json"
    for rate in (5, 7):  # the second replaces the first
        file.write_text(json.dumps(record([rate] * 60)))
        sustain.take_over(file)
    (row,) = load_measured().rows
    assert (row.device, row.variant, row.sustained_tokens_per_second) == ("galaxy-s23", "q3", 7.0)
    file.write_text(json.dumps(record([5] * 60, steps=[])))
    with pytest.raises(BundleError, match=r"no record of sustained load .*steps"):
        sustain.take_over(file)


def test_the_plan_shows_measured_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    row = summary(Sustained.model_validate(record([10] * 70 + [6] * 110)))
    monkeypatch.setattr("pipeline.report.plan.load_measured", lambda: type("Rows", (), {"rows": (row,)}))
    document = answer(["mimo-8b"], device="galaxy-s23")
    assert document["models"]["mimo-8b"]["devices"]["galaxy-s23"]["measured"] == [row.model_dump()]
    shown = "  measured, Samsung Galaxy S23: q3 mapped, 10.0 tokens/s, 6.0 at the end of 180 s, throttled after 70 s"
    assert shown in lines(document)
