"""What a model loses when one of its matrices is quantized: KL divergence of each matrix's damage, in one pass.

The text passes the model layer by layer, as in `pipeline.runtime.stream`. At its layer each matrix is replaced by its
quantized self once, experts, which have one format, all together: the hidden states that come out are a copy of the
text's, which from there on goes through the original layers beside all the others. So every matrix's damage reaches the
logits, for about half as many runs of a layer as there are copies; memory is one layer and the copies' hidden states
(copies × tokens × hidden × 4 bytes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from pipeline.checkpoint.architecture import Architecture, Matrix, bias_of
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.errors import EvaluationError
from pipeline.files import sha256_of
from pipeline.graph.slices import DecoderSlices, Slice
from pipeline.machine import cores
from pipeline.partial import Partial
from pipeline.progress import Progress
from pipeline.runtime.device import CPU, Array, Device, engine_of, passing

# A matrix and some of its rows, float32 [rows, columns] → the same rows as they are after quantization.
Damage = Callable[[Matrix, np.ndarray], np.ndarray]
_Run = Callable[..., np.ndarray]

BATCH_TOKENS = 1024  # of one run of a layer: products are as fast as they get, activations stay small
_HEAD_ROWS = 4096


@dataclass
class Copies:
    """The text's hidden states, once clean and once for every damaged matrix.

    Attributes:
        names: the damaged matrix of each copy but the first, which is clean; `layers.0.experts` for a layer's experts.
        states: float32 [copies, windows, tokens, hidden].
        layer: the layer that they stand before.
    """

    names: list[str]
    states: np.ndarray
    layer: int


def sensitivities(
    slices: DecoderSlices, folder: Path, checkpoint: Checkpoint, ids: np.ndarray, damage: Damage, partial: Partial,
    label: str,
) -> dict[str, float]:  # fmt: skip
    """KL(original ‖ one matrix damaged) by the matrix's name: mean nats per token over `ids`, int64 [windows, tokens].
    Experts of a layer have one, by `damaged_together`.

    Includes the embedding and the head (once, if tied). Continues at the layer whose copies lie in `partial`.

    Raises EvaluationError when activations or logits are not finite.
    """
    passing, layers = Passing(slices, folder, checkpoint, damage), slices.architecture.layers
    with Progress(f"sensitivity {label}", layers + 1, "layers") as progress:
        copies = _resume(partial, slices.architecture) or passing.embedded(ids)
        progress.advance(copies.layer, kept=True)
        while copies.layer < layers:
            copies = passing.advance(copies)
            _record(partial, copies)
            progress.advance()
        found = passing.divergences(copies)
        progress.advance()
    if bad := [name for name, value in found.items() if not np.isfinite(value)]:
        raise EvaluationError(f"{label}: logits with a quantized {bad[0]} are not finite; the weights are damaged.")
    return found


def damaged_together(matrices: Iterable[Matrix]) -> dict[str, list[Matrix]]:
    """The matrices that one copy has damaged, by its name: each by itself, and a layer's experts together."""
    found: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        found.setdefault(matrix.name if matrix.expert is None else matrix.choice, []).append(matrix)
    return found


_Unit = tuple[np.ndarray, Sequence[Matrix]]  # some copies' hidden states, and the matrices that are damaged


class _Layer:
    """The job of one layer: hidden states of some copies → those after it. Its weights are read where it is done, and
    put on a GPU if that is this process's device."""

    def __init__(
        self, part: Slice, folder: Path, checkpoint: Checkpoint, matrices: Sequence[Matrix], damage: Damage,
        where: Device = CPU,
    ):  # fmt: skip
        self._given, self._where = (part, folder, checkpoint, matrices, damage), where

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._given

    @cached_property
    def _run(self) -> _Run:
        return _opened(*self._given[:2], self._where)

    @cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        _, _, checkpoint, matrices, _ = self._given
        return {matrix.name: checkpoint.rows(matrix.name) for matrix in matrices}

    @cached_property
    def _weights(self) -> dict[str, Array]:
        return {name: self._where.put(rows) for name, rows in self._rows.items()}

    def __call__(self, unit: _Unit) -> np.ndarray:
        states, damaged = unit
        damage, rows = self._given[-1], self._rows
        hurt = {matrix.name: self._where.put(damage(matrix, rows[matrix.name])) for matrix in damaged}
        return self._run(states, self._weights | hurt)


def _opened(part: Slice, folder: Path, where: Device) -> _Run:
    """A slice as a function of hidden states, float32 [copies, windows, tokens, hidden], and weights: its first output,
    of the same shape."""
    run_slice = where.open(part.model, folder)
    output = part.target or next(iter(part.taps.values()))

    def run(states: np.ndarray, weights: Mapping[str, Array] = MappingProxyType({})) -> np.ndarray:
        batch = states.reshape(-1, *states.shape[2:])
        mask = np.ones(batch.shape[:2], np.int64)
        (result,) = run_slice([output], {"attention_mask": mask, part.source: batch, **weights})
        return result.reshape(states.shape)

    return run


