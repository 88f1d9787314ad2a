"""Give up every right a pure computation does not need, before running code that a model wrote.

`lock_down` is called inside the process that will run the code, after everything it may need has been imported:

- a seccomp allow-list leaves memory, clocks, sleeping, exit, and reads and writes on descriptors that are already open;
  files, sockets, processes, threads, signals, ptrace, terminals and namespaces all fail with EPERM, for root too;
- Landlock, where the kernel has it, denies the file system, TCP and signals a second time, by another mechanism;
- resource limits bound memory, CPU time, file size and core dumps (RLIMIT_NPROC does nothing for uid 0, hence seccomp).

Because no file can be opened at any level, a verdict does not depend on whether the kernel has Landlock.

Not covered here: wall time, output volume and inherited descriptors, which are the parent's business
(`pipeline.evaluate.referee`); side channels and bugs of the kernel behind the calls that stay allowed.

Sources: Linux seccomp(2), landlock(7), prctl(2), linux/filter.h; call numbers from the kernel's asm/unistd_64.h and
asm-generic/unistd.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import sys

from pipeline.errors import EvaluationError

LANDLOCK = "landlock+seccomp+rlimits"
SECCOMP = "seccomp+rlimits"
RLIMITS = "rlimits"
SAFE_LEVELS = (LANDLOCK, SECCOMP)

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

_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # classic BPF: LD|W|ABS, JMP|JEQ|K, RET|K
_KILL, _ALLOW, _DENY = 0x80000000, 0x7FFF0000, 0x00050001  # kill the process; allow; fail with EPERM
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE = 0, 4  # bytes into struct seccomp_data


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def isolation_level() -> str:
    """The strongest level this machine offers: one of `LANDLOCK`, `SECCOMP`, `RLIMITS`; only `SAFE_LEVELS` contain."""
    if sys.platform != "linux" or platform.machine() not in _ALLOWED:
        return RLIMITS
    if _libc().prctl(_PR_GET_SECCOMP, 0, 0, 0, 0) < 0:
        return RLIMITS
    return LANDLOCK if _landlock_version() > 0 else SECCOMP


def require_isolation(allow_unsafe: bool = False) -> str:
    """The level to run generated code at.

    Raises:
        EvaluationError: this machine cannot contain hostile code, and `allow_unsafe` is false.
    """
    level = isolation_level()
    if level not in SAFE_LEVELS and not allow_unsafe:
        raise EvaluationError(
            f"generated code was not run: this machine ({sys.platform}, {platform.machine()}) offers only {level!r}, "
            f"which lets it reach files, the network and other processes. Run the evaluation on Linux (x86-64 or "
            f"arm64) with seccomp filters, or allow unsafe execution inside a throw-away virtual machine."
        )
    return level


def lock_down(level: str, cpu_seconds: int) -> None:
    """Confine this process for the rest of its life; the caller must be single-threaded.

    Args:
        level: what to apply, as returned by `isolation_level`.
        cpu_seconds: CPU time after which the kernel kills the process.

    Raises:
        EvaluationError: the kernel refused a layer of `level`; the process must then run nothing hostile.
    """
    _set_limits(cpu_seconds)
    if level == RLIMITS:
        return
    _control("die with the parent", _PR_SET_PDEATHSIG, _SIGKILL)
    _control("give up new privileges", _PR_SET_NO_NEW_PRIVS, 1)
    if level == LANDLOCK:
        _apply_landlock()
    _apply_seccomp()
    _require_closed()


def _set_limits(cpu_seconds: int) -> None:
    import resource  # absent on Windows, where isolation_level already says that nothing is safe

    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: MEMORY_LIMIT,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    try:
        for limit, value in limits.items():
            resource.setrlimit(limit, (value, value))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"the sandbox could not set resource limit {limit} to {value}: {error}") from error


def _apply_landlock() -> None:
    """Enter a Landlock domain without a single rule: whatever it governs is denied."""
    version = _landlock_version()
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
    """A last look from inside: the file system must be out of reach."""
    with contextlib.suppress(PermissionError):
        os.stat("/")
        raise EvaluationError(
            "the sandbox was applied without an error, yet a file is still reachable from inside it; refusing to run "
            "generated code. Run the evaluation on a Linux kernel with seccomp filters (CONFIG_SECCOMP_FILTER)."
        )


def _landlock_version() -> int:
    """Landlock's ABI version, or a negative number where the kernel has none."""
    return _libc().syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_CREATE_RULESET_VERSION)


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
