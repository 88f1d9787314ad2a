"""What a model loses when one of its matrices is quantized: KL divergence of each matrix's damage, in one pass.

The text passes the model layer by layer, as in `pipeline.runtime.stream`. At its layer each matrix is replaced by its
quantized self once: the hidden states that come out are a copy of the text's, which from there on goes through the
original layers beside all the others. So every matrix's damage reaches the logits, for about half as many runs of a
layer as there are matrices; memory is one layer and the copies' hidden states (copies × tokens × hidden × 4 bytes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from pipeline.checkpoint.architecture import Architecture, Matrix
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.errors import EvaluationError
from pipeline.files import sha256_of
from pipeline.graph.slices import DecoderSlices, Slice
from pipeline.machine import cores
from pipeline.partial import Partial
from pipeline.progress import Progress
from pipeline.runtime.session import open_slice

Damage = Callable[[Matrix, np.ndarray], np.ndarray]
"""A matrix and some of its rows, float32 [rows, columns] → the same rows as they are after quantization."""

CLEAN = ""
"""Name of the copy that no matrix has damaged."""
BATCH_TOKENS = 1024
"""Of one run of a layer: products are as fast as they get, activations stay small."""
_HEAD_ROWS = 4096


class Copies:
    """The text's hidden states, once clean and once for every damaged matrix.

    Attributes:
        layer: the layer that they stand before.
        names: the damaged matrix of each, `CLEAN` first.
        states: float32 [copies, windows, tokens, hidden].
    """

    def __init__(self, names: list[str], states: np.ndarray, layer: int):
        self.names, self.states, self.layer = names, states, layer

    @classmethod
    def embedded(cls, ids: np.ndarray, architecture: Architecture, checkpoint: Checkpoint, damage: Damage) -> Copies:
        """Before the first layer: clean, and with a damaged embedding (a tied table is damaged there and as the head).

        `ids`: int64 [windows, tokens].
        """
        table = architecture.tables[0]
        used, where = np.unique(ids, return_inverse=True)
        rows = np.concatenate([checkpoint.rows(table.name, token, token + 1) for token in used])
        clean, hurt = (part[where].reshape(*ids.shape, -1) for part in (rows, damage(table, rows)))
        return cls([CLEAN, table.name], np.stack([clean, hurt]), 0)


def sensitivities(
    slices: DecoderSlices,
    folder: Path,
    checkpoint: Checkpoint,
    ids: np.ndarray,
    damage: Damage,
    partial: Partial,
    label: str,
) -> dict[str, float]:
    """KL(original ‖ one matrix damaged) by the matrix's name: mean nats per token over `ids`, int64 [windows, tokens].

    Includes the embedding and the head (once, if tied). Continues at the layer whose copies lie in `partial`.

    Raises EvaluationError when activations or logits are not finite.
    """
    arch = slices.architecture
    with Progress(f"sensitivity {label}", arch.layers + 1, "layers") as progress:
        copies = _resume(partial, arch) or Copies.embedded(ids, arch, checkpoint, damage)
        progress.advance(copies.layer, kept=True)
        while copies.layer < arch.layers:
            copies = _advance(copies, slices, folder, checkpoint, damage)
            _record(partial, copies)
            progress.advance()
        found = _divergences(copies, slices, folder, checkpoint, damage)
        progress.advance()
    if bad := [name for name, value in found.items() if not np.isfinite(value)]:
        raise EvaluationError(f"{label}: logits with a quantized {bad[0]} are not finite; the weights are damaged.")
    return found


def _advance(copies: Copies, slices: DecoderSlices, folder: Path, checkpoint: Checkpoint, damage: Damage) -> Copies:
    """All copies through one layer, and one more for each of its matrices."""
    matrices = slices.architecture.body(copies.layer)
    weights = {matrix.name: checkpoint.rows(matrix.name) for matrix in matrices}
    run = _LayerRun(slices.open_layer(copies.layer), slices.architecture, folder)
    states = np.empty((len(copies.names) + len(matrices), *copies.states.shape[1:]), np.float32)
    for first, stop in _batches(copies.states.shape):
        states[first:stop] = run(copies.states[first:stop], weights)
    for index, matrix in enumerate(matrices, len(copies.names)):
        hurt = {matrix.name: damage(matrix, weights[matrix.name])}
        states[index] = run(copies.states[:1], weights | hurt)[0]
    if not np.isfinite(states[0]).all():
        raise EvaluationError(f"activations overflow in layer {copies.layer}; the weights are damaged.")
    return Copies([*copies.names, *(matrix.name for matrix in matrices)], states, copies.layer + 1)


def _batches(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    copies, windows, tokens, _ = shape
    step = max(1, BATCH_TOKENS // (windows * tokens))
    return ((start, min(start + step, copies)) for start in range(0, copies, step))


class _LayerRun:
    """A slice as a function of hidden states and weights."""

    def __init__(self, part: Slice, architecture: Architecture, folder: Path):
        self._session = open_slice(part.model, folder)
        self._part, self._arch = part, architecture
        self._inputs = [value.name for value in self._session.get_inputs()]

    def __call__(self, states: np.ndarray, weights: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """float32 [copies, windows, tokens, hidden] → the slice's first output, of the same shape."""
        copies, windows, tokens, hidden = states.shape
        batch = copies * windows
        past = np.zeros((batch, self._arch.kv_heads, 0, self._arch.head_dim), np.float32)
        feeds = {
            "attention_mask": np.ones((batch, tokens), np.int64),
            self._part.source: states.reshape(batch, tokens, hidden),
            **{name: past for name in self._inputs if name.startswith("past_key_values.")},
            **(weights or {}),
        }
        output = self._part.target or next(iter(self._part.taps.values()))
        (result,) = self._session.run([output], {name: feeds[name] for name in self._inputs})
        return result.reshape(states.shape)


