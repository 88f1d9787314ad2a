"""Writing an artifact: weights streamed once from the checkpoint through the quantizer into the parts.

Every byte's place is fixed before the first weight is read. Memory is bounded by a few hundred rows of one matrix.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from pipeline.artifact.graph import QuantizedGraph, channel_names, piece_names, quantize_graph
from pipeline.artifact.layout import Layout, make_layout
from pipeline.checkpoint.architecture import Matrix
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.errors import CheckpointError, PlanError
from pipeline.files import disk_full, require_free_space
from pipeline.graph.decoder import ROPE_FILE
from pipeline.planning.recipes import Piece, Plan, PlannedMatrix
from pipeline.progress import track
from pipeline.quantize.formats import Quantized, pack
from pipeline.quantize.search import nearest, weighted
from pipeline.quantize.split import channel_importance, split_channels

_CHUNK_BYTES = 64 << 20  # float32 bytes of a matrix in memory at a time

Moments = Mapping[str, np.ndarray]  # input name → float32 [channels], second moment of each channel


@dataclass(frozen=True)
class Draft:
    """An artifact before its weights: the finished graph, its layout, and so its exact size."""

    plan: Plan
    model: onnx.ModelProto
    layout: Layout
    stem: str

    @property
    def model_file(self) -> str:
        """Name of the graph, as apps name it."""
        return f"{self.stem}.onnx"

    def part_file(self, number: int) -> str:
        """Name of a data part."""
        return f"{self.stem}.data.{number}"

    @property
    def bytes(self) -> int:
        """Bytes of the graph and all parts."""
        return self.model.ByteSize() + self.layout.bytes


def draft(source: onnx.ModelProto, plan: Plan, stem: str, part_bytes: int) -> Draft:
    """Lay out the artifact of `plan`; `stem` is its file name, such as mimo_8b_q4."""
    graph: QuantizedGraph = quantize_graph(source, plan)
    layout = make_layout(((item.name, item.bytes) for item in graph.stored), part_bytes)
    model = graph.place(layout, lambda number: f"{stem}.data.{number}")
    return Draft(plan, model, layout, stem)


class PartWriter:
    """Writes bytes of named tensors at their places; refuses to write outside them, and knows what is still missing."""

    def __init__(self, folder: Path, drafted: Draft, stack: ExitStack):
        self.layout = drafted.layout
        self.left = {name: place.length for name, place in drafted.layout.places.items()}
        self.files = []
        for number, size in enumerate(drafted.layout.parts):
            file = stack.enter_context((folder / drafted.part_file(number)).open("wb"))
            file.truncate(size)
            self.files.append(file)

    def put(self, name: str, offset: int, data: np.ndarray) -> None:
        """Write `data` at byte `offset` of tensor `name`."""
        place = self.layout.places[name]
        raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        if offset + raw.size > place.length:
            raise PlanError(f"tensor {name!r}: {offset + raw.size:,} bytes to write, {place.length:,} planned.")
        _write_all(self.files[place.part].fileno(), memoryview(raw), place.offset + offset)
        self.left[name] -= raw.size

    def finish(self) -> None:
        """Flush to disk. Raises PlanError if a planned byte was never written."""
        if missing := {name: count for name, count in self.left.items() if count}:
            name, count = next(iter(missing.items()))
            raise PlanError(
                f"{len(missing)} tensors are not fully written, the first is {name!r}: {count:,} bytes left."
            )
        for file in self.files:
            os.fsync(file.fileno())


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def write_artifact(folder: Path, drafted: Draft, checkpoint: Checkpoint, export: Path, moments: Moments | None) -> None:
    """Fill `folder` with the artifact: parts first, the graph last.

    Args:
        export: the folder of the full-precision export, which holds the rotary tables.
        moments: second moments by input; None rounds to nearest.

    Raises:
        PlanError: moments are missing or not this model's.
        CheckpointError: a weight is not finite, or too large for a float16 scale.
        ResourceError: the disk is full. The caller removes `folder` (files.atomic_directory does).
    """
    if moments is not None:
        _check_moments(drafted.plan, moments)
    require_free_space(folder, drafted.bytes, f"write {drafted.model_file}")
    with disk_full(f"write {drafted.model_file}"), ExitStack() as stack:
        writer = PartWriter(folder, drafted, stack)
        channels = _write_channels(writer, drafted.plan, checkpoint, moments)
        tables = drafted.plan.tables
        for planned in track(tables, f"quantize {drafted.stem}", len(tables)):
            for start, rows, quantized in quantize_matrix(planned, checkpoint, moments, channels):
                _write_rows(writer, planned, start, rows, quantized)
        _write_copies(writer, checkpoint, export)
        writer.finish()
        (folder / drafted.model_file).write_bytes(drafted.model.SerializeToString(deterministic=True))


def _check_moments(plan: Plan, moments: Moments) -> None:
    """Raise PlanError unless every product has usable statistics: a missing one would be searched blindly."""
    for matrix in (item.matrix for item in (*plan.body, plan.head)):
        found = moments.get(matrix.input)
        if found is None or found.shape != (matrix.columns,) or not (np.isfinite(found) & (found >= 0)).all():
            state = "there are none" if found is None else f"they are {list(found.shape)}, or not all ≥ 0"
            raise PlanError(
                f"tensor {matrix.name!r}: its search needs {matrix.columns:,} finite second moments of input "
                f"{matrix.input!r}, and {state}. Run the calibrate stage for this model again."
            )


def quantize_matrix(
    planned: PlannedMatrix, checkpoint: Checkpoint, moments: Moments | None, channels: Mapping[str, np.ndarray]
) -> Iterator[tuple[int, int, list[Quantized]]]:
    """(first row, row count, one Quantized per piece) for consecutive chunks of rows of one matrix."""
    matrix = planned.matrix
    importance = None
    if moments is not None:
        # An embedding is looked up, not multiplied: its channels matter alike. A tied table serves the head's products.
        alike = np.ones(matrix.columns, np.float32)
        importance = alike if matrix.role == "embedding" else moments[matrix.input]
    step = max(1, _CHUNK_BYTES // (4 * matrix.columns))
    for start in range(0, matrix.rows, step):
        weights = checkpoint.rows(matrix.name, start, min(start + step, matrix.rows))
        chosen = []
        for piece, name in zip(planned.pieces, channel_names(planned), strict=False):
            columns = channels[name] if planned.split else slice(None)
            part = np.ascontiguousarray(weights[:, columns])
            chosen.append(_quantize_piece(part, piece, None if importance is None else importance[columns], matrix))
        yield start, len(weights), chosen


def _quantize_piece(part: np.ndarray, piece: Piece, importance: np.ndarray | None, matrix: Matrix) -> Quantized:
    quantized = nearest(part, piece.format) if importance is None else weighted(part, importance, piece.format)
    if not np.isfinite(quantized.scales).all():
        raise CheckpointError(
            f"tensor {matrix.name!r}: a block's scale exceeds float16's 65,504 (largest weight "
            f"{np.abs(part).max():.4g}). The checkpoint is damaged, or needs a format of its own."
        )
    return quantized


def _write_rows(writer: PartWriter, planned: PlannedMatrix, start: int, rows: int, chosen: list[Quantized]) -> None:
    for piece, prefix, quantized in zip(planned.pieces, piece_names(planned), chosen, strict=True):
        fmt = piece.format
        writer.put(f"{prefix}.codes", fmt.code_bytes(start, piece.columns), pack(quantized.codes, fmt.bits))
        writer.put(f"{prefix}.scales", fmt.scale_bytes(start, piece.columns), quantized.scales)
        if not fmt.symmetric:
            writer.put(f"{prefix}.zeros", fmt.zero_bytes(start, piece.columns), pack(quantized.zeros, fmt.bits))


def _write_channels(
    writer: PartWriter, plan: Plan, checkpoint: Checkpoint, moments: Moments | None
) -> dict[str, np.ndarray]:
    """Choose and write the channel order of every split input."""
    consumers: dict[str, list[PlannedMatrix]] = {}
    for planned in plan.body:
        if planned.split:
            consumers.setdefault(planned.matrix.input, []).append(planned)
    channels: dict[str, np.ndarray] = {}
    for name, group in consumers.items():
        if moments is None:
            raise PlanError(f"input {name!r} is split by importance, which needs calibration: use `search: weighted`.")
        importance = channel_importance(moments[name], (_column_norms(item.matrix, checkpoint) for item in group))
        halves = split_channels(importance, group[0].pieces[0].columns)
        for key, indices in zip(channel_names(group[0]), halves, strict=True):
            channels[key] = indices
            writer.put(key, 0, indices)
    return channels


def _column_norms(matrix: Matrix, checkpoint: Checkpoint) -> np.ndarray:
    """Squared norm of each column, float64 [columns]."""
    step = max(1, _CHUNK_BYTES // (4 * matrix.columns))
    total = np.zeros(matrix.columns)
    for start in range(0, matrix.rows, step):
        rows = checkpoint.rows(matrix.name, start, min(start + step, matrix.rows))
        total += np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
    return total


def _write_copies(writer: PartWriter, checkpoint: Checkpoint, export: Path) -> None:
    """Tensors kept in float32: norms and biases from the checkpoint, rotary tables from the export."""
    rope = _rope_tables(export)
    for name in [name for name, left in writer.left.items() if left]:
        origin = name.removesuffix("/float32")
        if origin in checkpoint:
            writer.put(name, 0, checkpoint.rows(origin))
        elif name in rope:
            writer.put(name, 0, rope[name])


def _rope_tables(export: Path) -> dict[str, np.ndarray]:
    model = onnx.load(export / "model.onnx", load_external_data=False)
    data = (export / ROPE_FILE).read_bytes()
    tables = {}
    for tensor in model.graph.initializer:
        entry = {item.key: item.value for item in tensor.external_data}
        if entry.get("location") == ROPE_FILE:
            start, length = int(entry["offset"]), int(entry["length"])
            tables[tensor.name] = np.frombuffer(data[start : start + length], np.float32)
    return tables
