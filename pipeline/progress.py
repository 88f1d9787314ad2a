"""Progress of long work: a bar on a terminal, a line now and then elsewhere (logs, CI)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from pipeline.machine import private_memory

T = TypeVar("T")
_QUIET_SECONDS = 15.0


class Progress:
    """How far a piece of work is: items and, if it is measured in bytes, GB/s; memory and time left. To stderr."""

    def __init__(self, what: str, items: int, noun: str = "", total_bytes: int = 0):
        self.what, self.items, self.noun, self.total_bytes = what, items, noun, total_bytes
        self.done = self.bytes = self.kept = 0
        self.start = self.last = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bars

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
            self._bar = Bars(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.what, total=self.total_bytes or self.items, figures="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, items: int = 1, read: int = 0, kept: bool = False) -> None:
        """Count `items` more, worth `read` bytes; `kept` if an earlier run had done them: no sign of speed."""
        self.done, self.bytes = self.done + items, self.bytes + read
        if kept:
            self.kept += read if self.total_bytes else items
        now = time.monotonic()
        if self._bar:
            self._bar.update(
                self._task, completed=self.bytes if self.total_bytes else self.done, figures=self.figures(now)
            )
        elif now - self.last > _QUIET_SECONDS:
            self.last = now
            print(f"  {self.what}: {self.figures(now)}", file=sys.stderr, flush=True)

    def figures(self, now: float) -> str:
        """Such as `12 of 291 tensors · 0.9 of 15.2 GB · 0.41 GB/s · 310 MB private · about 35 s left`."""
        done, total = (self.bytes, self.total_bytes) if self.total_bytes else (self.done, self.items)
        fresh, seconds = done - self.kept, max(now - self.start, 1e-9)
        parts = [f"{self.done:,} of {self.items:,} {self.noun}".rstrip()]
        if self.total_bytes:
            parts.append(f"{self.bytes / 1e9:.1f} of {self.total_bytes / 1e9:.1f} GB")
            parts.append(f"{fresh / seconds / 1e9:.2f} GB/s")
        parts.append(f"{private_memory() / 1e6:,.0f} MB private")
        if fresh:
            parts.append(f"about {(total - done) * seconds / fresh:,.0f} s left")
        return " · ".join(parts)


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yield `items`, showing how many of `total` are done and how long the rest will take."""
    with Progress(what, total) as progress:
        for item in items:
            yield item
            progress.advance()
