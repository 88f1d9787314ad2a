"""Files of the head's project that a worker's node lacks: fetched once, compared with their digests while written.

A node without a shared file system starts with a clone of the code alone. Weights come into its own store under the
SHA-256 that the model's source lock names; every other file is compared with what the head's node says of it. What is
there already stays as it is: whether it is the same is asked elsewhere (`pipeline.engine.cluster.identity`). Ray moves
the bytes, some megabytes at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any

from pipeline.checkpoint.blobs import LARGER_STORE, Store
from pipeline.checkpoint.chunks import CHUNK, SUFFIX, copied
from pipeline.errors import SourceError
from pipeline.files import atomic_file, require_free_space, sha256_of
from pipeline.workspace import ARTIFACTS, REFERENCE, Workspace

_PIECE = 64 << 20  # bytes
# Of a model's folder, what a unit may read.
_READ = (
    "source.json", "export/*", f"{REFERENCE}/*", "calibration/*", "evaluation/reference/*/*",
)  # fmt: skip


def listed(models: Iterable[str], variants: Iterable[str]) -> list[str]:
    """The files of this project that a worker may read, relative to it; source locks first. No blob's list of digests,
    which the blob brings."""
    patterns = (*_READ, *(f"variants/{name}/*" for name in variants))
    found = [path for pattern in patterns for model in models for path in sorted((ARTIFACTS / model).glob(pattern))]
    return [path.as_posix() for path in found if path.is_file() and path.suffix != SUFFIX]


class Head:
    """Gives the bytes of the files that are listed in `names`, and of nothing else; an actor on the head's node."""

    def __init__(self, root: str, names: Iterable[str]):
        self._root, self._names = Path(root), frozenset(names)

    def sha256(self, name: str) -> str:
        """Of a whole file, 64 hex digits."""
        return sha256_of(self._path(name))

    def read(self, name: str, start: int) -> bytes:
        """At most 64 MiB of a file, from byte `start` on; b"" at its end."""
        with open(self._path(name), "rb") as file:
            return os.pread(file.fileno(), _PIECE, start)

    def _path(self, name: str) -> Path:
        if name not in self._names:
            raise SourceError(f"{name!r} is no file that a worker of this command reads")
        return self._root / name


class _Remote(RawIOBase):
    """A file of the head's node, read from its beginning."""

    def __init__(self, head: Any, name: str):
        self._head, self._name, self._start, self._piece = head, name, 0, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import ray

        if not self._piece:
            self._piece = memoryview(ray.get(self._head.read.remote(self._name, self._start)))
            self._start += len(self._piece)
        count = min(len(buffer), len(self._piece))
        buffer[:count], self._piece = self._piece[:count], self._piece[count:]
        return count


def fetch(names: Sequence[str], head: Any) -> None:
    """Bring files here from `head`, an actor of `Head`; one process of a node at a time.

    Raises:
        SourceError: bytes that came are not those of the digest. Nothing of that file is kept.
        ResourceError: not enough disk.
    """
    import ray

    store = Store()
    with store.exclusive("supply"):
        for name in names:
            path, stream = Path(name), BufferedReader(_Remote(head, name), CHUNK)
            if path.exists():  # another command brought it meanwhile
                continue
            if path.parent.name == REFERENCE and path.suffix == ".safetensors":
                file = Workspace(path.parts[1]).read_lock().file(path.name)
                if not store.has(file.sha256, file.size):
                    require_free_space(store.root, file.size, f"fetch {name}", LARGER_STORE)
                    store.add(stream, name, file.sha256)
                store.link([file], path.parent)
                continue
            with atomic_file(path) as target:
                found, expected = copied(stream, target).sha256, ray.get(head.sha256.remote(name))
                if found != expected:
                    raise SourceError(f"{name}: wrong bytes came: sha256 {found}, {expected} on the head's node")
