"""Units of work done in this process, in the order in which they are put together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Generic, Protocol, TypeVar

from threadpoolctl import threadpool_limits

from pipeline.machine import cores

U = TypeVar("U")
R = TypeVar("R")

# Units waiting for a thread: what they read is on the way from the disk already.
AHEAD = 16


class Engine(Protocol):
    """Who does units of work.

    Attributes:
        workers: how many units are done at a time.
        shared: whether workers see what this process holds. If not, a job and its units are pickled, and small units
            are worth putting together.
    """

    workers: int
    shared: bool

    def run(self, job: Callable[[U], R], units: Iterable[U | None], reduce: Callable[[U, R], object]) -> None:
        """Call `reduce(unit, job(unit))` for each unit, in their order, on this thread.

        `units` is read as work goes on. At a None, all before it are finished first: what they held may be dropped.

        Raises what a job raises, for the first unit that fails.
        """
        ...


class Threads:
    """`workers` threads of this process; None: as many as it may use cores. A unit's products in numpy have one thread,
    so their digits do not depend on the cores."""

    shared = True

    def __init__(self, workers: int | None = None):
        self.workers = workers or cores()

    def run(self, job: Callable[[U], R], units: Iterable[U | None], reduce: Callable[[U, R], object]) -> None:
        """As `Engine.run`."""
        # Set once around all of them: a limit is the whole process's, and the unit that ends first would lift it.
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(self.workers) as pool:
            try:
                for unit, made in in_order(units, lambda unit: pool.submit(job, unit).result, self.workers + AHEAD):
                    reduce(unit, made)
            finally:
                pool.shutdown(cancel_futures=True)


class Here:
    """This thread, one unit after the other: for units that take all cores themselves. Nothing is done ahead."""

    workers = 1
    shared = True

    def run(self, job: Callable[[U], R], units: Iterable[U | None], reduce: Callable[[U, R], object]) -> None:
        """As `Engine.run`; what a generator gives is made as `reduce` takes it."""
        for unit in units:
            if unit is not None:
                reduce(unit, job(unit))


class Bundles:
    """Units of one core each on the workers of `engine`: `size` of them at a time on one, by threads there."""

    shared = False

    def __init__(self, engine: Engine, size: int):
        self._engine, self._size, self.workers = engine, size, engine.workers * size

    def run(self, job: Callable[[U], R], units: Iterable[U | None], reduce: Callable[[U, R], object]) -> None:
        """As `Engine.run`, for an engine to which a barrier is nothing."""

        def take(bundle: tuple[U, ...], made: list[R]) -> None:
            for unit, one in zip(bundle, made, strict=True):
                reduce(unit, one)

        given = (unit for unit in units if unit is not None)
        self._engine.run(_Bundle(job), iter(lambda: tuple(islice(given, self._size)), ()), take)


@dataclass(frozen=True)
class _Bundle(Generic[U, R]):
    job: Callable[[U], R]

    def __call__(self, bundle: tuple[U, ...]) -> list[R]:
        made: list[R] = []
        Threads().run(self.job, bundle, lambda _, one: made.append(one))
        return made


def in_order(units: Iterable[U | None], begin: Callable[[U], Callable[[], R]], ahead: int) -> Iterator[tuple[U, R]]:
    """Begin units, at most `ahead` before the one that is taken; each with what it gives, in their order. `begin` gives
    what waits for that. At a None, all before it are finished first."""
    pending: deque[tuple[U, Callable[[], R]]] = deque()
    for unit in chain(units, [None]):
        if unit is not None:
            pending.append((unit, begin(unit)))
        while len(pending) > (ahead if unit is not None else 0):
            first, wait = pending.popleft()
            yield first, wait()
