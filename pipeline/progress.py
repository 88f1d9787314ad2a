"""Progress of long work: a bar on a terminal, a line now and then elsewhere (logs, CI)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_QUIET_SECONDS = 15.0


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yield `items`, showing how many of `total` are done and how long the rest will take; writes to stderr."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as bar

        yield from bar(items, description=what, total=total, console=Console(stderr=True), transient=True)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last > _QUIET_SECONDS:
            last = now
            left = (now - start) / done * (total - done) if done else 0
            print(f"  {what}: {done} of {total}, about {left:.0f} s left", file=sys.stderr, flush=True)
        yield item