def _divergences(
    copies: Copies, slices: DecoderSlices, folder: Path, checkpoint: Checkpoint, damage: Damage
) -> dict[str, float]:
    """KL of every copy, and of the clean one through a damaged head; the table is read in chunks of rows."""
    arch = slices.architecture
    run = _LayerRun(slices.up_to("head"), arch, folder)
    states = np.concatenate([run(copies.states[first:stop]) for first, stop in _batches(copies.states.shape)])
    states = states.reshape(len(states), -1, arch.hidden)
    names = copies.names[1:]
    if not arch.tied:  # the last copy: clean states, damaged head
        states, names = np.concatenate([states, states[:1]]), [*names, arch.head.name]
    clean = states[0]
    own, others = _LogSum(len(clean)), [_LogSum(len(clean)) for _ in names]
    for rows in _head_rows(arch, checkpoint):
        own.add(clean @ rows.T)
    reference, cross = own.log(), np.zeros((len(names), len(clean)))
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(cores()) as pool:
        for rows in _head_rows(arch, checkpoint):
            logits, hurt = clean @ rows.T, damage(arch.head, rows)
            tables = [hurt if name == arch.head.name else rows for name in names]
            shares = np.exp(logits - reference[:, None].astype(np.float32))

            def add(item: tuple[np.ndarray, np.ndarray, np.ndarray, _LogSum]) -> None:
                hidden, table, total, sums = item
                other = hidden @ table.T
                # Differences first: in float32, two sums of thousands of logits would not be told apart.
                total += np.einsum("tv,tv->t", shares, logits - other)  # noqa: B023 (finished within this turn)
                sums.add(other)

            list(pool.map(add, zip(states[1:], tables, cross, others, strict=True)))
    divergence = (cross + [sums.log() for sums in others] - reference).mean(axis=1)
    return dict(zip(names, divergence.tolist(), strict=True))


def _head_rows(architecture: Architecture, checkpoint: Checkpoint) -> Iterator[np.ndarray]:
    head = architecture.head
    for start in range(0, head.rows, _HEAD_ROWS):
        yield checkpoint.rows(head.name, start, min(start + _HEAD_ROWS, head.rows))


class _LogSum:
    """log Σ exp over logits that come in chunks, float64 [tokens]."""

    def __init__(self, tokens: int):
        self._top = np.full(tokens, -np.inf)
        self._sum = np.zeros(tokens)

    def add(self, logits: np.ndarray) -> None:
        """float32 [tokens, chunk]; they are overwritten."""
        top = np.maximum(self._top, logits.max(axis=1))
        logits -= top[:, None].astype(np.float32)
        part = np.exp(logits, out=logits).sum(axis=1, dtype=np.float64)
        self._sum = self._sum * np.exp(self._top - top) + part
        self._top = top

    def log(self) -> np.ndarray:
        return self._top + np.log(self._sum)


# --- an interrupted run ---


def _file(layer: int) -> str:
    return f"copies.{layer}.npy"


def _names(architecture: Architecture, layer: int) -> list[str]:
    done = [matrix.name for before in range(layer) for matrix in architecture.body(before)]
    return [CLEAN, architecture.tables[0].name, *done]


def _record(partial: Partial, copies: Copies) -> None:
    """Keep the copies before a layer; what stood before the one before it is no longer needed."""
    path = partial.folder / _file(copies.layer)
    np.save(path, copies.states)
    partial.record(path.name, sha256_of(path))
    (partial.folder / _file(copies.layer - 1)).unlink(missing_ok=True)


def _resume(partial: Partial, architecture: Architecture) -> Copies | None:
    """The copies before the last layer that is whole on the disk; None for the start."""
    for layer in range(architecture.layers, 0, -1):
        path, names = partial.folder / _file(layer), _names(architecture, layer)
        if path.is_file() and sha256_of(path) == partial.digests.get(path.name):
            return Copies(names, np.load(path, allow_pickle=False), layer)
    return None
