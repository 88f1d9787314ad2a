"""The store's laws: one blob per content, whole or absent, read-only, linked and never copied."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.checkpoint import blobs as store_module
from pipeline.checkpoint.blobs import STORE, LockedFile, Store, checked_name, disk_errors
from pipeline.checkpoint.chunks import CHUNK, SUFFIX, Chunks, Digest
from pipeline.errors import ResourceError, SourceError

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
W = LockedFile("w", len(CONTENT), DIGEST)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def everything(store: Store) -> list[Path]:
    return [path for path in store.root.rglob("*") if path.is_file()]


def spoil(blob: Path) -> None:
    """Change the last byte; the length stays."""
    blob.chmod(0o644)
    content = blob.read_bytes()
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_add_from_stream_and_file(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    with open(source, "rb") as stream:
        assert store.add(stream, "w") == W
    assert store.add(io.BytesIO(CONTENT), "w", DIGEST) == W
    assert store.path(DIGEST).read_bytes() == CONTENT
    assert everything(store) == [store.root / "sha256" / DIGEST[:2] / DIGEST]
    assert store.path(DIGEST).stat().st_mode & 0o777 == 0o444
    assert source.read_bytes() == CONTENT and source.stat().st_nlink == 1  # the user's file is copied, not linked


def test_adopt_moves_without_a_second_copy(store: Store) -> None:
    path = store.workspace("job") / "file"
    path.write_bytes(CONTENT)
    inode = path.stat().st_ino
    store.adopt(path, "w", DIGEST)
    assert not path.exists()
    assert store.path(DIGEST).stat().st_ino == inode


def test_adding_again_keeps_the_inode_that_graphs_are_linked_to(store: Store) -> None:
    store.add(io.BytesIO(CONTENT), "w")
    inode = store.path(DIGEST).stat().st_ino
    store.add(io.BytesIO(CONTENT), "other name")
    assert store.path(DIGEST).stat().st_ino == inode


def test_adding_again_repairs_a_damaged_blob(store: Store) -> None:
    store.add(io.BytesIO(CONTENT), "w")
    spoil(store.path(DIGEST))
    store.add(io.BytesIO(CONTENT), "w")
    assert store.path(DIGEST).read_bytes() == CONTENT


def test_wrong_hash_leaves_nothing(store: Store) -> None:
    with pytest.raises(SourceError, match=f"w: wrong bytes. Expected sha256 {'0' * 64}, got {DIGEST}"):
        store.add(io.BytesIO(CONTENT), "w", "0" * 64)
    assert everything(store) == []
    assert not store.has(DIGEST)


def test_refused_content_stays_where_it_is(store: Store) -> None:
    path = store.workspace("job") / "file"
    path.write_bytes(CONTENT)
    with pytest.raises(SourceError, match="wrong bytes"):
        store.adopt(path, "w", "0" * 64)
    assert not store.has(DIGEST) and path.exists()


def test_a_failing_stream_leaves_nothing(store: Store) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(SourceError, match="Input/output error"):
        store.add(Broken(), "w")
    assert everything(store) == []


def test_has_compares_the_size(store: Store) -> None:
    store.add(io.BytesIO(CONTENT), "w")
    assert store.has(DIGEST) and store.has(DIGEST, len(CONTENT))
    assert not store.has(DIGEST, len(CONTENT) + 1)
    assert not store.has("0" * 64)


def test_absent_blob_names_the_command(store: Store) -> None:
    with pytest.raises(SourceError, match=r"python -m pipeline download MODEL"):
        store.path(DIGEST)


def test_link_makes_hard_links_of_real_files(store: Store, tmp_path: Path) -> None:
    store.add(io.BytesIO(CONTENT), "w")
    store.link([W, replace(W, name="sub/copy")], tmp_path / "graph")
    for name in ("w", "sub/copy"):
        link = tmp_path / "graph" / name
        assert not link.is_symlink()
        assert link.samefile(store.path(DIGEST))
    store.link([W], tmp_path / "graph")  # again, over the existing link
    assert store.path(DIGEST).read_bytes() == CONTENT


def test_weights_come_with_a_list_of_their_chunks(store: Store, tmp_path: Path) -> None:
    content = os.urandom(2 * CHUNK + 5)
    file = store.add(io.BytesIO(content), "model.safetensors")
    assert store.intact(file) and store.find("model.safetensors", file.sha256) == file
    store.link([file], tmp_path / "graph")
    assert store.path(file.chunks).samefile(tmp_path / "graph" / f"model.safetensors{SUFFIX}")
    listed = Chunks.beside(tmp_path / "graph/model.safetensors")
    assert listed and (listed.sha256, len(listed.digests)) == (file.sha256, 3 * 32)
    with pytest.raises(SourceError, match=r"locked without digests of its chunks.*python -m pipeline download MODEL"):
        store.link([replace(file, chunks="")], tmp_path / "old")


@pytest.mark.parametrize("damaged", ["sha256", "chunks"])
def test_a_damaged_blob_or_list_is_not_intact(store: Store, tmp_path: Path, damaged: str) -> None:
    file = store.add(io.BytesIO(os.urandom(2 * CHUNK)), "model.safetensors")
    spoil(store.path(getattr(file, damaged)))
    assert not store.intact(file)
    with (
        pytest.raises(SourceError) if damaged == "chunks" else nullcontext()
    ):  # weights are compared when they are read
        store.link([file], tmp_path / "graph")


def test_a_small_file_is_hashed_when_it_is_linked(store: Store, tmp_path: Path) -> None:
    store.add(io.BytesIO(CONTENT), "w")
    spoil(store.path(DIGEST))
    assert not store.intact(W) and store.find("w", DIGEST) is None
    with pytest.raises(SourceError, match=f"w: blob {DIGEST} of the store .* is damaged.*python -m pipeline download"):
        store.link([W], tmp_path / "graph")
    assert not (tmp_path / "graph").exists()


def test_link_is_all_or_nothing(store: Store, tmp_path: Path) -> None:
    store.add(io.BytesIO(CONTENT), "w")
    with pytest.raises(SourceError, match="not in the store"):
        store.link([W, LockedFile("absent", 1, "0" * 64)], tmp_path / "graph")
    assert not (tmp_path / "graph").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/x", "../x", "a/../../x", "a/..", "a//b", "./a", "a\\b", "a\0b"])
def test_names_that_leave_the_folder_are_refused(store: Store, tmp_path: Path, name: str) -> None:
    store.add(io.BytesIO(CONTENT), "w")
    with pytest.raises(SourceError, match="leaves its folder"):
        store.link([replace(W, name=name)], tmp_path / "graph")
    assert not (tmp_path / "graph").exists()


@pytest.mark.parametrize("name", ["a", "a.b", "a/b", "..a", "a..", ".hidden"])
def test_plain_names_are_accepted(name: str) -> None:
    assert checked_name(name) == name


def test_link_does_not_follow_a_symlink_out(store: Store, tmp_path: Path) -> None:
    store.add(io.BytesIO(CONTENT), "w")
    (tmp_path / "graph").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "graph" / "sub").symlink_to(tmp_path / "outside")
    with pytest.raises(SourceError, match="symlink that leaves"):
        store.link([replace(W, name="sub/x")], tmp_path / "graph")
    assert list((tmp_path / "outside").iterdir()) == []


def test_root_comes_from_argument_then_environment_then_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_STORE", str(tmp_path / "env"))
    assert Store().root == tmp_path / "env"
    assert Store(tmp_path / "arg").root == tmp_path / "arg"
    monkeypatch.delenv("PIPELINE_STORE")
    assert Store().root == STORE


def test_full_disk_is_a_resource_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, target: object) -> Digest:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store_module, "copied", full)
    with pytest.raises(ResourceError, match="PIPELINE_STORE"):
        store.add(io.BytesIO(CONTENT), "w")
    assert everything(store) == []


def test_other_refusals_name_the_file() -> None:
    with (
        pytest.raises(SourceError, match=r"cannot read it: No such file or directory \(/no/such\)"),
        disk_errors("read it"),
    ):
        open("/no/such")  # noqa: SIM115


def test_exclusive_keeps_other_processes_out(store: Store) -> None:
    """A second process cannot take the lock while this one holds it, and can afterwards."""
    probe = (
        "import fcntl, sys\n"
        "try:\n    fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError:\n    sys.exit(3)\n"
    )
    command = [sys.executable, "-c", probe, str(store.root / "partial" / "job.lock")]
    with store.exclusive("job"):
        assert subprocess.run(command, check=False).returncode == 3
    assert subprocess.run(command, check=False).returncode == 0
