"""The choice of a level: tried, not believed; preferred in a fixed order; refused in words below a safe one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pipeline.confine import isolation, sandbox
from pipeline.confine.isolation import SAFE_LEVELS, isolation_level, obstacle, require_isolation
from pipeline.errors import EvaluationError


@pytest.fixture(autouse=True)
def _no_memory_of_trials() -> None:
    isolation._trial.cache_clear()


def test_the_first_level_that_a_trial_holds_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = (*SAFE_LEVELS, sandbox.RLIMITS)
    for first, level in enumerate(levels):
        refused = set(levels[:first])
        monkeypatch.setattr(isolation, "obstacle", lambda asked, refused=refused: "no" if asked in refused else "")
        assert isolation_level() == level


def test_other_systems_are_refused_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(isolation, "_bwrap", lambda: None)
    assert isolation_level() == sandbox.RLIMITS
    with pytest.raises(EvaluationError, match="was not run") as refusal:
        require_isolation()
    for reason in ("allow-list", "no bwrap on PATH", "allow_unsafe"):
        assert reason in str(refusal.value)
    assert require_isolation(allow_unsafe=True) == sandbox.RLIMITS


@pytest.mark.skipif(bool(obstacle(sandbox.SECCOMP)), reason="no seccomp here")
def test_without_landlock_seccomp_alone_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "landlock_version", lambda: -1)
    assert require_isolation() == sandbox.SECCOMP


@pytest.mark.skipif(bool(obstacle(sandbox.BUBBLEWRAP)), reason="no bubblewrap here")
def test_without_seccomp_bubblewrap_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "system_calls_known", lambda: False)
    assert require_isolation() == sandbox.BUBBLEWRAP


def test_a_level_whose_trial_fails_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a container's profile forbids what the level needs."""
    monkeypatch.setattr(isolation, "_bwrap", lambda: "/bin/false")
    assert obstacle(sandbox.BUBBLEWRAP) == "its trial ended with status 1: nothing"
    monkeypatch.setattr(isolation, "_bwrap", lambda: "/nowhere/bwrap")
    isolation._trial.cache_clear()
    assert "/nowhere/bwrap" in obstacle(sandbox.BUBBLEWRAP)


def test_a_wrapper_that_confines_nothing_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretender = tmp_path / "bwrap"
    pretender.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n')
    pretender.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert isolation._bwrap() == str(pretender)
    assert "a file is still reachable" in obstacle(sandbox.BUBBLEWRAP)


def test_bubblewrap_shows_the_interpreter_read_only_and_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_bwrap", lambda: "bwrap")
    arguments = isolation.command(sandbox.BUBBLEWRAP, "pass")
    options = arguments[: arguments.index("--")]
    bound = [options[i + 1] for i, option in enumerate(options) if option == "--ro-bind"]
    package = str(Path(isolation.__file__).resolve().parents[1])
    assert set(bound) - {"/lib", "/lib64"} == {"/usr", sys.base_prefix, package}
    assert "--bind" not in options and "--proc" not in options
    assert {"--unshare-net", "--unshare-pid", "--unshare-ipc", "--die-with-parent", "--clearenv"} <= set(options)
    assert options[-5:] == ["--remount-ro", "/", "--clearenv", "--chdir", "/"]
    assert arguments[-1].endswith("; pass")
    kept = {options[i + 1] for i, option in enumerate(options) if option == "--cap-add"}
    assert kept == ({"CAP_SETUID", "CAP_SETGID"} if os.geteuid() == 0 else set())
