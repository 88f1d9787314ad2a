"""Where everything lies in a place of publication, the same in a folder, in an object store and behind a web server.

    blobs/sha256/<hex>                               every file of every bundle: written once, never changed
    bundles/<model>/<variant>/<release>/model.sig    the signature: it names the files and their digests
    bundles/<model>/<variant>/latest.sig             a copy of the highest release's; written last
    tiers/<model>/<release>/model.sig, latest.sig    the same for tiers.json

There is no index beside the signature: an index could only say less, or something that nobody signed. So one small
file changes, `latest.sig`, and whoever holds its bytes holds a whole release.
"""

from __future__ import annotations

from pipeline.bundle.release import SIGNATURE


def blob(sha256: str) -> str:
    """Path of a file by the SHA-256 of its bytes (64 hex digits)."""
    return f"blobs/sha256/{sha256}"


def folder(model: str, variant: str | None) -> str:
    """Folder of a variant's releases; without one, of the releases of the model's tiers.json."""
    return f"bundles/{model}/{variant}" if variant else f"tiers/{model}"


def signature(folder: str, release: int) -> str:
    """Path of one release's signature."""
    return f"{folder}/{release}/{SIGNATURE}"


def pointer(folder: str) -> str:
    """Path of the highest release's signature."""
    return f"{folder}/latest.sig"
