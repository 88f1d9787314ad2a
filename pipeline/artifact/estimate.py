"""How long writing an artifact will take on this machine: a sample of the work itself, timed."""

from __future__ import annotations

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.artifact.graph import channel_names
from pipeline.artifact.quantizers import Search
from pipeline.artifact.work import Unit, quantize_unit
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.machine import cores
from pipeline.planning.recipes import Plan, PlannedMatrix

_SAMPLE_WEIGHTS = 1 << 20
_SAMPLE_BYTES = 128 << 20

# Weights that a search takes a second on one of two busy cores. The first two: the whole stage at MiMo's and Phi-4's
# shapes (benchmarks/README.md). GPTQ with its coordinate descent, without the statistics: 770 and 1,460 ns a weight on
# matrices of 4,096 and 11,008 columns, on an AMD core with AVX2.
WEIGHTS_PER_CORE_SECOND = {"nearest": 120e6, "weighted": 60e6, "gptq": 1.4e6}


@dataclass(frozen=True)
class Estimate:
    """Seconds of computing on `threads` cores, and seconds of the disk; they overlap."""

    compute: float
    disk: float
    threads: int

    def describe(self) -> str:
        """For people."""
        longer = max(self.compute, self.disk)
        return (
            f"  estimate: about {longer:,.0f} s ({self.compute:,.0f} s of computing on {self.threads} cores beside "
            f"{self.disk:,.0f} s of reading and writing), from samples timed just now"
        )


def estimate(plan: Plan, checkpoint: Checkpoint, folder: Path, search: str, written: int) -> Estimate:
    """Time some rows of a matrix of each format, and the disk of `folder` on 128 MB. Writes nothing that stays."""
    kinds: dict[str, list[PlannedMatrix]] = {}
    for planned in plan.tables:
        kinds.setdefault("+".join(str(piece.format) for piece in planned.pieces), []).append(planned)
    compute = sum(
        _seconds_per_weight(group[0], checkpoint, search, cores())
        * sum(item.matrix.rows * item.matrix.columns for item in group)
        for group in kinds.values()
    )
    weights = max((checkpoint[item.matrix.name] for item in plan.tables), key=lambda ref: ref.length)
    read = _read_rate(checkpoint.folder / weights.file, weights.offset)
    disk = sum(checkpoint[item.matrix.name].length for item in plan.tables) / read + written / _write_rate(folder)
    return Estimate(compute, disk, cores())


def _seconds_per_weight(planned: PlannedMatrix, checkpoint: Checkpoint, search: str, threads: int) -> float:
    """Wall seconds per weight with all cores at work: they share caches and memory, and may share arithmetic units."""
    matrix = planned.matrix
    unit = Unit(planned, 0, min(matrix.rows, max(1, _SAMPLE_WEIGHTS // matrix.columns)))
    moments = {matrix.input: np.ones(matrix.columns, np.float32)}
    order = np.arange(matrix.columns, dtype=np.int32)  # the time does not depend on which
    channels = dict(zip(channel_names(planned), np.split(order, [planned.widths[0]]), strict=True))
    quantizer = Search(None if search == "nearest" else moments).of(planned, channels)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(4):  # the first one compiles; others may have been interrupted
            start = time.perf_counter()
            list(pool.map(lambda _: quantize_unit(unit, checkpoint, quantizer), range(4 * threads)))
            seconds.append(time.perf_counter() - start)
    return min(seconds) / (4 * threads * unit.weights)


def _read_rate(path: Path, offset: int) -> float:
    """Bytes per second; what the page cache holds is as fast as it will be then."""
    buffer, count = bytearray(1 << 23), 0
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while count < _SAMPLE_BYTES and (got := file.readinto(buffer)):
            count += got
    return count / (time.perf_counter() - start)


def _write_rate(folder: Path) -> float:
    block = os.urandom(1 << 23)
    start = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(_SAMPLE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return _SAMPLE_BYTES / (time.perf_counter() - start)
