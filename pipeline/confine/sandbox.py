"""Give up every right a pure computation does not need, before running code that a model wrote.

`lock_down` is called inside the process that will run the code, after everything it may need has been imported. What
it does depends on the level that `pipeline.confine.isolation` chose for this machine:

- a seccomp allow-list leaves memory, clocks, sleeping, exit, and reads and writes on descriptors that are already open;
  files, sockets, processes, threads, signals, ptrace, terminals and namespaces all fail with EPERM, for root too;
- Landlock, where the kernel has it, denies the file system, TCP and signals a second time, by another mechanism;
- without seccomp, a wrapper around the process (bubblewrap's namespaces) keeps files, network and other processes out
  of sight, and root becomes `nobody`, whom RLIMIT_NPROC keeps from making processes and threads;
- resource limits bound memory, CPU time, file size and core dumps, and let no new descriptor be opened, whatever it
  would be of (a file, a socket, anonymous memory, io_uring).

Because no file can be opened at any level, a verdict does not depend on the level.

Not covered here: wall time, output volume and inherited descriptors, which are the parent's business
(`pipeline.confine.referee`); side channels and bugs of the kernel behind the calls that stay allowed, which are few
under seccomp and most of them under a wrapper.

Sources: Linux seccomp(2), landlock(7), prctl(2), linux/filter.h; call numbers from the kernel's asm/unistd_64.h and
asm-generic/unistd.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import socket
import struct
import sys

from pipeline.errors import EvaluationError

LANDLOCK = "landlock+seccomp+rlimits"
SECCOMP = "seccomp+rlimits"
BUBBLEWRAP = "bubblewrap+rlimits"
RLIMITS = "rlimits"

MEMORY_LIMIT = 512 << 20  # bytes of address space; the interpreter itself maps about 30 MB

# What CPython calls while it computes, by machine: call numbers differ between the two.
_ALLOWED = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12,
        "rt_sigprocmask": 14, "rt_sigreturn": 15, "sched_yield": 24, "mremap": 25, "madvise": 28, "nanosleep": 35,
        "getpid": 39, "exit": 60, "gettimeofday": 96, "gettid": 186, "time": 201, "futex": 202, "restart_syscall": 219,
        "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "getrandom": 318,
    },
    "aarch64": {
        "close": 57, "lseek": 62, "read": 63, "write": 64, "exit": 93, "exit_group": 94, "futex": 98,
        "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "sched_yield": 124,
        "restart_syscall": 128, "rt_sigprocmask": 135, "rt_sigreturn": 139, "gettimeofday": 169, "getpid": 172,
        "gettid": 178, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233,
        "getrandom": 278,
    },
}  # fmt: skip
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_PR_GET_SECCOMP, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _PR_SET_PDEATHSIG = 21, 22, 38, 1
_SECCOMP_MODE_FILTER = 2
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
_SIGKILL = 9
_NOBODY = 65534

_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # classic BPF: LD|W|ABS, JMP|JEQ|K, RET|K
_KILL, _ALLOW, _DENY = 0x80000000, 0x7FFF0000, 0x00050001  # kill the process; allow; fail with EPERM
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE = 0, 4  # bytes into struct seccomp_data


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def system_calls_known() -> bool:
    """Whether there is a seccomp allow-list for this machine, and a kernel that takes it."""
    known = sys.platform == "linux" and platform.machine() in _ALLOWED
    return known and _libc().prctl(_PR_GET_SECCOMP, 0, 0, 0, 0) >= 0


def landlock_version() -> int:
    """Landlock's ABI version, or a negative number where the kernel has none."""
    return _libc().syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_CREATE_RULESET_VERSION)


