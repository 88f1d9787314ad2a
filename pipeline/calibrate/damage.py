"""What a model loses when one of its matrices is quantized: KL divergence of each matrix's damage, in one pass.

The text passes the model layer by layer, as in `pipeline.runtime.stream`. At its layer each matrix is replaced by its
quantized self once, experts, which have one format, all together: the hidden states that come out are a copy of the
text's, which from there on goes through the original layers beside all the others. So every matrix's damage reaches the
logits, for about half as many runs of a layer as there are copies; memory is one layer and the copies' hidden states
(copies × tokens × hidden × 4 bytes).

Copies do not depend on each other, so they are units of one core each (`pipeline.engine`), and every product has one
thread: the digits are the same for any number of cores and workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from pipeline.checkpoint.architecture import Architecture, Matrix, bias_of
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.errors import EvaluationError
from pipeline.files import sha256_of
from pipeline.graph.slices import DecoderSlices, Slice
from pipeline.partial import Partial
from pipeline.progress import Progress
from pipeline.runtime.device import CPU, Array, Device, engine_of, passing

# A matrix and some of its rows, float32 [rows, columns] → the same rows as they are after quantization.
Damage = Callable[[Matrix, np.ndarray], np.ndarray]
_Run = Callable[..., np.ndarray]

# Digits must depend on no number of cores, so neither may these.
BATCH_TOKENS = 256  # of one run of a layer on one core: products are as fast as they get, activations stay small
UNIT_TOKENS = 1024  # of one unit, some such runs: what a unit costs through a cluster is little beside them
_HEAD_ROWS = 1024  # of the table: what one core holds of it
HEAD_COPIES = 16  # of one unit, which makes the clean copy's logits for itself


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


class _Unit(NamedTuple):
    """Some copies, from number `place` on, and what of the job's matrices is damaged while they pass."""

    place: int
    states: np.ndarray
    damaged: Sequence[Matrix] = ()


class _Job:
    """What copies pass: a slice, opened where the job is done, once for all threads there, and what `given` says."""

    def __init__(self, part: Slice, folder: Path, where: Device, *given: Any):
        self._slice, self._where, self._given, self._lock = (part, folder), where, given, Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self._slice, CPU, *self._given)

    @cached_property
    def _run(self) -> _Run:
        return _opened(*self._slice, self._where)


class _Layer(_Job):
    """Hidden states before a layer → those after it. Given are a checkpoint, the layer's matrices and their damage."""

    @cached_property
    def _weights(self) -> tuple[dict[str, np.ndarray], dict[str, Array]]:
        """As numpy and the device have them."""
        checkpoint, matrices, _ = self._given
        rows = {matrix.name: checkpoint.rows(matrix.name) for matrix in matrices}
        return rows, {name: self._where.put(values) for name, values in rows.items()}

    def __call__(self, unit: _Unit) -> np.ndarray:
        with self._lock:
            run, (rows, weights) = self._run, self._weights
        damage = self._given[-1]
        hurt = {matrix.name: self._where.put(damage(matrix, rows[matrix.name])) for matrix in unit.damaged}
        return run(unit.states, weights | hurt)


class _Head(_Job):
    """Hidden states after the last layer → KL of each copy from the clean one, nats per token. Given are a checkpoint,
    the head, its damage and the clean copy. The table is read in chunks of rows."""

    def __call__(self, unit: _Unit) -> list[float]:
        with self._lock:
            run = self._run
        (checkpoint, head, damage, clean), where, xp = self._given, self._where, self._where.xp
        first, *others = (
            where.put(one.reshape(-1, head.columns)) for states in (clean, unit.states) for one in run(states)
        )
        own, *sums = (_LogSum(len(first), where) for _ in (first, *others))
        cross = [where.put(np.zeros(len(first))) for _ in others]
        for start in range(0, head.rows, _HEAD_ROWS):
            span = start, min(start + _HEAD_ROWS, head.rows)
            rows, bias = checkpoint.rows(head.name, *span), where.put(bias_of(head, checkpoint, *span))
            table = where.put(rows)
            used = where.put(damage(head, rows)) if unit.damaged else table
            logits = first @ table.T + bias
            faded, shares = own.add(logits)
            for n, hidden in enumerate(others):
                other = hidden @ used.T + bias
                sums[n].add(other)
                # Differences first: in float32, two sums of thousands of logits would not be told apart.
                cross[n] = cross[n] * faded + xp.einsum("tv,tv->t", shares, logits - other)
        found = (part / own.total + one.log() - own.log() for part, one in zip(cross, sums, strict=True))
        return [float(nats.mean()) for nats in found]


