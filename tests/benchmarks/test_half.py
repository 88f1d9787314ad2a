"""Products with activations in float16: their probes, and how instructions are counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import half, probes
from pipeline.quantize.formats import TensorFormat

_LOG = """----------------
IN:
0x0000005505a20000:  d10043ff  sub      sp, sp, #0x10
0x0000005505a20004:  d65f03c0  ret

Trace 0: 0x7f0000000100 [0000000000000000/0000005505a20000/00000000/ff000000] run
----------------
IN: next
0x0000005505a20004:  d65f03c0  ret

Trace 0: 0x7f0000000200 [0000000000000000/0000005505a20004/00000000/ff000000] next
Trace 0: 0x7f0000000100 [0000000000000000/0000005505a20000/00000000/ff000000] run
----------------
IN:
0x0000005505a20000:  d10043ff  sub      sp, sp, #0x10
0x0000005505a20004:  d65f03c0  ret

Trace 0: 0x7f0000000300 [0000000000000000/0000005505a20000/00000000/ff000000] run
a warning of the guest
"""


def test_a_block_counts_as_often_as_it_runs() -> None:
    assert half.count(_LOG.splitlines()) == 2 + 1 + 2 + 2


@pytest.mark.parametrize("way", half.WAYS)
@pytest.mark.parametrize("rows", [1, 16])
def test_a_product_in_float16_is_right(way: str, rows: int, tmp_path: Path) -> None:
    probe = half.external(probes.make_probe(TensorFormat.parse("w4b64a"), rows, tmp_path, half.WAYS[way]))
    said = half.here(probe, tmp_path, 1)
    found = np.load(tmp_path / "y.npy")
    assert found.dtype == (np.float16 if half.WAYS[way].half else np.float32)
    error = np.linalg.norm(found[0] - probe.exact) / np.linalg.norm(probe.exact)
    assert error < probes.INT8[1]
    assert said["private"] > 0 and said["seconds"] > 0
