"""Keys and values in int8: a static scale per channel, from the largest magnitudes that calibration text gave.

Keys are cached after the rotary embedding. Text of a calibration window turns the slow pairs of channels by a fraction
of a degree only, so one channel of a pair can look nearly dead there and carry the pair's whole length thousands of
tokens later. What does not depend on the position is that length: it is the range of both.
"""

from __future__ import annotations

import numpy as np

LEVELS = 127
ROTATED = ".rotated"
"""Ends the name of ranges of values that are rotated by heads (`quantize.rotation`)."""
# Least range of a channel, in parts of the tensor's largest: what text never excited is still kept with 8 bits of it,
# and its rounding error is far below the other channels'.
FLOOR = 1e-3


def magnitudes(values: np.ndarray, rotary: int = 0) -> np.ndarray:
    """Largest magnitude of every channel at any position: float32 [heads · channels].

    Args:
        values: float32 [heads, tokens, channels], cached keys or values.
        rotary: how many first channels of a head are rotated, i paired with i + rotary / 2; both get the largest
            length of the pair.
    """
    half = rotary // 2
    pairs = np.hypot(values[..., :half], values[..., half:rotary]).max(axis=1)
    rest = np.abs(values[..., rotary:]).max(axis=1)
    return np.concatenate([pairs, pairs, rest], axis=1).reshape(-1)


def scales(ranges: np.ndarray) -> np.ndarray:
    """Scales of int8 codes, float32 like `ranges` (finite, ≥ 0, one above 0): a channel's range is code 127."""
    return np.maximum(ranges, np.float32(FLOOR) * ranges.max()) / np.float32(LEVELS)
