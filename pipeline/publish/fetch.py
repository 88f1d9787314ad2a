"""fetch: what an app does to get a bundle, as a command. Nothing is used before it is proven.

The signature comes first, from `latest.sig` or from a signed tiers.json that pins it; it gives every file's digest, and
release.json, checked against its digest, every size. Parts are then taken from an installed older release by digest, or
downloaded and hashed on the way. The whole is verified once more and renamed into place.

    DIR                 the bundle in use, whole: the old one until the new one is
    DIR.partial/        parts/<sha256> and parts/<sha256>.partial: what an interrupted run left for the next
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from io import BufferedRandom
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError
from urllib3.exceptions import MaxRetryError
from urllib3.util import Retry

from pipeline import files
from pipeline.bundle.keys import load_public_keys
from pipeline.bundle.release import CONTENT, SIGNATURE, SMALL, FileEntry, Release, Stamp
from pipeline.bundle.signing import SignatureError, open_signature
from pipeline.bundle.tiers import TierRefusal, TiersDocument
from pipeline.bundle.trust import ReleaseMemory
from pipeline.bundle.verify import Kind, Report, verify
from pipeline.config.typed_yaml import Name
from pipeline.errors import BundleError
from pipeline.progress import Progress
from pipeline.publish import layout
from pipeline.publish.places import Body, Interrupted, Reader, open_place

STATE = "releases.json"  # beside DIR, unless another file is named
CHUNK = 1 << 18  # bytes
# 8 requests in a row that bring nothing new end a fetch. The pauses between them double, from the second on, and last a
# minute (60 seconds) at most, also where a server asks for more.
PATIENCE = Retry(total=7, backoff_factor=0.5, backoff_jitter=0.5, backoff_max=60, retry_after_max=60)
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fetched:
    """What is installed now, and where its bytes came from."""

    directory: Path
    document: Release
    downloaded: int  # bytes, without signature and documents
    reused: int  # bytes that were here: of an installed release, or of an interrupted run
    tier: str | None = None  # that it was fetched for

    def describe(self) -> str:
        """One line for people."""
        moved = f"{self.downloaded:,} bytes downloaded, {self.reused:,} were here"
        way = self.document.tiers.get(self.tier or "")
        runs = f"; {self.tier} runs it with weights {way.weights} at {way.context:,} tokens" if way else ""
        return f"{self.directory}: {self.document.label}, verified; {moved}{runs}"


@dataclass(frozen=True)
class _Client:
    """Whom to ask and whom to trust. `verify` knows the keys, and what is wanted of every folder."""

    reader: Reader
    public_keys: Path | Sequence[Path]
    verify: Callable[..., Report]

    def lay_out(self, folder: Path, path: str, kind: type[Stamp], pinned: str | None = None) -> Path:
        """Fetch a signature and, by the digest that it proves, its document; `folder` holds them and no other file."""
        signature, where = read_all(self.reader, path, SMALL), f"{self.reader.shown}/{path}"
        if pinned is not None and hashlib.sha256(signature).hexdigest() != pinned:
            raise BundleError(f"{where} is not the signature that tiers.json pins, {pinned}.")
        try:
            digests = open_signature(signature, *load_public_keys(self.public_keys))
        except SignatureError as error:
            raise BundleError(f"{where}: {error}. Nothing else was fetched.") from None
        if kind.file_name not in digests:
            raise BundleError(f"{where} signs no {kind.file_name}: this is something else.")
        blob = layout.blob(digests[kind.file_name])
        raw = read_all(self.reader, blob, SMALL)
        if hashlib.sha256(raw).hexdigest() != digests[kind.file_name]:
            raise BundleError(f"{self.reader.shown}/{blob}: wrong bytes for {kind.file_name}. Nothing was kept.")
        shutil.rmtree(folder, ignore_errors=True)
        files.write_bytes(folder / SIGNATURE, signature)
        files.write_bytes(folder / CONTENT / kind.file_name, raw)
        return folder

    def accept(self, folder: Path, *passing: Kind, **more: Any) -> Any:
        """The folder's document. Raises BundleError for all that is wrong with it but findings of a `passing` kind."""
        report = self.verify(folder, **more)
        wrong = [finding for finding in report.findings if finding.kind not in passing]
        if wrong or report.document is None:
            raise BundleError("not accepted: " + "; ".join(map(str, wrong)))
        return report.document


