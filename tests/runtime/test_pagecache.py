"""Eviction really evicts, and says what stayed."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from pipeline.runtime.pagecache import evict, resident

MEBI = 1 << 20


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """A file of 32 MiB that is on the disk and wholly in the page cache."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(32 * MEBI))
    os.sync()
    assert len(path.read_bytes()) == resident(path)
    return path


def test_an_evicted_file_is_not_in_memory(cached: Path) -> None:
    assert evict(cached) == resident(cached) == 0
    cached.read_bytes()
    assert evict(cached.parent) == 0  # a folder too


def test_eviction_says_what_stayed(cached: Path) -> None:
    with open(cached, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        held = sum(mapped[offset] >= 0 for offset in range(0, 8 * MEBI, mmap.PAGESIZE)) * mmap.PAGESIZE
        assert held <= evict(cached) <= 32 * MEBI
    assert evict(cached) == 0


def test_an_empty_file_has_nothing_in_memory(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert evict(tmp_path) == 0
