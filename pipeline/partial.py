"""An unfinished artifact, kept where a killed run left it, so that the next run continues.

`dvc repro` deletes a stage's outputs before it runs, so the work in progress lies beside them: `<name>/`, the artifact
itself as it grows, and the journal `<name>.journal`: a first item that says what makes these files (source, recipe,
code), then one for every finished unit of work with the SHA-256 of its bytes. A unit counts as finished when the bytes
in the files still have that digest: neither a power cut nor an edit can bring a wrong byte into an artifact.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import ResourceError
from pipeline.files import disk_full, fsync, remove_leftovers, replace_directory, sha256_of
from pipeline.journal import Journal

_KEY = ""  # no unit has this name


class Partial:
    """The folder to write into, and the SHA-256 of what is finished in it, 64 hex digits by the unit's name."""

    def __init__(self, folder: Path, key: str):
        """Keep what `key` began; drop the rest. The journal is locked."""
        self.folder, self._journal = folder, Journal(_journal_of(folder))
        self.digests: dict[str, str] = self._journal.items
        if self.digests.pop(_KEY, None) == key and folder.is_dir():
            for leftover in folder.glob(".*"):  # a file that a kill left half-written under a temporary name
                leftover.unlink()
            return
        if folder.is_dir() and any(folder.iterdir()):
            print(
                f"{folder.name}: what an earlier run left belongs to another source, recipe or code: dropped",
                file=sys.stderr,
            )
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self._journal.clear()
        self._journal.record(_KEY, key)
        del self.digests[_KEY]

    def record(self, unit: str, digest: str) -> None:
        """Note that `unit` is written."""
        self._journal.record(unit, digest)

    def whole(self, name: str) -> bool:
        """Whether the file of that name is there as it was recorded."""
        path = self.folder / name
        return path.is_file() and sha256_of(path) == self.digests.get(name)

    def finish(self, target: Path) -> None:
        """Everything is written and on the disk: make the folder `target`, replacing what was there."""
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        replace_directory(self.folder, target)
        fsync(target.parent)
        _remove(_journal_of(self.folder))


@contextmanager
def open_partial(folder: Path, key: str) -> Iterator[Partial]:
    """The work in progress at `folder` made by `key`; empty when there is none, or when another key made it.

    Raises ResourceError when another process is at work there, or the disk is full. On any error the finished units
    stay; without one, nothing does: space reserved on a full disk helps nobody.
    """
    with disk_full(f"write {folder}"), _lock(_journal_of(folder)):
        partial = Partial(folder, key)
        try:
            yield partial
        except BaseException:
            if not partial.digests:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def discard(folder: Path) -> None:
    """Remove what a killed run left at `folder`, of whatever key: what it was for is whole.

    Raises ResourceError when another process is at work there.
    """
    if folder.parent.exists():
        with _lock(_journal_of(folder)):
            shutil.rmtree(folder, ignore_errors=True)
            _remove(_journal_of(folder))


def _journal_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.journal")


def _remove(journal: Path) -> None:
    journal.unlink()
    with suppress(OSError):  # another variant is at work there
        journal.parent.rmdir()


def _lock(journal: Path) -> BinaryIO:
    """The journal, opened and locked until it is closed."""
    while True:
        journal.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # a process that finished in this moment removed file or folder: once more
            lock = open(journal, "ab")  # noqa: SIM115 (the caller closes it)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock.fileno()), journal.stat()):
                    return lock
            except BlockingIOError:
                lock.close()
                raise ResourceError(
                    f"another process is writing {journal.with_suffix('')}. Wait for it, or stop it: what it finished "
                    f"is kept."
                ) from None
            lock.close()
