"""Is this bundle what its maker signed, and may this phone take it now? Every difference is named.

The order is the defence: layout by names only, then the signature, then bytes against signed digests, and only then is
a document parsed, from bytes whose digest was signed. File names come from the folder; names in the signature or in
release.json are compared with them, never opened.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from pipeline.bundle.keys import key_id, load_public_key
from pipeline.bundle.release import CONTENT, SIGNATURE, FileEntry, Refusal, Release, Stamp, parse_time
from pipeline.bundle.signing import SignatureError, open_signature
from pipeline.bundle.tiers import TiersDocument
from pipeline.errors import BundleError

_SMALL = 16 << 20  # bytes; no signature or document of ours comes near it


class Kind(StrEnum):
    """What is wrong. The first three are `signing.Flaw`'s."""

    MALFORMED_SIGNATURE = "malformed-signature"
    OTHER_KEY = "other-key"
    INVALID_SIGNATURE = "invalid-signature"
    MISSING_SIGNATURE = "missing-signature"
    MISSING = "missing"
    EXTRA = "extra"
    UNLISTED = "unlisted"
    RENAMED = "renamed"
    MODIFIED = "modified"
    TRUNCATED = "truncated"
    SYMLINK = "symlink"
    NOT_A_FILE = "not-a-file"
    MALFORMED_DOCUMENT = "malformed-document"
    DISAGREES = "disagrees"
    SWAPPED = "swapped"
    EXPIRED = "expired"
    DOWNGRADED = "downgraded"
    DEVELOPMENT_KEY = "development-key"
    REFUSAL = "refusal"


@dataclass(frozen=True, order=True)
class Finding:
    """One thing that is wrong: its kind, the file (relative to the bundle), and a message with the figures."""

    kind: Kind
    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.file}: {self.message}"


@dataclass(frozen=True)
class Report:
    """What verification found, sorted. `document` is set once its signature and digest are proven, and not before."""

    directory: Path
    key: str
    findings: tuple[Finding, ...]
    document: Stamp | None

    @property
    def ok(self) -> bool:
        """Nothing is wrong: the bundle may be used."""
        return not self.findings

    @property
    def intact(self) -> bool:
        """Nothing is wrong, except perhaps that it is a refusal instead of a bundle."""
        return all(finding.kind is Kind.REFUSAL for finding in self.findings)

    def describe(self) -> str:
        """The report for people: one line if all is well, else a line per finding."""
        if self.ok and self.document is not None:
            what = f"{self.document.model} release {self.document.release}"
            return f"{self.directory}: OK, {what}, signed by {self.key}, fresh until {self.document.expires}"
        lines = [f"{self.directory}: {len(self.findings)} problem(s); trusted key {self.key}"]
        return "\n".join(lines + [f"  {finding}" for finding in self.findings])


@dataclass(frozen=True)
class _Expected:
    """What the caller asked for and accepts."""

    now: datetime
    highest_release: int | None
    allow_development: bool
    model: str | None
    variant: str | None


# --- reading without following anything ----------------------------------------------------------------------------


def _open(path: Path) -> BinaryIO:
    """Open a file seen to be regular; a symlink put in its place meanwhile is an error, not followed."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")


def _sha256(path: Path) -> str:
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_small(path: Path) -> bytes | None:
    """All bytes, or None if there are more than any signature or document of ours has."""
    with _open(path) as file:
        raw = file.read(_SMALL + 1)
    return raw if len(raw) <= _SMALL else None


def _shown(name: str) -> str:
    """A file name that is safe to print: control characters and undecodable bytes are escaped."""
    return name if name.isascii() and name.isprintable() else ascii(name)


# --- layout --------------------------------------------------------------------------------------------------------


def _type_finding(path: Path, file: str, wanted: Callable[[int], bool] = stat.S_ISREG) -> Finding | None:
    """A finding if `path` is a symlink, or not of the wanted type; nothing is opened."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return Finding(Kind.SYMLINK, file, f"it is a symlink to {os.readlink(path)!a}; a bundle holds none")
    if not wanted(mode):
        expected = "a folder" if wanted is stat.S_ISDIR else "a regular file"
        return Finding(Kind.NOT_A_FILE, file, f"expected {expected}, found type and mode {stat.filemode(mode)}")
    return None


def _check_layout(directory: Path) -> Iterator[Finding]:
    """Findings about the bundle's two entries and whatever lies beside them."""
    names = sorted(os.listdir(directory))
    for name in names:
        if name not in (CONTENT, SIGNATURE):
            message = f"it lies beside {CONTENT}/ and {SIGNATURE}, where no signature covers it"
            yield Finding(Kind.UNLISTED, _shown(name), message)
    if SIGNATURE not in names:
        yield Finding(Kind.MISSING_SIGNATURE, SIGNATURE, "there is no signature: nothing in this bundle is proven")
    elif finding := _type_finding(directory / SIGNATURE, SIGNATURE):
        yield finding
    if CONTENT not in names:
        yield Finding(Kind.MISSING, CONTENT, "the bundle has no content folder")
    elif finding := _type_finding(directory / CONTENT, CONTENT, wanted=stat.S_ISDIR):
        yield finding


