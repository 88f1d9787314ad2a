"""Files are whole or absent, and a full disk is a ResourceError that leaves nothing behind."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
from pathlib import Path

import pytest

from pipeline import files
from pipeline.errors import ResourceError


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_atomic_file_replaces_only_on_success(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    files.write_bytes(target, b"first")
    with pytest.raises(KeyboardInterrupt), files.atomic_file(target) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"first"
    files.write_bytes(target, b"second")
    assert target.read_bytes() == b"second"
    assert target.stat().st_mode & 0o777 == 0o644
    assert names(target.parent) == ["file"]


def test_json_is_the_same_bytes_for_equal_values(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a", {"b": 1, "a": "ế"})
    files.write_json(tmp_path / "b", {"a": "ế", "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert files.read_json(tmp_path / "a") == {"a": "ế", "b": 1}


def test_atomic_directory_replaces_only_on_success(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with files.atomic_directory(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(ValueError, match="stop"), files.atomic_directory(target) as folder:
        (folder / "b").write_text("2")
        raise ValueError("stop")
    assert names(target) == ["a"]
    with files.atomic_directory(target) as folder:
        (folder / "c").write_text("3")
    assert names(target) == ["c"]
    assert names(tmp_path) == ["out"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_directory_that_cannot_be_replaced_keeps_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    with files.atomic_directory(target) as folder:
        (folder / "old").write_text("1")
    real = os.replace

    def refuse(source: Path, destination: Path) -> None:
        if Path(destination) == target and (Path(source) / "new").exists():
            raise OSError(errno.EIO, "input/output error")
        real(source, destination)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="input/output"), files.atomic_directory(target) as folder:
        (folder / "new").write_text("2")
    assert names(target) == ["old"]
    assert names(tmp_path) == ["out"]


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_is_a_resource_error(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(ResourceError, match="disk filled up while trying to write"):
        files.write_bytes(tmp_path / "file", b"x")
    with pytest.raises(ResourceError, match="disk filled up"), files.atomic_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert names(tmp_path) == []


def test_writing_inside_the_block_may_find_the_disk_full(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="Free space"), files.atomic_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        full_disk()
    assert names(tmp_path) == []


def test_a_read_only_disk_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> tuple[int, str]:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path))

    monkeypatch.setattr(files.tempfile, "mkstemp", refuse)
    with pytest.raises(ResourceError, match=r"not allowed to write .*mounted read-only"):
        files.write_bytes(tmp_path / "file", b"x")


def test_other_errors_keep_their_type(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.atomic_directory(tmp_path / "out") as folder:
        (folder / "absent").read_bytes()


def test_disk_of_a_path_that_does_not_exist_yet_is_that_of_its_folder(tmp_path: Path) -> None:
    later = tmp_path / "not" / "there"
    assert files.file_system(later) == files.file_system(tmp_path) == tmp_path.stat().st_dev
    assert files.free_disk(later) > 0


def test_require_free_space_states_the_numbers(tmp_path: Path) -> None:
    files.require_free_space(tmp_path / "not" / "yet", 1, "test")
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(ResourceError, match=f"{free * 2:,} bytes needed"):
        files.require_free_space(tmp_path, free * 2, "test")


def test_links_share_bytes_and_follow_symlinks(tmp_path: Path) -> None:
    source, symlink, target = tmp_path / "source", tmp_path / "symlink", tmp_path / "deep" / "target"
    source.write_bytes(b"weights")
    symlink.symlink_to(source)
    files.link_or_copy(symlink, target)
    assert target.samefile(source)
    assert not target.is_symlink()
    files.link_or_copy(source, target)  # again: the link is already there
    files.link_or_copy(source, source)  # onto itself: nothing is lost
    assert source.read_bytes() == b"weights"
    assert names(target.parent) == ["target"]


def test_links_across_disks_are_whole_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_disk(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"weights")
    monkeypatch.setattr(os, "link", other_disk)
    files.link_or_copy(source, target)
    assert target.read_bytes() == b"weights"
    assert not target.samefile(source)
    monkeypatch.setattr(shutil, "copyfileobj", full_disk)
    with pytest.raises(ResourceError):
        files.link_or_copy(source, tmp_path / "second")
    assert names(tmp_path) == ["source", "target"]


def test_hashes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000  # more than one chunk
    (tmp_path / "file").write_bytes(data)
    expected = hashlib.sha256(data).hexdigest()
    assert files.sha256_of(tmp_path / "file") == expected
    target = io.BytesIO()
    assert files.copy_stream(io.BytesIO(data), target) == expected
    assert target.getvalue() == data


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    left, other = tmp_path / ".q4.abc" / "part", tmp_path / ".q4_k_m.abc" / "part"
    for file in (left, other):
        file.parent.mkdir()
        file.write_bytes(b"half")
    with files.atomic_directory(tmp_path / "q4") as folder:
        (folder / "part").write_bytes(b"whole")
    assert not left.parent.exists()
    assert other.exists(), "another variant's unfinished work is not this one's to remove"


def test_a_scratch_directory_starts_empty_and_goes_away(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "old").write_bytes(b"left by a killed process")
    with files.scratch_directory(tmp_path / "scratch") as folder:
        assert list(folder.iterdir()) == []
    assert not folder.exists()
