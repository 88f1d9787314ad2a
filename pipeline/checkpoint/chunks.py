"""Digests of a weight file's chunks, recorded at download, so that rows are compared with them in any order.

A list lies beside its file as `<file>.blake3`: the SHA-256 of the whole file, then the BLAKE3 digest of every `CHUNK`
bytes, 32 bytes each. The source lock names the list by its SHA-256, so a list is as trustworthy as the lock. BLAKE3
withstands tampering as SHA-256 does, and is three to four times as fast: https://github.com/BLAKE3-team/BLAKE3-specs
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from blake3 import blake3

from pipeline.checkpoint.untrusted import open_regular

CHUNK = 1 << 18
"""Bytes. Rows are read in units of megabytes: what a range shares with its neighbours is a few per cent of it."""
SUFFIX = ".blake3"
AGAIN = (
    "Run `python -m pipeline download MODEL`, which compares every file and fetches what is damaged anew. Then run "
    "this command again."
)
_DIGEST = 32  # bytes of either hash
_BLOCK = 16 * CHUNK


class Digest(NamedTuple):
    """What some bytes are: how many, their SHA-256 (64 hex digits), and their list as it lies beside a file."""

    size: int
    sha256: str
    chunks: bytes


def copied(source: IO[bytes], target: IO[bytes] | None = None) -> Digest:
    """What `source` holds up to its end, copied to `target`. `source` is buffered: only its last read may be short."""
    size, whole, chunks = 0, hashlib.sha256(), bytearray()
    while piece := source.read(CHUNK):
        size += len(piece)
        whole.update(piece)
        chunks += blake3(piece).digest()
        if target:
            target.write(piece)
    return Digest(size, whole.hexdigest(), whole.digest() + chunks)


@dataclass(frozen=True)
class Chunks:
    """The list of one file: `sha256` of the whole (64 hex digits), `digests` of its chunks one after the other."""

    path: Path
    sha256: str
    digests: bytes

    @classmethod
    def beside(cls, path: Path, listing: Path | None = None) -> Chunks | None:
        """The list of the file at `path`, or the one in `listing`; None for a folder that did not come out of the
        store."""
        try:
            with open_regular(listing or path.with_name(path.name + SUFFIX)) as file:
                whole, digests = file.read(_DIGEST), file.read()
        except FileNotFoundError:
            return None
        return cls(path, whole.hex(), digests)

    def damage(self, descriptor: int, offset: int, data: memoryview) -> range | None:
        """Compare bytes that were read at `offset` of the open file; the rest of their first and last chunk is read.

        Returns the place of the first chunk that is not what was downloaded, in bytes of the file; None without one.
        """
        end = offset + len(data)
        first, last = offset // CHUNK, -(-end // CHUNK)
        before = os.pread(descriptor, offset - first * CHUNK, first * CHUNK)
        after = os.pread(descriptor, last * CHUNK - end, end)
        for index in range(first, last):
            found = blake3(before if index == first else b"")
            found.update(data[max(index * CHUNK - offset, 0) : (index + 1) * CHUNK - offset])
            if index == last - 1:
                found.update(after)
            if found.digest() != self.digests[index * _DIGEST : (index + 1) * _DIGEST]:
                return range(index * CHUNK, (index + 1) * CHUNK)
        return None

    def damage_in(self, offset: int, length: int) -> range | None:
        """The same for `length` bytes that a runtime will map: they are read here."""
        stop = offset + length
        with open_regular(self.path) as file:
            while offset < stop:
                block = os.pread(file.fileno(), min(stop, (offset // _BLOCK + 1) * _BLOCK) - offset, offset)
                if not block:  # the file became shorter
                    return range(offset, stop)
                if found := self.damage(file.fileno(), offset, memoryview(block)):
                    return found
                offset += len(block)
        return None
