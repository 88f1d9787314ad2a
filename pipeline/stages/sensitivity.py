"""sensitivity: what each matrix costs in each format, and what its damage does to the model. Budgets are solved by it.

Two measurements. Errors: every format's calibrated error per input channel, on some rows of each matrix, seconds a
gigabyte. Damage: the divergence that each matrix alone causes in one format (`pipeline.calibrate.damage`); this one
takes as long as a calibration and goes on where a killed run was.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import groupby

import numpy as np
import onnx
from safetensors.numpy import save

from pipeline import keys, machine
from pipeline.calibrate.damage import damaged_together, sensitivities
from pipeline.calibrate.results import ERRORS, ORDER, TOKENS, read_moments
from pipeline.calibrate.texts import input_ids
from pipeline.checkpoint.architecture import Architecture, Matrix, read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.calibration import SensitivityConfig, load_sensitivity
from pipeline.engine import narrow
from pipeline.files import read_json, sha256_of, write_bytes, write_json
from pipeline.graph.slices import DecoderSlices
from pipeline.partial import open_partial
from pipeline.planning import experts
from pipeline.quantize.formats import TensorFormat
from pipeline.quantize.search import weighted
from pipeline.quantize.split import channel_importance, squared_norms
from pipeline.runtime.device import chosen_device, computed_by
from pipeline.workspace import MODEL_FILE, Workspace

_DAMAGED_ROWS = 256


def run(model: str) -> None:
    """Write artifacts/<model>/sensitivity: errors of every matrix and format, and nats of every matrix.

    What the same inputs and code gave before is kept.
    """
    wanted, store, workspace = load_sensitivity(), Store(), Workspace(model)
    folder = workspace.reference(store)
    windows = input_ids(wanted, folder, store)
    ids = np.stack([window for window in windows if len(window) == wanted.window])
    key = _key(workspace, wanted, ids)
    if _measured_by(workspace, key):
        print(f"{model}: damage of matrices measured before from the same inputs and code; kept")
        return
    architecture = read_architecture(folder / "config.json")
    moments = read_moments(workspace)
    checkpoint = Checkpoint(workspace.weights(store))
    slices = DecoderSlices(onnx.load(folder / MODEL_FILE, load_external_data=False), architecture)
    with open_partial(workspace.partial("sensitivity"), key) as growing:
        damage = partial(_damaged, moments, wanted.damage)
        nats = sensitivities(slices, folder, checkpoint, ids, damage, growing, model)
        errors = measure_errors(architecture, checkpoint, moments, wanted)
        for leftover in growing.folder.iterdir():
            leftover.unlink()
        write_bytes(growing.folder / ERRORS, save(errors))
        formats = {matrix.name: str(_format(wanted.damage, matrix)) for matrix in _matrices(architecture)}
        shares = _shared(nats, architecture, {name: errors[f"{name}/{fmt}"] for name, fmt in formats.items()})
        rows = {name: {"nats": value, "format": formats[name]} for name, value in shares.items()}
        found = {"key": key, "device": computed_by(), "tokens": ids.size, "tensors": rows}
        write_json(growing.folder / workspace.nats.name, found)
        growing.finish(workspace.sensitivity)
    print(f"{model}: damage of {len(nats)} matrices in {wanted.damage} over {ids.size:,} tokens; most sensitive:")
    for name in sorted(nats, key=nats.__getitem__, reverse=True)[:3]:
        print(f"  {name:<44} {nats[name]:.5f} nats")


def _shared(nats: dict[str, float], architecture: Architecture, errors: dict[str, np.ndarray]) -> dict[str, float]:
    """Nats of every matrix: what experts of a layer caused together, by the errors that they have in it."""
    found: dict[str, float] = {}
    for name, matrices in damaged_together(_matrices(architecture)).items():
        parts = [float(errors[matrix.name].sum(dtype=np.float64)) for matrix in matrices]
        shares = [part / sum(parts) if sum(parts) else 1 / len(parts) for part in parts]
        found |= {matrix.name: nats[name] * share for matrix, share in zip(matrices, shares, strict=True)}
    return found


def _measured_by(workspace: Workspace, key: str) -> bool:
    try:
        return read_json(workspace.nats)["key"] == key and (workspace.sensitivity / ERRORS).is_file()
    except (OSError, ValueError, KeyError):
        return False


def measure_errors(
    architecture: Architecture, checkpoint: Checkpoint, moments: dict[str, np.ndarray], wanted: SensitivityConfig
) -> dict[str, np.ndarray]:
    """`<matrix>/<format>` → E[x²]·Σ(w − ŵ)² of each channel over the sampled rows, float32 [columns]; `<input>/order` →
    its channels by importance, int32."""
    found, norms = dict[str, np.ndarray](), list[tuple[Matrix, np.ndarray]]()

    def add(matrix: Matrix, measured: tuple[dict[str, np.ndarray], np.ndarray]) -> None:
        found.update(measured[0])
        norms.append((matrix, measured[1]))

    narrow().run(partial(_errors, checkpoint, moments, wanted), _matrices(architecture), add)
    for name, sharing in groupby(norms, key=lambda item: item[0].input):
        if name in moments:
            importance = channel_importance(moments[name], (item[1] for item in sharing))
            found[f"{name}/{ORDER}"] = np.argsort(-importance, kind="stable").astype(np.int32)
    return found


def _errors(
    checkpoint: Checkpoint, moments: dict[str, np.ndarray], wanted: SensitivityConfig, matrix: Matrix
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A matrix's errors, and the squared norms of its columns."""
    weights, found = _sample(checkpoint, matrix, wanted.rows), dict[str, np.ndarray]()
    importance = _importance(matrix, moments)
    for name in (*wanted.formats, wanted.damage):
        fmt = _format(name, matrix)
        if (place := f"{matrix.name}/{fmt}") not in found:
            gap = weights - weighted(weights, importance, fmt).dequantize()
            cost = importance * np.einsum("rc,rc->c", gap, gap)
            found[place] = (cost * _share(matrix, moments)).astype(np.float32)
    return found, squared_norms(weights) * (matrix.rows / len(weights))


