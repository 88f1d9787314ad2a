"""A bandwidth is one that a machine can have."""

from __future__ import annotations

import pytest

from pipeline.runtime.bandwidth import memory_bandwidth

MEBI = 1 << 20


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bandwidth_is_what_a_machine_can_have(threads: int) -> None:
    """The sum itself is checked inside; a rate of terabytes would mean that the compiler dropped the reads."""
    assert 1e8 < memory_bandwidth(threads, 8 * MEBI + 8, repeats=2) < 5e12