# --- files against digests -----------------------------------------------------------------------------------------


def _check_file(path: Path, digest: str, entry: FileEntry | None) -> Iterator[Finding]:
    """One file against its signed digest, and against its size in release.json where that is known."""
    file, size, actual = f"{CONTENT}/{path.name}", path.lstat().st_size, _sha256(path)
    if actual == digest:
        if entry is not None and entry.size != size:
            message = f"{path.name}: it says {entry.size:,} bytes, the signed file has {size:,}"
            yield Finding(Kind.DISAGREES, f"{CONTENT}/{Release.file_name}", message)
        return
    if entry is not None and size < entry.size:
        message = f"expected {entry.size:,} bytes, found {size:,}: {entry.size - size:,} bytes are missing"
        yield Finding(Kind.TRUNCATED, file, message)
        return
    sizes = f" ({entry.size:,} bytes)" if entry else ""
    yield Finding(Kind.MODIFIED, file, f"expected sha256 {digest}{sizes}, found {actual} ({size:,} bytes)")


def _check_strangers(content: Path, names: list[str]) -> Iterator[Finding]:
    """Findings about entries that no signature names: hidden files and git's are entries like all others."""
    for name in names:
        path, file = content / name, f"{CONTENT}/{_shown(name)}"
        if stat.S_ISDIR(path.lstat().st_mode):
            yield Finding(Kind.EXTRA, file, "a folder that the signature does not cover")
        elif finding := _type_finding(path, file):
            yield finding
        else:
            size = path.lstat().st_size
            yield Finding(Kind.EXTRA, file, f"a file of {size:,} bytes that the signature does not cover")


def _check_content(content: Path, digests: Mapping[str, str], entries: Mapping[str, FileEntry]) -> Iterator[Finding]:
    """Findings about every entry of the folder against the signed digests."""
    present = set(os.listdir(content))
    missing, strangers = sorted(digests.keys() - present), sorted(present - digests.keys())
    candidates = [name for name in strangers if missing and stat.S_ISREG((content / name).lstat().st_mode)]
    moved = {_sha256(content / name): name for name in candidates}
    for name in missing:
        if (found := moved.get(digests[name])) is not None:
            message = f"it is here as {_shown(found)}, with the same sha256 {digests[name]}"
            yield Finding(Kind.RENAMED, f"{CONTENT}/{name}", message)
            strangers = [stranger for stranger in strangers if stranger != found]
        else:
            yield Finding(Kind.MISSING, f"{CONTENT}/{name}", f"expected sha256 {digests[name]}, found no such file")
    yield from _check_strangers(content, strangers)
    for name in sorted(digests.keys() & present):
        if finding := _type_finding(content / name, f"{CONTENT}/{name}"):
            yield finding
        else:
            yield from _check_file(content / name, digests[name], entries.get(name))


# --- the signed document -------------------------------------------------------------------------------------------


def _read_document(content: Path, kind: type[Stamp], digest: str) -> tuple[Stamp | None, Finding | None]:
    """Parse a document from bytes that have the signed digest.

    (None, None) when the file is not there or is not those bytes: comparing the files reports that.
    """
    path = content / kind.file_name
    if not os.path.lexists(path) or _type_finding(path, kind.file_name):
        return None, None
    raw = _read_small(path)
    if raw is None or hashlib.sha256(raw).hexdigest() != digest:
        return None, None
    try:
        return kind.model_validate_json(raw), None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        message = f"it is signed, but not a {kind.file_name} as this version knows it: {problems}"
        return None, Finding(Kind.MALFORMED_DOCUMENT, f"{CONTENT}/{kind.file_name}", message)


def _check_stamp(stamp: Stamp, key: str, expected: _Expected) -> Iterator[Finding]:
    """Findings about the key, freshness and identity of any signed document."""
    file = f"{CONTENT}/{stamp.file_name}"
    if stamp.key.id != key:
        yield Finding(Kind.DISAGREES, file, f"it names the key {stamp.key.id}, but {key} signed it")
    development = "development" in (stamp.key.kind, stamp.channel)
    if stamp.key.kind == "development" and stamp.channel == "release":
        yield Finding(Kind.DEVELOPMENT_KEY, file, f"channel 'release' was signed with the development key {key}")
    elif development and not expected.allow_development:
        message = f"expected a release, found channel {stamp.channel!r} and a {stamp.key.kind} key"
        yield Finding(Kind.DEVELOPMENT_KEY, file, message)
    if expected.now >= parse_time(stamp.expires):
        now = expected.now.astimezone(UTC).isoformat(timespec="seconds")
        yield Finding(Kind.EXPIRED, file, f"it expired on {stamp.expires}; the time is {now}")
    if expected.highest_release is not None and stamp.release < expected.highest_release:
        message = f"expected release {expected.highest_release} or later, found {stamp.release}: it was rolled back"
        yield Finding(Kind.DOWNGRADED, file, message)
    for field in ("model", "variant"):
        wanted, found = getattr(expected, field), getattr(stamp, field, None)
        if wanted is not None and found != wanted:
            yield Finding(Kind.SWAPPED, file, f"expected {field} {wanted!r}, found {found!r}")


