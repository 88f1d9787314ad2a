"""What a source was found to contain, as the store and git remember it: read without knowing how it is fetched."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pipeline.checkpoint.blobs import LockedFile, Store
from pipeline.config.sources import HubFile, WheelSource
from pipeline.errors import SourceError
from pipeline.files import write_json


@dataclass(frozen=True)
class SourceLock:
    """What a source was found to contain: the small file that git tracks in place of the weights.

    Law: after `write_lock(path, lock)`, `read_lock(path) == lock`.
    """

    model: str
    source: dict[str, Any]
    revision: str
    licence: str
    files: Annotated[tuple[LockedFile, ...], Field(min_length=1)]
    __pydantic_config__ = ConfigDict(extra="forbid")

    def file(self, name: str) -> LockedFile:
        """The file called `name`. Raises `SourceError` if the source has none."""
        for file in self.files:
            if file.name == name:
                return file
        raise SourceError(f"{self.model}: no file {name!r}; there are {', '.join(file.name for file in self.files)}.")


def write_lock(path: Path, lock: SourceLock) -> None:
    """Write a lock file atomically; equal locks are equal bytes."""
    write_json(path, asdict(lock))


def read_lock(path: Path) -> SourceLock:
    """Read a lock file. Raises `SourceError` naming the file if it is missing, or nothing that `write_lock` wrote."""
    try:
        return TypeAdapter(SourceLock).validate_json(path.read_bytes(), strict=True)
    except (OSError, ValueError, SourceError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise SourceError(
            f"{path}: not readable as a source lock ({reason}). Make it again: `python -m pipeline download MODEL`."
        ) from error


def key_of(identity: dict[str, Any]) -> str:
    """A file name for whatever decides a source's content."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def dataset_key(source: HubFile | WheelSource) -> str:
    """The key of a dataset's record in the store."""
    return key_of({"dataset": source.model_dump()})


def dataset_path(name: str, source: HubFile | WheelSource, store: Store) -> Path:
    """Path in `store` of the bytes of a dataset's one file, which was fetched before. Raises SourceError otherwise."""
    record = store.record(dataset_key(source))
    if not record.exists():
        raise SourceError(f"dataset {name!r} is not in the store. `python -m pipeline download MODEL` fetches it.")
    return store.path(read_lock(record).files[0].sha256)
