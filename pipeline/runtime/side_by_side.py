"""A full-precision model larger than memory takes many texts one token further with every pass over its weights.

A pass widens one layer after the other from the checkpoint to float32, always into the same buffers, and runs all texts
through it: those that are being written as one batch of a token each, those that begin through their whole prompt, in
chunks. One session serves all layers: their weights are its inputs. Memory is a layer, a
chunk's activations, and the texts' keys and values, to which attention adds in place. A GPU keeps the layers that its
memory holds, with their keys and values, from pass to pass.

New texts join as others end, at any pass: Yu et al. 2022, "Orca: A Distributed Serving System for Transformer-Based
Generative Models" (OSDI).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime as ort

from pipeline.checkpoint.architecture import Architecture, Matrix, bias_of
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.graph.decoder import activation_bytes
from pipeline.graph.slices import LOGITS, DecoderSlices, Slice, product
from pipeline.machine import cores
from pipeline.runtime.device import CPU, Array, Device, passing
from pipeline.runtime.session import SliceRun, open_graph, open_slice

CHUNK = 256
"""Tokens of a prompt that are run at a time."""
_BLOCK = 1 << 20  # weights that a core widens at a time: few enough for its cache
# They make the bits of a text its own, whatever runs beside it and on how many cores:
_ROWS = 2  # texts of a pass over single tokens, at least: one that is alone runs beside a shadow of itself
_THREAD_ROWS = 128  # of the narrowest fed weight that a thread multiplies, at least: up to 64, MLAS adds otherwise
_USED = 0.75  # of the memory that is available; the rest is left to the page cache and everyone else


def token_bytes(architecture: Architecture) -> int:
    """Bytes of one token's keys and values in all layers, float32."""
    return 2 * 4 * architecture.layers * architecture.cache_channels


def working_bytes(architecture: Architecture, texts: int) -> int:
    """What a pass takes beside keys and values: a layer in float32, the activations of a chunk, the texts' logits."""
    layer = sum(matrix.rows * matrix.columns for matrix in architecture.body(0))
    tokens = max(texts, CHUNK)
    return 4 * layer + activation_bytes(architecture, tokens) + 2 * 4 * architecture.vocab * texts


def most_threads(architecture: Architecture) -> int:
    """That a layer's products may take."""
    return _threads(min(matrix.rows for matrix in architecture.body(0)))


