"""bfloat16 to float32, compiled. Apart from tensors.py because the compiler takes half a second to import."""

from __future__ import annotations

import numpy as np

from pipeline.compiled import compiled


@compiled(nogil=True)
def widen_bfloat16(halves: np.ndarray, wide: np.ndarray) -> int:
    """Write bfloat16 bits, uint16 [n], as float32 bits to `wide`, uint32 [n]; return how many are NaN or infinite."""
    bad = 0
    for index in range(halves.size):
        wide[index] = np.uint32(halves[index]) << np.uint32(16)
        bad += (halves[index] & np.uint16(0x7F80)) == np.uint16(0x7F80)
    return bad
