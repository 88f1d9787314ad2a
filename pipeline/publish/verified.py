"""What may be published: a bundle or a tiers folder that was found to be in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.bundle.keys import load_public_keys
from pipeline.bundle.release import CONTENT, SIGNATURE, Release
from pipeline.bundle.signing import open_signature
from pipeline.bundle.tiers import TiersDocument
from pipeline.bundle.verify import verify, verify_tiers
from pipeline.errors import BundleError


@dataclass(frozen=True)
class Verified:
    """A folder, its document, its signature file's bytes, and the signed digests by file name."""

    directory: Path
    document: Release | TiersDocument
    signature: bytes
    digests: Mapping[str, str]

    @property
    def variant(self) -> str | None:
        """The variant, None for tiers."""
        return self.document.variant if isinstance(self.document, Release) else None


def verified(directory: Path, public_keys: Path | Sequence[Path], **checks: Any) -> Verified:
    """`directory`, a bundle or a signed tiers folder, after `verify` with `checks`.

    Raises:
        BundleError: it does not verify, or is a refusal.
    """
    is_tiers = (directory / CONTENT / TiersDocument.file_name).is_file()
    check = verify_tiers if is_tiers else verify
    report = check(directory, public_keys, **checks)
    if not report.ok or not isinstance(report.document, Release | TiersDocument):
        keys, wrong = " or ".join(report.trusted), "; ".join(map(str, report.findings))
        raise BundleError(f"{directory} does not verify under {keys}, so it is not published: {wrong}.")
    signature = (directory / SIGNATURE).read_bytes()
    return Verified(directory, report.document, signature, open_signature(signature, *load_public_keys(public_keys)))