def lock_down(level: str, cpu_seconds: int) -> None:
    """Confine this process for the rest of its life; the caller must be single-threaded.

    Args:
        level: what to apply, as returned by `isolation.isolation_level`. At a level with a wrapper the process must
            have been started by `isolation.command`.
        cpu_seconds: CPU time after which the kernel kills the process.

    Raises:
        EvaluationError: the kernel refused a layer of `level`, or something is still within reach; the process must
            then run nothing hostile.
    """
    if level in (LANDLOCK, SECCOMP):
        _control("die with the parent", _PR_SET_PDEATHSIG, _SIGKILL)
        _control("give up new privileges", _PR_SET_NO_NEW_PRIVS, 1)
        if level == LANDLOCK:
            _apply_landlock()
        _set_limits(cpu_seconds)
        _apply_seccomp()
        _require_closed()
        return
    _give_up_root()
    if level != RLIMITS:
        _require_closed()  # before the limits, which would refuse for the wrapper
    _set_limits(cpu_seconds)


def _set_limits(cpu_seconds: int) -> None:
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: MEMORY_LIMIT,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: 0,  # what is open stays open
    }
    if sys.platform == "darwin":
        del limits[resource.RLIMIT_AS]  # refused there: the shared cache of libraries alone is larger
    try:
        for limit, value in limits.items():
            resource.setrlimit(limit, (value, value))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"the sandbox could not set resource limit {limit} to {value}: {error}") from error


def _give_up_root() -> None:
    """Become `nobody`, for whom RLIMIT_NPROC holds and every file is another's."""
    if os.getuid() != 0:
        return
    try:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    except OSError as error:
        raise EvaluationError(f"the sandbox could not become user {_NOBODY} (nobody): {error}") from error


def _apply_landlock() -> None:
    """Enter a Landlock domain without a single rule: whatever it governs is denied."""
    version = landlock_version()
    files = (1 << 13) - 1
    for since, bit in ((2, 13), (3, 14), (5, 15)):  # refer, truncate, device ioctl
        files |= (version >= since) << bit
    network = 0b11 if version >= 4 else 0  # bind, connect
    scopes = 0b11 if version >= 6 else 0  # abstract sockets, signals
    attributes = struct.pack("=QQQ", files, network, scopes)
    ruleset = _libc().syscall(_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        raise _refused("create a Landlock ruleset")
    if _libc().syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) != 0:
        raise _refused("enter the Landlock ruleset")
    os.close(ruleset)


def _apply_seccomp() -> None:
    code = _filter(platform.machine())
    program = _FilterProgram(len(code) // 8, code)
    _control("install the seccomp filter", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program))


def _filter(machine: str) -> bytes:
    """The allow-list as a classic BPF program (8 bytes per instruction).

    The architecture is checked first, since another one's call numbers mean other calls; x32 numbers match nothing.
    """
    instructions = [
        (_LOAD, 0, 0, _OFFSET_ARCHITECTURE),
        (_JUMP_IF_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _OFFSET_NUMBER),
    ]
    for number in sorted(_ALLOWED[machine].values()):
        instructions += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    instructions.append((_RETURN, 0, 0, _DENY))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)


def _require_closed() -> None:
    """A last look from inside: the file system and the network must be out of reach."""
    for what, reach in (("a file", lambda: os.stat("/etc")), ("the network", _reach_network)):
        with contextlib.suppress(OSError):
            reach()
            raise EvaluationError(
                f"the sandbox was applied without an error, yet {what} is still reachable from inside it; refusing to "
                f"run generated code. Run the evaluation on a Linux kernel with seccomp filters "
                f"(CONFIG_SECCOMP_FILTER)."
            )


def _reach_network() -> None:
    """Find a route to an address that RFC 5737 reserves for examples; a datagram's connect sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))


def _control(purpose: str, option: int, *arguments: object) -> None:
    padded = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc().prctl(option, *padded) != 0:
        raise _refused(purpose)


def _refused(purpose: str) -> EvaluationError:
    code = ctypes.get_errno()
    return EvaluationError(
        f"the sandbox could not {purpose}: {os.strerror(code)} (errno {code}). Generated code was not run. A container "
        f"runtime's own seccomp profile may forbid this; allow prctl, seccomp and landlock calls in it."
    )


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
