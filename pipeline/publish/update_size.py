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
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from pipeline import files
from pipeline.artifact.layout import PAGE
from pipeline.bundle.release import CONTENT, SIGNATURE, Refusal, Release
from pipeline.errors import BundleError

Status = Literal["unchanged", "renamed", "changed", "new", "gone"]
_WINDOW = 4096 * PAGE  # bytes of a mapped file that are looked at together


@dataclass(frozen=True)
class Bundle:
    """A bundle's folder, its release.json, and the SHA-256 of every file by its path in the folder."""

    directory: Path
    release: Release
    digests: Mapping[str, str]


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

    old: Release
    new: Release
    files: tuple[FileUpdate, ...]

    def total(self, field: str) -> int | None:
        """Sum of one of the four byte counts; None if it is not known of every file."""
        values = [getattr(file, field) for file in self.files]
        return None if None in values else sum(values)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON with a total of each column."""
        sides = {
            name: {"model": side.model, "variant": side.variant, "release": side.release}
            for name, side in (("old", self.old), ("new", self.new))
        }
        totals = {column: self.total(column) for column in _COLUMNS}
        return sides | {"page_bytes": PAGE, "files": [asdict(file) for file in self.files], "total": totals}

    def describe(self) -> str:
        """The table for people; a line says so where zstd is missing."""
        rows = [("file", "", *_COLUMNS.values())]
        for file in self.files:
            rows.append((file.name, file.status, *(_figure(getattr(file, column)) for column in _COLUMNS)))
        rows.append(("total", "", *(_figure(self.total(column)) for column in _COLUMNS)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [f"{_side(self.old)} → {_side(self.new)}: bytes to download"]
        for name, status, *figures in rows:
            shown = "  ".join(figure.rjust(width) for figure, width in zip(figures, widths[2:], strict=True))
            lines.append(f"{name.ljust(widths[0])}  {status.ljust(widths[1])}  {shown}")
        if self.total("delta_bytes") is None:
            lines.append("No delta: the command zstd is not installed.")
        return "\n".join(lines)


_COLUMNS = {
    "whole_bytes": "whole files",
    "changed_page_bytes": "changed pages",
    "new_page_bytes": "new pages",
    "delta_bytes": "zstd delta",
}


def _figure(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _side(release: Release) -> str:
    return f"{release.model} {release.variant} release {release.release}"


def read_bundle(directory: Path) -> Bundle:
    """A bundle's release.json and the digests of its files.

    Raises:
        BundleError: it is a refusal, no bundle, or a file is missing or has another size than release.json says.
    """
    content = directory / CONTENT
    if (content / Refusal.file_name).is_file():
        raise BundleError(f"{directory} is a refusal: there is no bundle to compare.")
    try:
        release = Release.model_validate_json((content / Release.file_name).read_bytes())
        own = {f"{CONTENT}/{Release.file_name}": content / Release.file_name, SIGNATURE: directory / SIGNATURE}
        digests = {name: files.sha256_of(path) for name, path in own.items()}
        for name, entry in release.files.items():
            if (size := (content / name).stat().st_size) != entry.size:
                raise BundleError(f"{content / name} has {size:,} bytes, release.json says {entry.size:,}.")
    except OSError as error:
        raise BundleError(f"{directory} is no bundle: {error.filename} cannot be read ({error.strerror}).") from None
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "the whole file"
        raise BundleError(f"{directory} is no bundle: its release.json is none ({where}).") from None
    digests |= {f"{CONTENT}/{name}": entry.sha256 for name, entry in release.files.items()}
    return Bundle(directory, release, digests)


# --- pages -----------------------------------------------------------------------------------------------------------


def _windows(path: Path) -> Iterator[np.ndarray]:
    """A file's bytes, mapped, in windows of whole pages."""
    if path.stat().st_size:
        data = np.memmap(path, np.uint8, "r")
        for start in range(0, len(data), _WINDOW):
            yield data[start : start + _WINDOW]


def _page_sizes(size: int) -> np.ndarray:
    """Bytes of each page: the last may be short."""
    sizes = np.full(-(-size // PAGE), PAGE, np.int64)
    if size % PAGE:
        sizes[-1] = size % PAGE
    return sizes


def differing_pages(old: Path, new: Path) -> np.ndarray:
    """For each page of `new`, whether it differs from the page at the same offset of `old`, or has none there."""
    answers = np.ones(-(-new.stat().st_size // PAGE), bool)
    start = 0
    for ours, theirs in zip(_windows(new), _windows(old), strict=False):
        shared = min(len(ours), len(theirs))
        whole = shared // PAGE
        equal = (ours[: whole * PAGE] == theirs[: whole * PAGE]).reshape(whole, PAGE).all(axis=1)
        answers[start : start + whole] = ~equal
        if len(ours) == len(theirs) and shared % PAGE:  # the short last page of two files that end together
            answers[start + whole] = bool((ours[whole * PAGE :] != theirs[whole * PAGE :]).any())
        start += -(-len(ours) // PAGE)
    return answers


def page_hashes(path: Path) -> np.ndarray:
    """64-bit BLAKE2b of each page: 8 bytes of memory for 4,096 of the file."""
    hashes = bytearray()
    for window in _windows(path):
        for start in range(0, len(window), PAGE):
            hashes += hashlib.blake2b(window[start : start + PAGE], digest_size=8).digest()
    return np.frombuffer(bytes(hashes), np.uint64)


def _delta_bytes(old: Path, new: Path) -> int | None:
    """Size of zstd's patch. It holds the old file in memory (parts have at most 1.4e9 bytes); its output is counted."""
    program = shutil.which("zstd")
    if program is None:
        return None
    command = [program, "--quiet", "--single-thread", "--stdout", f"--patch-from={old}", str(new)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        size = sum(len(chunk) for chunk in iter(lambda: process.stdout.read(1 << 20), b""))
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
        raise BundleError(f"{_side(old.release)} and {_side(new.release)} are not releases of one bundle.")
    changed = set(new.digests.values()) - set(old.digests.values())
    known = np.unique(np.concatenate([page_hashes(old.directory / name) for name in old.digests] if changed else [[]]))
    updates = [_update(name, old, new, known) for name in sorted(old.digests.keys() | new.digests.keys())]
    return Update(old.release, new.release, tuple(updates))


def _size(bundle: Bundle, name: str) -> int | None:
    return (bundle.directory / name).stat().st_size if name in bundle.digests else None


def _status(name: str, old: Bundle, new: Bundle) -> Status:
    if name not in new.digests:
        return "gone"
    if old.digests.get(name) == new.digests[name]:
        return "unchanged"
    if new.digests[name] in old.digests.values():
        return "renamed"
    return "changed" if name in old.digests else "new"


def _update(name: str, old: Bundle, new: Bundle, known: np.ndarray) -> FileUpdate:
    status, sizes = _status(name, old, new), (_size(old, name), _size(new, name))
    if status in ("gone", "unchanged", "renamed"):
        return FileUpdate(name, status, *sizes, 0, 0, 0, 0)
    before, after = old.directory / name, new.directory / name
    pages = _page_sizes(after.stat().st_size)
    absent = int(pages[~np.isin(page_hashes(after), known)].sum())
    if status == "new":
        whole = after.stat().st_size
        return FileUpdate(name, status, *sizes, whole, whole, absent, whole)
    differing = int(pages[differing_pages(before, after)].sum())
    return FileUpdate(name, status, *sizes, after.stat().st_size, differing, absent, _delta_bytes(before, after))
