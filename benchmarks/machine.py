"""The machine under a measurement: what it is, what its memory, cores and disk can do at most, what a command used.

    python -m benchmarks.machine

prints the description and the ceilings as JSON. Every figure is measured when asked for; nothing is cached. Linux only.
"""

from __future__ import annotations

import json
import os
import platform
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pipeline.errors import EvaluationError
from pipeline.files import disk_full, require_free_space
from pipeline.machine import cores, resident_memory
from pipeline.runtime.bandwidth import memory_bandwidth
from pipeline.runtime.pagecache import evict, regular_files

_BLOCK = 8 << 20  # bytes of one plain read or write
_INTERVAL = 50  # milliseconds between two looks at a watched command
_PACKAGES = ("onnxruntime", "onnxruntime-genai", "numpy", "numba")
_VECTORS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
_MATMUL = """
import sys, time, numpy as np
n = int(sys.argv[1])
a = np.random.default_rng(0).standard_normal((n, n), np.float32)
best = 1e9
for _ in range(6):
    start = time.perf_counter()
    a @ a
    best = min(best, time.perf_counter() - start)
print(2 * n**3 / best / 1e9)
"""


def largest_cache() -> int:
    """Bytes of the first core's largest cache; 0 where the kernel does not say."""
    found = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20}
    texts = (path.read_text(encoding="ascii").strip() for path in found)
    return max((int(text[:-1]) * units[text[-1]] for text in texts if text[-1] in units), default=0)


