"""Writing an artifact: weights streamed once from the checkpoint through the quantizer into the parts.

Every byte's place is fixed before the first weight is read. Threads take units of work (some rows of one matrix), so
memory is bounded by a few units, whatever the model; what a killed run finished is not done again.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import onnx

from pipeline.artifact.graph import QuantizedGraph, cache_scales, channel_names
from pipeline.artifact.layout import Layout, make_layout
from pipeline.artifact.lost import find_lost
from pipeline.artifact.quantizers import Quantizer, Ranges, Search, check_moments, check_ranges
from pipeline.artifact.work import Range, Unit, quantize_unit, sharers, units
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.recipes import LOST_MAX
from pipeline.errors import PlanError
from pipeline.files import disk_full, write_bytes
from pipeline.graph.decoder import ROPE_FILE
from pipeline.machine import cores
from pipeline.partial import Partial
from pipeline.planning.recipes import Plan, PlannedMatrix
from pipeline.progress import Progress
from pipeline.quantize.cache import scales
from pipeline.quantize.lost import Lost
from pipeline.quantize.split import channel_importance, split_channels, squared_norms

# Flushing as it goes keeps the disk busy while the cores are, and the end short.
_FLUSH_BYTES = 256 << 20
# Units waiting for a thread: their weights are on the way from the disk already.
_AHEAD = 16


@dataclass(frozen=True)
class Draft:
    """An artifact before its weights: the finished graph, its layout, and so its exact size.

    `files`: the names of the graph, as apps name it, and of the data parts.
    """

    plan: Plan
    model: onnx.ModelProto
    layout: Layout
    stem: str
    files: tuple[str, ...]

    @property
    def model_file(self) -> str:
        """Name of the graph."""
        return self.files[0]

    @property
    def bytes(self) -> int:
        """Bytes of the graph and all parts."""
        return self.model.ByteSize() + self.layout.bytes


def draft(source: onnx.ModelProto, plan: Plan, stem: str, part_bytes: int) -> Draft:
    """Lay out the artifact of `plan`; `stem` is its file name, such as mimo_8b_q4."""
    graph = QuantizedGraph(source, plan)
    layout = make_layout(((name, item.bytes) for name, item in graph.stored.items()), part_bytes)
    parts = [f"{stem}.data.{number}" for number in range(len(layout.parts))]
    return Draft(plan, graph.place(layout, parts), layout, stem, (f"{stem}.onnx", *parts))


class PartWriter:
    """Writes bytes of named tensors at their places; refuses to write outside them, and knows what is still missing."""

    def __init__(self, folder: Path, drafted: Draft, stack: ExitStack):
        self.layout = drafted.layout
        self.left = {name: place.length for name, place in drafted.layout.places.items()}
        self.fds = []
        for name, size in zip(drafted.files[1:], drafted.layout.parts, strict=True):
            fd = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
            stack.callback(os.close, fd)
            os.fchmod(fd, 0o644)  # as every other file of ours, whatever the umask
            self.fds.append(fd)
            os.truncate(fd, size)
            if size and hasattr(os, "posix_fallocate"):  # a full disk is found now, not at hour 3
                os.posix_fallocate(fd, 0, size)

    def put(self, at: Range, array: np.ndarray) -> memoryview:
        """Write an array, and return its bytes; safe from several threads."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        fd, start, _ = self._place(at)
        for begin in range(0, len(data), at.run or len(data)):
            left = data[begin : begin + (at.run or len(data))]
            while left:
                written = os.pwrite(fd, left, start)
                left, start = left[written:], start + written
            start += at.step - at.run
        return data

    def get(self, at: Range) -> bytes:
        """What lies there."""
        fd, start, span = self._place(at)
        found = os.pread(fd, span, start)
        return b"".join(found[run : run + at.run] for run in range(0, span, at.step)) if at.run else found

    def _place(self, at: Range) -> tuple[int, int, int]:
        """File, and in it the offset and the bytes from the first to the last."""
        place, span = self.layout.places[at.name], at.length
        if at.run:
            span = (at.length // at.run - 1) * at.step + at.run
        if at.offset + span > place.length:
            raise PlanError(f"tensor {at.name!r}: {at.offset + span:,} bytes to write, {place.length:,} planned.")
        return self.fds[place.part], place.offset + at.offset, span

    def flush(self) -> None:
        """Wait until what was written is on the disk."""
        for fd in self.fds:
            os.fsync(fd)

    def finish(self) -> None:
        """Flush. Raises PlanError if a planned byte was never written."""
        if missing := {name: count for name, count in self.left.items() if count}:
            name, count = next(iter(missing.items()))
            raise PlanError(
                f"{len(missing)} tensors are not fully written, the first is {name!r}: {count:,} bytes left."
            )
        self.flush()


def write_artifact(
    partial: Partial, drafted: Draft, checkpoint: Checkpoint, export: Path, search: Search,
    threads: int | None = None, ranges: Ranges | None = None, lost_max: float = LOST_MAX,
) -> dict[str, Lost]:  # fmt: skip
    """Fill `partial.folder` with the artifact: parts first, the graph last. The bytes do not depend on `threads`.

    Args:
        export: the folder of the full-precision export, which holds the rotary tables.
        search: what turns rows into codes.
        threads: how many work at a time; default: the cores that this process may use.
        ranges: of cached keys and values, for a plan with an int8 KV cache.
        lost_max: the largest share of a tensor's energy that may vanish in float16.

    Returns:
        What float16 lost, by the name of the tensor, of those of which it lost something.

    Raises:
        PlanError: moments or ranges are missing or not this model's.
        CheckpointError: a weight is not finite, or too large for a float16 scale; or too much of a tensor vanished.
        ResourceError: the disk is full.
    """
    if search.moments is not None:
        check_moments(drafted.plan, search.moments)
    if drafted.plan.cache.type == "int8":
        check_ranges(drafted.plan, ranges or {})
    with disk_full(f"write {drafted.model_file}"), ExitStack() as stack:
        writer, count = PartWriter(partial.folder, drafted, stack), threads or cores()
        pool = stack.enter_context(ThreadPoolExecutor(count))
        run = _Run(writer, partial, checkpoint, search, pool, count + _AHEAD, lost_max)
        run.write(drafted)
        _write_copies(writer, checkpoint, export, ranges or {})
        writer.finish()
        write_bytes(partial.folder / drafted.model_file, drafted.model.SerializeToString(deterministic=True))
        return run.lost


@dataclass
class _Run:
    """The units of one artifact, at most `ahead` under way at a time, recorded in order as they finish."""

    writer: PartWriter
    partial: Partial
    checkpoint: Checkpoint
    search: Search
    pool: ThreadPoolExecutor
    ahead: int
    lost_max: float
    lost: dict[str, Lost] = field(default_factory=dict)
    channels: dict[str, np.ndarray] = field(default_factory=dict)
    quantizers: dict[str, Callable[[], Quantizer]] = field(default_factory=dict)  # of the matrices under way, by name

    def write(self, drafted: Draft) -> None:
        """Quantize every matrix of the plan, or find it finished."""
        tables, unflushed, flushes = drafted.plan.tables, 0, list[Future[None]]()
        weight_bytes = sum(self.checkpoint[item.matrix.name].length for item in tables)
        label = f"quantize {drafted.stem}"
        with ThreadPoolExecutor(1) as flusher, Progress(label, len(tables), "tensors", weight_bytes) as progress:
            for unit, digest in self._finished(drafted.plan):
                written = self._account(unit.name, unit.ranges(), digest)
                unflushed += written
                if unflushed > _FLUSH_BYTES:
                    flushes.append(flusher.submit(self.writer.flush))
                    unflushed = 0
                ref, last = self.checkpoint[unit.planned.matrix.name], unit.stop == unit.planned.matrix.rows
                progress.advance(int(last), unit.weights * ref.length // ref.elements, kept=not written)
                if last and (lost := self._lost(unit.planned)):
                    self.lost[unit.planned.matrix.name] = lost
        for flush in flushes:
            flush.result()  # the system tells a failed write only once, to whoever asks first

    def _lost(self, planned: PlannedMatrix) -> Lost | None:
        return find_lost(planned, self.writer.get, self.checkpoint, self.channels, self.lost_max)

    def _finished(self, plan: Plan) -> Iterator[tuple[Unit, str]]:
        """Units and the SHA-256 of their bytes, in order, whichever thread was faster."""
        pending: deque[tuple[Unit, Future[str]]] = deque()
        for unit in chain(self._units(plan), [None]):
            if unit is not None:
                pending.append((unit, self.pool.submit(self._write_unit, unit)))
            while len(pending) > (self.ahead if unit is not None else 0):
                first, future = pending.popleft()
                yield first, future.result()

    def _units(self, plan: Plan) -> Iterator[Unit | None]:
        """The units of all matrices in order; None where those before must be finished first.

        A matrix's quantizer is prepared when its first unfinished unit is due, on this thread: what it needs of the
        model (a Hessian) is made in the order of execution, and once.
        """
        groups, layer = sharers(plan), None
        for planned in plan.tables:
            name = planned.matrix.name
            if self.search.by_layer and planned.matrix.layer != layer:
                yield None
                self.quantizers.clear()
            layer = planned.matrix.layer
            if planned.split and channel_names(planned)[0] not in self.channels:
                self._choose_channels(groups[planned.matrix.input])
            self.quantizers[name] = cache(partial(self.search.of, planned, self.channels))
            for unit in units(planned, tile=self.search.tile):
                if unit.name not in self.partial.digests:
                    self.checkpoint.prefetch(name, unit.start, unit.stop)
                    self.quantizers[name]()
                yield unit

    def _write_unit(self, unit: Unit) -> str:
        def compute() -> list[np.ndarray]:
            chosen = quantize_unit(unit, self.checkpoint, self.quantizers[unit.planned.matrix.name]())
            return [array for item in chosen for array in item.stored()]

        return self._ensure(unit.name, list(unit.ranges()), compute)

    def _ensure(self, unit: str, ranges: list[Range], compute: Callable[[], Iterable[np.ndarray]]) -> str:
        """The SHA-256 of a unit's bytes: those that lie in the files if they are the recorded ones, else computed."""
        if recorded := self.partial.digests.get(unit):
            found = hashlib.sha256(b"".join(self.writer.get(item) for item in ranges)).hexdigest()
            if found == recorded:
                return found
        digest = hashlib.sha256()
        for at, array in zip(ranges, compute(), strict=True):
            if array.nbytes != at.length:
                raise PlanError(
                    f"tensor {at.name!r}: {array.nbytes:,} bytes computed, {at.length:,} planned. This is a bug."
                )
            digest.update(self.writer.put(at, array))
        return digest.hexdigest()

    def _account(self, unit: str, ranges: Iterable[Range], digest: str) -> int:
        """Tick off what a unit wrote; record it and return its bytes if it was not finished before."""
        length = 0
        for at in ranges:
            self.writer.left[at.name] -= at.length
            length += at.length
        if self.partial.digests.get(unit) == digest:
            return 0
        self.partial.record(unit, digest)
        return length

    def _choose_channels(self, group: list[PlannedMatrix]) -> None:
        """Choose and write the channel order of the input that `group` shares."""
        names = channel_names(group[0])
        ranges = [Range(name, 0, self.writer.layout.places[name].length) for name in names]
        self._account(names[0], ranges, self._ensure(names[0], ranges, lambda: self._split(group)))
        self.channels |= {item.name: np.frombuffer(self.writer.get(item), np.int32) for item in ranges}

    def _split(self, group: list[PlannedMatrix]) -> tuple[np.ndarray, np.ndarray]:
        name = group[0].matrix.input
        if self.search.moments is None:
            raise PlanError(f"input {name!r} is split by importance, which needs calibration: use `search: weighted`.")
        importance = channel_importance(self.search.moments[name], map(self._column_norms, group))
        return split_channels(importance, group[0].pieces[0].columns)

    def _column_norms(self, planned: PlannedMatrix) -> np.ndarray:
        """Squared norm of each column, float64 [columns]. These rows are read again at once, from the page cache."""

        def of_unit(unit: Unit) -> np.ndarray:
            return squared_norms(self.checkpoint.rows(planned.matrix.name, unit.start, unit.stop))

        return sum(self.pool.map(of_unit, units(planned)), np.zeros(planned.matrix.columns))


def _write_copies(writer: PartWriter, checkpoint: Checkpoint, export: Path, ranges: Ranges) -> None:
    """Tensors in float32: norms and biases from the checkpoint, rotary tables from the export, scales of the cache."""
    computed = _rope_tables(export) | {cache_scales(name): scales(values) for name, values in ranges.items()}
    for name in [name for name, left in writer.left.items() if left]:
        origin = name.removesuffix("/float32")
        values = checkpoint.rows(origin) if origin in checkpoint else computed.get(name)
        if values is not None:
            writer.left[name] -= len(writer.put(Range(name, 0, values.nbytes), values))


def _rope_tables(export: Path) -> dict[str, np.ndarray]:
    """Read here, because onnx refuses external data in a file with a second hard link, as DVC's files are."""
    data, tables = np.fromfile(export / ROPE_FILE, np.uint8), {}
    for tensor in onnx.load(export / "model.onnx", load_external_data=False).graph.initializer:
        place = {item.key: item.value for item in tensor.external_data}
        if place.get("location") == ROPE_FILE:
            start = int(place["offset"])
            tables[tensor.name] = data[start : start + int(place["length"])]
    return tables
