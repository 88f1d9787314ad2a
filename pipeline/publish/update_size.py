"""update-size: what a phone downloads when it goes from one release to the next, under four ways of updating.

    whole files       what `fetch` does: files with a known digest stay, the others come whole
    changed pages     4 KiB pages that differ from the page at the same offset of the old file
    new pages         4 KiB pages whose bytes are nowhere in the old bundle, at any page of any file
    delta             `zstd --patch-from=OLD NEW`, the bytes of its output; a new file counts whole

Tensors lie in a stable order, each large one on pages of its own, so that one that changes moves no other: that is
what the columns show. Digests are those of release.json; this reads bundles and proves nothing about them.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline import files
from pipeline.artifact.layout import PAGE
from pipeline.bundle.release import CONTENT, SIGNATURE, Refusal, Release, parse
from pipeline.errors import BundleError
from pipeline.report.columns import aligned

Status = Literal["unchanged", "renamed", "changed", "new", "gone"]
_COLUMNS = {
    "whole_bytes": "whole files",
    "changed_page_bytes": "changed pages",
    "new_page_bytes": "new pages",
    "delta_bytes": "zstd delta",
}


@dataclass(frozen=True)
class Bundle:
    """A bundle's folder, its release.json, and the SHA-256 of every file by its path in the folder."""

    directory: Path
    release: Release
    digests: Mapping[str, str]

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it has no such file."""
        return (self.directory / name).stat().st_size if name in self.digests else None


@dataclass(frozen=True)
class FileUpdate:
    """One file. Sizes in bytes; `delta_bytes` is None where zstd is not installed."""

    name: str
    status: Status
    old_bytes: int | None
    new_bytes: int | None
    whole_bytes: int
    changed_page_bytes: int
    new_page_bytes: int
    delta_bytes: int | None


@dataclass(frozen=True)
class Update:
    """All files of both releases, by name."""

    old: Bundle
    new: Bundle
    files: tuple[FileUpdate, ...]

    @property
    def totals(self) -> dict[str, int | None]:
        """Sum of each of the four byte counts; None if it is not known of every file."""
        columns = {column: [getattr(file, column) for file in self.files] for column in _COLUMNS}
        return {column: None if None in values else sum(values) for column, values in columns.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON with a total of each column."""
        named = {"model", "variant", "release"}
        sides = {name: side.release.model_dump(include=named) for name, side in (("old", self.old), ("new", self.new))}
        return sides | {"page_bytes": PAGE, "files": [asdict(file) for file in self.files], "total": self.totals}

    def describe(self) -> str:
        """The table for people; a line says so where zstd is missing."""
        rows = [("file", "", *_COLUMNS.values())]
        rows += [(it.name, it.status, *(_figure(getattr(it, column)) for column in _COLUMNS)) for it in self.files]
        rows.append(("total", "", *map(_figure, self.totals.values())))
        lines = [f"{self.old.release.label} → {self.new.release.label}: bytes to download", *aligned(rows, {0, 1})]
        if self.totals["delta_bytes"] is None:
            lines.append("No delta: the command zstd is not installed.")
        return "\n".join(lines)


