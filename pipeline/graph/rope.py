"""Rotary position tables, in the arithmetic of transformers so that long positions agree to the last bits."""

from __future__ import annotations

import numpy as np

from pipeline.checkpoint.architecture import Rope


def rope_tables(rope: Rope, positions: int, factor: tuple[float, ...] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, each float32 [positions, rope.dims / 2].

    Frequencies are theta^(-2i/dims), divided by `factor` (LongRoPE, arXiv 2402.13753; Llama 3), in float32; the angle
    is their float32 product with the position, as in transformers; tables are scaled by the attention factor.
    """
    # numpy's float32 power is off by one in the last place for a tenth of the frequencies, which is 2e-3 radians at
    # position 32,768; rounded from float64 it equals torch's.
    exponents = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
    frequencies = (np.float64(rope.theta) ** exponents.astype(np.float64)).astype(np.float32)
    if factor is not None:
        frequencies = np.asarray(factor, dtype=np.float32) * frequencies
    angles = np.outer(np.arange(positions, dtype=np.float32), np.float32(1) / frequencies).astype(np.float32)
    scale = np.float32(rope.attention_factor)
    return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)