def describe() -> dict[str, Any]:
    """Processor, cores, vector extensions, largest cache and memory in bytes, kernel, package versions.

    Names neither the host nor any path.
    """
    fields = _cpuinfo(Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "cpu": fields.get("model name", platform.machine()),
        "architecture": platform.machine(),
        "cores": cores(),
        "vector_extensions": [name for name in _VECTORS if name in flags],
        "cache_bytes": largest_cache(),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _cpuinfo(text: str) -> dict[str, str]:
    """Fields of the first processor."""
    pairs = (line.partition(":") for line in text.split("\n\n", maxsplit=1)[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def busy_percent(seconds: float = 1.0) -> float:
    """Share of all cores that was busy while this process slept: other programs', which lower every rate."""
    return psutil.cpu_percent(seconds)


# --- ceilings: memory and arithmetic ---


def matmul_gflops(threads: int, size: int = 2048) -> float:
    """Billions of float32 operations per second of numpy's [size, size] product, the best of several.

    Runs in a process of its own: the linear-algebra library fixes its number of threads when it is loaded.
    """
    limits = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
    environment = os.environ | dict.fromkeys(limits, str(threads))
    command = [sys.executable, "-c", _MATMUL, str(size)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EvaluationError(f"the {size}×{size} product failed with status {done.returncode}: {last}")
    return float(done.stdout)


# --- ceilings: disk ---


@dataclass(frozen=True)
class IoFloor:
    """Seconds to read a source cold, then to write and sync an artifact, in plain large blocks and nothing else."""

    read_bytes: int
    read_seconds: float
    resident_bytes: int  # of the source before reading: more than a little means that the read was not cold
    written_bytes: int
    write_seconds: float

    @property
    def seconds(self) -> float:
        """Read, then write."""
        return self.read_seconds + self.write_seconds


def io_floor(source_folder: Path, bytes_to_write: int, folder: Path) -> IoFloor:
    """Read every file of `source_folder` once from the disk, then write `bytes_to_write` bytes below `folder` and sync.

    What was written is removed, and the source is evicted again, so that what is measured next starts cold too.
    Raises ResourceError when `folder` lacks the space.
    """
    require_free_space(folder, bytes_to_write, "measure how fast this disk writes")
    stayed = evict(source_folder)
    buffer = bytearray(_BLOCK)
    start = time.perf_counter()
    read = sum(_read(file, buffer) for file in regular_files(source_folder))
    read_seconds = time.perf_counter() - start
    evict(source_folder)
    return IoFloor(read, read_seconds, stayed, bytes_to_write, _write(folder, bytes_to_write))


def _read(path: Path, buffer: bytearray) -> int:
    """Read a file to its end; return its bytes."""
    total = 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total


def _write(folder: Path, size: int) -> float:
    """Seconds to write and sync `size` bytes that no file system can compress or leave out."""
    block = memoryview(np.random.default_rng(0).bytes(_BLOCK))
    folder.mkdir(parents=True, exist_ok=True)
    with disk_full("measure how fast this disk writes"), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        start = time.perf_counter()
        left = size
        while left:
            left -= file.write(block[: min(left, _BLOCK)])
        os.fsync(file.fileno())
        return time.perf_counter() - start


# --- what a command used ---


@dataclass(frozen=True)
class Usage:
    """What a command and all its descendants used. Peaks are of their sum at one moment, looked at every 50 ms.

    Mapped pages that two processes share are counted twice. `disk_growth_bytes` is the peak of allocated bytes below
    the watched folder over what was there at the start; a file with several links counts once.
    """

    status: int  # exit status; negative: the signal
    output: str  # standard output
    wall_seconds: float
    cpu_seconds: float  # user and system
    private_bytes: int  # peak RssAnon
    mapped_bytes: int  # peak RssFile
    disk_growth_bytes: int


def watch(
    command: Sequence[str],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    disk_root: Path | None = None,
) -> Usage:
    """Run `command` to its end and report what it used; its standard error passes through, its output is returned.

    Args:
        env: the whole environment; None for this process's.
        disk_root: folder whose growth is followed; None follows none.
    """
    disk = _DiskGrowth(disk_root)
    private = mapped = 0
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=env, cwd=cwd, stdout=output)
        try:
            ended = select.poll()
            descriptor = os.pidfd_open(process.pid)
            ended.register(descriptor, select.POLLIN)
            while not ended.poll(_INTERVAL):
                now = [resident_memory(pid) for pid in _tree(process.pid)]
                private = max(private, sum(kinds[0] for kinds in now))
                mapped = max(mapped, sum(kinds[1] for kinds in now))
                disk.look()
            wall = time.perf_counter() - start
            os.close(descriptor)
            _, code, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(code)  # reaped above, so Popen must not wait for it
        disk.look(last=True)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Usage(process.returncode, text, wall, used.ru_utime + used.ru_stime, private, mapped, disk.peak)


def _tree(pid: int) -> list[int]:
    """A process and its descendants that are alive."""
    found = [pid]
    for parent in found:
        try:
            tasks = list(Path(f"/proc/{parent}/task").iterdir())
            found += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
    return found


class _DiskGrowth:
    """Allocated bytes below a folder, over what they were at the start."""

    def __init__(self, root: Path | None):
        self.root = root
        self.peak = 0
        self._start = allocated(root) if root else 0
        self._next = 0.0

    def look(self, last: bool = False) -> None:
        """Update the peak. A large tree is looked at more rarely: walking it takes a twentieth of the time at most."""
        begin = time.perf_counter()
        if self.root is None or (begin < self._next and not last):
            return
        self.peak = max(self.peak, allocated(self.root) - self._start)
        end = time.perf_counter()
        self._next = end + 20 * (end - begin)


def allocated(folder: Path) -> int:
    """Allocated bytes of all files below `folder`, each inode once; what disappears meanwhile is left out."""
    found: dict[tuple[int, int], int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(parent, name))
            except FileNotFoundError:
                continue
            found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(found.values())


def main() -> None:
    """Print the description and the ceilings."""
    counts = sorted({1, cores()})
    report = {
        "machine": describe(),
        "memory_bytes_per_second": {count: memory_bandwidth(count) for count in counts},
        "matmul_gflops": {count: matmul_gflops(count) for count in counts},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
