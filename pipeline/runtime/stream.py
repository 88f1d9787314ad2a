"""A text run through a full-precision model layer by layer: memory is one layer's weights, whatever the model.

All windows pass one layer before the next is loaded. Between layers their hidden states lie in a file, float32
[tokens, hidden], the windows one after another; so work goes on at any layer whose file is there. What is wanted on
the way is Σ x·xᵀ of the products' inputs x, and some tokens of them as they are.

A unit is a batch of windows (`batch_tokens`). Whoever passes it multiplies its inputs; here such products are added, in
the order of batches and panel by panel, so a sum has the same bits whoever did which batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from pipeline.checkpoint.architecture import Architecture
from pipeline.engine.units import in_order
from pipeline.errors import EvaluationError
from pipeline.graph.slices import DecoderSlices, Slice
from pipeline.machine import cores
from pipeline.quantize.cache import ROTATED, magnitudes
from pipeline.quantize.rotation import rotate
from pipeline.runtime.device import CPU, Array, Device, engine_of, passing
from pipeline.runtime.session import SliceRun

Windows = Sequence[np.ndarray]
"""Token ids, int64 [tokens] each."""
Beside = Callable[[], Any]
"""A unit of other work; pickled where workers are elsewhere."""
SAMPLE_TOKENS = 1024  # of each input that are kept as they are, in whole windows
BATCH_TOKENS = 2048  # of a batch at least: each addition of its products passes over the whole sum
PANEL_BYTES = 64 << 20  # of the products of a batch


@dataclass(frozen=True)
class Passed:
    """What a layer showed of the text.

    Attributes:
        tokens: input name → how many tokens its products saw: of an expert its own, perhaps none, of others all.
        products: input name → Σ x·xᵀ over these tokens, float32 [channels, channels], of which only the upper triangle
            is meant (`mirror`): 1.3 GB for Phi-4's widest.
        samples: input name → x of some windows (`sampled`), float32 [tokens, channels].
        ranges: `layers.0.key` → of cached keys and values (`quantize.cache.magnitudes`), float32 [channels]; empty
            unless the slices give those. Of values also once their heads are rotated, `layers.0.value.rotated`.
    """

    tokens: dict[str, int]
    products: dict[str, np.ndarray]
    samples: dict[str, np.ndarray]
    ranges: dict[str, np.ndarray]

    def add(self, other: Passed) -> None:
        """Take in what later windows showed, all but the products."""
        for name, x in other.samples.items():
            self.tokens[name] += other.tokens[name]
            if len(x):  # few windows are kept
                self.samples[name] = np.concatenate([self.samples[name], x])
        for name, reached in other.ranges.items():
            self.ranges[name] = np.maximum(self.ranges.get(name, reached), reached)


def _nothing(channels: Mapping[str, int]) -> Passed:
    samples = {name: np.empty((0, count), np.float32) for name, count in channels.items()}
    return Passed(dict.fromkeys(channels, 0), {}, samples, {})


def sampled(windows: Windows) -> frozenset[int]:
    """Which windows are kept: a quarter at most, spread over the text, of `SAMPLE_TOKENS` together."""
    count = min(len(windows) // 4, max(1, SAMPLE_TOKENS // max(map(len, windows))))
    return frozenset((2 * k + 1) * len(windows) // (2 * count) for k in range(count))


def batch_tokens(architecture: Architecture) -> int:
    """Tokens of a batch, whose windows are whole: as many as take in the inputs of a layer the bytes of the triangles
    that they become, so products are no more to send than inputs."""
    inputs = {matrix.input: matrix for matrix in architecture.body(0)}.values()
    woken = architecture.experts_per_token / max(architecture.experts, 1)
    of_token = sum(matrix.columns * (1 if matrix.expert is None else woken) for matrix in inputs)
    return max(BATCH_TOKENS, int(sum(matrix.columns**2 for matrix in inputs) / 2 / of_token))


class _Batch(NamedTuple):
    """Windows by number, and the hidden states of them all before a slice, float32 [tokens, hidden]; or none."""

    windows: Mapping[int, np.ndarray]
    hidden: np.ndarray


class _Part:
    """The job of one slice: a batch of windows → all that the slice gives of it, or what another unit gives. Weights
    are mapped where it is done, or lie on a GPU of this process."""

    def __init__(
        self, part: Slice, folder: Path, architecture: Architecture, channels: Mapping[str, int], kept: frozenset[int],
        where: Device = CPU,
    ):  # fmt: skip
        self._part, self._given, self._where = part, (folder, architecture, channels, kept), where

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._part, *self._given)

    @cached_property
    def _run(self) -> SliceRun:
        return self._where.open(self._part.model, self._given[0])

    def __call__(self, unit: Any) -> Any:
        return self._passed(unit) if isinstance(unit, _Batch) else unit()

    def _passed(self, batch: _Batch) -> Iterator[Any]:
        """The hidden states after the slice, and what it showed; then of each input the panels of xᵀ·x, each with the
        name and the first row. They are made as they are taken."""
        part, (_, arch, channels, kept) = self._part, self._given
        names, seen, start = [value.name for value in part.model.graph.output], _nothing(channels), 0
        inputs = {name: np.empty((len(batch.hidden), count), np.float32) for name, count in channels.items()}
        states = np.empty((len(batch.hidden), arch.hidden if part.target else 0), np.float32)
        for number, ids in batch.windows.items():
            span = slice(start, start := start + len(ids))
            mask = np.ones((1, len(ids)), np.int64)
            arrays = {"input_ids": ids[None], "attention_mask": mask, part.source: batch.hidden[None, span]}
            values = dict(zip(names, (value[0] for value in self._run(names, arrays)), strict=True))
            if part.target:
                states[span] = values[part.target]
            shown = _nothing(channels)
            for name, value in part.taps.items():
                x, at = values[value], seen.tokens[name]
                inputs[name][at : at + len(x)], shown.tokens[name] = x, len(x)
                if number in kept:
                    shown.samples[name] = x
            for name, value in part.cached.items():
                shown.ranges[name] = magnitudes(values[value], arch.rope.dims if name.endswith(".key") else 0)
                if name.endswith(".value"):
                    turned = rotate(values[value].reshape(-1, arch.head_dim).copy(), arch.head_dim)
                    shown.ranges[f"{name}{ROTATED}"] = magnitudes(turned.reshape(values[value].shape))
            seen.add(shown)
        yield states, seen
        for name in channels:
            for first, panel in _triangle(self._where.put(inputs.pop(name)[: seen.tokens[name]])):
                yield name, first, panel


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
            passing("calibration: embedding", lambda where: self._pass(slices.embedding(), 0, where))
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

    def advance(self, beside: Iterable[Beside] = (), take: Callable[[Any], object] = lambda made: None) -> Passed:
        """Pass the current layer; the head is the last. A killed run can go on from the states before it, which stay.

        Args:
            beside: units that workers do first, in the same run of the engine; taken one by one.
            take: gets what each of them gives, before any state is written.

        Raises:
            EvaluationError: ONNX Runtime refuses the layer.
            OSError: the disk is full (wrap the work in `files.disk_full`).
        """
        part, beside = self._slices.layer(self.layer), iter(beside)
        found = passing(
            f"calibration: layer {self.layer}", lambda where: self._pass(part, self.layer + 1, where, beside, take)
        )
        self.layer += 1
        return found

    def _pass(
        self, part: Slice, next_layer: int, where: Device, beside: Iterable[Beside] = (),
        take: Callable[[Any], object] = lambda made: None,
    ) -> Passed:  # fmt: skip
        """What a slice shows of all windows. What it gives as hidden states goes to the file before `next_layer`, and
        `digest` is that file's."""
        channels = {name: self._slices.columns[name] for name in part.taps}
        products = {name: where.put(np.zeros((count, count), np.float32)) for name, count in channels.items()}
        found, digest = _nothing(channels), hashlib.sha256()
        with open(self._states / self.states_file(next_layer), "wb") if part.target else nullcontext() as file:

            def reduce(unit: Any, made: Any) -> None:
                if not isinstance(unit, _Batch):
                    take(made)
                    return
                parts = iter(made)
                states, seen = next(parts)
                if file:
                    file.write(states.data)
                    digest.update(states.data)
                found.add(seen)
                for name, first, panel in parts:
                    products[name][first : first + len(panel), first:] += panel

            units: Iterator[Any] = chain(beside, self._batches(part))
            job = _Part(part, self._weights, self.architecture, channels, sampled(self._windows), where)
            engine_of(where).run(job, units, reduce)
        found.products.update({name: where.get(total) for name, total in products.items()})
        if part.target:
            self.digest = digest.hexdigest()
        return found

    def _batches(self, part: Slice) -> Iterator[_Batch]:
        """All windows, with the hidden states before the current layer if the slice takes any."""
        width, limit, some = self.architecture.hidden, batch_tokens(self.architecture), dict[int, np.ndarray]()
        with open(self._states / self.states_file(self.layer), "rb") if part.source else nullcontext() as file:
            for number, ids in enumerate(self._windows):
                some[number] = ids
                tokens = sum(map(len, some.values()))
                if tokens >= limit or number == len(self._windows) - 1:
                    values = np.fromfile(file, np.float32, tokens * width) if file else np.empty(0, np.float32)
                    yield _Batch(some, values.reshape(tokens, -1))
                    some = {}


def _triangle(x: Array) -> Iterator[tuple[int, Array]]:
    """xᵀ·x of float32 [tokens, channels] in panels: its rows from a first one on, which is named, and from that column.
    They are made as they are taken, one more than cores at most."""
    panels = _panels(x.shape[1])

    def product(panel: slice) -> tuple[int, Array]:
        return panel.start, x[:, panel].T @ x[:, panel.start :]

    # Panels side by side, each product on one thread: the sum does not depend on the number of cores.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(cores()) as pool:
        for _, made in in_order(panels, lambda panel: pool.submit(product, panel).result, cores()):
            yield made


def mirror(total: np.ndarray) -> np.ndarray:
    """`total`, [channels, channels], once its upper triangle is copied to the lower one."""
    for panel in _panels(len(total)):
        block = total[panel, panel]
        block[:] = np.triu(block) + np.triu(block, 1).T
        total[panel.stop :, panel] = total[panel, panel.stop :].T
    return total


def _panels(channels: int) -> Iterator[slice]:
    step = max(1, PANEL_BYTES // (4 * channels))
    return (slice(start, min(start + step, channels)) for start in range(0, channels, step))
