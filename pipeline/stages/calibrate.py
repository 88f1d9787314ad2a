"""calibrate: second moments of every product's input over the calibration text, layer by layer.

A killed run goes on at the layer where it was: hidden states and moments so far lie in artifacts/<model>/partial.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from safetensors.numpy import load_file, save

import pipeline
from pipeline import config
from pipeline.artifact.partial import Partial, open_partial
from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.store import Store
from pipeline.errors import EvaluationError
from pipeline.evaluate.stream import LayerStream
from pipeline.files import sha256_of, write_bytes
from pipeline.graph.slices import DecoderSlices
from pipeline.progress import Progress
from pipeline.stages import needs
from pipeline.stages.preflight import require
from pipeline.stages.texts import input_ids, text_overlap
from pipeline.stages.workspace import MODEL_FILE, Workspace

Moments = dict[str, np.ndarray]


def run(model: str) -> None:
    """Write artifacts/<model>/calibration/moments.safetensors: E[x²] by input, float32 [channels].

    Raises EvaluationError when the calibration text shares 13-grams with the evaluation text.
    """
    calibration, suite = config.load_calibration(), config.load_suite(config.load_pipeline().suite)
    store, workspace = Store(), Workspace(model)
    folder = workspace.reference(store)
    architecture = read_architecture(folder / "config.json")
    require(model, needs.calibrate(architecture, calibration))
    windows = input_ids(calibration, folder, store)
    if shared := text_overlap(calibration.texts, suite.divergence.texts, store):
        raise EvaluationError(
            f"calibration text {sorted(calibration.texts)} shares {shared} 13-grams with the evaluation text "
            f"{sorted(suite.divergence.texts)}: results would flatter. Choose other text in configs/calibration.yaml."
        )
    slices = DecoderSlices(onnx.load(folder / MODEL_FILE, load_external_data=False), architecture)
    tokens = sum(map(len, windows))
    with open_partial(workspace.partial("calibration"), _key(workspace, windows)) as partial:
        moments = _moments(slices, folder, windows, partial, model)
        for leftover in partial.folder.iterdir():
            leftover.unlink()
        write_bytes(partial.folder / workspace.moments.name, save(moments, metadata={"tokens": str(tokens)}))
        partial.finish(workspace.moments.parent)
    print(f"{model}: second moments of {len(moments)} inputs over {tokens:,} tokens")


def _key(workspace: Workspace, windows: list[np.ndarray]) -> str:
    """What decides the moments: SHA-256, 64 hex digits. The export stands for the weights, as in quantize."""
    package = Path(pipeline.__file__).parent
    code = ("evaluate/runtime.py", "evaluate/stream.py", "graph/slices.py", "graph/taps.py", "stages/calibrate.py")
    inputs = {
        "export": [sha256_of(file) for file in sorted(workspace.export.iterdir())],
        "windows": [hashlib.sha256(ids.tobytes()).hexdigest() for ids in windows],
        "code": [sha256_of(package / name) for name in code],
        "libraries": [(module.__name__, module.__version__) for module in (np, onnx, onnxruntime)],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _moments(slices: DecoderSlices, folder: Path, windows: list[np.ndarray], partial: Partial, model: str) -> Moments:
    """Of all layers and the head, those that an earlier run finished included."""
    layers = slices.architecture.layers
    done, moments = _resume(partial, layers)
    with Progress(f"calibrate {model}", layers + 1, "layers") as progress:
        stream = LayerStream(slices, folder, windows, partial.folder, done)
        progress.advance(stream.layer, kept=True)
        while stream.layer <= layers:
            measured = stream.advance()
            if bad := [name for name, values in measured.items() if not np.isfinite(values).all()]:
                raise EvaluationError(
                    f"{model}: activations at {bad[0]} overflow on the calibration text; the weights are damaged."
                )
            moments |= measured
            if stream.layer <= layers:
                _record(partial, stream, moments)
            progress.advance()
    return moments


def _moments_file(layer: int) -> str:
    return f"moments.{layer}.safetensors"


def _record(partial: Partial, stream: LayerStream, moments: Moments) -> None:
    """Note that everything before the stream's layer is finished. Not flushed: digests tell what a power cut lost."""
    data = save(moments)
    (partial.folder / _moments_file(stream.layer)).write_bytes(data)
    partial.record(_moments_file(stream.layer), hashlib.sha256(data).hexdigest())
    partial.record(stream.states_file(stream.layer), stream.digest)
    (partial.folder / _moments_file(stream.layer - 1)).unlink(missing_ok=True)


def _resume(partial: Partial, layers: int) -> tuple[int | None, Moments]:
    """The layer to go on at, None for the start, and the moments before it: the last that is whole on the disk."""
    for layer in range(layers, 0, -1):
        names = LayerStream.states_file(layer), _moments_file(layer)
        files = {name: partial.folder / name for name in names}
        if all(file.is_file() and sha256_of(file) == partial.digests.get(name) for name, file in files.items()):
            return layer, load_file(files[_moments_file(layer)])
    return None, {}


def read_moments(workspace: Workspace) -> dict[str, np.ndarray]:
    """What `run` wrote: input name → float32 [channels]."""
    return load_file(workspace.require(workspace.moments, "calibrate"))
