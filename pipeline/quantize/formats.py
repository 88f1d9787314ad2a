"""Tensor formats: how one matrix is stored, one table and one decoder for all of them.

`w4b32s` is 4 bits, blocks of 32 along the input channels, symmetric; `a` is asymmetric (an integer zero point per
block). A weight is (code − zero) · scale, scale in float16, the zero of a symmetric format being 2^(bits−1). Codes are
packed little-end first, which is MatMulNBits' layout:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits

No kernel multiplies 6 bits, but two do: a code is 4 · (its upper 4 bits) + (its lower 2), so is its zero point, and the
product with both planes under one scale is the sum of two products.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import PlanError

# Kernels that are fast on x86-64 and arm64 with int8 activations (accuracy_level 4). Others exist in the operator's
# schema and run 20 to 400 times slower, or are refused when the session starts: a recipe that names one is refused.
FAST_BLOCKS = {2: (32, 64, 128), 4: (16, 32, 64, 128, 256), 6: (32, 64, 128), 8: (16, 32, 64, 128, 256)}
# Bits of the planes that codes are stored in, the uppermost first.
_PLANES = {6: (4, 2)}


@dataclass(frozen=True)
class TensorFormat:
    """One row of the vocabulary: bits per code, block of input channels per scale, symmetric or not."""

    bits: int
    block: int
    symmetric: bool

    def __str__(self) -> str:
        return f"w{self.bits}b{self.block}{'s' if self.symmetric else 'a'}"

    @classmethod
    def parse(cls, name: str) -> TensorFormat:
        """`TensorFormat.parse(str(f)) == f`. Raises PlanError when no fast kernel runs the format."""
        match = re.fullmatch(r"w(\d+)b(\d+)([sa])", name)
        if not match:
            raise PlanError(f"tensor format {name!r} is not of the form w<bits>b<block><s|a>, such as w4b32s.")
        bits, block = int(match[1]), int(match[2])
        if bits not in FAST_BLOCKS:
            raise PlanError(
                f"tensor format {name!r}: ONNX Runtime's MatMulNBits runs 2, 4 and 8 bits, and 6 as a sum of two, not "
                f"{bits}. For an average of about {bits} bits, split a matrix along its input channels (see "
                f"configs/recipes/q3.yaml)."
            )
        if block not in FAST_BLOCKS[bits]:
            raise PlanError(
                f"tensor format {name!r}: {bits}-bit blocks of {block} have no fast kernel; "
                f"use {', '.join(map(str, FAST_BLOCKS[bits]))}."
            )
        if bits in _PLANES and match[3] == "s":
            raise PlanError(
                f"tensor format {name!r}: {bits} bits are stored in planes of {_PLANES[bits]}, whose kernels take no "
                f"symmetric blocks together; use w{bits}b{block}a."
            )
        return cls(bits, block, match[3] == "s")

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits of each plane of the codes, the uppermost first; one plane where a kernel multiplies all bits."""
        return _PLANES.get(self.bits, (self.bits,))

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero of a symmetric block."""
        return 1 << (self.bits - 1)

    def fitted(self, columns: int) -> TensorFormat:
        """This format with the largest allowed block, no larger than its own, that divides `columns`.

        Raises PlanError when none does.
        """
        for block in sorted(FAST_BLOCKS[self.bits], reverse=True):
            if block <= self.block and columns % block == 0:
                return TensorFormat(self.bits, block, self.symmetric)
        raise PlanError(f"format {self}: no block of at most {self.block} divides {columns} input channels.")

    def code_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the packed codes."""
        return rows * columns * self.bits // 8

    def scale_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the float16 scales."""
        return rows * (columns // self.block) * 2

    def zero_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the packed zero points; each row starts on a byte."""
        if self.symmetric:
            return 0
        return rows * sum(row_bytes(columns // self.block, bits) for bits in self.planes)


def row_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` packed values; each row starts on a byte."""
    return -(-count * bits // 8)


@dataclass(frozen=True)
class Quantized:
    """Rows of a matrix in a format: packed codes and zero points, uint8 [rows, bytes of a row] (none for a symmetric
    format; a row's planes one behind the other), scales float16 [rows, columns/block]."""

    format: TensorFormat
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    def rows(self, part: slice) -> Quantized:
        """Some of the rows."""
        return Quantized(self.format, self.codes[part], self.scales[part], self.zeros[part])

    def stored(self) -> list[np.ndarray]:
        """The arrays as they are stored: the planes of the codes, the scales, the planes of the zero points."""
        planes, blocks = self.format.planes, self.scales.shape[1]
        found = [*_planes(self.codes, planes, blocks * self.format.block), self.scales]
        return found if self.format.symmetric else [*found, *_planes(self.zeros, planes, blocks)]

    @property
    def columns(self) -> int:
        """Input channels."""
        return self.scales.shape[1] * self.format.block

    def zero_points(self) -> np.ndarray:
        """The code of a weight of 0 in each block, uint8 [rows, columns/block]."""
        if self.format.symmetric:
            return np.full(self.scales.shape, self.format.middle, np.uint8)
        return unpack(self.zeros, self.format.bits, self.scales.shape[1])

    def levels(self) -> np.ndarray:
        """Codes less their zero points, float32 [rows, columns]."""
        codes = unpack(self.codes, self.format.bits, self.columns).astype(np.float32)
        return codes - np.repeat(self.zero_points().astype(np.float32), self.format.block, axis=1)

    def dequantize(self) -> np.ndarray:
        """The weights that the runtime computes with, float32 [rows, columns]."""
        return self.levels() * np.repeat(self.scales.astype(np.float32), self.format.block, axis=1)


def stacked(parts: Sequence[Quantized]) -> Quantized:
    """Rows of one format, those of each part behind the other's."""
    arrays = zip(*((part.codes, part.scales, part.zeros) for part in parts), strict=True)
    return Quantized(parts[0].format, *map(np.concatenate, arrays))


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack uint8 [rows, n] values of `bits` bits into uint8 [rows, ceil(n·bits/8)], lowest bits first; planes lie one
    behind the other, each from a byte on."""
    if bits in _PLANES:
        high, low = _PLANES[bits]
        return np.hstack([pack(values >> np.uint8(low), high), pack(values & np.uint8((1 << low) - 1), low)])
    per_byte = 8 // bits
    count = values.shape[1]
    if count % per_byte:
        values = np.pad(values, ((0, 0), (0, per_byte - count % per_byte)))
    packed = values[:, 0::per_byte].copy()
    for slot in range(1, per_byte):
        packed |= values[:, slot::per_byte] << np.uint8(slot * bits)
    return packed


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Inverse of `pack`: uint8 [rows, count]."""
    if bits in _PLANES:
        (high, low), planes = _PLANES[bits], _planes(packed, _PLANES[bits], count)
        return unpack(planes[0], high, count) << np.uint8(low) | unpack(planes[1], low, count)
    per_byte = 8 // bits
    slots = [(packed >> np.uint8(slot * bits)) & np.uint8((1 << bits) - 1) for slot in range(per_byte)]
    return np.stack(slots, axis=-1).reshape(len(packed), -1)[:, :count]


def _planes(packed: np.ndarray, planes: tuple[int, ...], count: int) -> list[np.ndarray]:
    """The planes of packed rows of `count` values."""
    ends = np.cumsum([row_bytes(count, bits) for bits in planes])
    return np.split(packed, ends[:-1], axis=1)