def read_bundle(directory: Path) -> Bundle:
    """A bundle's release.json and the digests of its files.

    Raises:
        BundleError: it is a refusal, no bundle, or a file is missing or has another size than release.json says.
    """
    content = directory / CONTENT
    if (content / Refusal.file_name).is_file():
        raise BundleError(f"{directory} is a refusal: there is no bundle to compare.")
    try:
        release = parse(Release, (content / Release.file_name).read_bytes())
        own = {f"{CONTENT}/{Release.file_name}": content / Release.file_name, SIGNATURE: directory / SIGNATURE}
        digests = {name: files.sha256_of(path) for name, path in own.items()}
        for name, entry in release.files.items():
            if (size := (content / name).stat().st_size) != entry.size:
                raise BundleError(f"{content / name} has {size:,} bytes, release.json says {entry.size:,}.")
    except OSError as error:
        raise BundleError(f"{directory} is no bundle: {error.filename} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise BundleError(f"{directory} is no bundle: its release.json is none ({error}).") from None
    digests |= {f"{CONTENT}/{name}": entry.sha256 for name, entry in release.files.items()}
    return Bundle(directory, release, digests)


def _figure(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


# --- pages -----------------------------------------------------------------------------------------------------------


def _pages(path: Path) -> Iterator[bytes]:
    """A file's pages; the last may be short."""
    with open(path, "rb") as file:
        yield from iter(partial(file.read, PAGE), b"")


def differing_pages(old: Path, new: Path) -> Iterator[int]:
    """For each page of `new` its bytes, or 0 if the page at the same offset of `old` equals it."""
    for theirs, ours in itertools.zip_longest(_pages(old), _pages(new), fillvalue=b""):
        if ours:
            yield len(ours) if ours != theirs else 0


def page_hashes(path: Path) -> np.ndarray:
    """64-bit BLAKE2b of each page: 8 bytes of memory for 4,096 of the file."""
    hashes = b"".join(hashlib.blake2b(page, digest_size=8).digest() for page in _pages(path))
    return np.frombuffer(hashes, np.uint64)


def _delta_bytes(old: Path, new: Path) -> int | None:
    """Size of zstd's patch. It holds the old file in memory (parts have at most 1.4e9 bytes); its output is counted."""
    if shutil.which("zstd") is None:
        return None
    command = ["zstd", "--quiet", "--single-thread", "--stdout", f"--patch-from={old}", str(new)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        size = sum(map(len, iter(partial(process.stdout.read, 1 << 20), b"")))
        reason = " ".join(process.stderr.read().decode(errors="replace").split())[-200:]
    if process.returncode != 0:
        raise BundleError(f"zstd cannot make a delta of {new.name}: {reason or f'status {process.returncode}'}.")
    return size


# --- the whole -------------------------------------------------------------------------------------------------------


def compare(old_directory: Path, new_directory: Path) -> Update:
    """What changes between two bundles of one model and variant, file by file.

    Memory is bounded by the page hashes, a five-hundredth of the old bundle, and by zstd's own.

    Raises:
        BundleError: a folder is no bundle, they are of different models or variants, or zstd fails.
    """
    old, new = read_bundle(old_directory), read_bundle(new_directory)
    if (old.release.model, old.release.variant) != (new.release.model, new.release.variant):
        raise BundleError(f"{old.release.label} and {new.release.label} are not releases of one bundle.")
    changed = set(new.digests.values()) - set(old.digests.values())
    hashes = [page_hashes(old.directory / name) for name in old.digests if changed]
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))
    updates = [_update(name, old, new, known) for name in sorted(old.digests.keys() | new.digests.keys())]
    return Update(old, new, tuple(updates))


def _status(name: str, old: Bundle, new: Bundle) -> Status:
    if name not in new.digests:
        return "gone"
    if old.digests.get(name) == new.digests[name]:
        return "unchanged"
    if new.digests[name] in old.digests.values():
        return "renamed"
    return "changed" if name in old.digests else "new"


def _update(name: str, old: Bundle, new: Bundle, known: np.ndarray) -> FileUpdate:
    status, size = _status(name, old, new), new.size(name)
    if size is None or status not in ("new", "changed"):
        return FileUpdate(name, status, old.size(name), size, 0, 0, 0, 0)
    before, after = old.directory / name, new.directory / name
    fresh = ~np.isin(page_hashes(after), known)
    absent = sum(len(page) for page, new_here in zip(_pages(after), fresh, strict=True) if new_here)
    if status == "new":
        return FileUpdate(name, status, None, size, size, size, absent, size)
    changed = sum(differing_pages(before, after))
    return FileUpdate(name, status, old.size(name), size, size, changed, absent, _delta_bytes(before, after))
