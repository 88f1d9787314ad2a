"""The content-addressed store: every downloaded byte once, named by its SHA-256.

    <root>/sha256/<first two digits>/<digest>   blobs, read-only, whole or absent
    <root>/sources/<key>.json                   what a source contains (written last, so it means "complete")
    <root>/partial/<key>/                       work in progress; safe to delete when nothing runs

A graph refers to weights through hard links made by `Store.link`, never through copies or symlinks (ONNX Runtime
refuses external data behind a symlink). Blobs are read-only because a write through any link would change them all.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field

from pipeline.checkpoint.chunks import AGAIN, SUFFIX, Chunks, Digest, copied
from pipeline.config.typed_yaml import Sha256
from pipeline.errors import SourceError
from pipeline.files import disk_full, fsync, link_or_copy, sha256_of

STORE = Path("store")
"""Default root, relative to the project; the environment variable PIPELINE_STORE names another (a larger disk)."""


@dataclass(frozen=True)
class LockedFile:
    """One file of a source: its name there, its size in bytes and the SHA-256 of those bytes (64 hex digits).

    `chunks` is the SHA-256 of its list of chunk digests (`checkpoint.chunks`), a blob of its own; "" for a file that
    holds no weights: it is small, and compared as a whole.
    """

    name: Annotated[str, AfterValidator(checked_name)]
    size: Annotated[int, Field(ge=0)]
    sha256: Sha256
    chunks: Sha256 | Literal[""] = ""
    __pydantic_config__ = ConfigDict(extra="forbid")

    @property
    def has_weights(self) -> bool:
        """Whether it is read in parts."""
        return self.name.endswith(".safetensors")


def checked_name(name: str) -> str:
    """`name` if it is a relative POSIX path that stays inside its folder.

    Names come from index files, archives and servers, so they are untrusted.

    Raises:
        SourceError: absolute, empty, with `..`, a backslash, a NUL, or not in its shortest form.
    """
    path = PurePosixPath(name)
    plain = bool(name) and name == str(path) and not path.is_absolute() and path.parts != ()
    if not plain or ".." in path.parts or "\\" in name or "\0" in name:
        remedy = "Nothing was written; a source with such a name is broken or hostile: do not use it."
        raise SourceError(f"file name {name!r} leaves its folder or is not a plain relative path. {remedy}")
    return name


LARGER_STORE = "point PIPELINE_STORE at a larger disk"


@contextmanager
def disk_errors(purpose: str) -> Iterator[None]:
    """Turn the operating system's refusals while `purpose` into `ResourceError` (disk full) or `SourceError`."""
    try:
        with disk_full(f"{purpose} (another disk: set PIPELINE_STORE)"):
            yield
    except OSError as error:
        where = error.filename or "no file named"
        raise SourceError(f"cannot {purpose}: {error.strerror or error} ({where})") from error


