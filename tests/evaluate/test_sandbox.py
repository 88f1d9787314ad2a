"""The sandbox against attacks: each succeeds in a free process (the control) and has no effect in a locked-down one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import EvaluationError
from pipeline.evaluate import sandbox

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534

pytestmark = pytest.mark.skipif(
    sandbox.isolation_level() not in sandbox.SAFE_LEVELS, reason="this machine cannot contain hostile code"
)

# Runs one attack in several fresh children: free, and at each level; as this user, and as `nobody` if this one is root.
# Everything an attacker could wish for is imported before the doors close. A child exits with 42 if its attack worked.
DRIVER = """
import _posixshmem, ctypes, json, mmap, os, platform, resource, signal, socket, sys, threading, time
from pipeline.evaluate import sandbox
attack, folder, port, users, levels = json.loads(sys.stdin.read())
platform.machine()
libc = ctypes.CDLL(None, use_errno=True)

def child(user, level):
    if user is not None:
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        libc.prctl(4, 1, 0, 0, 0)  # dumpable again, as an ordinary user's process is
    target = f"{folder}/{user}-{level}"
    open(target, "w").write("untouched")
    alive, hold = os.pipe()
    victim = os.fork()
    if victim == 0:
        os.close(hold)
        os.read(alive, 1)  # until this child has ended
        os._exit(0)
    names = {**globals(), "target": target, "victim": victim}
    try:
        if level != "free":
            sandbox.lock_down(level, 5)
        exec(attack, names)
        os._exit(42 if names["effect"] else 0)
    except (OSError, RuntimeError, MemoryError, AssertionError) as error:
        os._exit(1)
    finally:
        os._exit(99)

results = {}
for user in users:
    for level in levels:
        pid = os.fork()
        if pid == 0:
            child(user, level)
        status = os.waitpid(pid, 0)[1]
        results[f"{user} {level}"] = os.waitstatus_to_exitcode(status)
print(json.dumps(results))
"""

EFFECT = 42
UNEXPECTED = 99  # the attack itself is broken

ATTACKS = {
    "read a file": "effect = open(target).read() == 'untouched'",
    "read a file by openat2": """
how = (ctypes.c_uint64 * 3)(0, 0, 0)
fd = libc.syscall(437, -100, target.encode(), how, ctypes.c_size_t(24))
effect = fd >= 0 and os.read(fd, 9) == b"untouched"
""",
    "list a folder": "effect = len(os.listdir(folder)) > 0",
    "look at a file": "effect = os.stat(target).st_size > 0",
    "write a file": "effect = open(target + '.new', 'w').write('x') == 1",
    "fill the disk": "fd = os.open(target, os.O_WRONLY); os.posix_fallocate(fd, 0, 1 << 22); effect = True",
    "delete a file": "os.unlink(target); effect = True",
    "rename a file": "os.rename(target, target + '.moved'); effect = True",
    "truncate a file": "os.truncate(target, 0); effect = True",
    "change permissions": "os.chmod(target, 0o777); effect = True",
    "make a folder": "os.mkdir(target + '.folder'); effect = True",
    "make a link": "os.symlink('/etc/passwd', target + '.link'); effect = True",
    "make a pipe file": "os.mkfifo(target + '.pipe'); effect = True",
    "connect over TCP": "socket.socket().connect(('127.0.0.1', port)); effect = True",
    "send over UDP": """
out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
effect = out.sendto(b"secret", ("127.0.0.1", port)) == 6
""",
    "listen": "socket.create_server(('127.0.0.1', 0)); effect = True",
    "abstract socket": "s = socket.socket(socket.AF_UNIX); s.bind(chr(0) + target); effect = True",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW); effect = True",
    "read another's environment": "effect = open(f'/proc/{victim}/environ', 'rb').read(1) is not None",
    "read another's memory": """
class Span(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("size", ctypes.c_size_t))
here = ctypes.create_string_buffer(16)
mine, theirs = Span(ctypes.addressof(here), 16), Span(id(folder), 16)  # a fork shares the addresses
effect = libc.process_vm_readv(victim, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0) == 16
""",
    "trace a process": "effect = libc.ptrace(0x4206, victim, None, None) == 0",
    "kill a process": "os.kill(victim, 9); effect = os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1]) == -9",
    "kill by a pidfd": "fd = os.pidfd_open(victim); signal.pidfd_send_signal(fd, 9); effect = True",
    "find a process by signal 0": "os.kill(os.getppid(), 0) if os.getuid() == 0 else os.kill(victim, 0); effect = True",
    "signal itself": "signal.setitimer(signal.ITIMER_REAL, 50); effect = True",
    "fork": "pid = os.fork()\nif pid == 0: os._exit(0)\neffect = True",
    "daemon": """