def _opened(part: Slice, folder: Path, where: Device) -> _Run:
    """A slice as a function of hidden states, float32 [copies, windows, tokens, hidden], and weights: its first output,
    of the same shape. It runs on the caller's thread alone, so that no digit depends on how many there are."""
    run_slice = where.open(part.model, folder, threads=1)
    output = part.target or next(iter(part.taps.values()))

    def run(states: np.ndarray, weights: Mapping[str, Array] = MappingProxyType({})) -> np.ndarray:
        windows = states.reshape(-1, *states.shape[2:])
        mask = np.ones(windows.shape[:2], np.int64)
        passed = [
            run_slice([output], {"attention_mask": mask[some], part.source: windows[some], **weights})[0]
            for some in _batches(0, len(windows), BATCH_TOKENS // windows.shape[1])
        ]
        return np.concatenate(passed).reshape(states.shape)

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
        matrices, before = self._arch.body(copies.layer), copies.states
        damaged, part = damaged_together(matrices), self._slices.open_layer(copies.layer)
        states = np.empty((len(before) + len(damaged), *before.shape[1:]), np.float32)
        # The longest first: the short ones fill what cores have left at the end.
        units = [_Unit(place, before[:1], together) for place, together in enumerate(damaged.values(), len(before))]
        batches = _batches(0, len(before), UNIT_TOKENS // (before.shape[1] * before.shape[2]))
        units += [_Unit(batch.start, before[batch]) for batch in batches]

        def put(unit: _Unit, passed: np.ndarray) -> None:
            states[unit.place : unit.place + len(passed)] = passed

        job = _Layer(part, self._folder, where, self._checkpoint, matrices, self._damage)
        engine_of(where, wide=False).run(job, units, put)
        if not np.isfinite(states[0]).all():
            raise EvaluationError(f"activations overflow in layer {copies.layer}; the weights are damaged.")
        return Copies([*copies.names, *damaged], states, copies.layer + 1)

    def divergences(self, copies: Copies) -> dict[str, float]:
        """KL of every copy, and of the clean one through a damaged head."""
        return passing("sensitivity: head", lambda where: self._divergences(copies, where))

    def _divergences(self, copies: Copies, where: Device) -> dict[str, float]:
        head, states, found = self._arch.head, copies.states, dict[str, float]()
        own = int(self._arch.tied)  # the copy that passes a damaged head: the clean one, or the damaged embedding's
        batches = _batches(own + 1, len(states), HEAD_COPIES if where is CPU else len(states))
        units = [_Unit(own, states[own : own + 1], [head]), *(_Unit(batch.start, states[batch]) for batch in batches)]

        def put(unit: _Unit, nats: list[float]) -> None:
            names = [head.name] if unit.damaged else copies.names[unit.place - 1 :]
            found.update(zip(names, nats, strict=False))

        part = self._slices.layer(self._arch.layers)
        job = _Head(part, self._folder, where, self._checkpoint, head, self._damage, states[:1])
        engine_of(where, wide=False).run(job, units, put)
        return found


def _batches(start: int, stop: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))


class _LogSum:
    """log Σ exp over logits that come in chunks, float64 [tokens].

    Attributes:
        total: Σ exp(logit − the greatest so far), float64 [tokens].
    """

    def __init__(self, tokens: int, where: Device):
        self._xp, self._top, self.total = where.xp, where.put(np.full(tokens, -np.inf)), where.put(np.zeros(tokens))

    def add(self, logits: Array) -> tuple[Array, Array]:
        """Of float32 [tokens, chunk]: what sums so far must be multiplied by, float64 [tokens], now that greater logits
        may have come; and exp(logits − the greatest), float32 [tokens, chunk]."""
        xp = self._xp
        top = xp.maximum(self._top, xp.amax(logits, 1))
        shares = xp.exp(logits - xp.asarray(top[:, None], dtype=xp.float32))
        faded = xp.exp(self._top - top)
        self.total = self.total * faded + xp.sum(shares, 1, dtype=xp.float64)
        self._top = top
        return faded, shares

    def log(self) -> Array:
        return self._top + self._xp.log(self.total)


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
