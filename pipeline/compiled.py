"""Compiled hot loops: numba, with its cache on disk where there is a place for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Callable], Callable]:
    """numba.njit with its on-disk cache, and without where no cache folder is writable (numba refuses to import)."""

    def wrap(function: Callable) -> Callable:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:
            return numba.njit(**options)(function)

    return wrap
