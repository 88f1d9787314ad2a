"""Opening and parsing files that somebody else wrote: bounded in memory and time, never through a link or a device.

Everything here raises only OSError (the file) or ValueError (its content); the caller says which model and what to do.
"""

from __future__ import annotations

import errno
import json
import os
import reprlib
import stat
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

MAX_JSON = 1 << 21
"""Bytes of JSON that are parsed: 15,000 tensors of a safetensors header. Empty lists take 30 times that in memory."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = 200
_SHORT.maxlong = 60
_SHORT.maxother = 100

shown: Callable[[object], str] = _SHORT.repr
"""`repr` for messages: at most a few hundred characters on one line."""


def open_regular(path: Path, *, follow: bool = False) -> FileIO:
    """Open a regular file for reading; `follow` allows a symbolic link to one.

    Raises:
        OSError: absent, not readable, or a link, folder, pipe, socket or device. It never blocks on one of those.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "a symbolic link, which is not followed", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return FileIO(descriptor, "rb")


def read_json(path: Path, *, follow: bool = False) -> Any:
    """Parse a JSON file of at most `MAX_JSON` bytes. Raises OSError as `open_regular`, ValueError as `parse_json`."""
    with open_regular(path, follow=follow) as file:
        return parse_json(file.read(MAX_JSON + 1))


def parse_json(raw: bytes, most: int = MAX_JSON) -> Any:
    """Parse UTF-8 JSON of at most `most` bytes.

    Raises:
        ValueError: longer than that, malformed, nested too deeply, or a key given twice in one object,
            which another reader would resolve differently.
    """
    if len(raw) > most:
        raise ValueError(f"longer than {most:,} bytes")
    try:
        return json.loads(raw.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{shown(key)} appears twice; which one is meant cannot be known")
        found[key] = value
    return found
