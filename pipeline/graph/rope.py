"""Rotary position tables, in the arithmetic of transformers so that long positions agree to the last bits."""

from __future__ import annotations

import numpy as np

from pipeline.checkpoint.architecture import Rope


def rope_tables(rope: Rope, positions: int, factor: tuple[float, ...] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, each float32 [positions, rope.dims / 2].

    Frequencies are theta^(-2i/dims), divided by `factor` (LongRoPE, arXiv 2402.13753), in float32; the angle is their
    float32 product with the position, as in transformers; tables are scaled by the attention factor.
    """
    exponents = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
    frequencies = np.float32(rope.theta) ** exponents
    if factor is not None:
        frequencies = np.asarray(factor, dtype=np.float32) * frequencies
    angles = np.outer(np.arange(positions, dtype=np.float32), np.float32(1) / frequencies).astype(np.float32)
    scale = np.float32(rope.attention_factor)
    return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)
