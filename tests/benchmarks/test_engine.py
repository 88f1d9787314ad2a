"""The benchmark of workers: what it counts, whom it kills, what its table says; and each stage on the tiny model."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engine
from pipeline.engine import Threads
from pipeline.stages import calibrate, download, export, quantize, validate
from pipeline.workspace import REFERENCE, Workspace
from tests import tiny
from tests.conftest import ROOT

FOREVER = {"executable": "/bin/sleep"}


def test_what_passes_an_engine_is_counted() -> None:
    watched = engine.Watched(threads := Threads(2))
    seen: list[int] = []

    def slowly(_: int, made: int) -> None:
        time.sleep(0.01)
        seen.append(made)

    threads.run(lambda unit: unit * unit, [1, 2, None, 3], slowly)
    assert seen == [1, 4, 9]
    assert watched.units == 3
    assert 0.03 <= watched.reducing <= watched.running


def test_only_a_worker_at_its_unit_is_killed() -> None:
    agent, busy = (subprocess.Popen([title, "100"], **FOREVER) for title in ("ray::RuntimeEnvAgent", "ray::_do"))  # type: ignore[call-overload]
    try:
        with engine.killing(1, random.Random(0), (0.0, 0.01)) as killed:
            assert busy.wait(30) == -signal.SIGKILL
        assert killed == [busy.pid]
        assert agent.poll() is None
    finally:
        agent.kill()
        agent.wait()


def test_it_runs_until_all_kills_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = iter(["a", "a", "b"])
    runs = [1, 2, 1]

    def killing(most: int, chance: random.Random) -> Any:
        del chance
        return _Killed(min(most, runs.pop(0)))

    monkeypatch.setattr(engine, "killing", killing)
    monkeypatch.setattr(engine, "timed", lambda name, watched: {"seconds": 1.0, "digest": next(digests)})
    watched = engine.Watched(Threads(1))
    assert engine.disturbed("quantize", 3, "a", watched) == {
        "kills": 3,
        "seconds": [1.0, 1.0],
        "units": 0,
        "equal": True,
    }
    assert not engine.disturbed("quantize", 1, "a", watched)["equal"]


class _Killed(list[int]):
    def __init__(self, count: int):
        super().__init__(range(count))

    def __enter__(self) -> _Killed:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def record(two: float, digest: str = "a") -> dict[str, Any]:
    """What `once` writes of one stage, with two nodes in `two` seconds."""
    nodes = {"units": 40, "head_seconds": 3.0}
    runs = {
        "threads": {"seconds": 11.0, "digest": digest},
        "1": {"seconds": 20.0, "digest": "a", **nodes},
        "2": {"seconds": two, "digest": "a", **nodes},
    }
    kills = {"quantize": {"kills": 10, "seconds": [30.0], "units": 40, "equal": digest == "a"}}
    return {
        "stages": {"quantize": runs}, "empty_unit_ms": {"1": 2.0, "2": 1.5}, "kills": kills, "busy_percent": 0.0,
        "machine": {"cpu": "A processor", "cores": 2}, "ray": "2.60.0",
    }  # fmt: skip


def test_the_table_names_a_limit_and_other_bytes() -> None:
    fast = engine.report(record(two=10.0))
    assert "| quantize q4 | 11.0 | 20.0 | 10.0 | 2.00 | 40 | 3.0 | the same |" in fast
    assert "less than" not in fast and "killed at random in quantize (30 s): the same bytes" in fast
    slow = engine.report(record(two=16.0, digest="b"))
    assert "less than 1.7 times as fast in quantize (of 16.0 s the head node works 3.0 alone)" in slow
    assert "OTHERS with threads" in slow and "OTHER BYTES" in slow


@pytest.mark.long
def test_every_stage_runs_and_writes_the_same_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.make_store(tmp_path / "store")
    monkeypatch.setenv("PIPELINE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tiny.copy_configs(tmp_path))
    for stage in (download, export, calibrate):
        stage.run(tiny.MODEL)
    quantize.run(tiny.MODEL, "q4")
    validate.run(tiny.MODEL, REFERENCE)
    for name, value in (("SMALL", tiny.MODEL), ("WORKSPACE", Workspace(tiny.MODEL)), ("SUITE", "seconds")):
        monkeypatch.setattr(engine, name, value)
    whole, few = engine.asked, {"problems": 2, "max_new_tokens": 8}

    def fewer(name: str, against: bool = True, **more: Any) -> Any:
        return whole(name, against, **(more | few if more else {}))

    monkeypatch.setattr(engine, "asked", fewer)
    before = engine.digest(engine.WORKSPACE.moments.parent)
    for name in engine.STAGES:
        first, second = (engine.timed(name, None) for _ in range(2))
        assert first["seconds"] > 0
        assert first["digest"] == second["digest"] != engine.digest(tmp_path / "nothing"), name
    assert engine.digest(engine.WORKSPACE.moments.parent) == before, "the demo's statistics are there again"