def open_reader(address: str) -> Reader:
    """The place at a folder's path, or at a file://, s3://, https:// or http:// address.

    Raises:
        BundleError: another scheme, or s3fs is not installed.
    """
    if urlsplit(address).scheme in ("http", "https"):
        from pipeline.publish.http import Http

        return Http(address)
    return open_place(address)


def fetch(
    address: str,
    model: str,
    directory: Path,
    public_keys: Path | Sequence[Path],
    *,
    variant: str | None = None,
    tier: str | None = None,
    state: Path | None = None,
    allow_development: bool = False,
    now: datetime | None = None,
) -> Fetched:
    """Bring `directory` to the newest published release of a model's variant, or of what its tiers.json gives `tier`.

    `state` keeps the highest release accepted (default: releases.json beside `directory`). An interrupted run is gone
    on with by the next. On any error `directory` is what it was before.

    Raises:
        BundleError: not published, signed by none of `public_keys`, expired, rolled back, wrong bytes, no bundle for
            the tier, the place does not answer, or `directory` holds something else.
        ResourceError: the disk is too small, known before the first part moves.
    """
    for what, name in (("model", model), ("variant", variant), ("tier", tier)):
        try:
            TypeAdapter(Name | None).validate_python(name)
        except ValidationError:
            raise BundleError(f"{name!a} cannot be the name of a {what}: small letters, digits, '_' and '-'.") from None
    if (variant is None) == (tier is None):
        raise BundleError("name either the variant or the tier to fetch.")
    target = directory.absolute()
    accepted = ReleaseMemory(state or target.parent / STATE)
    checks: dict[str, Any] = {"now": now, "memory": accepted, "model": model}
    check = partial(verify, public_keys=public_keys, allow_development=allow_development, **checks)
    client = _Client(open_reader(address), public_keys, check)
    with _staging(target) as staging:
        _recover(target)
        path, pinned = layout.pointer(layout.folder(model, variant)), None
        if tier:
            tiers, (variant, path, pinned) = _of_tier(client, model, tier, staging)
            accepted.record(tiers.subject, tiers.release)
        bundle = client.lay_out(staging / "bundle", path, Release, pinned)
        document = client.accept(bundle, Kind.MISSING, variant=variant)
        fetched = _install(client, document, bundle, staging / "parts", target)
    accepted.record(document.subject, document.release)
    return replace(fetched, tier=tier)


