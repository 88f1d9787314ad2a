"""What this machine has for us: cores, memory, and how fast it multiplies.

A container's limits count as the machine's: memory and CPU quotas of cgroups v1 and v2. `root` is where /proc and /sys
hang; tests put files of their own there.
"""

from __future__ import annotations

import math
import os
import platform
import re
import timeit
from collections.abc import Iterator
from pathlib import Path

CORES = "OMP_NUM_THREADS"
"""The environment variable that gives a process fewer cores than it may use; Ray sets it for its workers."""
_ROOT = Path("/")
_KERNEL_FLAGS = {"avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "sve"}


def cores(root: Path = _ROOT) -> int:
    """CPU cores that this process may use: the lowest of its affinity, its cgroup's quota (rounded up) and `CORES`."""
    given = os.environ.get(CORES, "")
    return max(1, min([_all_cores(root), *([int(given)] if given.isdigit() else [])]))


def share(root: Path = _ROOT) -> float:
    """What `CORES` leaves this process of the cores that it could use without: others have the rest, and its memory."""
    return cores(root) / _all_cores(root)


def _all_cores(root: Path) -> int:
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *(math.ceil(quota) for quota in _cpu_quotas(root))]))


def available_memory(root: Path = _ROOT) -> int:
    """Bytes of memory that can be taken without swapping: what the system has, or what the cgroup's limit leaves.

    File cache inside the limit counts as free: the kernel drops it before it kills.
    """
    import psutil

    return max(0, min([psutil.virtual_memory().available, *_memory_left(root)]))


def processor(root: Path = _ROOT) -> str:
    """The processor's name as Linux gives it; "" where it does not."""
    found = re.search(r"^model name\s*: (.*)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else ""


def kernel_class(root: Path = _ROOT) -> str:
    """What decides which kernels numerical libraries pick, such as `x86_64 avx2 avx512f`.

    In one class equal work gives equal bytes. OPENBLAS_CORETYPE picks for OpenBLAS, so it is part of it.
    """
    found = re.search(r"^(?:flags|Features)\s*: (.*)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    flags = sorted(_KERNEL_FLAGS & set(found[1].split())) if found else []
    return " ".join([platform.machine(), *flags, os.environ.get("OPENBLAS_CORETYPE", "")]).strip()


def resident_memory(pid: int | str = "self", root: Path = _ROOT) -> tuple[int, int]:
    """(private, mapped) bytes that a process has in memory; zeros once it has ended.

    Private memory is backed by no file (RssAnon): the kernel cannot drop it. Mapped memory is a file's (RssFile,
    RssShmem), the libraries' included.
    """
    status = _read(root / "proc" / str(pid) / "status")
    sizes = {name: int(kib) * 1024 for name, kib in re.findall(r"^Rss(\w+):\s*(\d+) kB", status, re.MULTILINE)}
    return sizes.get("Anon", 0), sizes.get("File", 0) + sizes.get("Shmem", 0)


def product_rate() -> float:
    """Floating-point operations per second in float32 matrix products on all cores, measured for some 0.2 seconds."""
    import numpy as np

    size = 1024
    left = np.ones((size, size), np.float32)
    left @ left  # wakes the threads
    products, spent = timeit.Timer(lambda: left @ left).autorange()
    return products * 2 * size**3 / spent


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Cores that each enclosing cgroup grants."""
    for group in _groups(root, "cpu"):
        limit = _read(group / "cpu.max").split()
        if not limit:
            limit = [_read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        if len(limit) == 2 and all(value.isdigit() for value in limit) and int(limit[1]):
            yield int(limit[0]) / int(limit[1])


def _memory_left(root: Path) -> Iterator[int]:
    """Bytes under the limit of each enclosing cgroup, reclaimable file cache not counted as used."""
    for group in _groups(root, "memory"):
        limit = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
        used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            yield int(limit) - max(0, int(used) - _file_cache(_read(group / "memory.stat")))


def _file_cache(statistics: str) -> int:
    """Bytes of file pages on the reclaim lists; `total_` is v1's name for "with all groups inside"."""
    values = dict(line.split(" ", 1) for line in statistics.splitlines() if " " in line)
    names = ("inactive_file", "active_file")
    return sum(int(values.get(f"total_{name}") or values.get(name) or 0) for name in names)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's cgroup and of those around it. A limit may be set on any of them.

    Inside a container the listed path may not be visible; the mount's own folder then stands for the container.
    """
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = mount  # v2; beside v1 it holds no memory or CPU files, and reading those finds nothing
        elif controller in controllers.split(","):
            top = mount / controller
        else:
            continue
        folder = top / path.strip("/")
        yield from (group for group in (folder, *folder.parents) if group.is_relative_to(top) and group.is_dir())


def _read(path: Path) -> str:
    """Content of a small file without its last newline; "" where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
