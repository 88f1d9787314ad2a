"""E[x·xᵀ] of an input as it lies on the disk: correlations in float16, beside the second moments.

A quarter of the bytes of float32 (6.3 GB for MiMo, 16 GB for Phi-4, whose weights take 15.7 and 29.3), so that one pass
over the calibration text serves every variant. Float16 moves a correlation by 1/2048 of itself at most: far less than
the damping that GPTQ adds to a channel's correlation with itself, and than another text would.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_ROWS = 256  # of a panel: rows [start, stop) from column `start` on


def stored_bytes(channels: int) -> int:
    """Bytes of an input's correlations."""
    return sum(2 * (stop - start) * (channels - start) for start, stop in _panels(channels))


def packed(products: np.ndarray) -> np.ndarray:
    """Correlations of Σ x·xᵀ, float32 [channels, channels], symmetric: its panels one after another, float16 [values].
    A channel that is always 0 has none with any."""
    roots = np.sqrt(products.diagonal())
    scale = np.divide(1, roots, out=np.zeros_like(roots), where=roots > 0)
    values, at = np.empty(stored_bytes(len(products)) // 2, np.float16), 0
    for start, stop in _panels(len(products)):
        panel = products[start:stop, start:] * np.multiply.outer(scale[start:stop], scale[start:])
        values[at : at + panel.size] = panel.reshape(-1)
        at += panel.size
    return values


def unpacked(values: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """E[x·xᵀ], float32 [channels, channels], symmetric to the bit, of `packed` values; its diagonal is `moments`,
    float32 [channels]."""
    channels, roots = len(moments), np.sqrt(moments)
    products, at = np.empty((channels, channels), np.float32), 0
    for start, stop in _panels(channels):
        size = (stop - start) * (channels - start)
        panel = values[at : at + size].reshape(stop - start, -1) * np.multiply.outer(roots[start:stop], roots[start:])
        products[start:stop, start:], products[start:, start:stop] = panel, panel.T
        at += size
    np.fill_diagonal(products, moments)
    return products


def _panels(channels: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _ROWS, channels)) for start in range(0, channels, _ROWS))
