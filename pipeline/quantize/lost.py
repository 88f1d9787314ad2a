"""What is lost because scales are float16: blocks that decode to zero though their weights are not, coarse steps.

Float16 ends at 65,504, has 11 bits of precision down to 2⁻¹⁴, and fewer below: multiples of 2⁻²⁴. A search makes no
step shorter than that, so a block vanishes if none of its weights reaches half of it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LARGEST = 65_504.0
_SIGN, _ONE, _NORMAL = 0x7FFF, 0x3C00, 0x0400  # the bits of a float16 but its sign; those of 1 and 2⁻¹⁴; 2⁻²⁴ has 1


class Lost(NamedTuple):
    """Counts over the blocks of one tensor.

    Attributes:
        blocks: all of them.
        vanished: those that decode to zero though a weight in them is not.
        weights: weights in those that are not zero.
        share: their part of the tensor's energy, the sum of its squares.
        subnormal: scales below 2⁻¹⁴, which are rounded to a multiple of 2⁻²⁴.
    """

    blocks: int
    vanished: int
    weights: int
    share: float
    subnormal: int


def plain(scales: np.ndarray) -> bool:
    """Whether all scales, float16, are normal numbers other than 1, as in nearly all tensors: nothing is lost then."""
    size = scales.view(np.uint16) & _SIGN
    return not ((size < _NORMAL) | (size == _ONE)).any()


def subnormal(scales: np.ndarray) -> int:
    """How many scales, float16, are subnormal (0 is not)."""
    size = scales.view(np.uint16) & _SIGN
    return int(np.count_nonzero((size > 0) & (size < _NORMAL)))


def suspects(scales: np.ndarray) -> np.ndarray:
    """Blocks that may have vanished, by their float16 scales alone: 0, the smallest, or 1, which a block of float32
    subnormals gets as a block of zeros does. bool, shaped as `scales`."""
    size = scales.view(np.uint16) & _SIGN
    return (size <= 1) | (size == _ONE)


def vanished(weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The nonzero weights of each block that decodes to zero: int [rows, blocks] for float32 [rows, columns] and its
    float16 scales [rows, blocks]."""
    found = np.zeros(scales.shape, np.int64)
    places = suspects(scales)
    blocks = weights.reshape(*scales.shape, -1)[places]
    steps = np.abs(scales[places]).astype(np.float32)
    gone = (steps == 0) | (np.abs(blocks).max(axis=-1, initial=0) <= steps / 2)
    found[places] = np.where(gone, np.count_nonzero(blocks, axis=-1), 0)
    return found


def energy(weights: np.ndarray) -> float:
    """The sum of squares, in float64: squares of what vanishes would vanish in float32."""
    return float(np.square(weights, dtype=np.float64).sum())
