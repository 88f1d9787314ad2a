"""Tensor formats: how one matrix is stored, a class each. A new one is a class in `FORMATS`, and a vector in the tests.

`w4b32s` is 4 bits, blocks of 32 along the input channels, symmetric; `a` is asymmetric (an integer zero point per
block). A weight is (code − zero) · scale, scale in float16, the zero of a symmetric format being 2^(bits−1). Codes are
packed little-end first, which is MatMulNBits' layout:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits

`w4b32s8` stores a scale in 8 bits, as a share of its row's largest: a quarter of a bit less for each weight, on the
disk alone. The graph multiplies shares by the row's float16 once, when it is loaded.

A format describes the nodes that compute with it as data (`Node`); what writes a graph makes operators of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, NamedTuple

import numpy as np

from pipeline.errors import PlanError

# Bits that a kernel of so many bits keeps of each block beside its codes, once it has packed a weight: scales, zero
# points and sums, the most of what `python -m benchmarks.kernels` measures on x86-64 and arm64 (ONNX Runtime 1.31). On
# arm64 4-bit products keep four bytes a row besides, too few to count; symmetric ones keep 16 bits of a block.
_KEPT_PER_BLOCK = {2: 64, 4: 64, 8: 96}


Read = Callable[[str], bytes]
"""The bytes of a stored tensor, by its ending."""


class Plane(NamedTuple):
    """Some bits of every code, as one kernel multiplies them: their number, and what the lowest of them counts."""

    bits: int
    unit: int = 1


class Stored(NamedTuple):
    """A tensor of an artifact's data: its name, the numpy name of its type, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Length in bytes."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


class Operand(NamedTuple):
    """What a node reads of a matrix: the tensor with this ending of its name, seen under another shape if one is given.
    Scales are read as float32, `unit` times as large, and times the tensor with the ending `rows`, one value a row."""

    tensor: str
    shape: tuple[int, ...] | None = None
    unit: float = 1
    rows: str | None = None


