"""The page cache under a measurement: what of a file it holds, and how to empty it, so that a cold load is cold.

Linux only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

from pipeline.errors import EvaluationError


def resident(path: Path) -> int:
    """Bytes of a file that the page cache holds (mincore)."""
    size = path.stat().st_size
    if not size:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    flags = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        start, found = (ctypes.c_void_p(array.ctypes.data) for array in (view, flags))
        status = libc.mincore(start, ctypes.c_size_t(size), found)
        del view  # or the mapping cannot be closed
    if status:
        raise EvaluationError(f"{path}: mincore failed: {os.strerror(ctypes.get_errno())}")
    return min(size, int((flags & 1).sum()) * mmap.PAGESIZE)


def evict(path: Path) -> int:
    """Drop a file, or every file below a folder, from the page cache; return the bytes that stayed.

    Dirty pages are written first. Pages that some process has mapped stay: the caller decides what that means.
    """
    stayed = 0
    for file in regular_files(path):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        stayed += resident(file)
    return stayed


def regular_files(path: Path) -> list[Path]:
    """The file itself, or the regular files below a folder, each inode once."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    return list({(file.stat().st_dev, file.stat().st_ino): file for file in found if file.is_file()}.values())
