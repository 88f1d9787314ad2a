"""A peer's file: how it is made, what decides it, how it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.quality.measure import Runtime
from benchmarks.quality.subjects import Prepared, digest_of
from pipeline.files import sha256_of

Make = Callable[[Prepared, Mapping[str, Any], Path], None]


@dataclass(frozen=True)
class Peer:
    """One file of one tool.

    Attributes:
        tool, name: the row's.
        options: what the tool is asked for; `make(prepared, options, folder)` writes the file, in its own process.
        code: files, and `packages`: distributions, whose change makes the file anew.
        calibrated: whether the calibration's statistics are used.
    """

    tool: str
    name: str
    options: Mapping[str, Any]
    make: Make
    runtime: Runtime
    code: tuple[Path, ...]
    packages: tuple[str, ...]
    calibrated: bool = False

    def key(self, prepared: Prepared) -> dict[str, Any]:
        """All that decides the file."""
        return {
            "model": prepared.identity,
            "tool": self.tool,
            "options": dict(self.options),
            "code": digest_of(self.code),
            "packages": {name: _version(name) for name in self.packages},
            "moments": sha256_of(prepared.moments) if self.calibrated else None,
        }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