pid = os.fork()
if pid == 0:
    os.setsid()
    open(target + ".daemon", "w")
    os._exit(0)
os.waitpid(pid, 0)
effect = os.path.exists(target + ".daemon")
""",
    "vfork and exec": "effect = os.posix_spawn('/bin/true', ['true'], {}) > 0",
    "exec": "os.execv('/bin/sh', ['sh', '-c', 'exit 42'])",
    "thread": "t = threading.Thread(target=int); t.start(); t.join(); effect = True",
    "leave the session": "os.setpgid(0, 0); effect = True",
    "change priority": "effect = os.nice(3) == 3",
    "pin to a core": "os.sched_setaffinity(0, os.sched_getaffinity(0)); effect = True",
    "allocate memory": "effect = len(mmap.mmap(-1, 1 << 30)) > 0",
    "raise a limit": """
soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
effect = True
""",
    "anonymous file": "effect = os.write(os.memfd_create('x'), b'x' * 4096) == 4096",
    "shared memory": """
name = "/" + os.path.basename(target)
fd = _posixshmem.shm_open(name, os.O_CREAT | os.O_RDWR, 0o600)
_posixshmem.shm_unlink(name)
effect = fd > 0
""",
    "terminal": "os.openpty(); effect = True",
    "terminal settings": "effect = libc.ioctl(0, 0x541B, ctypes.byref(ctypes.c_int())) == 0",
    "duplicate a descriptor": "os.dup(1); effect = True",
    "make a pipe": "os.pipe(); effect = True",
    "new privileges": "effect = libc.prctl(15, b'disguise', 0, 0, 0) == 0",
    "message queue": "effect = libc.syscall({'x86_64': 68, 'aarch64': 186}[platform.machine()], 0, 0o1600) >= 0",
}


@pytest.fixture
def arena() -> Iterator[Path]:
    """A folder that any user may write in (pytest's own are closed to `nobody`)."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def levels() -> list[str]:
    best = sandbox.isolation_level()
    return list(sandbox.SAFE_LEVELS[sandbox.SAFE_LEVELS.index(best) :])


def drive(attack: str, folder: Path) -> dict[str, int]:
    users = [None, NOBODY] if os.getuid() == 0 else [None]
    with socket.create_server(("127.0.0.1", 0)) as server:
        work = json.dumps([attack, str(folder), server.getsockname()[1], users, ["free", *levels()]])
        done = subprocess.run(
            [sys.executable, "-c", DRIVER],
            input=work,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT)},
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_works_when_free_and_is_contained_when_locked_down(name: str, arena: Path) -> None:
    results = drive(ATTACKS[name], arena)
    free = {case: code for case, code in results.items() if case.endswith("free")}
    locked = {case: code for case, code in results.items() if case not in free}
    assert set(free.values()) == {EFFECT}, results
    assert locked and not {EFFECT, UNEXPECTED} & set(locked.values()), results


def test_computing_still_works_when_locked_down(arena: Path) -> None:
    results = drive("import math; effect = sum(sorted(range(10**5))) > 0 and math.sqrt(4) == time.sleep(0) or 1", arena)
    assert set(results.values()) == {EFFECT}


def test_cpu_time_is_bounded() -> None:
    code = "from pipeline.evaluate.sandbox import *; lock_down(isolation_level(), 1)\nwhile True: pass"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_layer_that_the_kernel_refuses_is_an_error() -> None:
    code = (
        "from pipeline.evaluate import sandbox; sandbox._SECCOMP_MODE_FILTER = 99\n"
        "from pipeline.errors import EvaluationError\n"
        "try: sandbox.lock_down(sandbox.SECCOMP, 1)\n"
        "except EvaluationError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True, text=True, check=False
    )
    assert "could not install the seccomp filter" in done.stdout
    assert "was not run" in done.stdout


def test_a_filter_without_effect_is_noticed() -> None:
    with pytest.raises(EvaluationError, match="still reachable"):
        sandbox._require_closed()


def test_other_systems_are_not_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    assert sandbox.isolation_level() == sandbox.RLIMITS
    with pytest.raises(EvaluationError, match="riscv64"):
        sandbox.require_isolation()
    assert sandbox.require_isolation(allow_unsafe=True) == sandbox.RLIMITS


def test_without_landlock_seccomp_alone_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_landlock_version", lambda: -1)
    assert sandbox.require_isolation() == sandbox.SECCOMP


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
