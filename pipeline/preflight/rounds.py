"""How long units of work take: on the cores of this machine, or on workers elsewhere. Arithmetic that knows no machine.

A stage is rounds of units, one after another; each is a call of an engine, and ends when its last unit has ended. Cores
are of one speed wherever they are. Workers take units in their order, each when it is free: so does Ray.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.tasks.subject import batch_size

UNIT_SECONDS = 0.002
"""What a unit takes through Ray beside its work: 1.6 to 2.0 ms (`python -m benchmarks.engine`, docs/scale.md)."""
NETWORK = 1.25e9
"""Bytes per second that the head node exchanges with all workers together, and that each worker reads weights at from a
file system that all share: 10 Gb/s, assumed."""


@dataclass(frozen=True)
class Units:
    """Units of one size.

    Attributes:
        count: how many.
        wide: core-seconds of one that all cores of its worker share.
        narrow: of one, seconds on one core, whatever its worker has; threads here take one unit each.
        first: of one, seconds on one core before its work, which this process spends for one unit after the other.
        moved: bytes of one that go to a worker and come back.
        batched: whether a worker elsewhere gets several at a time, as `pipeline.tasks.subject.fill` does.
        again: core-seconds of each such batch beside its units.
        layered: (units, cores) → seconds of a batch, of a model that runs layer by layer; a worker gets one batch.
    """

    count: int
    wide: float = 0.0
    narrow: float = 0.0
    first: float = 0.0
    moved: float = 0.0
    batched: bool = False
    again: float = 0.0
    layered: Callable[[int, int], float] | None = None

    def here(self, cores: int) -> float:
        """Seconds of all on so many cores of this process."""
        if self.layered:
            return self.layered(self.count, cores)
        return self.count * (self.first + (self.wide + self.narrow) / cores)

    def batch(self, units: int, cores: int) -> float:
        """Seconds of some together on a worker of so many cores."""
        if self.layered:
            return self.layered(units, cores)
        return units * (self.first + self.narrow + self.wide / cores) + self.again / cores


class Round(NamedTuple):
    """Units of one call of an engine, in their order.

    Attributes:
        units: of one size after another.
        alone: seconds that no second worker shortens: what the head node does, or every worker for itself.
        read: bytes of weights that each worker reads for it.
        times: so many such rounds follow one another.
    """

    units: tuple[Units, ...] = ()
    alone: float = 0.0
    read: float = 0.0
    times: int = 1


@dataclass(frozen=True)
class Workers:
    """So many workers of so many cores each; seconds of a unit beside its work; bytes per second as `NETWORK`."""

    count: int
    cores: int
    unit: float = UNIT_SECONDS
    network: float = NETWORK

    def __str__(self) -> str:
        return f"{self.count} worker{'s' * (self.count != 1)} × {self.cores} core{'s' * (self.cores != 1)}"


class Phase(NamedTuple):
    """A round on workers: seconds on the head node, then each unit's on its worker; `link`: what moving them takes."""

    alone: float
    sizes: list[float]
    link: float
    times: int = 1


def here(work: Iterable[Round], cores: int) -> float:
    """Seconds on so many cores of this process."""
    return sum(one.times * (one.alone + sum(same.here(cores) for same in one.units)) for one in work)


def phases(work: Iterable[Round], workers: Workers) -> Iterator[Phase]:
    """What workers make of each round."""
    for one in work:
        sizes, moved = list[float](), 0.0
        for same in one.units:
            size = batch_size(same.count, workers.count, same.layered is not None) if same.batched else 1
            whole, rest = divmod(same.count, size)
            sizes += [workers.unit + same.batch(size, workers.cores)] * whole
            if rest:
                sizes.append(workers.unit + same.batch(rest, workers.cores))
            moved += same.count * same.moved
        read = one.read / workers.network if sizes else 0.0
        yield Phase(one.alone + read, sizes, moved / workers.network, one.times)


def makespan(sizes: Iterable[float], workers: int) -> float:
    """Seconds until the last of units has ended, which begin in their order as workers are free."""
    free = [0.0] * workers
    for size in sizes:
        heapq.heapreplace(free, free[0] + size)
    return max(free)


def on(work: Iterable[Round], workers: Workers) -> float:
    """Seconds on workers elsewhere. What moves, moves beside the units' work, as far as that takes longer."""
    return sum(
        one.times * (one.alone + max(makespan(one.sizes, workers.count), one.link)) for one in phases(work, workers)
    )