# --- folders -------------------------------------------------------------------------------------------------------


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """DIR.partial, held alone; removed once the bundle is installed, kept on an error for the next run."""
    staging = target.with_name(f"{target.name}.partial")
    with files.disk_full(f"fetch into {target}"):
        (staging / "parts").mkdir(parents=True, exist_ok=True)
        with open(staging / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the file closes, also after a crash
            except BlockingIOError:
                raise BundleError(f"another fetch into {target} is running.") from None
            yield staging
            shutil.rmtree(staging, ignore_errors=True)


def _recover(target: Path) -> None:
    """Put back what a run moved aside that was killed between two renames; refuse to replace what is no bundle."""
    if not target.exists():
        for aside in sorted(target.parent.glob(f".{target.name}.old.*")):
            if (aside / SIGNATURE).is_file():
                os.replace(aside, target)
                break
    if target.exists() and not (target.is_dir() and set(os.listdir(target)) <= {CONTENT, SIGNATURE}):
        raise BundleError(f"{target} holds other things than a bundle, which would be lost. Name another folder.")
    files.remove_leftovers(target)


# --- tiers -----------------------------------------------------------------------------------------------------------


def _of_tier(client: _Client, model: str, tier: str, staging: Path) -> tuple[TiersDocument, tuple[str, str, str]]:
    """The newest signed tiers.json, and what it gives `tier`: variant, path and SHA-256 of the bundle's signature.

    A refusal is an error with its figures.
    """
    folder = client.lay_out(staging / "tiers", layout.pointer(layout.folder(model, None)), TiersDocument)
    document: TiersDocument = client.accept(folder, kinds=(TiersDocument,))
    if (decision := document.tiers.get(tier)) is None:
        raise BundleError(f"{model} has no tier {tier!r}. Its tiers: {', '.join(sorted(document.tiers))}.")
    if isinstance(decision, TierRefusal):
        need, share = "no variant passed its gates", f"{decision.budget_bytes:,} of its {decision.ram_bytes:,} bytes"
        if (missing := decision.shortfall_bytes) is not None:
            need = f"the variant that comes nearest lacks {missing:,} bytes"
        given = f"{tier} gets no bundle of {model} release {document.release}: an app may use {share} of memory"
        raise BundleError(f"{given}; {need}. {'; '.join(decision.reasons)}.")
    if (reference := document.bundles.get(decision.variant)) is None:
        raise BundleError(f"tiers.json of {model} gives {tier} {decision.variant}, and pins no bundle of it.")
    path = layout.signature(layout.folder(model, decision.variant), reference.release)
    return document, (decision.variant, path, reference.signature_sha256)


# --- parts -----------------------------------------------------------------------------------------------------------


def _install(client: _Client, document: Release, bundle: Path, parts: Path, target: Path) -> Fetched:
    """Complete `bundle`, which has signature and document as yet, through `parts`, and make it `target`."""
    there, signature = target / SIGNATURE, (bundle / SIGNATURE).read_bytes()
    same = there.is_file() and there.read_bytes() == signature
    if same and client.verify(target, variant=document.variant).ok:
        return Fetched(target, document, 0, sum(entry.size for entry in document.files.values()))
    wanted = {entry.sha256: entry for entry in document.files.values()}
    names = {entry.sha256: name for name, entry in document.files.items()}
    for path in parts.iterdir():
        if path.name.removesuffix(".partial") not in wanted:  # of a release that has been superseded
            path.unlink()
    _reuse(target / CONTENT, wanted, parts)
    kept = {digest: _kept(parts, digest) for digest in wanted}
    left = sum(entry.size - kept[digest] for digest, entry in wanted.items())
    files.require_free_space(parts, left, f"fetch {document.model} {document.variant}")
    with Progress(f"fetch {document.model} {document.variant}", len(wanted), "files", left) as progress:
        for digest, entry in sorted(wanted.items(), key=lambda item: names[item[0]]):
            if not (parts / digest).is_file():
                _download(client.reader, names[digest], entry, parts, progress)
            progress.advance()
    for name, entry in sorted(document.files.items()):
        files.link_or_copy(parts / entry.sha256, bundle / CONTENT / name)
    try:
        client.accept(bundle, variant=document.variant)
    except BundleError:
        shutil.rmtree(parts)  # they were right when they arrived: what is on the disk now is not
        raise
    files.fsync(bundle / CONTENT)
    files.fsync(bundle)
    files.replace_directory(bundle, target)
    files.fsync(target.parent)
    return Fetched(target, document, left, sum(kept.values()))


def _reuse(installed: Path, wanted: dict[str, FileEntry], parts: Path) -> None:
    """Give files of an installed release that have a wanted digest a second name in `parts`."""
    sizes = {entry.size for entry in wanted.values()}
    for file in sorted(installed.iterdir()) if installed.is_dir() else []:
        plausible = not file.is_symlink() and file.is_file() and file.stat().st_size in sizes
        if plausible and (digest := files.sha256_of(file)) in wanted:
            files.link_or_copy(file, parts / digest)


def _kept(parts: Path, digest: str) -> int:
    """Bytes of a file that are here, whole or in part."""
    here = (path for path in (parts / digest, parts / f"{digest}.partial") if path.is_file())
    return next((path.stat().st_size for path in here), 0)


def _download(reader: Reader, name: str, entry: FileEntry, parts: Path, progress: Progress) -> None:
    """Fetch one file to parts/<sha256>, going on behind what an earlier run left.

    What that run left is hashed again; if the whole is wrong then, it is fetched once more from its first byte.

    Raises:
        BundleError: the place has other bytes; none of them is kept.
    """
    partial = parts / f"{entry.sha256}.partial"
    with open(partial, "a+b") as file:
        resumed = os.fstat(file.fileno()).st_size
        actual = _append(reader, entry, file, progress)
        if actual != entry.sha256 and resumed:
            file.truncate(0)
            actual = _append(reader, entry, file, progress)
        os.fsync(file.fileno())
    if actual != entry.sha256:
        partial.unlink()
        wrong = f"{name}: wrong bytes from {reader.shown}. Expected sha256 {entry.sha256} ({entry.size:,} bytes)"
        remedy = "Try again; if it happens twice, the place or something before it changes the file."
        raise BundleError(f"{wrong}, got {actual}. None of them was kept; what was installed stays. {remedy}")
    os.replace(partial, parts / entry.sha256)


def _append(reader: Reader, entry: FileEntry, file: BufferedRandom, progress: Progress) -> str:
    """Complete `file` up to the promised size; the SHA-256 of all its bytes."""
    if os.fstat(file.fileno()).st_size > entry.size:
        file.truncate(0)
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256")
    for chunk in stream(reader, layout.blob(entry.sha256), file.tell(), entry.size):
        file.write(chunk)
        digest.update(chunk)
        progress.advance(0, len(chunk))
    file.flush()
    return digest.hexdigest()


# --- bytes over as many requests as it takes: pauses grow, and begin anew when something arrived ----------------------


def _pause(patience: Retry, broken: Interrupted, where: str, position: int) -> Retry:
    try:
        patience = patience.increment(error=broken)
    except MaxRetryError:
        attempts = len(patience.history) + 1
        failed = f"{attempts} attempts in a row brought nothing beyond byte {position:,}; the last: {broken}"
        remedy = "What arrived is kept: run the same command again and it goes on there."
        raise BundleError(f"{where}: {failed}. {remedy}") from None
    _LOG.info("%s: %s at byte %s; going on", where, broken, f"{position:,}")
    patience.sleep(broken.response)
    return patience


def _skip(body: Body, count: int) -> None:
    """Read past bytes that are here already: a server without Range begins at the first one again."""
    while count > 0:
        chunk = body.read(min(CHUNK, count))
        if not chunk:
            raise Interrupted("the answer ended early")
        count -= len(chunk)


def stream(reader: Reader, path: str, start: int, size: int | None, limit: int | None = None) -> Iterator[bytes]:
    """The bytes of `path` from `start` to `size`, never more, whatever the server sends; None: to the file's end.

    `limit` bounds a file whose size is not known.

    Raises:
        BundleError: not there, longer than `limit`, or `ATTEMPTS` requests in a row brought nothing new.
    """
    position, patience, where = start, PATIENCE, f"{reader.shown}/{path}"
    while size is None or position < size:
        reached = position
        try:
            with reader.open(path, position) as body:
                size = body.total if size is None else size
                _skip(body, position - body.start)
                while chunk := body.read(CHUNK if size is None else min(CHUNK, size - position)):
                    position += len(chunk)
                    if limit is not None and position > limit:
                        raise BundleError(f"{where} has more than {limit:,} bytes: it is no document of ours.")
                    yield chunk
            if size is None:
                return
            if position < size:
                raise Interrupted("the answer ended early")
        except Interrupted as broken:
            patience = _pause(PATIENCE if position > reached else patience, broken, where, position)


def read_all(reader: Reader, path: str, limit: int) -> bytes:
    """A small file of unknown size, at most `limit` bytes. Raises as `stream`."""
    return b"".join(stream(reader, path, 0, None, limit))
