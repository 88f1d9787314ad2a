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
from pipeline.quantize.factor import Factor, factor
from pipeline.quantize.formats import Quantized
from pipeline.quantize.gptq import TILE, bounds, compensated
from pipeline.quantize.rotation import rotate, rotate_products, rotated_moments
from pipeline.quantize.search import nearest, weighted

Moments = Mapping[str, np.ndarray]  # input name → float32 [channels], second moment of each channel
Ranges = Mapping[str, np.ndarray]  # `layers.0.key`, `layers.0.value` → float32 [kv_heads · head_dim]
Channels = Mapping[str, np.ndarray]  # name of a piece's channel indices → int32 [columns of the piece]
Quantizer = Callable[[np.ndarray], list[Quantized]]
Products = Callable[[str], tuple[np.ndarray, float]]

# Weights that a search takes a second on one of two busy cores. The first two: the whole stage at MiMo's and Phi-4's
# shapes (benchmarks/README.md). GPTQ with its coordinate descent, without the statistics: 770 and 1,460 ns a weight on
# matrices of 4,096 and 11,008 columns, on an AMD core with AVX2.
WEIGHTS_PER_CORE_SECOND = {"nearest": 120e6, "weighted": 60e6, "gptq": 1.4e6}


class Search:
    """Scales and zero points of every piece for itself: searched under the second moments of the inputs, or, without
    them, rounded to nearest: the control.

    Attributes:
        tile: rows that are worked on at a time.
        by_layer: a layer must be finished, and its quantizers dropped, before the next one's are asked for: what they
            hold is large.
    """

    tile = 1
    by_layer = False

    def __init__(self, moments: Moments | None = None):
        self.moments = moments

    def of(self, planned: PlannedMatrix, channels: Channels) -> Quantizer:
        """The function of a matrix; `channels` are those of its input, if it is split."""
        matrix, order = planned.matrix, order_of(planned, channels)
        # An embedding is looked up, not multiplied: its channels matter alike. A tied table serves the head.
        known = matrix.role != "embedding" and self.moments
        moments = _taken(known[matrix.input] if known else np.ones(matrix.columns, np.float32), order)
        if planned.rotated:
            moments = rotated_moments(moments, planned.rotated)
        places = [slice(*place) for place in bounds(planned.pieces)]
        pieces: list[Callable[[np.ndarray], Quantized]] = [
            partial(nearest, fmt=piece.format)
            if self.moments is None
            else partial(weighted, moments=moments[place], fmt=piece.format)
            for piece, place in zip(planned.pieces, places, strict=True)
        ]

        def quantize(weights: np.ndarray) -> list[Quantized]:
            ordered = arranged(weights, order, planned.rotated)
            return [piece(ordered[:, place]) for piece, place in zip(pieces, places, strict=True)]

        return quantize


def evenly(plan: Plan) -> Search:
    """A search without statistics: every channel matters alike."""
    return Search({item.matrix.input: np.ones(item.matrix.columns, np.float32) for item in (*plan.body, plan.head)})


class Compensated(Search):
    """GPTQ and coordinate descent for the body, whose errors accumulate; the embedding and the head are searched as in
    `Search`.

    Args:
        products: E[x·xᵀ] of an input by its name, float32 [channels, channels], and its damping.
    """

    tile = TILE
    by_layer = True

    def __init__(self, moments: Moments, products: Products):
        super().__init__(moments)
        self._products = products
        self._lock = Lock()
        self._kept: tuple[str, np.ndarray, Factor] | None = None

    def __reduce__(self) -> tuple[type, tuple[Moments | None, Products]]:
        return type(self), (self.moments, self._products)

    def of(self, planned: PlannedMatrix, channels: Channels) -> Quantizer:
        """Under the whole second moment matrix of the matrix's input, for a matrix of the body."""
        if planned.matrix.role in TABLES:
            return super().of(planned, channels)
        order, block = order_of(planned, channels), planned.rotated
        _, hessian, found = self._statistics(planned.matrix.input, order, block)

        def quantize(weights: np.ndarray) -> list[Quantized]:
            ordered = arranged(weights, order, block)
            return descended(ordered, hessian, found.damping, compensated(ordered, found, planned.pieces))

        return quantize

    def _statistics(self, name: str, order: np.ndarray | None, block: int) -> tuple[str, np.ndarray, Factor]:
        """E[x·xᵀ] with its channels in `order`, rotated in blocks, and its factor. Those of the input asked for last
        are kept: matrices that share it follow one another."""
        with self._lock:
            if self._kept is None or self._kept[0] != name:
                self._kept = None  # more than two such matrices at a time would be the peak of memory
                hessian, damping = self._products(name)
                if order is not None:
                    hessian = hessian[np.ix_(order, order)]
                if block:
                    hessian = rotate_products(hessian, block)
                self._kept = name, hessian, factor(hessian, damping)
            return self._kept


def order_of(planned: PlannedMatrix, channels: Channels) -> np.ndarray | None:
    """The channels of a split matrix's pieces, one piece behind the other; None for a whole one."""
    return np.concatenate([channels[name] for name in channel_names(planned)]) if planned.split else None


def arranged(weights: np.ndarray, order: np.ndarray | None, block: int) -> np.ndarray:
    """float32 [rows, columns] as they are stored: columns in `order`, then rotated in blocks, if in any."""
    ordered = _taken(weights, order)
    return rotate(ordered.copy() if ordered is weights else ordered, block) if block else ordered


def _taken(values: np.ndarray, part: np.ndarray | None) -> np.ndarray:
    """Some of the last axis's channels, or all."""
    return values if part is None else np.take(values, part, axis=-1)


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
