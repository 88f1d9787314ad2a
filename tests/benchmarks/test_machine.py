"""Ceilings are real numbers, and a watched command's figures are what it did."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import machine
from pipeline.errors import ResourceError
from pipeline.runtime.pagecache import resident

MEBI = 1 << 20


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_the_description_names_no_host_and_no_path() -> None:
    found = machine.describe()
    text = json.dumps(found)
    assert found["cores"] >= 1 and found["memory_bytes"] > 1 << 28 and found["packages"]["numpy"]
    assert platform.node() not in text.split('"') and str(Path.home()) not in text and str(Path.cwd()) not in text


def test_the_first_processor_is_described() -> None:
    text = "processor\t: 0\nmodel name\t: One @ 2: fast\nflags\t\t: avx2 fma\n\nprocessor\t: 1\nmodel name\t: Two\n"
    fields = machine._cpuinfo(text)
    assert (fields["model name"], fields["flags"]) == ("One @ 2: fast", "avx2 fma")


def test_a_busy_core_is_seen() -> None:
    burning = subprocess.Popen(python("while True: pass"))
    try:
        assert machine.busy_percent(0.5) > 50 / (os.cpu_count() or 1)  # half of one core
    finally:
        burning.kill()
        burning.wait()


def test_the_matrix_product_is_what_a_machine_can_have() -> None:
    assert 0.1 < machine.matmul_gflops(1, 256) < 1e5


def test_the_floor_reads_and_writes_what_it_says_and_leaves_nothing(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "inner").mkdir(parents=True)
    (source / "a").write_bytes(os.urandom(9 * MEBI))
    (source / "inner" / "b").write_bytes(b"12345")
    os.link(source / "a", source / "again")  # the same bytes are read once
    floor = machine.io_floor(source, 17 * MEBI + 3, target)
    assert (floor.read_bytes, floor.written_bytes, floor.resident_bytes) == (9 * MEBI + 5, 17 * MEBI + 3, 0)
    assert floor.read_seconds > 0 and floor.write_seconds > 0
    assert floor.seconds == floor.read_seconds + floor.write_seconds
    assert list(target.iterdir()) == [] and resident(source / "a") == 0


def test_a_floor_that_does_not_fit_the_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"not enough disk to measure .* 1,152,921,504,606,846,976 bytes needed"):
        machine.io_floor(tmp_path, 1 << 60, tmp_path)


def test_what_a_grandchild_allocates_is_seen() -> None:
    grandchild = "import time; block = bytearray(200 << 20); block[::4096] = b'x' * len(block[::4096]); time.sleep(0.4)"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}]); print('done')"
    used = machine.watch(python(script))
    assert (used.status, used.output) == (0, "done\n")
    assert 200 * MEBI <= used.private_bytes < 300 * MEBI
    assert used.mapped_bytes < 100 * MEBI and used.disk_growth_bytes == 0
    assert used.cpu_seconds > 0 and used.wall_seconds > 0.4


def test_mapped_pages_are_not_private(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(32 * MEBI))
    script = (
        f"import mmap, time; file = open({str(path)!r}, 'rb')\n"
        "m = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "sum(m[i] for i in range(0, len(m), 4096)); time.sleep(0.3)"
    )
    used = machine.watch(python(script))
    assert used.mapped_bytes >= 32 * MEBI > used.private_bytes


def test_processor_time_of_a_grandchild_counts() -> None:
    burn = "import time\nwhile time.process_time() < 0.4: pass"
    used = machine.watch(python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"))
    assert 0.4 <= used.cpu_seconds <= 2 * used.wall_seconds  # two processes, of one thread each


def test_disk_that_was_used_and_freed_is_seen(tmp_path: Path) -> None:
    (tmp_path / "before").write_bytes(os.urandom(4 * MEBI))
    script = (
        "import os, time\n"
        "with open('f', 'wb') as f: f.write(os.urandom(24 << 20)); f.flush(); os.fsync(f.fileno())\n"
        "os.link('f', 'g'); time.sleep(0.5); os.remove('f'); os.remove('g')\n"
    )
    used = machine.watch(python(script), cwd=tmp_path, disk_root=tmp_path)
    assert 24 * MEBI <= used.disk_growth_bytes < 25 * MEBI  # linked twice, stored once


def test_environment_and_status_are_passed_on() -> None:
    used = machine.watch(python("import os; print(os.environ['WORD']); raise SystemExit(3)"), env={"WORD": "here"})
    assert (used.status, used.output) == (3, "here\n")
    assert machine.watch(python("import os; os.kill(os.getpid(), 9)")).status == -signal.SIGKILL
