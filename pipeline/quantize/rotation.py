"""Rotations of channels: a Hadamard matrix, with a small cosine transform where the width is no power of two.

After a rotation no channel stands out, so a grid that a block shares fits all of it (QuaRot, arXiv 2404.00456;
SpinQuant, 2405.16406). For a width of m · 2^k, m odd,

    R = diag(s) · (C ⊗ H),   s signs, C the orthonormal DCT-II of m points, H the Walsh-Hadamard matrix over √2^k,

and a row x becomes x · R in k additions and m products a channel. Signs come from splitmix64, sums have a fixed order
and cosines are rounded to float32, so the result is the same on every machine and however rows are chunked.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np

from pipeline.compiled import compiled
from pipeline.quantize.search import LANES

_WORD = (1 << 64) - 1
_LEAST = np.float32(1e-3)


class Factors(NamedTuple):
    """R of a width: its signs, float32 [width], C, float32 [m, m], and the order 2^k of H. width = m · 2^k"""

    signs: np.ndarray
    mix: np.ndarray
    order: int


@cache
def factors(width: int) -> Factors:
    """Those of `width` channels, at least 1."""
    order = width & -width
    return Factors(_signs(width), _cosines(width // order), order)


def rotate(values: np.ndarray, width: int) -> np.ndarray:
    """Replace every run x of `width` channels in float32 [rows, n · width] by x · R; returns `values`.

    `rotate(w.T, width)` makes Rᵀ · w of a matrix in place. Runs on the calling thread, without Python's lock; memory:
    256 bytes a channel of `width`.
    """
    if values.ndim != 2 or values.dtype != np.float32 or not width or values.shape[1] % width:
        raise ValueError(f"{values.dtype} {values.shape} in runs of {width}")
    signs, mix, order = factors(width)
    _rotate(values, signs * np.float32(1 / math.sqrt(order)), mix)
    return values


def rotate_products(products: np.ndarray, width: int) -> np.ndarray:
    """Rᵀ · H · R of Σ x·xᵀ, float32 [channels, channels], symmetric to the bit: what it is for rotated x. `products` is
    used up.

    H is stored in fewer bits than it was summed in. A rotated channel that hardly varies would drown in what that lost,
    or fall below 0: it gets a thousandth of its run's mean.
    """
    rotate(rotate(products, width).T, width)
    symmetric = products + products.T
    symmetric *= np.float32(0.5)
    own = symmetric.diagonal().reshape(-1, width)
    symmetric[np.diag_indices(len(symmetric))] = np.maximum(own, _LEAST * own.mean(axis=1, keepdims=True)).reshape(-1)
    return symmetric


def rotated_moments(moments: np.ndarray, width: int) -> np.ndarray:
    """E[(x·R)²] of channels that are uncorrelated, which is how a search of scales takes them: float32 like `moments`,
    [channels]."""
    shares = rotate(np.eye(width, dtype=np.float32), width) ** 2
    return (moments.reshape(-1, width) @ shares).reshape(-1)


def hadamard(order: int) -> np.ndarray:
    """The orthonormal Walsh-Hadamard matrix, float32 [order, order], of a power of two."""
    rows = np.arange(order)
    odd = np.bitwise_count(rows[:, None] & rows[None, :]) & 1
    return np.where(odd, -1, 1).astype(np.float32) * np.float32(1 / math.sqrt(order))


def _signs(width: int) -> np.ndarray:
    """Steele, Lea, Flood 2014: splitmix64 from `width` on, 64 signs a word."""
    words, state = bytearray(), width
    for _ in range(-(-width // 64)):
        state = (state + 0x9E3779B97F4A7C15) & _WORD
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _WORD
        words += (mixed ^ (mixed >> 31)).to_bytes(8, "little")
    bits = np.unpackbits(np.frombuffer(words, np.uint8), bitorder="little")[:width]
    return np.where(bits, -1, 1).astype(np.float32)


def _cosines(points: int) -> np.ndarray:
    """C[i, j] = cos(π (2i + 1) j / 2m) · √(2/m), √(1/m) in the first column."""
    scale = [math.sqrt((1 if j == 0 else 2) / points) for j in range(points)]
    rows = [[math.cos(math.pi * (2 * i + 1) * j / (2 * points)) for j in range(points)] for i in range(points)]
    return (np.array(rows) * scale).astype(np.float32)


@compiled(nogil=True)
def _rotate(values, signs, mix):
    """32 rows at a time, as lanes: vectorised without reordering any sum."""
    width = len(signs)
    lanes, mixed = np.zeros((width, LANES), np.float32), np.zeros((width, LANES), np.float32)
    for start in range(0, values.shape[0], LANES):
        count = min(LANES, values.shape[0] - start)
        for first in range(0, values.shape[1], width):
            for j in range(width):
                for lane in range(count):
                    lanes[j, lane] = values[start + lane, first + j] * signs[j]
            _hadamard(lanes, width // len(mix))
            _mix(lanes, mix, mixed)
            for j in range(width):
                for lane in range(count):
                    values[start + lane, first + j] = lanes[j, lane]


@compiled(nogil=True)
def _hadamard(lanes, order):
    """The Walsh-Hadamard transform, not scaled, of every run of `order` rows of [width, 32]."""
    half = 1
    while half < order:
        for start in range(0, len(lanes), 2 * half):
            for j in range(start, start + half):
                for lane in range(LANES):
                    a, b = lanes[j, lane], lanes[j + half, lane]
                    lanes[j, lane], lanes[j + half, lane] = a + b, a - b
        half *= 2


@compiled(nogil=True)
def _mix(lanes, mix, mixed):
    """Runs of rows of [width, 32] become their sums under the columns of `mix`."""
    points = len(mix)
    if points == 1:
        return
    order = len(lanes) // points
    mixed[:] = 0
    for j in range(points):
        for i in range(points):
            share = mix[i, j]
            for k in range(order):
                for lane in range(LANES):
                    mixed[j * order + k, lane] += share * lanes[i * order + k, lane]
    lanes[:] = mixed