class Store:
    """Blobs under `root`; without one, under $PIPELINE_STORE or `STORE`."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or Path(os.environ.get("PIPELINE_STORE") or STORE)

    def _blob(self, sha256: str) -> Path:
        return self.root / "sha256" / sha256[:2] / sha256

    def has(self, sha256: str, size: int | None = None) -> bool:
        """Whether the blob is present (with `size` bytes). Its bytes are hashed by `find`, `intact` and readers."""
        blob = self._blob(sha256)
        return blob.is_file() and size in (None, blob.stat().st_size)

    def find(self, name: str, sha256: str) -> LockedFile | None:
        """The blob as a file called `name`; None if it is absent or its bytes, hashed anew, are others."""
        if not self.has(sha256):
            return None
        with disk_errors(f"read {name} in the store {self.root}"), open(self._blob(sha256), "rb") as stream:
            digest = copied(stream)
        return self._described(name, digest) if digest.sha256 == sha256 else None

    def intact(self, file: LockedFile) -> bool:
        """Whether the store holds a file and its list of chunks, with the bytes that were downloaded."""
        if not file.chunks:
            return self.find(file.name, file.sha256) is not None
        listing = self._blob(file.chunks)
        with disk_errors(f"read {file.name} in the store {self.root}"):
            chunks = Chunks.beside(self._blob(file.sha256), listing)
            if chunks is None or sha256_of(listing) != file.chunks or not self.has(file.sha256, file.size):
                return False
            return not chunks.damage_in(0, file.size)

    def discard(self, sha256: str) -> None:
        """Remove a blob. Hard links to it keep its bytes."""
        self._blob(sha256).unlink(missing_ok=True)

    def path(self, sha256: str) -> Path:
        """The blob's path, a regular read-only file.

        Raises:
            SourceError: it is not in this store.
        """
        if not self.has(sha256):
            remedy = "Run `python -m pipeline download MODEL`, or set PIPELINE_STORE to the store that holds it."
            raise SourceError(f"{sha256} is not in the store {self.root}. {remedy}")
        return self._blob(sha256)

    def add(self, source: IO[bytes], name: str, sha256: str | None = None) -> LockedFile:
        """Copy `source`'s bytes in, hashing exactly the bytes that are stored, and report them under `name`.

        Raises:
            SourceError: the bytes do not hash to `sha256`, or cannot be read or written.
            ResourceError: the disk is full.
        """
        with disk_errors(f"add {name} to the store {self.root}"):
            (self.root / "partial").mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.root / "partial", prefix="add.") as folder:
                path = Path(folder) / "blob"
                with open(path, "wb") as target:
                    digest = copied(source, target)
                return self._install(path, name, digest, sha256)

    def adopt(self, path: Path, name: str, sha256: str | None = None) -> LockedFile:
        """Move the file at `path` (inside this store's `workspace`) in, without a second copy of its bytes.

        Raises: as `add`. On an error the file stays where it is.
        """
        with disk_errors(f"add {name} to the store {self.root}"):
            with open(path, "rb") as stream:
                digest = copied(stream)
            return self._install(path, name, digest, sha256)

    def _install(self, path: Path, name: str, found: Digest, expected: str | None) -> LockedFile:
        if expected not in (None, found.sha256):
            got = f"Expected sha256 {expected}, got {found.sha256} ({found.size:,} bytes). Nothing was kept"
            remedy = "Fetch it again; if it happens twice, the source or a proxy changed the file."
            raise SourceError(f"{name}: wrong bytes. {got}. {remedy}")
        blob = self._blob(found.sha256)
        if self.has(found.sha256, found.size) and sha256_of(blob) == found.sha256:
            path.unlink()  # keep the first inode: graphs hold hard links to it
        else:
            blob.parent.mkdir(parents=True, exist_ok=True)
            path.chmod(0o444)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            os.replace(path, blob)
            fsync(blob.parent)
        return self._described(name, found)

    def _described(self, name: str, digest: Digest) -> LockedFile:
        """The file, its list of chunks being in the store."""
        file = LockedFile(name, digest.size, digest.sha256)
        return replace(file, chunks=self.add(BytesIO(digest.chunks), name + SUFFIX).sha256 if file.has_weights else "")

    def link(self, files: Iterable[LockedFile], directory: Path) -> None:
        """Hard-link blobs into `directory` under their files' names, lists of chunks beside them.

        What has no list is hashed. Copies only across file systems.

        Raises:
            SourceError: a blob is absent or damaged, weights were locked without a list, or a name leaves `directory`;
                then nothing is linked.
            ResourceError: a copy would not fit.
        """
        blobs: dict[str, Path] = {}
        for file in files:
            blobs[checked_name(file.name)] = self.path(file.sha256)
            if file.has_weights and not file.chunks:
                old = "locked without digests of its chunks, by an earlier version"
                why = "what is read of it cannot be compared with what was downloaded"
                raise SourceError(f"{file.name} was {old}: {why}. {AGAIN}")
            if file.chunks:
                blobs[file.name + SUFFIX] = self.path(file.chunks)
            if sha256_of(self.path(whole := file.chunks or file.sha256)) != whole:
                what = f"blob {whole} of the store {self.root} is damaged, or something wrote to it"
                raise SourceError(f"{file.name}: {what}. {AGAIN}")
        with disk_errors(f"link {len(blobs)} files into {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
            places = {directory / name: blob for name, blob in blobs.items()}
            for place in places:
                if not place.parent.resolve().is_relative_to(directory.resolve()):
                    raise SourceError(f"{place} lies behind a symlink that leaves {directory}; remove it.")
            for place, blob in places.items():
                link_or_copy(blob, place)

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
        (self.root / "partial").mkdir(parents=True, exist_ok=True)
        with open(self.root / "partial" / f"{key}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes, also after a crash
            yield
