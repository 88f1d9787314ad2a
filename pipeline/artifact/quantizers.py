"""How rows of a planned matrix become stored bytes: one class per `search` of a recipe.

`of(planned, channels)` gives the function for one matrix: float32 [rows, columns] to one Quantized per piece; whatever
it costs to prepare is spent there. Rows are independent, so many threads may call it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from threading import Lock

import numpy as np

from pipeline.artifact.graph import channel_names
from pipeline.errors import PlanError
from pipeline.planning.recipes import TABLES, Plan, PlannedMatrix
from pipeline.quantize.descent import descended
from pipeline.quantize.formats import Quantized, TensorFormat
from pipeline.quantize.gptq import TILE, Factor, compensated, damping_for, factor
from pipeline.quantize.search import nearest, weighted

Moments = Mapping[str, np.ndarray]  # input name → float32 [channels], second moment of each channel
Ranges = Mapping[str, np.ndarray]  # `layers.0.key`, `layers.0.value` → float32 [kv_heads · head_dim]
Channels = Mapping[str, np.ndarray]  # name of a piece's channel indices → int32 [columns of the piece]
Quantizer = Callable[[np.ndarray], list[Quantized]]
Part = slice | np.ndarray  # of a matrix's columns


class Search:
    """What all have in common.

    Attributes:
        tile: rows that are worked on at a time.
        by_layer: a layer must be finished, and its quantizers dropped, before the next one's are asked for: what they
            hold is large.
        moments: None for a search that needs no calibration.
    """

    tile = 1
    by_layer = False
    moments: Moments | None = None

    def of(self, planned: PlannedMatrix, channels: Channels) -> Quantizer:
        """Every piece for itself."""
        if not planned.split:
            whole = self._piece(planned, planned.pieces[0].format, slice(None))
            return lambda weights: [whole(weights)]
        parts = [channels[name] for name in channel_names(planned)]
        pieces = [self._piece(planned, piece.format, part) for piece, part in zip(planned.pieces, parts, strict=True)]
        return lambda weights: [
            piece(np.take(weights, part, axis=1)) for piece, part in zip(pieces, parts, strict=True)
        ]

    def _piece(self, planned: PlannedMatrix, fmt: TensorFormat, part: Part) -> Callable[[np.ndarray], Quantized]:
        raise NotImplementedError


class Nearest(Search):
    """Round to nearest: the control."""

    def _piece(self, planned: PlannedMatrix, fmt: TensorFormat, part: Part) -> Callable[[np.ndarray], Quantized]:
        return partial(nearest, fmt=fmt)


class Weighted(Search):
    """Scales and zero points searched under the second moments of the inputs."""

    moments: Moments

    def __init__(self, moments: Moments):
        self.moments = moments

    def _piece(self, planned: PlannedMatrix, fmt: TensorFormat, part: Part) -> Callable[[np.ndarray], Quantized]:
        # An embedding is looked up, not multiplied: its channels matter alike. A tied table serves the head's products.
        matrix = planned.matrix
        moments = np.ones(matrix.columns, np.float32) if matrix.role == "embedding" else self.moments[matrix.input]
        return partial(weighted, moments=moments[part], fmt=fmt)


class Compensated(Weighted):
    """GPTQ and coordinate descent for the body, whose errors accumulate; the embedding and the head are searched as in
    `Weighted`.

    Args:
        hessian: Σ x·xᵀ of an input by its name, float32 [channels, channels]; asked for in the order of execution.
        tokens: how many tokens are summed there.
    """

    tile = TILE
    by_layer = True

    def __init__(self, moments: Moments, hessian: Callable[[str], np.ndarray], tokens: int):
        super().__init__(moments)
        self._hessian, self._tokens = hessian, tokens
        self._lock = Lock()
        self._kept: tuple[str, np.ndarray, Factor] | None = None

    def of(self, planned: PlannedMatrix, channels: Channels) -> Quantizer:
        """Under the whole second moment matrix of the matrix's input, for a matrix of the body."""
        if planned.matrix.role in TABLES:
            return super().of(planned, channels)
        order = np.concatenate([channels[name] for name in channel_names(planned)]) if planned.split else None
        _, hessian, found = self._statistics(planned.matrix.input, order)
        formats = [(piece.format, piece.columns) for piece in planned.pieces]

        def quantize(weights: np.ndarray) -> list[Quantized]:
            ordered = weights if order is None else np.take(weights, order, axis=1)
            return descended(ordered, hessian, found.damping, compensated(ordered, found, formats))

        return quantize

    def _statistics(self, name: str, order: np.ndarray | None) -> tuple[str, np.ndarray, Factor]:
        """Σ x·xᵀ with its channels in `order`, and its factor. Those of the input asked for last are kept: matrices
        that share it follow one another."""
        with self._lock:
            if self._kept is None or self._kept[0] != name:
                self._kept = None  # more than two such matrices at a time would be the peak of memory
                hessian = self._hessian(name)
                if order is not None:
                    hessian = hessian[np.ix_(order, order)]
                self._kept = name, hessian, factor(hessian, damping_for(len(hessian), self._tokens))
            return self._kept


def check_moments(plan: Plan, moments: Moments) -> None:
    """Raise PlanError unless every product has usable statistics: a missing one would be searched blindly."""
    for matrix in (item.matrix for item in (*plan.body, plan.head)):
        if state := _unusable(moments.get(matrix.input), matrix.columns):
            raise PlanError(
                f"tensor {matrix.name!r}: its search needs {matrix.columns:,} finite second moments ≥ 0 of input "
                f"{matrix.input!r}, and {state}. Run the calibrate stage for this model again."
            )


def check_ranges(plan: Plan, ranges: Ranges) -> None:
    """Raise PlanError unless all keys and values have usable ranges: other scales would spoil every answer."""
    for name in plan.cache.names:
        state = _unusable(ranges.get(name), plan.cache.channels)
        if state or not ranges[name].any():
            raise PlanError(
                f"{name!r}: an int8 KV cache needs {plan.cache.channels:,} finite ranges ≥ 0, not all 0, and "
                f"{state or 'all are 0'}. Run the calibrate stage for this model again, or use `kv_cache: float32`."
            )


def _unusable(found: np.ndarray | None, channels: int) -> str:
    """What is wrong with statistics of so many channels; "" when nothing is."""
    if found is None:
        return "there are none"
    if found.shape != (channels,):
        return f"they are {list(found.shape)}"
    bad = np.flatnonzero(~(np.isfinite(found) & (found >= 0)))
    return f"channel {bad[0]} has {found[bad[0]]}" if bad.size else ""
