from __future__ import annotations

import mmap
import os
from pathlib import Path

import psutil
import pytest

from pipeline import machine

GROUP = "a/b"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def v2(root: Path, **group: str) -> Path:
    inner = {f"sys/fs/cgroup/{GROUP}/{name.replace('_', '.', 1)}": text for name, text in group.items()}
    return tree(root, {"proc/self/cgroup": f"0::/{GROUP}", **inner})


def v1(root: Path, controller: str, path: str = GROUP, **group: str) -> Path:
    inner = {f"sys/fs/cgroup/{controller}/{path}/{controller}.{name}": text for name, text in group.items()}
    return tree(root, {"proc/self/cgroup": f"4:{controller}:/{GROUP}\n0::/", **inner})


def test_the_processor_has_a_name_where_linux_gives_one(tmp_path: Path) -> None:
    assert machine.processor(tmp_path) == ""
    root = tree(tmp_path, {"proc/cpuinfo": "processor\t: 0\nmodel name\t: A CPU @ 2 GHz\nflags\t: x"})
    assert machine.processor(root) == "A CPU @ 2 GHz"


def test_without_cgroups_the_system_decides(tmp_path: Path) -> None:
    assert machine.cores(tmp_path) == len(os.sched_getaffinity(0))
    total = psutil.virtual_memory().total
    assert 0 < machine.available_memory(tmp_path) <= total
    assert 0 < machine.available_memory() <= total


def test_memory_under_a_v2_limit_counts_file_cache_as_free_and_shared_memory_as_used(tmp_path: Path) -> None:
    statistics = "anon 30000\nfile 45000\nshmem 5000\ninactive_file 30000\nactive_file 10000"
    root = v2(tmp_path, memory_max="100000", memory_current="80000", memory_stat=statistics)
    assert machine.available_memory(root) == 100_000 - (80_000 - 40_000)


def test_memory_under_a_v1_limit_uses_the_hierarchical_totals(tmp_path: Path) -> None:
    statistics = "inactive_file 1\nactive_file 1\ntotal_inactive_file 20000\ntotal_active_file 5000"
    root = v1(tmp_path, "memory", limit_in_bytes="100000", usage_in_bytes="60000", stat=statistics)
    assert machine.available_memory(root) == 100_000 - (60_000 - 25_000)


def test_the_lowest_limit_on_the_way_up_decides(tmp_path: Path) -> None:
    root = v2(tmp_path, memory_max="max", memory_current="10")
    tree(root, {"sys/fs/cgroup/a/memory.max": "5000", "sys/fs/cgroup/a/memory.current": "2000"})
    assert machine.available_memory(root) == 3_000


def test_in_a_container_the_mount_stands_for_the_path_that_is_not_visible(tmp_path: Path) -> None:
    root = v1(tmp_path, "memory", path="", limit_in_bytes="7000", usage_in_bytes="1000")
    assert machine.available_memory(root) == 6_000


def test_more_used_than_allowed_is_nothing_left(tmp_path: Path) -> None:
    assert machine.available_memory(v2(tmp_path, memory_max="10", memory_current="20")) == 0


@pytest.mark.parametrize("limit", ["max", "", "nonsense"])
def test_a_limit_that_is_none_or_not_readable_limits_nothing(tmp_path: Path, limit: str) -> None:
    root = v2(tmp_path, memory_max=limit, memory_current="10", cpu_max=f"{limit} 100000")
    assert machine.available_memory(root) > 1 << 20
    assert machine.cores(root) == len(os.sched_getaffinity(0))


def test_a_cpu_quota_below_the_affinity_decides_and_is_rounded_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert machine.cores(v2(tmp_path / "half", cpu_max="50000 100000")) == 1
    assert machine.cores(v2(tmp_path / "more", cpu_max="250000 100000")) == 3
    assert machine.cores(v2(tmp_path / "many", cpu_max="1600000 100000")) == 8
    assert machine.cores(v1(tmp_path / "v1", "cpu", cfs_quota_us="150000", cfs_period_us="100000")) == 2
    assert machine.cores(v1(tmp_path / "none", "cpu", cfs_quota_us="-1", cfs_period_us="100000")) == 8


def test_private_memory_is_what_no_file_backs(tmp_path: Path) -> None:
    tree(tmp_path, {"proc/self/status": "Name:\tpython\nVmRSS:\t  999 kB\nRssAnon:\t  123 kB\nRssFile:\t  876 kB"})
    assert machine.resident_memory(root=tmp_path) == (123 * 1024, 876 * 1024)
    before, _ = machine.resident_memory()
    with mmap.mmap(
        -1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    ) as held:  # fresh pages, whatever this process has freed before
        held.write(os.urandom(1) * len(held))
        assert machine.resident_memory()[0] - before > len(held) // 2


def test_the_product_rate_is_a_rate() -> None:
    assert machine.product_rate() > 1e8


@pytest.mark.parametrize(("given", "share"), [("", 1), ("1", 0.25), ("3", 0.75), ("64", 1)])
def test_who_is_given_fewer_cores_shares_the_machine(given: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.CORES, given)
    monkeypatch.setattr(machine, "_all_cores", lambda root: 4)
    assert machine.share() == share


def test_nothing_takes_more_cores_than_this_process_may_use() -> None:
    """`os.cpu_count`, which a pool without a number asks too, counts all of the machine: 64 threads on 2 cores."""
    sources = {path: path.read_text(encoding="utf-8") for path in Path("pipeline").rglob("*.py")}
    assert [path for path, text in sources.items() if "PoolExecutor()" in text] == []
    asking = {str(path) for path, text in sources.items() if "cpu_count" in text}
    assert asking == {
        "pipeline/machine.py",
        "pipeline/prepack/emulator.py",
    }  # the latter lists the processors there are
