"""Writing an artifact: weights streamed once from the checkpoint through the quantizer into the parts.

Every byte's place is fixed before the first weight is read. An engine's workers take units of work (some rows of one
matrix), so memory is bounded by a few units, whatever the model; this process writes what they give, and what a killed
run finished is not done again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx

from pipeline.artifact.graph import QuantizedGraph, cache_scales, channel_names
from pipeline.artifact.layout import Layout, make_layout
from pipeline.artifact.lost import find_lost
from pipeline.artifact.quantizers import Channels, Quantizer, Ranges, Search, check_moments, check_ranges
from pipeline.artifact.work import TABLE_UNITS, Range, Unit, quantize_unit, sharers, units
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.recipes import LOST_MAX
from pipeline.engine import Engine, Threads
from pipeline.errors import PlanError
from pipeline.files import disk_full, write_bytes
from pipeline.graph.decoder import ROPE_FILE
from pipeline.partial import Partial
from pipeline.planning.recipes import TABLES, Plan, PlannedMatrix
from pipeline.progress import Progress
from pipeline.quantize.cache import scales
from pipeline.quantize.lost import Lost
from pipeline.quantize.split import channel_importance, split_channels, squared_norms

# Flushing as it goes keeps the disk busy while the cores are, and the end short.
_FLUSH_BYTES = 256 << 20


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
    engine: Engine | None = None, ranges: Ranges | None = None, lost_max: float = LOST_MAX,
) -> dict[str, Lost]:  # fmt: skip
    """Fill `partial.folder` with the artifact: parts first, the graph last. The bytes do not depend on `engine`.

    Args:
        export: the folder of the full-precision export, which holds the rotary tables.
        search: what turns rows into codes.
        engine: who quantizes; default: threads on the cores that this process may use.
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
        writer, tables = PartWriter(partial.folder, drafted, stack), drafted.plan.tables
        flusher, size = (
            stack.enter_context(ThreadPoolExecutor(1)),
            sum(checkpoint[item.matrix.name].length for item in tables),
        )
        progress = stack.enter_context(Progress(f"quantize {drafted.stem}", len(tables), "tensors", size))
        run = _Run(writer, partial, checkpoint, search, engine or Threads(), lost_max, progress, flusher)
        run.write(drafted.plan)
        _write_copies(writer, checkpoint, export, ranges or {})
        writer.finish()
        write_bytes(partial.folder / drafted.model_file, drafted.model.SerializeToString(deterministic=True))
        return {item.matrix.name: run.lost[item.matrix.name] for item in tables if item.matrix.name in run.lost}


class Share(NamedTuple):
    """What one worker does at a time: units of matrices that share an input, and the channels of those that are split.

    Where workers share no memory each prepares quantizers for itself, so all matrices of an input are one share.
    """

    units: tuple[Unit, ...]
    channels: Channels


class _Quantizing:
    """The job: a share to the arrays that each of its units becomes. Pickled without the quantizers in `ready`."""

    def __init__(self, checkpoint: Checkpoint, search: Search):
        self._checkpoint, self._search = checkpoint, search
        self.ready: dict[str, Quantizer] = {}

    def __reduce__(self) -> tuple[type, tuple[Checkpoint, Search]]:
        return type(self), (self._checkpoint, self._search)

    def prepare(self, planned: PlannedMatrix, channels: Channels) -> None:
        """Make a matrix's quantizer ready, unless it is."""
        if planned.matrix.name not in self.ready:
            self.ready[planned.matrix.name] = self._search.of(planned, channels)

    def __call__(self, share: Share) -> list[list[np.ndarray]]:
        ready, found = dict(self.ready), list[list[np.ndarray]]()
        for unit in share.units:
            name = unit.planned.matrix.name
            if name not in ready:
                ready[name] = self._search.of(unit.planned, share.channels)
            chosen = quantize_unit(unit, self._checkpoint, ready[name])
            found.append([array for item in chosen for array in item.stored()])
        return found


