"""Is this bundle what its maker signed, and may this phone take it now? Every difference is named.

The order is the defence: layout by names only, then the signature, then bytes against signed digests, and only then is
a document parsed, from bytes whose digest was signed. File names come from the folder; names in the signature or in
release.json are compared with them, never opened.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from pipeline.bundle.keys import key_id, load_public_keys
from pipeline.bundle.release import CONTENT, SIGNATURE, SMALL, FileEntry, Refusal, Release, Stamp, parse, parse_time
from pipeline.bundle.signing import Kind, SignatureError, authenticate
from pipeline.bundle.tiers import TiersDocument
from pipeline.bundle.trust import ReleaseMemory
from pipeline.checkpoint.untrusted import open_regular
from pipeline.errors import BundleError

_CLOCK_SKEW = timedelta(days=1)  # two honest clocks may differ by this much


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
    """What verification found, sorted. `trusted` are the ids of the pinned keys, `signer` is the one that signed.

    `signer` is set once the signed statement is proven, `document` once its digest is too, and not before.
    """

    directory: Path
    trusted: tuple[str, ...]
    signer: str | None
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
            return f"{self.directory}: OK, {what}, signed by {self.signer}, fresh until {self.document.expires}"
        lines = [f"{self.directory}: {len(self.findings)} problem(s); trusted key {' or '.join(self.trusted)}"]
        return "\n".join(lines + [f"  {finding}" for finding in self.findings])


# --- reading: a symlink put in a file's place meanwhile is an error, not followed -------------------------------------


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_small(path: Path) -> bytes:
    """All bytes; none if there are more than any signature or document of ours has."""
    with open_regular(path) as file:
        raw = file.read(SMALL + 1)
    return raw if len(raw) <= SMALL else b""


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
    if CONTENT not in names:
        yield Finding(Kind.MISSING, CONTENT, "the bundle has no content folder")
    for name, wanted in ((SIGNATURE, stat.S_ISREG), (CONTENT, stat.S_ISDIR)):
        if name in names and (finding := _type_finding(directory / name, name, wanted)):
            yield finding


# --- files against digests -----------------------------------------------------------------------------------------


# `digests` are those that the signature proves, `entries` what release.json says of sizes, where it can be read.


def _may_be_listed(size: int, entries: Mapping[str, FileEntry]) -> bool:
    """Whether a listed file can have this size: others are not worth the time that hashing them takes."""
    return not entries or any(entry.size == size for entry in entries.values())


def _check_file(path: Path, digests: Mapping[str, str], entries: Mapping[str, FileEntry]) -> Finding | None:
    """One file against its signed digest, and against its size in release.json where that is known."""
    file, size = f"{CONTENT}/{path.name}", path.lstat().st_size
    digest, entry = digests[path.name], entries.get(path.name)
    documents = (Release.file_name, Refusal.file_name, TiersDocument.file_name)
    plausible = size <= SMALL or (path.name not in documents and _may_be_listed(size, entries))
    actual = _sha256(path) if plausible else None
    if actual == digest and (entry is None or entry.size == size):
        return None
    if actual != digest and (others := sorted(name for name, other in digests.items() if other == actual)):
        return Finding(Kind.EXCHANGED, file, f"it holds the bytes of {others[0]}, sha256 {actual}")
    if entry is not None and size != entry.size:
        kind, amiss = (Kind.TRUNCATED, "are missing") if size < entry.size else (Kind.EXTENDED, "too many")
        message = f"expected {entry.size:,} bytes, found {size:,}: {abs(entry.size - size):,} bytes {amiss}"
        return Finding(kind, file, message)
    sizes, found = f" ({entry.size:,} bytes)" if entry else "", actual or "too many bytes to be it"
    return Finding(Kind.MODIFIED, file, f"expected sha256 {digest}{sizes}, found {found} ({size:,} bytes)")


def _check_strangers(content: Path, names: list[str], digests: Mapping[str, str]) -> Iterator[Finding]:
    """Findings about entries that no signature names: hidden files and git's are entries like all others."""
    folded = {name.casefold(): name for name in digests}
    for name in names:
        path, file = content / name, f"{CONTENT}/{_shown(name)}"
        if stat.S_ISDIR(path.lstat().st_mode):
            yield Finding(Kind.EXTRA, file, "a folder that the signature does not cover")
        elif finding := _type_finding(path, file):
            yield finding
        else:
            size, twin = path.lstat().st_size, folded.get(name.casefold())
            case = f"; it differs only in case from {twin}, and on a phone one may replace the other" if twin else ""
            yield Finding(Kind.EXTRA, file, f"a file of {size:,} bytes that the signature does not cover{case}")


