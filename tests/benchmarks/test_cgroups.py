"""Limits that the kernel enforces, where it lets us; version 2 and refusals on files of our own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import cgroups
from pipeline.errors import EvaluationError, ResourceError

MEBI = 1 << 20
TAKE = "import sys; held = b'x' * (int(sys.argv[1]) << 20)"


@pytest.fixture
def group() -> Iterator[cgroups.Group]:
    """A group of 128 MiB."""
    try:
        with cgroups.limited(128 * MEBI) as made:
            yield made
    except ResourceError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("mebibytes", "status", "kills"), [(64, 0, 0), (192, -9, 1)])
def test_a_process_is_killed_when_its_memory_does_not_fit(
    group: cgroups.Group, mebibytes: int, status: int, kills: int
) -> None:
    command = group.command([sys.executable, "-c", TAKE, str(mebibytes)])
    assert subprocess.run(command, check=False).returncode == status
    assert group.kills == kills
    assert group.peak_bytes is None or min(mebibytes, 120) * MEBI < group.peak_bytes <= 128 * MEBI


def test_the_group_goes_with_all_its_processes() -> None:
    with pytest.raises(KeyboardInterrupt), cgroups.limited(128 * MEBI) as group:
        process = subprocess.Popen(group.command(["sh", "-c", "echo in; sleep 100"]), stdout=subprocess.PIPE)
        assert process.stdout and process.stdout.readline() == b"in\n"
        raise KeyboardInterrupt
    assert not group.folder.exists()
    assert process.wait() == -9


# --- files of our own ---


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root whose control groups are version 2 and hold what the kernel would put there."""
    mount = tmp_path / "sys/fs/cgroup"
    make = Path.mkdir

    def mkdir(self: Path, *arguments: object, **options: object) -> None:
        make(self, *arguments, **options)
        if mount in self.parents:
            (self / "cgroup.procs").touch()
            if "memory" in (self.parent / "cgroup.subtree_control").read_text():
                for name in ("memory.max", "memory.swap.max", "memory.events"):
                    (self / name).write_text("oom_kill 0\n")

    (mount / "app.scope").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/app.scope\n")
    for folder, processes in ((mount, "1\n"), (mount / "app.scope", "17\n")):
        (folder / "cgroup.controllers").write_text("cpu memory\n")
        (folder / "cgroup.procs").write_text(processes)
        (folder / "cgroup.subtree_control").write_text("")
    (mount / "cgroup.subtree_control").write_text("cpu memory\n")
    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "rmdir", shutil.rmtree)
    return tmp_path


def test_version_2_gets_a_limit_and_no_swap(root: Path) -> None:
    with cgroups.limited(1000, root) as group:
        assert group.folder.parent == root / "sys/fs/cgroup"
        assert (group.folder / "memory.max").read_text() == "1000"
        assert (group.folder / "memory.swap.max").read_text() == "0"
        assert group.kills == 0 and group.peak_bytes is None
        (group.folder / "memory.events").write_text("low 0\noom 3\noom_kill 1\n")
        assert group.kills == 1
        (group.folder / "memory.events").write_text("low 0\n")
        with pytest.raises(EvaluationError, match=r"does not count kills .* Linux 4\.13"):
            group.kills  # noqa: B018
    assert not group.folder.exists()


def test_a_scope_of_our_own_lets_its_processes_move_first(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody but root may make groups beside all others."""
    mount = root / "sys/fs/cgroup"
    (mount / "cgroup.subtree_control").unlink()
    scope = mount / "app.scope"
    with cgroups.limited(1000, root) as group:
        # The kernel would list what it can hand down, without the sign.
        assert (scope / "cgroup.subtree_control").read_text() == "+memory"
        assert (scope / "supervisor" / "cgroup.procs").read_text() == "17"
        assert group.folder.parent == scope


def test_a_machine_without_groups_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with (
        pytest.raises(ResourceError, match=r"has no memory controller.*as root.*systemd-run --user --scope"),
        cgroups.limited(1000, tmp_path),
    ):
        pass
