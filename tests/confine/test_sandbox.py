"""The sandbox against attacks: each succeeds in a free process (the control) and has no effect in a locked-down one."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.confine import isolation, sandbox
from pipeline.errors import EvaluationError
from tests.confine.attacks import (
    ATTACKS,
    EFFECT,
    HARMLESS_IN_BUBBLEWRAP,
    NOBODY,
    NOT_EVERYWHERE,
    ROOT,
    ROOT_ATTACKS,
    Case,
    contained,
    drive,
)

HERE = [level for level in (sandbox.LANDLOCK, sandbox.SECCOMP, sandbox.BUBBLEWRAP) if not isolation.obstacle(level)]
SECCOMP_HERE = [level for level in HERE if level != sandbox.BUBBLEWRAP]

needs_seccomp = pytest.mark.skipif(not SECCOMP_HERE, reason="no seccomp allow-list for this machine")


@pytest.fixture
def arena() -> Iterator[Path]:
    """A folder that any user may write in (pytest's own are closed to `nobody`)."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def nobody_reaches_the_interpreter() -> bool:
    """What a wrapper run by `nobody` must bind; an interpreter below root's home is out of reach."""
    path = Path(sys.base_prefix)
    return all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents))


def cases(name: str) -> list[Case]:
    """Every level of this machine, as this user, and as an ordinary user where this one is root."""
    levels = [level for level in HERE if level != sandbox.BUBBLEWRAP or name not in HARMLESS_IN_BUBBLEWRAP]
    found: list[Case] = [(None, level) for level in levels]
    if os.getuid() == 0 and name not in ROOT_ATTACKS:
        wrapped = nobody_reaches_the_interpreter()
        found += [(NOBODY, level) for level in levels if level != sandbox.BUBBLEWRAP or wrapped]
    return found


@pytest.mark.skipif(not HERE, reason="this machine cannot contain hostile code")
@pytest.mark.parametrize("name", [*ATTACKS, *ROOT_ATTACKS])
def test_attack_works_when_free_and_is_contained_when_locked_down(name: str, arena: Path) -> None:
    if name in ROOT_ATTACKS and os.getuid() != 0:
        pytest.skip("only root can do this at all")
    locked = cases(name)
    free: list[Case] = [(user, "free") for user in dict.fromkeys(user for user, _ in locked)]
    results = drive((ATTACKS | ROOT_ATTACKS)[name], arena, [*free, *locked])
    if name in NOT_EVERYWHERE and EFFECT not in {results[case] for case in free}:
        pytest.skip("this kernel offers it to nobody")
    assert name in NOT_EVERYWHERE or {results[case] for case in free} == {EFFECT}, results
    assert locked and all(contained(results[case]) for case in locked), results


@pytest.mark.skipif(not HERE, reason="this machine cannot contain hostile code")
def test_computing_still_works_when_locked_down(arena: Path) -> None:
    code = "import math; effect = sum(sorted(range(10**5))) > 0 and math.sqrt(4) == 2 and time.sleep(0) is None"
    results = drive(code, arena, cases("read a file"))
    assert set(results.values()) == {EFFECT}


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_cpu_time_is_bounded() -> None:
    code = "from pipeline.confine.sandbox import lock_down; lock_down('rlimits', 1)\nwhile True: pass"
    done = subprocess.run(isolation.command(sandbox.RLIMITS, code), timeout=60, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL


@needs_seccomp
def test_a_layer_that_the_kernel_refuses_is_an_error() -> None:
    code = (
        "from pipeline.confine import sandbox; sandbox._SECCOMP_MODE_FILTER = 99\n"
        "from pipeline.errors import EvaluationError\n"
        "try: sandbox.lock_down(sandbox.SECCOMP, 1)\n"
        "except EvaluationError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True, text=True, check=False
    )
    assert "could not install the seccomp filter" in done.stdout
    assert "was not run" in done.stdout


def test_a_sandbox_without_effect_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvaluationError, match="a file is still reachable"):
        sandbox._require_closed()
    monkeypatch.setattr(sandbox.os, "stat", lambda path: (_ for _ in ()).throw(PermissionError()))
    monkeypatch.setattr(sandbox, "_reach_network", lambda: None)
    with pytest.raises(EvaluationError, match="the network is still reachable"):
        sandbox._require_closed()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give it up")
def test_without_seccomp_root_becomes_nobody_and_cannot_fork() -> None:
    code = (
        "from pipeline.confine.sandbox import lock_down; import os; lock_down('rlimits', 5); print(os.getresuid())\n"
        "try: os.fork()\nexcept OSError as error: print('no fork')"
    )
    done = subprocess.run(isolation.command(sandbox.RLIMITS, code), timeout=60, capture_output=True, check=False)
    assert done.stdout.decode().splitlines() == [f"({NOBODY}, {NOBODY}, {NOBODY})", "no fork"]


def verdict(program: bytes, architecture: int, number: int) -> int:
    """Interpret a classic BPF program that uses load, jump-if-equal and return."""
    data = struct.pack("=II", number, architecture)
    accumulator = position = 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("=HBBI", program, 8 * position)
        position += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("=I", data, value)
            case 0x15:
                position += if_true if accumulator == value else if_false
            case 0x06:
                return value


@pytest.mark.parametrize(
    ("machine", "architecture", "read", "forbidden"),
    [  # forbidden: execve, openat, socket
        ("x86_64", 0xC000003E, 0, (59, 257, 41)),
        ("aarch64", 0xC00000B7, 63, (221, 56, 198)),
    ],
)
def test_filter_of_each_machine(machine: str, architecture: int, read: int, forbidden: tuple[int, ...]) -> None:
    program = sandbox._filter(machine)
    allow, deny, kill = 0x7FFF0000, 0x00050001, 0x80000000
    assert verdict(program, architecture, read) == allow
    assert {verdict(program, architecture, number) for number in forbidden} == {deny}
    assert verdict(program, architecture, read | 0x40000000) == deny  # the x32 spelling of the same call
    assert verdict(program, architecture ^ 1, read) == kill
    allowed = sum(verdict(program, architecture, n) == allow for n in range(1024))
    assert allowed == len(sandbox._ALLOWED[machine]) < 30