def _check_agreement(document: Stamp, digests: Mapping[str, str]) -> Iterator[Finding]:
    """Findings where the document's own list of files differs from what was signed."""
    file = f"{CONTENT}/{document.file_name}"
    entries = document.files if isinstance(document, Release) else {}
    signed = digests.keys() - {document.file_name}
    for name in sorted(entries.keys() - signed):
        yield Finding(Kind.DISAGREES, file, f"{name}: it lists this file, but the signature does not")
    for name in sorted(signed - entries.keys()):
        yield Finding(Kind.DISAGREES, file, f"{name}: it does not list this file, but the signature does")
    for name in sorted(entries.keys() & signed):
        if entries[name].sha256 != digests[name]:
            message = f"{name}: it says sha256 {entries[name].sha256}, the signature says {digests[name]}"
            yield Finding(Kind.DISAGREES, file, message)


def _check_refusal(document: Stamp) -> Iterator[Finding]:
    if isinstance(document, Refusal):
        message = f"{document.model}/{document.variant} was refused, there is no bundle: {'; '.join(document.reasons)}"
        yield Finding(Kind.REFUSAL, f"{CONTENT}/{document.file_name}", message)


# --- the whole -----------------------------------------------------------------------------------------------------


def _check_signed(
    directory: Path, digests: Mapping[str, str], kinds: tuple[type[Stamp], ...], key: str, expected: _Expected
) -> tuple[list[Finding], Stamp | None]:
    """Findings about content and document once the digests are proven, and the document if it can be trusted."""
    content = directory / CONTENT
    named = [kind for kind in kinds if kind.file_name in digests]
    if len(named) != 1:
        wanted = " or ".join(kind.file_name for kind in kinds)
        message = f"expected one {wanted} in the signed content, found {len(named)}: this is something else"
        return [Finding(Kind.MALFORMED_DOCUMENT, CONTENT, message), *_check_content(content, digests, {})], None
    document, malformed = _read_document(content, named[0], digests[named[0].file_name])
    entries = document.files if isinstance(document, Release) else {}
    findings = [malformed] if malformed else []
    findings += _check_content(content, digests, entries)
    if document is not None:
        findings += _check_stamp(document, key, expected)
        findings += _check_agreement(document, digests)
        findings += _check_refusal(document)
    return findings, document


def _verify(directory: Path, public_key: Path, kinds: tuple[type[Stamp], ...], expected: _Expected) -> Report:
    if expected.now.tzinfo is None:
        raise BundleError(f"the time {expected.now.isoformat()} has no time zone: pass an aware datetime.")
    trusted = load_public_key(public_key)
    key = key_id(trusted)
    try:
        findings = list(_check_layout(directory))
        document = None
        if not any(finding.file in (CONTENT, SIGNATURE) for finding in findings):
            raw = _read_small(directory / SIGNATURE)
            digests = open_signature(raw if raw is not None else b"", trusted)
            signed, document = _check_signed(directory, digests, kinds, key, expected)
            findings += signed
    except SignatureError as error:
        findings.append(Finding(Kind(error.flaw.value), SIGNATURE, str(error)))
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else str(directory)
        raise BundleError(f"{_shown(where)} cannot be read: {error.strerror}. Nothing was verified.") from None
    return Report(directory, key, tuple(sorted(set(findings))), document)


def verify(
    bundle: Path,
    public_key: Path,
    *,
    now: datetime | None = None,
    highest_release: int | None = None,
    allow_development: bool = False,
    model: str | None = None,
    variant: str | None = None,
) -> Report:
    """Check a bundle folder (`content/` and `model.sig`) from nothing but itself and a trusted public key (PEM).

    `now` (aware; default: the clock) is compared with the expiry, `highest_release` is the highest number accepted so
    far, `model` and `variant` are what was asked for. Files are hashed in bounded memory. A bundle that was tampered
    with is a report with findings, never an exception.

    Raises:
        BundleError: the folder or the public key cannot be read, or `now` has no time zone.
    """
    expected = _Expected(now or datetime.now(UTC), highest_release, allow_development, model, variant)
    return _verify(bundle, public_key, (Release, Refusal), expected)


def verify_tiers(
    directory: Path,
    public_key: Path,
    *,
    now: datetime | None = None,
    highest_release: int | None = None,
    allow_development: bool = False,
    model: str | None = None,
) -> Report:
    """Check a signed tiers.json folder as `verify` checks a bundle; the report's document is a `TiersDocument`.

    Raises:
        BundleError: the folder or the public key cannot be read, or `now` has no time zone.
    """
    expected = _Expected(now or datetime.now(UTC), highest_release, allow_development, model, None)
    return _verify(directory, public_key, (TiersDocument,), expected)