def _threads(rows: int) -> int:
    """That products with fed weights of so many rows and more may take."""
    return max(1, rows // _THREAD_ROWS)


def _steps(matrix: Matrix, weights: int) -> list[int]:
    """Where a matrix is cut into parts of like size, of so many weights at most: its rows from one to the next."""
    parts = -(-matrix.rows * matrix.columns // (weights - weights % matrix.columns))
    return [matrix.rows * part // parts for part in range(parts + 1)]


def fitting_texts(architecture: Architecture, texts: int, tokens: int, memory: int) -> int:
    """How many of `texts` run side by side, `tokens` tokens each, where `memory` bytes are available: at least one."""
    room = _USED * memory - working_bytes(architecture, texts)
    return min(texts, max(1, int(room // (tokens * token_bytes(architecture)))))


class _Batch(NamedTuple):
    """Texts of the numbers `rows`; int64 ids [texts, tokens] that they run, and their mask [texts, total]."""

    rows: slice
    ids: np.ndarray
    mask: np.ndarray


class _Kept(NamedTuple):
    """A slice that a GPU keeps from pass to pass."""

    where: Device
    part: Slice
    run: SliceRun


class SideBySide:
    """Texts on their way through a model.

    Attributes:
        lengths: the tokens of each text that have passed. A text's number is its place here.
        switch: the length beyond which LongRoPE rotates a text otherwise, from its first token on; 0 for none.
        cache: keys and values of each layer, float32 [texts, kv_heads, tokens, head_dim], where the layer runs.
    """

    def __init__(self, graph: Path, architecture: Architecture, texts: int, tokens: int):
        """
        Args:
            graph: the full-precision graph in the folder of its weights.
            texts, tokens: how many texts run at once, and how long each becomes, at most.

        Raises EvaluationError when ONNX Runtime refuses a slice, and CheckpointError as `session.check_weights`.
        """
        self.lengths: list[int] = []
        self._architecture, self._folder, self._weights = architecture, graph.parent, Checkpoint(graph.parent)
        self._pool = ThreadPoolExecutor(cores() + 1)  # one waits for the disk
        self.switch = architecture.rope.original_max_position if architecture.rope.long_factor else 0
        self._slices = slices = DecoderSlices(onnx.load(graph, load_external_data=False), architecture, cache=True)
        self._kept: dict[int, _Kept] = {}  # the number of layers stands for the head
        part = slices.embedding()
        self._states, self._embed = str(part.target), open_slice(part.model, graph.parent)
        self._layer, self._last = slices.open_layer(0, vectors=True), slices.layer(architecture.layers)
        self._norm = open_slice(self._last.model, graph.parent)
        self._session = open_graph(self._layer.model, graph.parent, min(cores(), most_threads(architecture)))
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        weights = architecture.expected_tensors().keys() & shapes.keys()
        self._wide = {name: np.empty(shapes[name], np.float32) for name in shapes if name in weights}
        self._steps = _steps(architecture.head, max(map(np.size, self._wide.values())))
        self._multiply = open_slice(product(architecture.hidden), graph.parent, min(cores(), _threads(self._steps[1])))
        shape = (max(_ROWS, texts), architecture.kv_heads, tokens, architecture.head_dim)
        # Not np.empty: untouched pages of zeros take no memory, so it grows with the texts.
        layers = range(architecture.layers)
        self.cache: list[list[Array]] = [[np.zeros(shape, np.float32) for _ in self._layer.cached] for _ in layers]

    def drop(self, text: int) -> None:
        """Forget a text; the last one takes its number."""
        last = len(self.lengths) - 1
        length = self.lengths[text] = self.lengths[last]
        self.lengths.pop()
        for layer in self.cache if text < last else []:
            for values in layer:
                values[text, :, :length] = values[last, :, :length]

    def run(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits after the last of its `ids` for each text, float32 [texts, vocab].

        `ids` are one token for each text that is there, or all of them again where it reaches `switch`; then the
        beginnings of new texts, of any length.

        Raises:
            CheckpointError: weights are damaged; the first pass compares all with their digests.
        """
        batches = list(self._batches(ids))
        hidden = [self._embed([self._states], {"input_ids": batch.ids})[0] for batch in batches]
        for layer in range(self._architecture.layers):
            hidden = passing(f"writing: layer {layer}", partial(self._pass, layer, batches, hidden))
        # A long beginning has several batches: the last one overwrites what those before it gave for the text.
        last = np.zeros((max(_ROWS, len(ids)), 1, self._architecture.hidden), np.float32)
        for batch, values in zip(batches, hidden, strict=True):
            last[batch.rows] = values[:, -1:]
        logits = self._logits(last)[: len(ids)]
        self._weights.trust()
        return logits

    def _batches(self, ids: Sequence[Sequence[int]]) -> Iterator[_Batch]:
        """What is there goes together, unless LongRoPE chooses its tables by a batch's total length."""
        there, longest = len(self.lengths), max(map(len, ids)) if self.switch else CHUNK
        self.lengths += [0] * (len(ids) - there)
        if there and not self.switch:
            yield self._batch(slice(0, there), ids[:there], max(_ROWS, there))
        for text in range(0 if self.switch else there, len(ids)):
            if len(ids[text]) > 1:
                self.lengths[text] = 0
            for start in range(0, len(ids[text]), longest):
                yield self._batch(slice(text, text + 1), [ids[text][start : start + longest]])

    def _batch(self, rows: slice, ids: Sequence[Sequence[int]], least: int = 1) -> _Batch:
        """`least`: how many rows; after the last text the first comes again."""
        self.lengths[rows] = [length + len(ids[0]) for length in self.lengths[rows]]
        count = max(least, len(ids))
        lengths, taken = np.resize(self.lengths[rows], count), np.resize(np.array(ids, np.int64), (count, len(ids[0])))
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        return _Batch(slice(rows.start, rows.start + count), taken, mask)

    def _pass(self, layer: int, batches: list[_Batch], hidden: list[np.ndarray], where: Device) -> list[np.ndarray]:
        """All batches' hidden states after a layer."""
        if where is not CPU:
            return [self._advance_kept(layer, where, *pair) for pair in zip(batches, hidden, strict=True)]
        if layer in self._kept:
            where = self._kept.pop(layer).where
            self.cache[layer] = [where.get(values) for values in self.cache[layer]]
        for name, wide in zip(self._stored(layer), self._wide.values(), strict=True):
            self._widen(name, wide)
        for name in self._stored(layer + 1):  # while this layer multiplies, the disk reads the next
            self._pool.submit(self._weights.prefetch, name, 0, self._weights[name].shape[0])
        return [self._advance(layer, *pair) for pair in zip(batches, hidden, strict=True)]

    def _advance_kept(self, layer: int, where: Device, batch: _Batch, hidden: np.ndarray) -> np.ndarray:
        """As `_advance`, of a layer that a GPU keeps from now on."""
        if layer not in self._kept:
            kept = self._keep(self._slices.layer(layer), where)
            self.cache[layer], self._kept[layer] = [where.put(values) for values in self.cache[layer]], kept
        _, part, run = self._kept[layer]
        past = zip(part.cached.values(), self.cache[layer], strict=True)
        given = {name.replace("present.", "past_key_values."): values[batch.rows] for name, values in past}
        return run([str(part.target)], given | {part.source: hidden, "attention_mask": batch.mask})[0]

    def _keep(self, part: Slice, where: Device) -> _Kept:
        return _Kept(where, part, where.open(part.model, self._folder))

    def _stored(self, layer: int) -> list[str]:
        """What the checkpoint calls a layer's tensors; the number of layers stands for the head."""
        last = layer == self._architecture.layers
        return [self._architecture.head.name] if last else [name.replace(".0.", f".{layer}.", 1) for name in self._wide]

    def _advance(self, layer: int, batch: _Batch, hidden: np.ndarray) -> np.ndarray:
        """Hidden states after a layer, whose weights are widened; keys and values are written where they stay."""
        given = {self._states: hidden, "attention_mask": batch.mask, **self._wide}
        binding = self._session.io_binding()
        for name, values in given.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(values))
        for name, values in zip(self._layer.cached.values(), self.cache[layer], strict=True):
            shared = ort.OrtValue.ortvalue_from_numpy(values[batch.rows])
            binding.bind_ortvalue_input(name.replace("present.", "past_key_values."), shared)
            binding.bind_ortvalue_output(name, shared)
        binding.bind_output(self._layer.target)
        self._session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()

    def _logits(self, hidden: np.ndarray) -> np.ndarray:
        """float32 [texts, vocab] of the last hidden states [texts, 1, hidden]."""
        normed = self._norm([self._last.taps["head"]], {self._last.source: hidden})[0]
        return passing("writing: head", partial(self._product, normed))

    def _product(self, normed: np.ndarray, where: Device) -> np.ndarray:
        """Logits of [texts, 1, hidden]; the CPU widens the head a part at a time."""
        matrix, last = self._architecture.head, self._architecture.layers
        if where is not CPU:
            self._kept[last] = self._kept.get(last) or self._keep(self._slices.head(), where)
            _, part, run = self._kept[last]
            return run([LOGITS], {part.source: normed})[0][:, 0]
        buffer = max(self._wide.values(), key=np.size).reshape(-1)
        logits = np.empty((len(normed), matrix.rows), np.float32)
        for start, stop in pairwise(self._steps):
            wide = buffer[: (stop - start) * matrix.columns].reshape(-1, matrix.columns)
            self._widen(matrix.name, wide, start)
            logits[:, start:stop] = self._multiply([LOGITS], {"x": normed[:, 0], "w": wide})[0]
        logits += bias_of(matrix, self._weights)
        return logits

    def _widen(self, name: str, wide: np.ndarray, start: int = 0) -> None:
        """A stored tensor's rows from `start` on into a buffer, float32 [rows, …], on all cores."""
        step = max(1, _BLOCK * len(wide) // wide.size)

        def part(at: int) -> None:
            stop = min(at + step, len(wide))
            self._weights.rows(name, start + at, start + stop, wide[at:stop])

        list(self._pool.map(part, range(0, len(wide), step)))
