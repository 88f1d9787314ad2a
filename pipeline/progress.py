"""Progress of long work: a bar on a terminal, a line now and then elsewhere (logs of DVC, CI). Both are rich's."""

from __future__ import annotations

import math
import sys
import time
from typing import Self

from pipeline.machine import resident_memory

_QUIET_SECONDS = 15.0
_SPEED_SECONDS = 3600.0  # speed is that of the last hour: a layer of a large model takes minutes
_BURST_SECONDS = 0.05  # items that come so close together are one sign of speed: a worker hands over several at once


class Progress:
    """How far a piece of work is: items and, if it is measured in bytes, GB/s; memory and time left. To stderr.

    `workers`: who do it elsewhere; 0 for this process.
    """

    def __init__(self, what: str, items: int, noun: str = "", total_bytes: int = 0, workers: int = 0):
        from rich import progress
        from rich.console import Console

        self.items, self.noun, self.total_bytes, self.done, self.workers = items, noun, total_bytes, 0, workers
        columns = ("{task.description}", progress.BarColumn(), "{task.fields[figures]}")
        self._bars = progress.Progress(
            *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
            get_time=time.monotonic, speed_estimate_period=_SPEED_SECONDS,
        )  # fmt: skip
        self._id = self._bars.add_task(what, total=total_bytes or items, figures="")
        (self._task,) = self._bars.tasks
        self._told = self._bars.get_time()
        self._waiting, self._seen = 0, -math.inf  # counted, but no sign of speed yet; when there was one

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def advance(self, items: int = 1, read: int = 0, kept: bool = False) -> None:
        """Count `items` more, worth `read` bytes; `kept` if an earlier run had done them: no sign of speed."""
        self.done, now = self.done + items, self._bars.get_time()
        self._waiting += read if self.total_bytes else items
        if kept or self.done >= self.items or now - self._seen > _BURST_SECONDS:
            count = self._bars.reset if kept else self._bars.update
            count(self._id, completed=int(self._task.completed) + self._waiting)
            self._waiting, self._seen = 0, -math.inf if kept else now
        if not self._bars.disable:
            self._bars.update(self._id, figures=self.figures())
        elif now - self._told > _QUIET_SECONDS:
            self._told = now
            print(f"  {self._task.description}: {self.figures()}", file=sys.stderr, flush=True)

    def figures(self) -> str:
        """Such as `12 of 291 tensors · 0.9 of 15.2 GB · 0.41 GB/s · 310 MB private · about 35 s left`."""
        task, parts = self._task, [f"{self.done:,} of {self.items:,} {self.noun}".rstrip()]
        if self.total_bytes:
            parts.append(f"{task.completed / 1e9:.1f} of {self.total_bytes / 1e9:.1f} GB")
            parts.append(f"{(task.speed or 0) / 1e9:.2f} GB/s")
        parts += [f"{self.workers:,} workers"] * bool(self.workers)
        parts.append(f"{resident_memory()[0] / 1e6:,.0f} MB private")
        if task.time_remaining is not None:
            parts.append(f"about {task.time_remaining:,.0f} s left")
        return " · ".join(parts)
