"""GPTQ on a real 3-bit grid, which no kernel runs: simulated, to see what q3's mixture of 4 and 2 bits gives up.

The body's weights are quantized with GPTQ's error compensation, the first half of `search: gptq`, and written back as
float32, the table of embedding and head in 6 bits as in q3, and the result is measured like every file. It computes
with float activations, where files use int8 ones. Its bits are counted as a file would store them: codes, float16
scales, 3-bit zero points.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits

import pipeline
from benchmarks.quality.measure import OnnxFile
from benchmarks.quality.peer import Peer
from benchmarks.quality.subjects import Prepared
from pipeline.calibrate.results import read_products
from pipeline.checkpoint.architecture import Architecture, Matrix
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.files import read_json, write_json
from pipeline.machine import cores
from pipeline.quantize.factor import Factor, factor
from pipeline.quantize.formats import FourBits, TensorFormat
from pipeline.quantize.gptq import TILE, compensated
from pipeline.quantize.search import weighted
from pipeline.workspace import Workspace

BITS = 3
BLOCKS = (64, 32)
_TABLE = TensorFormat.parse("w6b64a")
_SIZE = "size.json"
_CODE = (*(f"quantize/{name}.py" for name in ("gptq", "factor", "search", "formats")), "calibrate/correlations.py")


class _HalfByte(FourBits):
    """A format whose codes do not fill bytes, kept two in a byte while it is searched."""

    bits = BITS
    ranges = np.linspace(1.0, 0.5, 4)


def bits_per_weight(block: int) -> float:
    """Codes, a float16 scale and a 3-bit zero point per block."""
    return BITS + (16 + BITS) / block


def peers() -> list[Peer]:
    """One model for each block size."""
    code = (Path(__file__), *(Path(pipeline.__file__).parent / name for name in _CODE))
    return [
        Peer("simulated", f"GPTQ, 3-bit grid, block {block}", {"block": block}, make, FloatModel(), code, (), True)
        for block in BLOCKS
    ]


class FloatModel(OnnxFile):
    """The reference's graph over weights that were quantized and dequantized again."""

    def size(self, folder: Path) -> dict[str, Any]:
        """What a file with a 3-bit kernel would take, and the bits of the body."""
        return read_json(folder / _SIZE)

    def speed(self, folder: Path) -> dict[str, Any]:
        """No kernel runs it."""
        return {}


def make(prepared: Prepared, options: Mapping[str, Any], folder: Path) -> None:
    """Write the graph and its weights, and what they would take, into `folder`."""
    for file in prepared.reference.iterdir():
        if file.suffix in {".onnx", ".data", ".safetensors"}:
            shutil.copyfile(file, folder / file.name)
    checkpoint, architecture, block = Checkpoint(prepared.reference), prepared.architecture, options["block"]
    head, moments = architecture.head, load_file(prepared.moments)
    table = weighted(checkpoint.rows(head.name), moments[head.input], _TABLE)
    _replace(folder, checkpoint, head.name, table.dequantize())
    with threadpool_limits(1, "blas"):
        for name, sharing in groupby(_body(architecture), key=lambda matrix: matrix.input):
            with chdir(prepared.project.folder):
                found = factor(*read_products(Workspace(prepared.subject.model), name, moments[name]))
            for matrix in sharing:
                _replace(folder, checkpoint, matrix.name, compensated_3_bit(checkpoint.rows(matrix.name), found, block))
    body = sum(matrix.rows * matrix.columns for matrix in _body(architecture))
    norms = 4 * (architecture.parameters - body - head.rows * head.columns)
    bits = bits_per_weight(block)
    stored = sum(array.nbytes for array in table.stored()) + norms + int(body * bits / 8)
    write_json(folder / _SIZE, {"bytes": stored, "body_bits": bits})


def _body(architecture: Architecture) -> Iterator[Matrix]:
    return (matrix for layer in range(architecture.layers) for matrix in architecture.body(layer))


def compensated_3_bit(weights: np.ndarray, found: Factor, block: int) -> np.ndarray:
    """Weights, float32 [rows, columns], on 3-bit grids with a scale and a zero point per block, errors compensated."""
    fmt = _HalfByte(block, False)

    def one(start: int) -> np.ndarray:
        (piece,) = compensated(weights[start : start + TILE], found, [(fmt, weights.shape[1])])
        return piece.dequantize()

    with ThreadPoolExecutor(cores()) as pool:
        return np.concatenate(list(pool.map(one, range(0, len(weights), TILE))))


def _replace(folder: Path, checkpoint: Checkpoint, name: str, values: np.ndarray) -> None:
    """Overwrite a float32 tensor in a copy of the checkpoint's file."""
    ref = checkpoint[name]
    stored = np.memmap(folder / ref.file, np.float32, "r+", ref.offset, ref.shape)
    stored[:] = values
    stored.flush()