def _sample(checkpoint: Checkpoint, matrix: Matrix, rows: int) -> np.ndarray:
    """At most `rows` rows, in 8 runs spread evenly over the matrix."""
    if matrix.rows <= rows:
        return checkpoint.rows(matrix.name)
    run = max(1, rows // 8)
    starts = np.linspace(0, matrix.rows - run, 8).astype(int)
    return np.concatenate([checkpoint.rows(matrix.name, start, start + run) for start in starts])


def _matrices(architecture: Architecture) -> list[Matrix]:
    return [*architecture.tables[:-1], *architecture.matrices]  # the embedding, unless it is the head's table


def _importance(matrix: Matrix, moments: dict[str, np.ndarray]) -> np.ndarray:
    return np.ones(matrix.columns, np.float32) if matrix.role == "embedding" else moments[matrix.input]


def _share(matrix: Matrix, moments: dict[str, np.ndarray]) -> np.float32:
    """Of all tokens, those that multiply the matrix: of an expert, those that it is woken by."""
    seen = moments.get(f"{matrix.choice}{TOKENS}") if matrix.expert is not None else None
    return np.float32(1) if seen is None else np.float32(seen[matrix.expert] / seen.sum())


def _format(name: str, matrix: Matrix) -> TensorFormat:
    fmt = TensorFormat.parse(name)
    return fmt.fitted(matrix.columns) if matrix.expert is None else experts.fitted(fmt, matrix)


def _damaged(moments: dict[str, np.ndarray], name: str, matrix: Matrix, rows: np.ndarray) -> np.ndarray:
    """Rows as they are after quantization to format `name`."""
    found, importance, fmt = np.empty_like(rows), _importance(matrix, moments), _format(name, matrix)

    def some(start: int) -> None:  # few at a time: unpacking takes three times their bytes
        part = slice(start, start + _DAMAGED_ROWS)
        found[part] = weighted(rows[part], importance, fmt).dequantize()

    list(_pool().map(some, range(0, len(rows), _DAMAGED_ROWS)))
    return found


@cache
def _pool() -> ThreadPoolExecutor:
    """Of all matrices that are damaged side by side: together they use no more than the cores."""
    return ThreadPoolExecutor(machine.cores())


def _key(workspace: Workspace, wanted: SensitivityConfig, ids: np.ndarray) -> str:
    """What decides the measurement, 64 hex digits."""
    inputs = {
        "config": wanted.model_dump(mode="json"),
        "export": [sha256_of(file) for file in sorted(workspace.export.iterdir())],
        "moments": sha256_of(workspace.moments),
        "ids": hashlib.sha256(ids.tobytes()).hexdigest(),
    }
    return keys.digest([keys.code(__name__), machine.kernel_class(), chosen_device().name, inputs])
