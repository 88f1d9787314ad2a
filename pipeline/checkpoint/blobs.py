"""The content-addressed store: every downloaded byte once, named by its SHA-256.

    <root>/sha256/<first two digits>/<digest>   blobs, read-only, whole or absent
    <root>/sources/<key>.json                   what a source contains (written last, so it means "complete")
    <root>/partial/<key>/                       work in progress; safe to delete when nothing runs

A graph refers to weights through hard links made by `Store.link`, never through copies or symlinks (ONNX Runtime
refuses external data behind a symlink). Blobs are read-only because a write through any link would change them all.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pipeline.errors import ResourceError, SourceError
from pipeline.files import copy_stream, fsync_directory, link_or_copy, require_free_space, sha256_of

STORE = Path("store")
"""Default root, relative to the project; the environment variable PIPELINE_STORE names another (a larger disk)."""


@dataclass(frozen=True)
class LockedFile:
    """One file of a source: its name there, its size in bytes and the SHA-256 of those bytes (64 hex digits)."""

    name: str
    size: int
    sha256: str


def checked_name(name: str) -> str:
    """`name` if it is a relative POSIX path that stays inside its folder.

    Names come from index files, archives and servers, so they are untrusted.

    Raises:
        SourceError: absolute, empty, with `..`, a backslash, a NUL, or not in its shortest form.
    """
    path = PurePosixPath(name)
    plain = bool(name) and name == str(path) and not path.is_absolute() and path.parts != ()
    if not plain or ".." in path.parts or "\\" in name or "\0" in name:
        raise SourceError(
            f"file name {name!r} leaves its folder or is not a plain relative path. Nothing was written; "
            f"a source with such a name is broken or hostile: do not use it."
        )
    return name


@contextmanager
def disk_errors(purpose: str) -> Iterator[None]:
    """Turn the operating system's refusals while `purpose` into `ResourceError` (disk full) or `SourceError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"the disk filled up while trying to {purpose}: {error.strerror}. Free space, or point PIPELINE_STORE "
                f"at a larger disk, and run the same command again; finished files are kept."
            ) from error
        raise SourceError(
            f"cannot {purpose}: {error.strerror or error} ({error.filename or 'no file named'})"
        ) from error


class Store:
    """Blobs under `root`; without one, under $PIPELINE_STORE or `STORE`."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or Path(os.environ.get("PIPELINE_STORE") or STORE)

    def _blob(self, sha256: str) -> Path:
        return self.root / "sha256" / sha256[:2] / sha256

    def has(self, sha256: str, size: int | None = None) -> bool:
        """Whether the blob is present (with `size` bytes). A blob's bytes are hashed when it enters, not here."""
        blob = self._blob(sha256)
        return blob.is_file() and size in (None, blob.stat().st_size)

    def path(self, sha256: str) -> Path:
        """The blob's path, a regular read-only file.

        Raises:
            SourceError: it is not in this store.
        """
        if not self.has(sha256):
            raise SourceError(
                f"{sha256} is not in the store {self.root}. Fetch it with `python -m pipeline download MODEL` "
                f"(or set PIPELINE_STORE to the store that holds it)."
            )
        return self._blob(sha256)

    def add(self, source: Path | BinaryIO, name: str, sha256: str | None = None) -> LockedFile:
        """Copy `source`'s bytes in, hashing exactly the bytes that are stored, and report them under `name`.

        Raises:
            SourceError: the bytes do not hash to `sha256`, or cannot be read or written.
            ResourceError: the disk is full.
        """
        with disk_errors(f"add {name} to the store {self.root}"):
            partial = self.root / "partial"
            partial.mkdir(parents=True, exist_ok=True)
            if isinstance(source, Path):
                require_free_space(partial, source.stat().st_size, f"add {name} to the store")
            descriptor, temporary = tempfile.mkstemp(dir=partial, prefix="add.")
            try:
                with os.fdopen(descriptor, "wb") as target:
                    if isinstance(source, Path):
                        with open(source, "rb") as stream:
                            size, digest = copy_stream(stream, target)
                    else:
                        size, digest = copy_stream(source, target)
                return self._install(Path(temporary), LockedFile(name, size, digest), sha256)
            finally:
                Path(temporary).unlink(missing_ok=True)

    def adopt(
        self, path: Path, name: str, sha256: str | None = None, check: Callable[[Path], None] | None = None
    ) -> LockedFile:
        """Move the file at `path` (inside this store's `workspace`) in, without a second copy of its bytes.

        `check(path)` may refuse the content; it is called after the hash was found right and before the blob exists.

        Raises: as `add`. On an error the file stays where it is.
        """
        with disk_errors(f"add {name} to the store {self.root}"):
            found = LockedFile(name, path.stat().st_size, sha256_of(path))
            return self._install(path, found, sha256, check)

    def _install(
        self, path: Path, found: LockedFile, expected: str | None, check: Callable[[Path], None] | None = None
    ) -> LockedFile:
        if expected not in (None, found.sha256):
            raise SourceError(
                f"{found.name}: wrong bytes. Expected sha256 {expected}, got {found.sha256} ({found.size:,} bytes). "
                f"Nothing was kept. Fetch it again; if it happens twice, the source or a proxy changed the file."
            )
        if check:
            check(path)
        blob = self._blob(found.sha256)
        if self.has(found.sha256, found.size) and sha256_of(blob) == found.sha256:
            path.unlink()  # keep the first inode: graphs hold hard links to it
            return found
        blob.parent.mkdir(parents=True, exist_ok=True)
        path.chmod(0o444)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(path, blob)
        fsync_directory(blob.parent)
        return found

    def link(self, files: Mapping[str, str], directory: Path) -> None:
        """Hard-link blobs into `directory`: file name → sha256. Copies only across file systems.

        Raises:
            SourceError: a blob is absent or a name leaves `directory`; then nothing is linked.
            ResourceError: a copy would not fit.
        """
        blobs = {checked_name(name): self.path(sha256) for name, sha256 in files.items()}
        with disk_errors(f"link {len(blobs)} files into {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
            inside = directory.resolve()
            for name in blobs:
                if not (directory / name).parent.resolve().is_relative_to(inside):
                    raise SourceError(f"{directory / name} lies behind a symlink that leaves {directory}; remove it.")
            for name, blob in blobs.items():
                link_or_copy(blob, directory / name)

    def record(self, key: str) -> Path:
        """Path of the small JSON file that says what the source `key` was found to contain."""
        return self.root / "sources" / f"{key}.json"

    def workspace(self, key: str) -> Path:
        """A folder for unfinished files of the source `key`, on the blobs' file system, created if absent."""
        folder = self.root / "partial" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def clear(self, key: str) -> None:
        """Remove the workspace of `key`."""
        shutil.rmtree(self.root / "partial" / key, ignore_errors=True)

    @contextmanager
    def exclusive(self, key: str) -> Iterator[None]:
        """Hold `key` alone among processes: two downloads of one source wait for, rather than disturb, each other."""
        with disk_errors(f"use the store {self.root}"):
            (self.root / "partial").mkdir(parents=True, exist_ok=True)
            lock = open(self.root / "partial" / f"{key}.lock", "w")  # noqa: SIM115
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes, also after a crash
            yield
