"""Quantizing as a list of independent units: some rows of one matrix, and the bytes that they become."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.artifact.graph import seats
from pipeline.artifact.quantizers import Quantizer
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.errors import CheckpointError
from pipeline.planning.recipes import Plan, PlannedMatrix
from pipeline.quantize.formats import FORMATS, Quantized, TensorFormat
from pipeline.quantize.lost import LARGEST

# float32 bytes of the rows of one unit: small enough that the allocator keeps its blocks, and a fair share of a core's
# cache. At 32 MiB the system spends three times as long mapping fresh pages.
UNIT_BYTES = 8 << 20
TABLE_UNITS = 8  # of an embedding or a head that go to one worker elsewhere


class Range(NamedTuple):
    """`length` bytes of a stored tensor from `offset` on, or in runs of `run` bytes, whose starts are `step` apart."""

    name: str
    offset: int
    length: int
    run: int = 0
    step: int = 0


@dataclass(frozen=True)
class Unit:
    """Rows [start, stop) of a planned matrix."""

    planned: PlannedMatrix
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Its name in the journal."""
        return f"{self.planned.matrix.name}[{self.start}:{self.stop}]"

    @property
    def weights(self) -> int:
        """How many weights it holds."""
        return (self.stop - self.start) * self.planned.matrix.columns

    def ranges(self) -> Iterator[Range]:
        """What it becomes, in the order of `quantize_unit`."""
        rows = self.stop - self.start
        for piece, (prefix, first, step) in zip(self.planned.pieces, seats(self.planned), strict=True):
            for tensor in piece.format.tensors(rows, piece.columns):
                row = tensor.bytes // rows
                runs = (row, step * row) if step > 1 else ()
                yield Range(prefix + tensor.name, (first + step * self.start) * row, tensor.bytes, *runs)


def units(planned: PlannedMatrix, unit_bytes: int = UNIT_BYTES, tile: int = 1) -> list[Unit]:
    """The rows of a matrix in units of about `unit_bytes` in float32, a multiple of `tile` rows (one at least)."""
    rows, step = planned.matrix.rows, unit_bytes // (4 * planned.matrix.columns)
    step = max(tile, step // tile * tile)
    return [Unit(planned, start, min(start + step, rows)) for start in range(0, rows, step)]


def quantize_unit(unit: Unit, checkpoint: Checkpoint, quantizer: Quantizer) -> list[Quantized]:
    """One Quantized per piece of the matrix.

    Raises CheckpointError when a weight is not finite, or too large for a float16 scale.
    """
    matrix = unit.planned.matrix
    weights = checkpoint.rows(matrix.name, unit.start, unit.stop)
    chosen = quantizer(weights)
    for item in chosen:
        if not np.isfinite(item.scales).all():
            raise CheckpointError(
                f"tensor {matrix.name!r} as {unit.planned.formats}: a block's scale exceeds float16's 65,504 (largest "
                f"weight {np.abs(weights).max():.4g}). {_wider(weights, item.format, unit.planned)}"
            )
    return chosen


def _wider(weights: np.ndarray, fmt: TensorFormat, planned: PlannedMatrix) -> str:
    """What to do about weights whose steps are too long for a float16 scale."""
    reach = max(float(weights.max()), 0.0) - min(float(weights.min()), 0.0)
    for bits, kind in sorted(FORMATS.items()):
        if bits > fmt.bits and 1.1 * reach / (2**bits - 1) < LARGEST and fmt.block in kind.blocks:
            others = " and the roles that share its input" if planned.split else ""
            return (
                f"If it is meant to be so large, give {planned.matrix.role}{others} the format w{bits}b{fmt.block}a in "
                f"the recipe: in a rule above the others, or in a budget's `pin`."
            )
    return "No format holds it: the checkpoint is damaged. Use an intact one."


def sharers(plan: Plan) -> dict[str, list[PlannedMatrix]]:
    """The split matrices by the input that they share: one channel order serves them all."""
    found: dict[str, list[PlannedMatrix]] = {}
    for planned in plan.body:
        if planned.split:
            found.setdefault(planned.matrix.input, []).append(planned)
    return found