class Node(NamedTuple):
    """An operator of com.microsoft. The results of a format's nodes, called by their `ending`, add up to the whole.

    `inputs`: None stands for what is multiplied, or for the ids of rows that are looked up.
    """

    op: str
    ending: str
    inputs: tuple[Operand | None, ...]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class TensorFormat:
    """Codes of one width. Every subclass is a row of the vocabulary, and may store, pack or compute otherwise.

    Attributes:
        block: input channels per scale.
        symmetric: without zero points.
        short: with scales of 8 bits.
        bits: of a code.
        blocks: those with kernels that are fast on x86-64 and arm64 with int8 activations (accuracy_level 4). Others
            exist in the operators' schema and run 20 to 400 times slower, or are refused when the session starts: a
            recipe that names one is refused.
        ranges: what a search of scales starts from, as shares of the full range: few bits gain from clipping far, 8
            bits hardly. On Gaussian and Student-t weights these with the refinement leave .2 to 2 % less error than 12
            ranges without it, in 40 % of the time.
        planes: what codes are stored in, the uppermost bits first; one plane where a kernel multiplies all bits.
    """

    block: int
    symmetric: bool
    short: bool = False
    bits: ClassVar[int]
    blocks: ClassVar[tuple[int, ...]]
    ranges: ClassVar[np.ndarray]
    planes: ClassVar[tuple[Plane, ...]]

    def __str__(self) -> str:
        return f"w{self.bits}b{self.block}{'s' if self.symmetric else 'a'}{'8' * self.short}"

    @staticmethod
    def parse(name: str) -> TensorFormat:
        """`TensorFormat.parse(str(f)) == f`. Raises PlanError when no fast kernel runs the format."""
        match = re.fullmatch(r"w(\d+)b(\d+)([sa])(8?)", name)
        if not match:
            raise PlanError(f"tensor format {name!r} is not of the form w<bits>b<block><s|a>[8], such as w4b32s.")
        bits, found = int(match[1]), FORMATS.get(int(match[1]))
        if found is None:
            raise PlanError(
                f"tensor format {name!r}: ONNX Runtime's MatMulNBits runs 2, 4 and 8 bits, and 6 as a sum of two, not "
                f"{bits}. For an average of about {bits} bits, split a matrix along its input channels (see "
                f"configs/recipes/q3.yaml)."
            )
        chosen = found(int(match[2]), match[3] == "s", match[4] == "8")
        if chosen.block not in found.blocks:
            raise PlanError(
                f"tensor format {name!r}: {bits}-bit blocks of {chosen.block} have no fast kernel; "
                f"use {', '.join(map(str, found.blocks))}."
            )
        if chosen.symmetric and len(found.planes) > 1:
            raise PlanError(
                f"tensor format {name!r}: {bits} bits are stored in planes of "
                f"{' and '.join(str(plane.bits) for plane in found.planes)}, whose kernels take no symmetric blocks "
                f"together; use w{bits}b{chosen.block}a."
            )
        return chosen

    def fitted(self, columns: int) -> TensorFormat:
        """This format with the largest allowed block, no larger than its own, that divides `columns`.

        Raises PlanError when none does.
        """
        for block in sorted(self.blocks, reverse=True):
            if block <= self.block and columns % block == 0:
                return replace(self, block=block)
        raise PlanError(f"format {self}: no block of at most {self.block} divides {columns} input channels.")

    # --- the grid ---

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero of a symmetric block."""
        return 1 << (self.bits - 1)

    # --- storage ---

    @property
    def _named(self) -> list[tuple[str, Plane]]:
        """The planes, and how the names of their tensors end."""
        return [("" if len(self.planes) == 1 else f".bits{plane.bits}", plane) for plane in self.planes]

    def tensors(self, rows: int, columns: int) -> list[Stored]:
        """What `rows` of a matrix are stored in, in the order of `Quantized.stored`, each [rows, values of a row]."""
        blocks = columns // self.block
        codes = [Stored(f"{name}.codes", "uint8", (rows, _width(columns, plane))) for name, plane in self._named]
        zeros = [Stored(f"{name}.zeros", "uint8", (rows, _width(blocks, plane))) for name, plane in self._named]
        scales = [Stored(".scales", "float16", (rows, blocks))]
        if self.short:
            kind = "int8" if self.symmetric else "uint8"
            scales = [Stored(".scales", kind, (rows, blocks)), Stored(".largest", "float16", (rows, 1))]
        return [*codes, *scales, *(() if self.symmetric else zeros)]

    def bytes(self, rows: int, columns: int) -> int:
        """Bytes on disk: codes, scales and zero points."""
        return sum(tensor.bytes for tensor in self.tensors(rows, columns))

    def packed_bytes(self, weights: int) -> int:
        """Bytes of memory once the kernels have packed so many weights: their codes, and their share of a block."""
        return sum(int(weights * (bits + _KEPT_PER_BLOCK[bits] / self.block) / 8) for bits, _ in self.planes)

    @property
    def results(self) -> int:
        """How many times over a product holds its result: once, or that of every plane and their sum."""
        return 1 if len(self.planes) == 1 else len(self.planes) + 1

    def pack(self, values: np.ndarray) -> np.ndarray:
        """Pack codes or zero points, uint8 [rows, n], lowest bits first: uint8 [rows, bytes of a row]. Planes lie one
        behind the other, each from a byte on."""
        masked = [(values >> _shift(plane)) & np.uint8((1 << plane.bits) - 1) for plane in self.planes]
        return np.hstack([_pack(part, plane.bits) for part, plane in zip(masked, self.planes, strict=True)])

    def unpack(self, packed: np.ndarray, count: int) -> np.ndarray:
        """Inverse of `pack`: uint8 [rows, count]."""
        found = np.zeros((len(packed), count), np.uint8)
        for plane, part in zip(self.planes, self.split(packed, count), strict=True):
            found |= _unpack(part, plane.bits, count) << _shift(plane)
        return found

    def split(self, packed: np.ndarray, count: int) -> list[np.ndarray]:
        """The planes of packed rows of `count` values."""
        ends = np.cumsum([_width(count, plane) for plane in self.planes])
        return np.split(packed, ends[:-1], axis=1)

    @property
    def cell(self) -> int:
        """Bits in which a search writes a code: as the only plane has it, or a byte, to be packed into planes."""
        return self.planes[0].bits if len(self.planes) == 1 else 8

    @property
    def shares(self) -> int:
        """The largest scale of a row in 8 bits. A step is what `.largest` holds / (shares + 1): that is a power of two,
        so no product is rounded."""
        return 127 if self.symmetric else 255

    def shorten(self, scales: np.ndarray, used: np.ndarray) -> np.ndarray:
        """The nearest scales that 8 bits hold, float32, of [rows, blocks]; 0 for blocks that are not `used`, a step at
        least for others. The largest of a row is all shares, so `.largest` follows from it."""
        used = used | ~np.isfinite(scales)  # levels under an infinite scale are all 0
        sizes = np.where(used, np.abs(scales), 0).astype(np.float32)
        most = sizes.max(axis=1, keepdims=True)
        # Where a scale is not finite, its row is not either.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            step = _largest(most, self.shares).astype(np.float32) / (self.shares + 1)
            counts = np.clip(np.rint(sizes / step), 1, self.shares)
            counts[sizes == most] = self.shares
            return np.where(used, np.copysign(counts, scales) * step, 0).astype(np.float32)

    def read_scales(self, read: Read, rows: int) -> np.ndarray:
        """The scales, float16 [rows, blocks], as nearly as it holds them, from stored tensors by their ending."""
        if not self.short:
            return np.frombuffer(read(".scales"), np.float16).reshape(rows, -1)
        counts = np.frombuffer(read(".scales"), np.int8 if self.symmetric else np.uint8).reshape(rows, -1)
        steps = np.frombuffer(read(".largest"), np.float16).astype(np.float32)[:, None] / (self.shares + 1)
        return (counts * steps).astype(np.float16)

    # --- what computes with it ---

    def product(self, rows: int, columns: int) -> list[Node]:
        """Activations [.., columns] to [.., rows]. The kernel wants codes as [rows, blocks, bytes of a block]: a tied
        table is stored once, as its look-up has it."""
        found = []
        for name, plane in self._named:
            codes = Operand(f"{name}.codes", (rows, columns // self.block, _width(self.block, plane)))
            found.append(self._node("MatMulNBits", name, plane, (None, codes), K=columns, N=rows, accuracy_level=4))
        return found

    def lookup(self) -> list[Node]:
        """Ids to rows of the matrix, float32."""
        axes = {"gather_axis": 0, "quantize_axis": 1}
        return [
            self._node("GatherBlockQuantized", name, plane, (Operand(f"{name}.codes"), None), **axes)
            for name, plane in self._named
        ]

    def _node(self, op: str, name: str, plane: Plane, first: tuple[Operand | None, ...], **settings: int) -> Node:
        """All planes have one scale, which counts for more in the upper ones."""
        zeros = [] if self.symmetric else [Operand(f"{name}.zeros")]
        scales = Operand(".scales", unit=plane.unit)
        if self.short:
            scales = Operand(".scales", unit=plane.unit / (self.shares + 1), rows=".largest")
        inputs = (*first, scales, *zeros)
        return Node(op, name, inputs, settings | {"bits": plane.bits, "block_size": self.block})


class TwoBits(TensorFormat):
    """Four levels."""

    bits, planes = 2, (Plane(2),)
    blocks = (32, 64, 128)
    ranges = np.linspace(1.0, 0.3, 4)


class FourBits(TensorFormat):
    """Sixteen levels."""

    bits, planes = 4, (Plane(4),)
    blocks = (16, 32, 64, 128, 256)
    ranges = np.linspace(1.0, 0.7, 4)


class SixBits(TensorFormat):
    """64 levels. No kernel multiplies 6 bits, but two do: a code is 4 · (its upper 4 bits) + (its lower 2), so is its
    zero point, and the product with both planes under one scale is the sum of two products."""

    bits, planes = 6, (Plane(4, 4), Plane(2))
    blocks = (32, 64, 128)
    ranges = np.linspace(1.0, 0.85, 4)


class EightBits(TensorFormat):
    """256 levels."""

    bits, planes = 8, (Plane(8),)
    blocks = (16, 32, 64, 128, 256)
    ranges = np.linspace(1.0, 0.95, 3)


FORMATS: dict[int, type[TensorFormat]] = {kind.bits: kind for kind in (TwoBits, FourBits, SixBits, EightBits)}


@dataclass(frozen=True)
class Quantized:
    """Rows of a matrix in a format: packed codes and zero points, uint8 [rows, bytes of a row] (none for a symmetric
    format; a row's planes one behind the other), scales float16 [rows, columns/block], of a short format float32."""

    format: TensorFormat
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    @classmethod
    def of(
        cls, fmt: TensorFormat, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, cell: int = 8
    ) -> Quantized:
        """From codes in cells of so many bits, 8 or the format's own, and zero points, uint8 [rows, columns/block]."""
        kept = np.empty((len(zeros), 0), np.uint8) if fmt.symmetric else fmt.pack(zeros)
        found = cls(fmt, fmt.pack(codes) if cell == 8 else codes, scales, kept)
        if not fmt.short:
            return found
        return replace(
            found, scales=fmt.shorten(scales, np.logical_or.reduce(found.levels().reshape(*scales.shape, -1), axis=-1))
        )

    def rows(self, part: slice | np.ndarray) -> Quantized:
        """Some of the rows."""
        return Quantized(self.format, self.codes[part], self.scales[part], self.zeros[part])

    def stored(self) -> list[np.ndarray]:
        """The arrays as they are stored: the planes of the codes, the scales, the planes of the zero points."""
        blocks = self.scales.shape[1]
        found = [*self.format.split(self.codes, self.columns), *self._stored_scales()]
        return found if self.format.symmetric else [*found, *self.format.split(self.zeros, blocks)]

    def _stored_scales(self) -> list[np.ndarray]:
        if not self.format.short:
            return [self.scales]
        shares = self.format.shares
        largest = _largest(np.abs(self.scales).max(axis=1, keepdims=True), shares)
        steps = largest.astype(np.float32) / (shares + 1)
        counts = np.divide(self.scales, steps, out=np.zeros_like(self.scales), where=steps > 0)
        return [counts.astype(np.int8 if self.format.symmetric else np.uint8), largest]

    @property
    def columns(self) -> int:
        """Input channels."""
        return self.scales.shape[1] * self.format.block

    def zero_points(self) -> np.ndarray:
        """The code of a weight of 0 in each block, uint8 [rows, columns/block]."""
        if self.format.symmetric:
            return np.full(self.scales.shape, self.format.middle, np.uint8)
        return self.format.unpack(self.zeros, self.scales.shape[1])

    def levels(self) -> np.ndarray:
        """Codes less their zero points, float32 [rows, columns]."""
        codes = self.format.unpack(self.codes, self.columns).astype(np.float32)
        return codes - np.repeat(self.zero_points().astype(np.float32), self.format.block, axis=1)

    def dequantize(self) -> np.ndarray:
        """The weights that the runtime computes with, float32 [rows, columns]."""
        return self.levels() * np.repeat(self.scales.astype(np.float32), self.format.block, axis=1)


def stacked(parts: Sequence[Quantized]) -> Quantized:
    """Rows of one format, those of each part behind the other's."""
    arrays = zip(*((part.codes, part.scales, part.zeros) for part in parts), strict=True)
    return Quantized(parts[0].format, *map(np.concatenate, arrays))


def _width(count: int, plane: Plane) -> int:
    """Bytes of a row of `count` packed values; each row starts on a byte."""
    return -(-count * plane.bits // 8)


def _largest(scales: np.ndarray, shares: int) -> np.ndarray:
    """What `.largest` holds of a row whose largest scale is `shares` steps, float32 [rows, 1]."""
    return (scales * np.float32(shares + 1) / np.float32(shares)).astype(np.float16)


def _shift(plane: Plane) -> np.uint8:
    return np.uint8(plane.unit.bit_length() - 1)


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    per_byte = 8 // bits
    values = np.pad(values, ((0, 0), (0, -values.shape[1] % per_byte)))
    packed = values[:, 0::per_byte].copy()
    for slot in range(1, per_byte):
        packed |= values[:, slot::per_byte] << np.uint8(slot * bits)
    return packed


def _unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    per_byte = 8 // bits
    slots = [(packed >> np.uint8(slot * bits)) & np.uint8((1 << bits) - 1) for slot in range(per_byte)]
    return np.stack(slots, axis=-1).reshape(len(packed), -1)[:, :count]
