"""calibrate: second moments of every product's input over the calibration text."""

from __future__ import annotations

import numpy as np
import onnx
from safetensors.numpy import load_file, save

from pipeline import config
from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.store import Store
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.errors import EvaluationError
from pipeline.evaluate.runtime import fits_widened, open_session
from pipeline.files import write_bytes
from pipeline.graph.taps import SUFFIX, with_moments
from pipeline.progress import track
from pipeline.stages.texts import input_ids, text_overlap
from pipeline.stages.workspace import MODEL_FILE, Workspace


def run(model: str) -> None:
    """Write artifacts/<model>/calibration/moments.safetensors: E[x²] by input, float32 [channels].

    Raises EvaluationError when the calibration text shares 13-grams with the evaluation text.
    """
    calibration, suite = config.load_calibration(), config.load_suite(config.load_pipeline().suite)
    store, workspace = Store(), Workspace(model)
    folder = workspace.reference(store)
    windows = input_ids(calibration, folder, store)
    if shared := text_overlap(calibration.texts, suite.divergence.texts, store):
        raise EvaluationError(
            f"calibration text {sorted(calibration.texts)} shares {shared} 13-grams with the evaluation text "
            f"{sorted(suite.divergence.texts)}: results would flatter. Choose other text in configs/calibration.yaml."
        )
    moments = _moments(folder, windows, model)
    write_bytes(workspace.moments, save(moments, metadata={"tokens": str(sum(map(len, windows)))}))
    print(f"{model}: second moments of {len(moments)} inputs over {sum(map(len, windows)):,} tokens")


def _moments(folder, windows: list[np.ndarray], model: str) -> dict[str, np.ndarray]:
    architecture, checkpoint = read_architecture(folder / "config.json"), Checkpoint(folder)
    tapped = folder / "calibration.onnx"
    graph = with_moments(onnx.load(folder / MODEL_FILE, load_external_data=False), architecture)
    tapped.write_bytes(graph.SerializeToString())
    try:
        session = open_session(tapped, fits_widened(checkpoint.weight_bytes, architecture.parameters))
    finally:
        tapped.unlink()
    names = [value.name for value in session.get_outputs()]
    empty = np.zeros((1, architecture.kv_heads, 0, architecture.head_dim), np.float32)
    past = {value.name: empty for value in session.get_inputs() if value.name.startswith("past_key_values.")}
    sums: dict[str, np.ndarray] = {}
    for ids in track(windows, f"calibrate {model}", len(windows)):
        feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64), **past}
        for name, squares in zip(names, session.run(names, feeds), strict=True):
            sums[name] = sums.get(name, 0) + squares.astype(np.float64)
    tokens = sum(map(len, windows))
    moments = {name.removesuffix(SUFFIX): (total / tokens).astype(np.float32) for name, total in sums.items()}
    if bad := [name for name, values in moments.items() if not np.isfinite(values).all()]:
        raise EvaluationError(
            f"{model}: activations at {bad[0]} overflow on the calibration text; the weights are damaged."
        )
    return moments


def read_moments(workspace: Workspace) -> dict[str, np.ndarray]:
    """What `run` wrote: input name → float32 [channels]."""
    return load_file(workspace.require(workspace.moments, "calibrate"))