class Passing:
    """Copies on their way through a model whose slices run in `folder`."""

    def __init__(self, slices: DecoderSlices, folder: Path, checkpoint: Checkpoint, damage: Damage):
        self._slices, self._arch, self._folder = slices, slices.architecture, folder
        self._checkpoint, self._damage = checkpoint, damage

    def embedded(self, ids: np.ndarray) -> Copies:
        """Before the first layer: clean, and with a damaged embedding (a tied table is damaged there and as the head).

        `ids`: int64 [windows, tokens].
        """
        table = self._arch.tables[0]
        used, where = np.unique(ids, return_inverse=True)
        rows = np.concatenate([self._checkpoint.rows(table.name, token, token + 1) for token in used])
        both = [part[where].reshape(*ids.shape, -1) for part in (rows, self._damage(table, rows))]
        return Copies([table.name], np.stack(both), 0)

    def advance(self, copies: Copies) -> Copies:
        """All copies through one layer, and one more for each of its matrices."""
        return passing(f"sensitivity: layer {copies.layer}", lambda where: self._advanced(copies, where))

    def _advanced(self, copies: Copies, where: Device) -> Copies:
        matrices, done = self._arch.body(copies.layer), len(copies.states)
        damaged, part = damaged_together(matrices), self._slices.open_layer(copies.layer)
        states, places = np.empty((done + len(damaged), *copies.states.shape[1:]), np.float32), count()
        units: list[_Unit] = [(copies.states[batch], ()) for batch in _batches(copies.states)]
        units += [(copies.states[:1], together) for together in damaged.values()]

        def put(_: _Unit, passed: np.ndarray) -> None:
            for row in passed:
                states[next(places)] = row

        job = _Layer(part, self._folder, self._checkpoint, matrices, self._damage, where)
        engine_of(where).run(job, units, put)
        if not np.isfinite(states[0]).all():
            raise EvaluationError(f"activations overflow in layer {copies.layer}; the weights are damaged.")
        return Copies([*copies.names, *damaged], states, copies.layer + 1)

    def divergences(self, copies: Copies) -> dict[str, float]:
        """KL of every copy, and of the clean one through a damaged head; the table is read in chunks of rows."""
        return passing("sensitivity: head", lambda where: self._divergences(copies, where))

    def _divergences(self, copies: Copies, where: Device) -> dict[str, float]:
        head, xp = self._arch.head, where.xp
        run = _opened(self._slices.layer(self._arch.layers), self._folder, where)
        states = np.concatenate([run(copies.states[batch]) for batch in _batches(copies.states)])
        states, names = states.reshape(len(states), -1, self._arch.hidden), copies.names
        if not self._arch.tied:  # the last copy: clean states, damaged head
            states, names = np.concatenate([states, states[:1]]), [*names, head.name]
        clean, *others = map(where.put, states)
        own, *sums = (_LogSum(len(clean), where) for _ in states)
        for rows, bias in self._head_rows():
            own.add(clean @ where.put(rows).T + where.put(bias))
        reference = own.log()
        cross = [where.put(np.zeros(len(clean))) for _ in names]
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(cores()) as pool:
            for rows, added in self._head_rows():
                whole, hurt, bias = map(where.put, (rows, self._damage(head, rows), added))
                tables = [hurt if name == head.name else whole for name in names]
                logits = clean @ whole.T + bias
                shares = xp.exp(logits - xp.asarray(reference[:, None], dtype=xp.float32))

                def add(hidden: Array, table: Array, total: Array, sums: _LogSum) -> None:
                    other = hidden @ table.T + bias  # noqa: B023 (finished within this turn)
                    # Differences first: in float32, two sums of thousands of logits would not be told apart.
                    total += xp.einsum("tv,tv->t", shares, logits - other)  # noqa: B023 (finished within this turn)
                    sums.add(other)

                list(pool.map(add, others, tables, cross, sums))
        divergences = (total + one.log() - reference for total, one in zip(cross, sums, strict=True))
        return {name: float(one.mean()) for name, one in zip(names, divergences, strict=True)}

    def _head_rows(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The head and its bias, some rows at a time."""
        head = self._arch.head
        for start in range(0, head.rows, _HEAD_ROWS):
            span = start, min(start + _HEAD_ROWS, head.rows)
            yield self._checkpoint.rows(head.name, *span), bias_of(head, self._checkpoint, *span)


def _batches(states: np.ndarray) -> Iterator[slice]:
    copies, windows, tokens, _ = states.shape
    step = max(1, BATCH_TOKENS // (windows * tokens))
    return (slice(start, min(start + step, copies)) for start in range(0, copies, step))


class _LogSum:
    """log Σ exp over logits that come in chunks, float64 [tokens]."""

    def __init__(self, tokens: int, where: Device):
        self._xp, self._top, self._sum = where.xp, where.put(np.full(tokens, -np.inf)), where.put(np.zeros(tokens))

    def add(self, logits: Array) -> None:
        """float32 [tokens, chunk]; they are overwritten."""
        xp = self._xp
        top = xp.maximum(self._top, xp.amax(logits, 1))
        logits -= xp.asarray(top[:, None], dtype=xp.float32)
        part = xp.sum(xp.exp(logits, out=logits), 1, dtype=xp.float64)
        self._sum = self._sum * xp.exp(self._top - top) + part
        self._top = top

    def log(self) -> Array:
        return self._top + self._xp.log(self._sum)


# --- an interrupted run ---


def _file(layer: int) -> str:
    return f"copies.{layer}.npy"


def _record(partial: Partial, copies: Copies) -> None:
    """Keep the copies before a layer; what stood before the one before it is no longer needed."""
    path = partial.folder / _file(copies.layer)
    np.save(path, copies.states)
    partial.record(path.name, sha256_of(path))
    (partial.folder / _file(copies.layer - 1)).unlink(missing_ok=True)


def _resume(partial: Partial, architecture: Architecture) -> Copies | None:
    """The copies before the last layer that is whole on the disk; None for the start."""
    for layer in range(architecture.layers, 0, -1):
        if partial.whole(_file(layer)):
            done = [name for before in range(layer) for name in damaged_together(architecture.body(before))]
            return Copies(
                [architecture.tables[0].name, *done], np.load(partial.folder / _file(layer), allow_pickle=False), layer
            )
    return None