def _check_content(content: Path, digests: Mapping[str, str], entries: Mapping[str, FileEntry]) -> Iterator[Finding]:
    """Findings about every entry of the folder against the signed digests."""
    present = set(os.listdir(content))
    missing, strangers = sorted(digests.keys() - present), sorted(present - digests.keys())
    stats = {name: (content / name).lstat() for name in strangers} if missing else {}
    plain = [name for name, it in stats.items() if stat.S_ISREG(it.st_mode) and _may_be_listed(it.st_size, entries)]
    moved = {_sha256(content / name): name for name in plain}
    for name in missing:
        if (found := moved.get(digests[name])) is not None:
            message = f"it is here as {_shown(found)}, with the same sha256 {digests[name]}"
            yield Finding(Kind.RENAMED, f"{CONTENT}/{name}", message)
            strangers = [stranger for stranger in strangers if stranger != found]
        else:
            yield Finding(Kind.MISSING, f"{CONTENT}/{name}", f"expected sha256 {digests[name]}, found no such file")
    yield from _check_strangers(content, strangers, digests)
    for name in sorted(digests.keys() & present):
        path = content / name
        if finding := _type_finding(path, f"{CONTENT}/{name}") or _check_file(path, digests, entries):
            yield finding


# --- the signed document -------------------------------------------------------------------------------------------


def _read_document(content: Path, kinds: tuple[type[Stamp], ...], digests: Mapping[str, str]) -> Stamp | Finding | None:
    """The document of one of `kinds`, parsed from bytes that have the signed digest, or what is wrong with it.

    None when the file is not there or is not those bytes: comparing the files reports that.
    """
    named = [kind for kind in kinds if kind.file_name in digests]
    if len(named) != 1:
        wanted = " or ".join(kind.file_name for kind in kinds)
        message = f"expected one {wanted} in the signed content, found {len(named)}: this is something else"
        return Finding(Kind.MALFORMED_DOCUMENT, CONTENT, message)
    name, raw = named[0].file_name, b""
    with suppress(OSError):
        raw = _read_small(content / name)
    if hashlib.sha256(raw).hexdigest() != digests[name]:
        return None
    try:
        return parse(named[0], raw)
    except ValueError as error:
        message = f"it is signed, but not a {name} as this version knows it: {error}"
        return Finding(Kind.MALFORMED_DOCUMENT, f"{CONTENT}/{name}", message)


_Complaints = Iterator[tuple[Kind, str]]


def _check_key(stamp: Stamp, key: str, allow_development: bool) -> _Complaints:
    """What is wrong with who signed a document and for whom."""
    if stamp.key.id != key:
        yield Kind.DISAGREES, f"it names the key {stamp.key.id}, but {key} signed it"
    development = "development" in (stamp.key.kind, stamp.channel)
    if stamp.key.kind == "development" and stamp.channel == "release":
        yield Kind.DEVELOPMENT_KEY, f"channel 'release' was signed with the development key {key}"
    elif development and not allow_development:
        message = f"expected a release, found channel {stamp.channel!r} and a {stamp.key.kind} key"
        yield Kind.DEVELOPMENT_KEY, f"{message}; to try it all the same, --allow-development"


def _check_freshness(stamp: Stamp, now: datetime, floor: int, app: int | None) -> _Complaints:
    """What is wrong with a document's time, its release number below `floor`, and the app versions it is for."""
    time = now.astimezone(UTC).isoformat(timespec="seconds")
    if now >= parse_time(stamp.expires):
        yield Kind.EXPIRED, f"it expired on {stamp.expires}; the time is {time}"
    if now + _CLOCK_SKEW < parse_time(stamp.created):
        message = f"it was created on {stamp.created}, after the time, which is {time}: with such a clock none expires"
        yield Kind.NOT_YET_VALID, message
    if stamp.release < floor:
        yield Kind.DOWNGRADED, f"expected release {floor} or later, found {stamp.release}: it was rolled back"
    least, most = stamp.min_app_version, stamp.max_app_version
    if app is not None and (app < least or (most is not None and app > most)):
        wanted = f"{least} or later" if most is None else f"{least} to {most}"
        yield Kind.APP_VERSION, f"it is for app versions {wanted}; this app has version {app}"


