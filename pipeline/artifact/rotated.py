"""A checkpoint in rotated coordinates: another model of the same function, whose channels are alike.

With R orthogonal, hidden states h become h · R, and a head's attention a · V. An RMS norm without its gain does not
notice R, so gains go into the matrices that follow, W · diag(g) · R; what writes to the residual becomes Rᵀ · W;
values and the output projection take V. Embedding and head that are one table stay as they are: the graph rotates what
is looked up, and what the head multiplies back (`pipeline.artifact.graph`). Nothing here costs a phone anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from pipeline.checkpoint.architecture import Architecture, Matrix
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.recipes import Rotation
from pipeline.errors import PlanError
from pipeline.quantize.cache import ROTATED
from pipeline.quantize.rotation import factors, rotate, rotate_products, rotated_moments

HEAD_GAIN = "model.norm.gain"
"""What a tied head's input is multiplied by once it is rotated back but for R's signs: these times the norm's gain."""
_FINAL_NORM = "model.norm.weight"
_READ_BYTES = 8 << 20


class _Turn(NamedTuple):
    """How an input is rotated: in runs of `width` channels, after division by the gain of the norm before it."""

    width: int
    gain: str | None


class Rotated(Checkpoint):
    """The tensors of a checkpoint folder as `rotation` has them, and the statistics of their inputs.

    Memory: rows that `rows` gives; where the residual is one run, also the largest matrix that writes to it in float32:
    each of its rows is made of all rows. The last of these is kept, and its rows are asked for one after the other.
    """

    def __init__(self, folder: Path, architecture: Architecture, rotation: Rotation):
        super().__init__(folder)
        self._arch, self._rotation = architecture, rotation
        self._run = rotation.run(architecture.hidden)
        if self._run and architecture.traits.norm != "rms":
            raise PlanError(
                f"family {architecture.family!r} takes LayerNorm, which subtracts the mean of a token's channels: no "
                f"rotation of the residual stream passes it. Leave out `residual` in the recipe's `rotation`."
            )
        self._matrices = {matrix.name: matrix for matrix in (*architecture.tables, *architecture.matrices)}
        self._biased = {matrix.bias: matrix for matrix in architecture.matrices if matrix.bias}
        self._turns = {matrix.input: self._turn(matrix) for matrix in self._matrices.values()}
        self._lock = Lock()
        self._kept: tuple[str, np.ndarray] | None = None
        if self._run and architecture.tied:
            self[HEAD_GAIN] = self[_FINAL_NORM]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self._arch, self._rotation)

    def _turn(self, matrix: Matrix) -> _Turn | None:
        if matrix.role in {"o_proj", "down_proj"}:
            return _Turn(self._arch.head_dim, None) if matrix.role == "o_proj" and self._rotation.values else None
        if not self._run or (matrix.name == self._arch.head.name and self._arch.tied):
            return None
        prefix = f"model.layers.{matrix.layer}."
        norms = {"attention": f"{prefix}input_layernorm.weight", "mlp": f"{prefix}post_attention_layernorm.weight"}
        return _Turn(self._run, (norms | {"head": _FINAL_NORM}).get(matrix.kind))

    # --- weights ---

    def rows(self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """As a checkpoint's; gains of norms are 1."""
        stop = self[name].shape[0] if stop is None else stop
        matrix = self._matrices.get(name)
        if matrix is None:
            found = self._vector(name)[start:stop]
        else:
            first, size = self._mixing(matrix)
            if size == matrix.rows:
                found = self._mixed(matrix, size)[start:stop].copy()
            elif size:
                found = self._by_runs(matrix, start, stop, first, size)
            else:
                found = self._turned(matrix, start, stop)
        if out is None:
            return found
        out[...] = found
        return out

    def _mixing(self, matrix: Matrix) -> tuple[int, int]:
        """The first row that is mixed with others, and the size of its run; 0: none is."""
        if matrix.role in {"o_proj", "down_proj"}:
            return 0, self._run
        if matrix.role in {"v_proj", "qkv_proj"} and self._rotation.values:
            # values come last where a product gives queries and keys too
            return matrix.rows - self._arch.cache_channels, self._arch.head_dim
        return 0, 0

    def _vector(self, name: str) -> np.ndarray:
        values = super().rows(name)
        if name == HEAD_GAIN:
            return values * np.tile(factors(self._run).signs, len(values) // self._run)
        if name.endswith(("layernorm.weight", _FINAL_NORM)) and self._run:
            return np.ones_like(values)
        first, size = self._mixing(self._biased[name]) if name in self._biased else (0, 0)
        if size:
            rotate(values[None, first:], size)
        return values

    def _turned(self, matrix: Matrix, start: int, stop: int) -> np.ndarray:
        """Rows whose columns are rotated."""
        values, turn = super().rows(matrix.name, start, stop), self._turns[matrix.input]
        if turn and turn.gain:
            values *= super().rows(turn.gain)
        return rotate(values, turn.width) if turn else values

    def _by_runs(self, matrix: Matrix, start: int, stop: int, first: int, size: int) -> np.ndarray:
        """Rows that are mixed with others of their run of `size`, those from row `first` on."""
        begin = start // size * size
        values = self._turned(matrix, begin, min(-(-stop // size) * size, matrix.rows))
        rotate(values[max(first - begin, 0) :].T, size)
        return values[start - begin : stop - begin]

    def _mixed(self, matrix: Matrix, size: int) -> np.ndarray:
        """A whole matrix whose rows are all mixed with each other."""
        with self._lock:
            if self._kept is None or self._kept[0] != matrix.name:
                self._kept = None
                values = np.empty((matrix.rows, matrix.columns), np.float32)
                step = max(1, _READ_BYTES // (4 * matrix.columns))
                for start in range(0, matrix.rows, step):
                    values[start : start + step] = self._turned(matrix, start, min(start + step, matrix.rows))
                rotate(values.T, size)
                self._kept = matrix.name, values
            return self._kept[1]

    # --- statistics ---

    def moments(self, measured: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Second moments of the inputs, as if channels were uncorrelated, from those that were measured."""
        return {name: self._moments(name, values) for name, values in measured.items()}

    def _moments(self, name: str, values: np.ndarray) -> np.ndarray:
        turn = self._turns.get(name)
        return rotated_moments(values * self._unscaled(turn) ** 2, turn.width) if turn else values

    def products(self, name: str, measured: np.ndarray) -> np.ndarray:
        """E[x·xᵀ] of an input, from that which was measured, float32 [channels, channels]; it is used up."""
        if (turn := self._turns[name]) is None:
            return measured
        shares = self._unscaled(turn)
        measured *= shares
        measured *= shares[:, None]
        return rotate_products(measured, turn.width)

    def _unscaled(self, turn: _Turn) -> np.ndarray:
        """1/g; a channel whose gain is 0 was not seen, and its weights are 0."""
        if turn.gain is None:
            return np.ones(1, np.float32)
        gain = super().rows(turn.gain)
        return np.divide(1, gain, out=np.zeros_like(gain), where=gain != 0)

    def ranges(self, measured: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Of cached keys and values, from those that were measured of both kinds of values."""
        if not self._rotation.values:
            return measured
        keys = {name: values for name, values in measured.items() if name.endswith(".key")}
        turned = {name.removesuffix(ROTATED): values for name, values in measured.items() if name.endswith(ROTATED)}
        return keys | turned
