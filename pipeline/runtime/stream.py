"""A text run through a full-precision model layer by layer: memory is one layer's weights, whatever the model.

All windows pass one layer before the next is loaded. Between layers their hidden states lie in a file, float32
[tokens, hidden], the windows one after another; so work goes on at any layer whose file is there. What is wanted on
the way is Σ x·xᵀ of the products' inputs x, and some tokens of them as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import count, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from pipeline.errors import EvaluationError
from pipeline.graph.slices import DecoderSlices, Slice
from pipeline.machine import cores
from pipeline.quantize.cache import ROTATED, magnitudes
from pipeline.quantize.rotation import rotate
from pipeline.runtime.device import CPU, Array, Device, engine_of, passing
from pipeline.runtime.session import SliceRun

Windows = Sequence[np.ndarray]
"""Token ids, int64 [tokens] each."""
Values = Mapping[str, np.ndarray]
_See = Callable[[int, Values], None]
SAMPLE_TOKENS = 1024  # of each input that are kept as they are, in whole windows
BATCH_TOKENS = 2048  # whose products are added at a time: each addition passes over the whole sum
_PANEL_BYTES = 64 << 20  # of the partial products of a matrix Σ x·xᵀ


@dataclass(frozen=True)
class Passed:
    """What a layer showed of the text.

    Attributes:
        tokens: input name → how many tokens its products saw: of an expert its own, perhaps none, of others all.
        products: input name → Σ x·xᵀ over these tokens, float32 [channels, channels], symmetric to the bit: 1.3 GB for
            Phi-4's widest.
        samples: input name → x of some windows (`sampled`), float32 [tokens, channels].
        ranges: `layers.0.key` → of cached keys and values (`quantize.cache.magnitudes`), float32 [channels]; empty
            unless the slices give those. Of values also once their heads are rotated, `layers.0.value.rotated`.
    """

    tokens: dict[str, int]
    products: dict[str, np.ndarray]
    samples: dict[str, np.ndarray]
    ranges: dict[str, np.ndarray]


def sampled(windows: Windows) -> frozenset[int]:
    """Which windows are kept: a quarter at most, spread over the text, of `SAMPLE_TOKENS` together."""
    count = min(len(windows) // 4, max(1, SAMPLE_TOKENS // max(map(len, windows))))
    return frozenset((2 * k + 1) * len(windows) // (2 * count) for k in range(count))


class _Window(NamedTuple):
    """Token ids, int64 [tokens], and the hidden states before a slice, float32 [tokens, hidden]; empty for none."""

    number: int
    ids: np.ndarray
    hidden: np.ndarray


class _Part:
    """The job of one slice: a window → all that the slice gives of it. Its weights are mapped where it is done, or lie
    on a GPU of this process."""

    def __init__(self, part: Slice, folder: Path, where: Device = CPU):
        self._part, self._folder, self._where = part, folder, where

    def __reduce__(self) -> tuple[type, tuple[Slice, Path]]:
        return type(self), (self._part, self._folder)

    @cached_property
    def _run(self) -> SliceRun:
        return self._where.open(self._part.model, self._folder)

    def __call__(self, window: _Window) -> Values:
        names, mask = [value.name for value in self._part.model.graph.output], np.ones((1, len(window.ids)), np.int64)
        arrays = {"input_ids": window.ids[None], "attention_mask": mask, self._part.source: window.hidden[None]}
        return dict(zip(names, (value[0] for value in self._run(names, arrays)), strict=True))


class LayerStream:
    """Windows of tokens on their way through a model.

    Attributes:
        architecture: the model's.
        layer: the current one, whose inputs can be measured; the number of layers stands for the head.
        digest: SHA-256 of the file of hidden states before `layer`, 64 hex digits; "" if an earlier stream wrote it.
    """

    def __init__(self, slices: DecoderSlices, weights: Path, windows: Windows, states: Path, layer: int | None = None):
        """Start at the embedding, or go on at `layer` with the file that an earlier stream over `windows` left.

        Args:
            weights: the folder where the whole graph runs.
            states: an existing folder for the hidden states, this stream's own.

        Raises:
            EvaluationError: the file of an earlier stream is missing, or of other windows or another model.
        """
        self._slices, self._weights, self._windows, self._states = slices, weights, windows, states
        self.layer, self.digest, self.architecture = layer or 0, "", slices.architecture
        if layer is None:
            passing("calibration: embedding", lambda where: self._run(slices.embedding(), 0, where))
            return
        path = states / self.states_file(layer)
        size = path.stat().st_size if path.is_file() else 0
        needed = 4 * slices.architecture.hidden * sum(map(len, windows))
        if size != needed:
            raise EvaluationError(
                f"{path}: {size:,} bytes of hidden states, {needed:,} belong to these {len(windows)} windows. Remove "
                f"{states} and run the stage again."
            )

    @staticmethod
    def states_file(layer: int) -> str:
        """Name of the file of hidden states before `layer`, in the folder of states."""
        return f"hidden.{layer}"

    def advance(self) -> Passed:
        """Pass the current layer; the head is the last. The states before the layer stay until the next call: a killed
        run can go on from them.

        Raises:
            EvaluationError: ONNX Runtime refuses the layer.
            OSError: the disk is full (wrap the work in `files.disk_full`).
        """
        for old in range(self.layer):
            (self._states / self.states_file(old)).unlink(missing_ok=True)
        found = passing(f"calibration: layer {self.layer}", self._pass)
        self.layer += 1
        for total in found.products.values():
            _mirror(total)
        return found

    def _pass(self, where: Device) -> Passed:
        """The current layer's, of the products only the upper triangles."""
        arch, part = self._slices.architecture, self._slices.layer(self.layer)
        channels = {name: self._slices.columns[name] for name in part.taps}
        products = {name: where.put(np.zeros((count, count), np.float32)) for name, count in channels.items()}
        samples = {name: np.empty((0, count), np.float32) for name, count in channels.items()}
        found = Passed(dict.fromkeys(channels, 0), {}, samples, {})
        kept, last = sampled(self._windows), len(self._windows) - 1
        waiting: dict[str, list[np.ndarray]] = {name: [] for name in channels}

        def see(number: int, values: Values) -> None:
            for name, value in part.taps.items():
                found.tokens[name] += len(values[value])
                waiting[name].append(values[value])
                if number in kept:
                    found.samples[name] = np.concatenate([found.samples[name], values[value]])
                if number == last or sum(map(len, waiting[name])) >= BATCH_TOKENS:
                    _add(products[name], where.put(np.concatenate(waiting[name])))
                    waiting[name].clear()
            for name, value in part.cached.items():
                _raise(found.ranges, name, magnitudes(values[value], arch.rope.dims if name.endswith(".key") else 0))
                if name.endswith(".value"):
                    turned = rotate(values[value].reshape(-1, arch.head_dim).copy(), arch.head_dim)
                    _raise(found.ranges, f"{name}{ROTATED}", magnitudes(turned.reshape(values[value].shape)))

        self._run(part, self.layer + 1, where, see)
        found.products.update({name: where.get(total) for name, total in products.items()})
        return found

    def _run(self, part: Slice, next_layer: int, where: Device, see: _See | None = None) -> None:
        """Show what a slice gives of each window, in their order: float32 [tokens, channels] by name; keys, values
        [heads, tokens, channels].

        What it gives as hidden states goes to the file before `next_layer`, and `digest` is that file's.
        """
        digest, states = hashlib.sha256(), self._hidden() if part.source else repeat(np.empty(0))
        with open(self._states / self.states_file(next_layer), "wb") if part.target else nullcontext() as file:

            def reduce(unit: _Window, values: Values) -> None:
                if file and part.target:
                    data = np.ascontiguousarray(values[part.target]).data
                    file.write(data)
                    digest.update(data)
                if see:
                    see(unit.number, values)

            windows = map(_Window, count(), self._windows, states)
            engine_of(where).run(_Part(part, self._weights, where), windows, reduce)
        if part.target:
            self.digest = digest.hexdigest()

    def _hidden(self) -> Iterator[np.ndarray]:
        """The hidden states before the current layer, float32 [tokens, hidden] of each window."""
        width = self._slices.architecture.hidden
        with open(self._states / self.states_file(self.layer), "rb") as file:
            for ids in self._windows:
                yield np.fromfile(file, np.float32, len(ids) * width).reshape(len(ids), width)


def _raise(ranges: dict[str, np.ndarray], name: str, reached: np.ndarray) -> None:
    """Ranges that include what another window reached."""
    ranges[name] = np.maximum(ranges.get(name, reached), reached)


def _add(total: Array, x: Array) -> None:
    """Add xᵀ·x to the upper triangle of [channels, channels], x float32 [tokens, channels]; both of one device."""

    def add(panel: tuple[int, int]) -> None:
        start, stop = panel  # no second matrix is made
        total[start:stop, start:] += x[:, start:stop].T @ x[:, start:]

    # Panels side by side, each product on one thread: the sum does not depend on the number of cores.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(cores()) as pool:
        list(pool.map(add, _panels(total)))


def _mirror(total: np.ndarray) -> None:
    """Copy the upper triangle to the lower one."""
    for start, stop in _panels(total):
        block = total[start:stop, start:stop]
        block[:] = np.triu(block) + np.triu(block, 1).T
        total[stop:, start:stop] = total[start:stop, stop:].T


def _panels(total: np.ndarray) -> Iterator[tuple[int, int]]:
    channels = len(total)
    step = max(1, _PANEL_BYTES // (4 * channels))
    return ((start, min(start + step, channels)) for start in range(0, channels, step))
