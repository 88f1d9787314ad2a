"""A group of processes under a hard limit of memory, without swap: Linux control groups, versions 1 and 2.

A group may be made by root, or by anybody inside a scope that systemd hands over (`_REMEDY`). The kernel charges to the
group what its processes allocate, and the file pages that they are the first to read. It takes file pages back when the
limit is reached, and kills a process when nothing is left to take.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import EvaluationError, ResourceError

_ROOT = Path("/")
_CLEAN_UP = 10.0  # seconds that killed processes get to leave their group
_REMEDY = (
    "Run the command as root where /sys/fs/cgroup is writable, or in a scope of your own: "
    "`systemd-run --user --scope -p Delegate=yes python -m benchmarks.phone …`."
)
# Moves itself into the group, then becomes the command: nothing is allocated or read outside.
_ENTER = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True)
class Files:
    """What a version of control groups calls things."""

    limit: str
    events: str  # has a line `oom_kill COUNT`
    peak: str
    no_swap: dict[str, str]  # file → value, "{limit}" is the limit; written where the kernel has the file


VERSIONS = {
    1: Files(
        "memory.limit_in_bytes",
        "memory.oom_control",
        "memory.max_usage_in_bytes",
        {"memory.memsw.limit_in_bytes": "{limit}", "memory.swappiness": "0"},
    ),
    2: Files("memory.max", "memory.events", "memory.peak", {"memory.swap.max": "0"}),
}


@dataclass(frozen=True)
class Group:
    """A control group of our own."""

    folder: Path
    files: Files

    def command(self, command: Sequence[str]) -> list[str]:
        """The same command, inside the group from its first instruction on."""
        return ["sh", "-c", _ENTER, str(self.folder / "cgroup.procs"), *command]

    @property
    def kills(self) -> int:
        """Processes of the group that the kernel killed because the limit was reached.

        Raises EvaluationError where the kernel does not count them (before Linux 4.13): a kill could not be told.
        """
        path = self.folder / self.files.events
        counts = dict(line.split() for line in path.read_text().splitlines())
        if "oom_kill" not in counts:
            raise EvaluationError(f"{path}: this kernel does not count kills (`oom_kill`); Linux 4.13 and later do.")
        return int(counts["oom_kill"])

    @property
    def peak_bytes(self) -> int | None:
        """The most that was charged at one moment, file pages included; None where the kernel does not say."""
        path = self.folder / self.files.peak
        return int(path.read_text()) if path.exists() else None


@contextmanager
def limited(limit: int, root: Path = _ROOT) -> Iterator[Group]:
    """A group that may hold `limit` bytes; its processes are killed and it is removed at the end.

    Args:
        root: where /proc and /sys hang; tests put files of their own there.
    Raises ResourceError where no group can be made.
    """
    group = _make(root)
    try:
        (group.folder / group.files.limit).write_text(str(limit))
        for name, value in group.files.no_swap.items():
            if (group.folder / name).exists():
                (group.folder / name).write_text(value.format(limit=limit))
        yield group
    finally:
        _remove(group.folder)


def _make(root: Path) -> Group:
    """A new group in the first place that lets us have one."""
    reasons = []
    for parent, version in _places(root):
        folder, files = parent / f"phone-{uuid.uuid4().hex[:12]}", VERSIONS[version]
        try:
            if version == 2:
                _hand_down(parent)
            folder.mkdir()
        except OSError as error:
            reasons.append(f"{error.filename or parent}: {error.strerror}")
            continue
        if (folder / files.limit).exists():
            return Group(folder, files)
        folder.rmdir()
        reasons.append(f"{parent}: its groups have no {files.limit}")
    why = "; ".join(reasons) or f"{root / 'sys/fs/cgroup'} has no memory controller"
    raise ResourceError(f"no group of processes with a limit of memory can be made here ({why}). {_REMEDY}")


def _places(root: Path) -> Iterator[tuple[Path, int]]:
    """(folder, version) where a group may be made: beside all others, then inside this process's own group."""
    mount = root / "sys/fs/cgroup"
    if (mount / "memory" / "cgroup.procs").exists():
        yield mount / "memory", 1
    if (mount / "cgroup.controllers").exists():
        yield mount, 2
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/") and (own := mount / line[4:]) != mount and own.is_dir():
                yield own, 2


def _hand_down(parent: Path) -> None:
    """Let the groups inside `parent` have limits of memory.

    A group of version 2 that holds processes cannot: they move into a group inside it first, which stays as long as
    they live.
    """
    control = parent / "cgroup.subtree_control"
    if "memory" in control.read_text().split():
        return
    inner = parent / "supervisor"
    inner.mkdir(exist_ok=True)
    for process in (parent / "cgroup.procs").read_text().split():
        (inner / "cgroup.procs").write_text(process)
    control.write_text("+memory")


def _remove(folder: Path) -> None:
    """Kill what is left in the group and remove it. A process that was just killed leaves it a little later."""
    end = time.monotonic() + _CLEAN_UP
    while True:
        for process in (folder / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        try:
            folder.rmdir()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
