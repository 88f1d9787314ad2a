"""The highest release ever accepted of each thing that is released, a model's variant or its tiers: what makes an old
release, still well signed, a rollback. A release need not hold every variant, so each has a number of its own.

A signature and an expiry cannot tell that a newer release exists; only a memory of the phone's own can. This is the
one that `verify --state` keeps.
"""

from __future__ import annotations

import fcntl
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints

from pipeline import files
from pipeline.bundle.release import Record, parse
from pipeline.errors import BundleError

Subject = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_-]+(/[a-z0-9_-]+)?$")]
"""A model's variant, MODEL/VARIANT, or a model's tiers: `Stamp.subject`."""


class _State(Record):
    releases: dict[Subject, int] = Field(default_factory=dict)


@dataclass(frozen=True)
class ReleaseMemory:
    """The state file at `path`. A missing one remembers nothing; an unreadable one is an error, never a fresh start."""

    path: Path

    def highest(self, subject: str) -> int | None:
        """The highest release of `subject` accepted so far, None before the first.

        Raises:
            BundleError: the file cannot be read, or is not one of these.
        """
        return self._read().releases.get(subject)

    def record(self, subject: str, release: int) -> None:
        """Remember that `release` of `subject` was accepted; atomic, and safe beside other processes that record.

        Raises:
            BundleError: a higher release was accepted before, or the file is unreadable. Nothing is written then.
            ResourceError: the disk is full or not writable.
        """
        with files.disk_full(f"write {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path.with_name(f".{self.path.name}.lock"), "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                releases = dict(self._read().releases)
                known = releases.get(subject, release)
                if release < known:
                    what = f"{self.path}: release {known} of {subject} was accepted before"
                    remedy = "Publish a release with a higher number."
                    raise BundleError(f"{what}, so {release} is a rollback and is not recorded. {remedy}")
                if releases.get(subject) != release:
                    files.write_json(self.path, _State(releases=releases | {subject: release}).model_dump(mode="json"))

    def _read(self) -> _State:
        try:
            return parse(_State, self.path.read_bytes())
        except FileNotFoundError:
            return _State()
        except OSError as error:
            raise BundleError(f"the record of releases {self.path} cannot be read: {error.strerror}.") from None
        except ValueError as error:
            remedy = "restore it, or remove it to trust the next release that verifies"
            what = f"{self.path} is no record of releases ({error}). Without it a rollback cannot be seen"
            raise BundleError(f"{what}: {remedy}.") from None
