"""Files that are either whole or absent: atomic writes, hashes, links, free space.

What is written appears under its name in one step, when it is complete and on the disk. A full or unwritable disk is a
`ResourceError`, whoever wrote when it happened.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import ResourceError

_CHUNK = 1 << 22  # bytes
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def disk_full(purpose: str) -> Iterator[None]:
    """Turn "no space left" and "read-only" from the operating system while `purpose` into `ResourceError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ResourceError(
                f"the disk filled up while trying to {purpose}: {error.strerror}. Nothing half-written took its place. "
                f"Free space and run the same command again; what was finished before is reused."
            ) from error
        if error.errno == errno.EXDEV:
            raise ResourceError(
                f"cannot {purpose}: {error.filename} and {error.filename2} lie on different file systems. Keep all of "
                f"artifacts/ on one."
            ) from error
        if error.errno in _REFUSED:
            raise ResourceError(
                f"not allowed to {purpose}: {error.strerror} ({error.filename or 'no file named'}). Check who owns the "
                f"folder and whether its disk is mounted read-only."
            ) from error
        raise


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hex digits, read in bounded memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Make a file's bytes, or a rename inside a directory, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary neighbour of `path` for writing; on success fsync it and rename it to `path`.

    On any exception the temporary file is removed and `path` keeps its earlier content. Raises ResourceError when the
    disk is full or not writable.
    """
    with disk_full(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(fd, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_file(path) as file:
        file.write(data)


def json_bytes(value: Any) -> bytes:
    """`value` as indented JSON (UTF-8) with sorted keys, so that equal values are equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as `json_bytes`, atomically."""
    write_bytes(path, json_bytes(value))


def read_json(path: Path) -> Any:
    """Parse a JSON file (UTF-8)."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory; on success it replaces `path`, on failure it disappears.

    What a killed process left is removed first: gigabytes otherwise stay for ever. So a path has one writer at a time.
    Raises ResourceError when the disk is full or not writable.
    """
    with disk_full(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            os.chmod(temporary, 0o755)
            yield temporary
            for file in (entry for entry in temporary.rglob("*") if entry.is_file()):
                fsync(file)
            replace_directory(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove what a killed process left beside `path`: a directory half-written, or the old one moved aside."""
    for leftover in path.parent.glob(f".{path.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """An empty directory at `path` that is gone afterwards, and cleared of what a killed process left in it."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def replace_directory(new: Path, path: Path) -> None:
    """Rename `new` to `path`. What was there is moved aside first and comes back if that fails: it is never lost."""
    if not path.exists():
        os.replace(new, path)
        return
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    os.replace(path, aside)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Give `source`'s bytes a second name.

    A hard link of the real file, because ONNX Runtime refuses external data behind a symlink and a copy of a 15 GB
    checkpoint is a mistake; copied only when the two names are on different file systems.
    """
    real = source.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            link = Path(folder) / "link"
            os.link(real, link)
            os.replace(link, target)  # in one step, safe also when the target is `real` itself
    except OSError:
        require_free_space(target.parent, real.stat().st_size, f"copy {real.name}")
        with open(real, "rb") as stream, atomic_file(target) as copy:
            shutil.copyfileobj(stream, copy, _CHUNK)


def require_free_space(
    directory: Path, needed: int, purpose: str, remedy: str = "use a folder on a larger disk"
) -> None:
    """Raise `ResourceError` with the `remedy` unless the file system of `directory` has `needed` bytes free."""
    if (free := free_disk(directory)) < needed:
        raise ResourceError(
            f"not enough disk to {purpose}: {needed:,} bytes needed, {free:,} free on the file system of "
            f"{_existing(directory)}. Free at least {needed - free:,} bytes, or {remedy}."
        )


def free_disk(path: Path) -> int:
    """Bytes free for this user on the file system of `path`, which need not exist yet."""
    return shutil.disk_usage(_existing(path)).free


def file_system(path: Path) -> int:
    """Number of the file system (device) of `path`, which need not exist yet: equal numbers share their free space."""
    return _existing(path).stat().st_dev


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def copy_stream(source: BinaryIO, target: BinaryIO) -> str:
    """Copy to the end of `source`; return the SHA-256 of what was copied."""
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        target.write(chunk)
        digest.update(chunk)
    return digest.hexdigest()
