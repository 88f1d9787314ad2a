"""A process that believes it has so many cores: its sessions, engines and products take as many threads."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from threadpoolctl import threadpool_limits

from pipeline.engine import Here, units
from pipeline.quantize import factor
from pipeline.runtime import session, side_by_side, stream


@contextmanager
def with_cores(count: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(count, "blas"):
        for module in (factor, session, side_by_side, stream, units):
            patch.setattr(module, "cores", lambda: count)
        yield


class Elsewhere(Here):
    """An engine as a cluster is: jobs and units are pickled, what a worker has opened is its own."""

    shared = False

    def run(self, job: Callable[[Any], Any], units: Iterable[Any], reduce: Callable[[Any, Any], object]) -> None:
        theirs = pickle.loads(pickle.dumps(job))
        super().run(lambda unit: theirs(pickle.loads(pickle.dumps(unit))), units, reduce)
