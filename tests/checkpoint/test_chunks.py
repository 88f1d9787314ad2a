"""Digests of chunks: whatever range is read, a changed byte in it is found, and one outside its chunks is not."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.checkpoint.chunks import CHUNK, SUFFIX, Chunks, copied

CONTENT = os.urandom(3 * CHUNK + 77)
RANGES = [
    (0, 1),
    (CHUNK - 1, 2),
    (CHUNK, CHUNK),
    (5, 2 * CHUNK),
    (CHUNK + 9, 100),
    (2 * CHUNK - 3, CHUNK + 80),
    (3 * CHUNK + 70, 7),
    (0, len(CONTENT)),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    copy = io.BytesIO()
    digest = copied(io.BytesIO(CONTENT), copy)
    assert copy.getvalue() == CONTENT
    assert (digest.size, digest.sha256) == (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    (tmp_path / "w").write_bytes(CONTENT)
    (tmp_path / f"w{SUFFIX}").write_bytes(digest.chunks)
    return tmp_path / "w"


def read(path: Path, offset: int, length: int) -> range | None:
    """A reader's way: the bytes first, then their check."""
    chunks = Chunks.beside(path)
    assert chunks
    with open(path, "rb") as file:
        return chunks.damage(file.fileno(), offset, memoryview(os.pread(file.fileno(), length, offset)))


def map_range(path: Path, offset: int, length: int) -> range | None:
    """What is done for a runtime that maps the file."""
    chunks = Chunks.beside(path)
    assert chunks
    return chunks.damage_in(offset, length)


Check = Callable[[Path, int, int], range | None]


@pytest.mark.parametrize("check", [read, map_range])
@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_every_changed_byte_of_a_range_is_found(path: Path, check: Check, offset: int, length: int) -> None:
    assert check(path, offset, length) is None
    for place in {offset, offset + length // 2, offset + length - 1}:
        changed = bytearray(CONTENT)
        changed[place] ^= 1
        path.write_bytes(changed)
        found = check(path, offset, length)
        assert found and place in found and len(found) == CHUNK


def test_a_change_in_another_chunk_is_another_readers(path: Path) -> None:
    changed = bytearray(CONTENT)
    changed[CHUNK - 1] ^= 1
    path.write_bytes(changed)
    assert read(path, CHUNK, 2 * CHUNK) is None
    assert read(path, CHUNK - 10, 5) == range(CHUNK)


@pytest.mark.parametrize("check", [read, map_range])
def test_a_shorter_file_or_list_is_found(path: Path, check: Check) -> None:
    os.truncate(path, len(CONTENT) - 1)
    assert check(path, 3 * CHUNK, 77)
    os.truncate(path.with_name(f"w{SUFFIX}"), 32 * 3)
    assert check(path, 2 * CHUNK, CHUNK)
    assert check(path, CHUNK, CHUNK) is None


def test_a_folder_of_ones_own_has_no_list(tmp_path: Path) -> None:
    assert Chunks.beside(tmp_path / "model.safetensors") is None