def _check_identity(stamp: Stamp, tier: str | None, asked: Mapping[str, str | None]) -> _Complaints:
    """Where a document is not the one that was `asked` for: its fields by name."""
    for field, wanted in asked.items():
        if wanted is not None and (found := getattr(stamp, field, None)) != wanted:
            yield Kind.SWAPPED, f"expected {field} {wanted!r}, found {found!r}"
    if tier is not None and isinstance(stamp, Release | TiersDocument) and tier not in stamp.tiers:
        named = f"it is for {', '.join(stamp.tiers)}" if stamp.tiers else "it is for no tier"
        yield Kind.SWAPPED_TIER, f"expected tier {tier!r}, but {named}"
    if isinstance(stamp, Refusal):
        reasons = "; ".join(stamp.reasons)
        yield Kind.REFUSAL, f"{stamp.model}/{stamp.variant} was refused, there is no bundle: {reasons}"


def _check_agreement(document: Stamp, digests: Mapping[str, str]) -> _Complaints:
    """Where the document's own list of files differs from what was signed."""
    entries = document.files if isinstance(document, Release) else {}
    signed = digests.keys() - {document.file_name}
    for name in sorted(entries.keys() - signed):
        yield Kind.DISAGREES, f"{name}: it lists this file, but the signature does not"
    for name in sorted(signed - entries.keys()):
        yield Kind.DISAGREES, f"{name}: it does not list this file, but the signature does"
    for name in sorted(entries.keys() & signed):
        if (says := entries[name].sha256) != digests[name]:
            yield Kind.DISAGREES, f"{name}: it says sha256 {says}, the signature says {digests[name]}"


# --- the whole -----------------------------------------------------------------------------------------------------


def verify(
    directory: Path,
    public_keys: Path | Sequence[Path],
    *,
    kinds: tuple[type[Stamp], ...] = (Release, Refusal),
    now: datetime | None = None,
    highest_release: int | None = None,
    memory: ReleaseMemory | None = None,
    allow_development: bool = False,
    app_version: int | None = None,
    tier: str | None = None,
    model: str | None = None,
    variant: str | None = None,
) -> Report:
    """Check a bundle folder (`content/` and `model.sig`) from nothing but itself and trusted public keys (PEM files).

    Any one of the keys may have signed: an app pins the current and the next. `kinds` are the documents of which the
    content must hold one. `now` (aware; default: the clock) is compared with the expiry, `highest_release` and `memory`
    are what was accepted so far, `app_version`, `tier`, `model` and `variant` what the bundle is wanted for. Files are
    hashed in bounded memory. A bundle that was tampered with is a report with findings, never an exception; nothing is
    recorded in `memory`.

    Raises:
        BundleError: the folder, a public key or the memory cannot be read, or `now` has no time zone.
    """
    when = now or datetime.now(UTC)
    if when.tzinfo is None:
        raise BundleError(f"the time {when.isoformat()} has no time zone: pass an aware datetime.")
    trusted = load_public_keys(public_keys)
    if not trusted:
        raise BundleError(f"{directory} cannot be verified without a public key to trust.")
    signer = document = None
    try:
        findings = list(_check_layout(directory))
        if not any(finding.file in (CONTENT, SIGNATURE) for finding in findings):
            signer, digests = authenticate(_read_small(directory / SIGNATURE), trusted)
            read = _read_document(directory / CONTENT, kinds, digests)
            document = read if isinstance(read, Stamp) else None
            findings += [read] if isinstance(read, Finding) else []
            entries = document.files if isinstance(document, Release) else {}
            findings += _check_content(directory / CONTENT, digests, entries)
        if document and signer:
            floor = max(highest_release or 0, (memory and memory.highest(document.subject)) or 0)
            complaints = [
                *_check_key(document, signer, allow_development),
                *_check_freshness(document, when, floor, app_version),
                *_check_identity(document, tier, {"model": model, "variant": variant}),
                *_check_agreement(document, digests),
            ]
            findings += [Finding(kind, f"{CONTENT}/{document.file_name}", message) for kind, message in complaints]
    except SignatureError as error:
        findings.append(Finding(error.kind, SIGNATURE, str(error)))
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else str(directory)
        raise BundleError(f"{_shown(where)} cannot be read: {error.strerror}. Nothing was verified.") from None
    return Report(directory, tuple(map(key_id, trusted)), signer, tuple(sorted(set(findings))), document)


verify_tiers = partial(verify, kinds=(TiersDocument,))
"""Check a signed tiers.json folder as `verify` checks a bundle; the report's document is a `TiersDocument`."""
