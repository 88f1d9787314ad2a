"""Files that are either whole or absent: atomic writes, hashes, links, free space."""

from __future__ import annotations

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


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hex digits, read in bounded memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_directory(path: Path) -> None:
    """Make a rename inside `path` survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary neighbour of `path` for writing; on success fsync it and rename it to `path`.

    On any exception the temporary file is removed and `path` keeps its earlier content.
    """
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
    fsync_directory(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_file(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys (so equal values are equal bytes), atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Parse a JSON file (UTF-8)."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory; on success it replaces `path`, on failure it disappears."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        os.chmod(temporary, 0o755)
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(path.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Give `source`'s bytes a second name.

    A hard link of the real file, because ONNX Runtime refuses external data behind a symlink and a copy of a 15 GB
    checkpoint is a mistake; copied only when the two names are on different file systems.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    real = source.resolve()
    target.unlink(missing_ok=True)
    try:
        os.link(real, target)
    except OSError:
        require_free_space(target.parent, real.stat().st_size, f"copy {real.name}")
        shutil.copyfile(real, target)


def require_free_space(directory: Path, needed: int, purpose: str) -> None:
    """Raise `ResourceError` unless the file system of `directory` has `needed` bytes free."""
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ResourceError(
            f"not enough disk to {purpose}: {needed:,} bytes needed, {free:,} free on the file system of "
            f"{directory}. Free at least {needed - free:,} bytes, or move the working tree to a larger disk."
        )


def copy_stream(source: BinaryIO, target: BinaryIO) -> tuple[int, str]:
    """Copy to the end of `source`; return (bytes copied, sha256 of them)."""
    digest = hashlib.sha256()
    size = 0
    while chunk := source.read(_CHUNK):
        target.write(chunk)
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()