@dataclass
class _Run:
    """The units of one artifact, written and recorded in their order."""

    writer: PartWriter
    partial: Partial
    checkpoint: Checkpoint
    search: Search
    engine: Engine
    lost_max: float
    progress: Progress
    flusher: ThreadPoolExecutor
    lost: dict[str, Lost] = field(default_factory=dict)
    channels: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)  # that are finished, of a matrix
    flushes: list[Future[None]] = field(default_factory=list)
    unflushed: int = 0

    def write(self, plan: Plan) -> None:
        """Quantize every matrix of the plan, or find it finished."""
        job = _Quantizing(self.checkpoint, self.search)
        shares = self._units(plan, job) if self.engine.shared else self._shares(plan)
        self.engine.run(job, shares, self._finish)
        for flush in self.flushes:
            flush.result()  # the system tells a failed write only once, to whoever asks first

    def _units(self, plan: Plan, job: _Quantizing) -> Iterator[Share | None]:
        """Each unit for itself, all matrices in order; None where those before must be finished first.

        A matrix's quantizer is prepared when its first unfinished unit is due, on this thread: what it needs of the
        model (a Hessian) is made in the order of execution, and once.
        """
        groups, layer = sharers(plan), None
        for planned in plan.tables:
            if self.search.by_layer and planned.matrix.layer != layer:
                yield None
                job.ready.clear()
            layer = planned.matrix.layer
            channels = self._channels_of(planned, groups)
            for unit in self._left(planned):
                self.checkpoint.prefetch(planned.matrix.name, unit.start, unit.stop)
                job.prepare(planned, channels)
                yield Share((unit,), channels)

    def _shares(self, plan: Plan) -> Iterator[Share]:
        """All units of an input together; of a table, whose quantizer costs nothing, some."""
        groups, together = sharers(plan), dict[str, list[PlannedMatrix]]()
        for planned in plan.body:
            together.setdefault(planned.matrix.input, []).append(planned)
        for planned in plan.tables:
            table = planned.matrix.role in TABLES
            if not table and planned is not together[planned.matrix.input][0]:
                continue
            channels = self._channels_of(planned, groups)
            sharing = [planned] if table else together[planned.matrix.input]
            left = [unit for item in sharing for unit in self._left(item)]
            size = TABLE_UNITS if table else len(left) or 1
            for start in range(0, len(left), size):
                yield Share(tuple(left[start : start + size]), channels)

    def _left(self, planned: PlannedMatrix) -> Iterator[Unit]:
        """The units of a matrix that are not finished; those that are, are counted."""
        for unit in units(planned, tile=self.search.tile):
            ranges = list(unit.ranges())
            if digest := self._kept(unit.name, ranges):
                self._count(unit, ranges, digest)
            else:
                yield unit

    def _finish(self, share: Share, made: list[list[np.ndarray]]) -> None:
        """Write and record what a share became."""
        for unit, arrays in zip(share.units, made, strict=True):
            ranges = list(unit.ranges())
            self._count(unit, ranges, self._put(ranges, arrays))

    def _count(self, unit: Unit, ranges: list[Range], digest: str) -> None:
        written, name = self._account(unit.name, ranges, digest), unit.planned.matrix.name
        self.unflushed += written
        if self.unflushed > _FLUSH_BYTES:
            self.flushes.append(self.flusher.submit(self.writer.flush))
            self.unflushed = 0
        self.rows[name] = self.rows.get(name, 0) + unit.stop - unit.start
        whole, ref = self.rows[name] == unit.planned.matrix.rows, self.checkpoint[name]
        self.progress.advance(int(whole), unit.weights * ref.length // ref.elements, kept=not written)
        if whole and (lost := self._lost(unit.planned)):
            self.lost[name] = lost

    def _lost(self, planned: PlannedMatrix) -> Lost | None:
        return find_lost(planned, self.writer.get, self.checkpoint, self.channels, self.lost_max)

    def _kept(self, unit: str, ranges: Iterable[Range]) -> str | None:
        """The SHA-256 of a unit's bytes as they lie in the files, if it is the recorded one."""
        if recorded := self.partial.digests.get(unit):
            found = hashlib.sha256(b"".join(map(self.writer.get, ranges))).hexdigest()
            return found if found == recorded else None
        return None

    def _put(self, ranges: Iterable[Range], arrays: Iterable[np.ndarray]) -> str:
        """Write a unit's arrays; the SHA-256 of their bytes."""
        digest = hashlib.sha256()
        for at, array in zip(ranges, arrays, strict=True):
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

    def _channels_of(self, planned: PlannedMatrix, groups: Mapping[str, list[PlannedMatrix]]) -> Channels:
        """Of a split matrix's input: chosen and written with the first of those that share it."""
        if not planned.split:
            return {}
        names = channel_names(planned)
        if names[0] not in self.channels:
            ranges = [Range(name, 0, self.writer.layout.places[name].length) for name in names]
            digest = self._kept(names[0], ranges) or self._put(ranges, self._split(groups[planned.matrix.input]))
            self._account(names[0], ranges, digest)
            self.channels |= {item.name: np.frombuffer(self.writer.get(item), np.int32) for item in ranges}
        return {name: self.channels[name] for name in names}

    def _split(self, group: list[PlannedMatrix]) -> tuple[np.ndarray, np.ndarray]:
        name = group[0].matrix.input
        if self.search.moments is None:
            raise PlanError(f"input {name!r} is split by importance, which needs calibration: use `search: weighted`.")
        importance = channel_importance(self.search.moments[name], map(self._column_norms, group))
        return split_channels(importance, group[0].pieces[0].columns)

    def _column_norms(self, planned: PlannedMatrix) -> np.ndarray:
        """Squared norm of each column, float64 [columns]. These rows are read again at once, from the page cache."""
        total = np.zeros(planned.matrix.columns)

        def of_unit(unit: Unit) -> np.ndarray:
            return squared_norms(self.checkpoint.rows(planned.matrix.name, unit.start, unit.stop))

        def add(_: Unit, norms: np.ndarray) -> None:
            total[...] += norms

        Threads().run(of_unit, units(planned), add)
        return total


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
