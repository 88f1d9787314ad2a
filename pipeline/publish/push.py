"""push: a verified bundle, or tiers folder, into a store. Nothing that was published is ever changed.

Files go first, each under its own digest; then the release's signature; `latest.sig` last, so that whoever follows it
finds everything. A killed push leaves unreferenced files and goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pipeline.bundle.keys import load_public_keys
from pipeline.bundle.release import CONTENT, SIGNATURE, Release, Stamp
from pipeline.bundle.signing import open_signature
from pipeline.bundle.tiers import TiersDocument
from pipeline.bundle.verify import verify, verify_tiers
from pipeline.errors import BundleError
from pipeline.progress import Progress
from pipeline.publish import layout
from pipeline.publish.places import Store, open_store

HUB = "hf://"


@dataclass(frozen=True)
class Verified:
    """A folder found to be in order: its document, its signature file's bytes, and the signed digests by file name."""

    directory: Path
    document: Release | TiersDocument
    signature: bytes
    digests: Mapping[str, str]

    @property
    def title(self) -> str:
        """Such as `demo q4 release 7`."""
        return title(self.document)


def title(document: Stamp) -> str:
    """What a document describes, for people."""
    what = document.variant if isinstance(document, Release) else "tiers"
    return f"{document.model} {what} release {document.release}"


def push(
    directory: Path,
    destination: str,
    public_keys: Path | Sequence[Path],
    *,
    now: datetime | None = None,
    allow_development: bool = False,
) -> str:
    """Publish a bundle or a signed tiers folder to a folder, s3://bucket/folder or hf://owner/name; says what it did.

    `now` (aware; default: the clock) is compared with the expiry.

    Raises:
        BundleError: the bundle does not verify or is a refusal; this release is published with other bytes, or a
            higher one is; tiers name a bundle that is not published; the store refuses or does not keep what it got.
        ResourceError: a folder's disk is too small.
    """
    verified = _verified(directory, public_keys, now, allow_development)
    if destination.startswith(HUB):
        from pipeline.publish.hub import push_to_hub

        return push_to_hub(verified, destination.removeprefix(HUB))
    return _publish(verified, open_store(destination))


def _verified(
    directory: Path, public_keys: Path | Sequence[Path], now: datetime | None, allow_development: bool
) -> Verified:
    is_tiers = (directory / CONTENT / TiersDocument.file_name).is_file()
    report = (verify_tiers if is_tiers else verify)(
        directory, public_keys, now=now, allow_development=allow_development
    )
    if not report.ok or not isinstance(report.document, Release | TiersDocument):
        keys, wrong = " or ".join(report.trusted), "; ".join(map(str, report.findings))
        raise BundleError(f"{directory} does not verify under {keys}, so it is not published: {wrong}.")
    signature = (directory / SIGNATURE).read_bytes()
    return Verified(directory, report.document, signature, open_signature(signature, *load_public_keys(public_keys)))


def require_next(verified: Verified, published: list[int], same: bool | None) -> None:
    """Refuse a release below the highest of `published`, or with other bytes than published under its number.

    `same`: whether the published signature equals ours; None if this number was never published.

    Raises:
        BundleError: either.
    """
    release = verified.document.release
    if same is False:
        raise BundleError(
            f"{verified.title} is published with another signature, and what is published never changes. Raise "
            f"`release` in configs/signing.yaml, then bundle and sign again."
        )
    if published and max(published) > release:
        raise BundleError(
            f"{verified.title} is older than what is published, release {max(published)}: phones that have that one "
            f"refuse a lower one. Publish the older content under a new number."
        )


def _publish(verified: Verified, store: Store) -> str:
    folder, release = layout.folder(verified.document), verified.document.release
    published = [int(name) for name in store.children(folder) if name.isascii() and name.isdigit()]
    there = store.read(layout.signature(folder, release))
    require_next(verified, published, None if there is None else there == verified.signature)
    if isinstance(verified.document, TiersDocument):
        _require_bundles(verified.document, store)
    written = _put_blobs(verified, store)
    for path in (layout.signature(folder, release), layout.pointer(folder)):
        if store.read(path) != verified.signature:
            store.write(path, verified.signature)
            if store.read(path) != verified.signature:
                raise BundleError(f"{store.shown}/{path} reads back with other bytes than were written.")
    total = len(verified.digests)
    kept = f", {total - len(written)} were there" if len(written) < total else ""
    return (
        f"{verified.title}: {len(written)} of {total} files, {sum(written.values()):,} bytes, to {store.shown}{kept}; "
        f"{layout.pointer(folder)} names it"
    )


def _require_bundles(document: TiersDocument, store: Store) -> None:
    for variant, reference in sorted(document.bundles.items()):
        path = layout.signature(layout.bundles(document.model, variant), reference.release)
        require_bundle(document, variant, store.read(path), store.shown)


def require_bundle(document: TiersDocument, variant: str, published: bytes | None, where: str) -> None:
    """Refuse tiers unless the bundle that they pin is published: a phone that follows them must find it.

    Raises:
        BundleError: `published`, the signature that is there, is None or another than the pinned one.
    """
    reference = document.bundles[variant]
    if published is None or hashlib.sha256(published).hexdigest() != reference.signature_sha256:
        found = "is not published" if published is None else "is published with another signature"
        raise BundleError(
            f"{title(document)} names {variant} release {reference.release}, which {found} in {where}. Push that "
            f"bundle first."
        )


def _put_blobs(verified: Verified, store: Store) -> dict[str, int]:
    """Write the files that are not there; digest → bytes of those that were written."""
    content = verified.directory / CONTENT
    sources = {digest: content / name for name, digest in verified.digests.items()}
    sizes = {digest: path.stat().st_size for digest, path in sources.items()}
    written = {}
    with Progress(f"push {verified.title}", len(sources), "files", sum(sizes.values())) as progress:
        for digest, path in sorted(sources.items(), key=lambda item: item[1]):
            there = store.size(layout.blob(digest))
            if there is None:
                store.put(path, layout.blob(digest), digest)
                written[digest] = sizes[digest]
            elif there != sizes[digest]:
                raise BundleError(
                    f"{store.shown}/{layout.blob(digest)} has {there:,} bytes, {path.name} has {sizes[digest]:,}: it "
                    f"was not written by push. Find out what wrote it, and remove it."
                )
            progress.advance(1, sizes[digest], kept=there is not None)
    return written
