"""push: a verified bundle, or tiers folder, to where phones fetch it. Nothing that was published is ever changed.

Files go first, each under its own digest; then the release's signature; `latest.sig` last, so that whoever follows it
finds everything. A killed push leaves unreferenced files and goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from pipeline.bundle.release import CONTENT
from pipeline.bundle.tiers import TiersDocument
from pipeline.errors import BundleError
from pipeline.progress import Progress
from pipeline.publish import layout
from pipeline.publish.places import Place, open_place
from pipeline.publish.verified import Verified, verified

HUB = "hf://"


class Destination(Protocol):
    """Where releases are published, each under its number. `shown` is its address for messages."""

    shown: str

    def releases(self, model: str, variant: str | None) -> list[int]:
        """The numbers that a variant, or the tiers (None), were published under."""

    def signature(self, model: str, variant: str | None, release: int) -> bytes | None:
        """The signature file of one release; None if it is not published."""

    def publish(self, wanted: Verified) -> str:
        """Write what is not there yet; says what it did."""


def push(directory: Path, destination: str, public_keys: Path | Sequence[Path], **checks: Any) -> str:
    """Publish a bundle or a signed tiers folder to a folder, s3://bucket/folder or hf://owner/name; says what it did.

    `checks` are what `verify` takes besides: `now` (aware; default: the clock) and `allow_development`.

    Raises:
        BundleError: the bundle does not verify or is a refusal; this release is published with other bytes, or a
            higher one is; tiers name a bundle that is not published; the place refuses or does not keep what it got.
        ResourceError: a folder's disk is too small.
    """
    wanted = verified(directory, public_keys, **checks)
    target = _open(destination)
    _require_next(wanted, target)
    if isinstance(wanted.document, TiersDocument):
        _require_bundles(wanted.document.label, wanted.document, target)
    return target.publish(wanted)


def _open(destination: str) -> Destination:
    if destination.startswith(HUB):
        from pipeline.publish.hub import Hub

        return Hub(destination.removeprefix(HUB))
    return _Blobs(open_place(destination))


def _require_next(wanted: Verified, target: Destination) -> None:
    """Refuse a release below the highest that is published, or with other bytes than published under its number."""
    model, release = wanted.document.model, wanted.document.release
    if target.signature(model, wanted.variant, release) not in (None, wanted.signature):
        remedy = "Raise `release` in configs/signing.yaml, then bundle and sign again."
        what = f"{wanted.document.label} is published with another signature, and what is published never changes"
        raise BundleError(f"{what}. {remedy}")
    if (highest := max(target.releases(model, wanted.variant), default=0)) > release:
        what = f"{wanted.document.label} is older than what is published, release {highest}"
        remedy = "phones that have that one refuse a lower one. Publish the older content under a new number."
        raise BundleError(f"{what}: {remedy}")


def _require_bundles(title: str, document: TiersDocument, target: Destination) -> None:
    """Refuse tiers unless the bundles that they pin are published: a phone that follows them must find them."""
    for variant, reference in sorted(document.bundles.items()):
        there = target.signature(document.model, variant, reference.release)
        if there is None or hashlib.sha256(there).hexdigest() != reference.signature_sha256:
            found = "is not published" if there is None else "is published with another signature"
            named = f"{title} names {variant} release {reference.release}"
            raise BundleError(f"{named}, which {found} in {target.shown}. Push that bundle first.")


class _Blobs:
    """A place whose files lie as `layout` says."""

    def __init__(self, place: Place) -> None:
        self.place, self.shown = place, place.shown

    def releases(self, model: str, variant: str | None) -> list[int]:
        names = self.place.children(layout.folder(model, variant))
        return [int(name) for name in names if name.isascii() and name.isdigit()]

    def signature(self, model: str, variant: str | None, release: int) -> bytes | None:
        return self.place.read(layout.signature(layout.folder(model, variant), release))

    def publish(self, wanted: Verified) -> str:
        folder, written = layout.folder(wanted.document.model, wanted.variant), self._put_blobs(wanted)
        for path in (layout.signature(folder, wanted.document.release), layout.pointer(folder)):
            if self.place.read(path) != wanted.signature:
                self.place.write(path, wanted.signature)
                if self.place.read(path) != wanted.signature:
                    raise BundleError(f"{self.shown}/{path} reads back with other bytes than were written.")
        total = len(wanted.digests)
        kept = f", {total - len(written)} were there" if len(written) < total else ""
        moved = f"{len(written)} of {total} files, {sum(written.values()):,} bytes"
        return f"{wanted.document.label}: {moved}, to {self.shown}{kept}; {layout.pointer(folder)} names it"

    def _put_blobs(self, wanted: Verified) -> dict[str, int]:
        """Write the files that are not there; digest → bytes of those that were written."""
        sources = {digest: wanted.directory / CONTENT / name for name, digest in wanted.digests.items()}
        sizes = {digest: path.stat().st_size for digest, path in sources.items()}
        written = {}
        with Progress(f"push {wanted.document.label}", len(sources), "files", sum(sizes.values())) as progress:
            for digest, path in sorted(sources.items(), key=lambda item: item[1]):
                blob, size = layout.blob(digest), sizes[digest]
                if (there := self.place.size(blob)) is None:
                    self.place.put(path, blob, digest)
                    written[digest] = size
                elif there != size:
                    sizes_differ = f"{self.shown}/{blob} has {there:,} bytes, {path.name} has {size:,}"
                    remedy = "it was not written by push. Find out what wrote it, and remove it."
                    raise BundleError(f"{sizes_differ}: {remedy}")
                progress.advance(1, size, kept=there is not None)
        return written
