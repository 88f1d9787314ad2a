"""Package URLs (purl) of what a bundle was made from and runs on: https://github.com/package-url/purl-spec."""

from __future__ import annotations

from packageurl import PackageURL

from pipeline.checkpoint.lock import SourceLock


def pypi(name: str, version: str) -> PackageURL:
    """A release of a package on PyPI."""
    return PackageURL("pypi", None, name.lower().replace("_", "-"), version)


def source(lock: SourceLock) -> PackageURL | None:
    """Where a checkpoint came from; None for a folder of somebody's machine, whose path is nobody's business."""
    source = lock.source
    if source.get("kind") == "hub":
        owner, name = source["repo"].split("/")
        return PackageURL("huggingface", owner, name, source["revision"])
    if source.get("kind") == "pypi":
        return pypi(source["package"], source["version"])
    return None
