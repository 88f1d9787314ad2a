"""A whole decoder graph in ONNX Runtime with any of its values as outputs: what slices and streams are held against."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from pipeline.checkpoint.architecture import Architecture, read_architecture
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.graph.decoder import build_decoder, save_decoder
from tests.families import CASES, Case, make_checkpoint


def make_decoder(folder: Path, family: str | Case, dtype: str = "F32") -> tuple[onnx.ModelProto, Architecture]:
    """A family's tiny decoder for 128 tokens; `folder` then holds model.onnx and all that it refers to."""
    make_checkpoint(folder, CASES[family] if isinstance(family, str) else family, dtype=dtype)
    architecture = read_architecture(folder / "config.json")
    model, rope = build_decoder(architecture, Checkpoint(folder), 128)
    save_decoder(folder, model, rope, "model.onnx")
    return model, architecture


def run_whole(folder: Path, model: onnx.ModelProto, values: Iterable[str], ids: np.ndarray) -> dict[str, np.ndarray]:
    """`values` of the graph for int64 [tokens]: float32 [tokens, …]."""
    wanted = list(values)
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    del tapped.graph.output[:]
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    (folder / "whole.onnx").write_bytes(tapped.SerializeToString())
    session = ort.InferenceSession(folder / "whole.onnx", providers=["CPUExecutionProvider"])
    return dict(zip(wanted, (value[0] for value in run(session, {"input_ids": ids[None]})), strict=True))


def run(session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs of a session that takes `feeds` [1, tokens, …], and whatever else it asks for of a first prompt."""
    tokens = next(iter(feeds.values())).shape[1]
    inputs = {}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            inputs[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        else:
            inputs[value.name] = feeds.get(value.name, np.ones((1, tokens), np.int64))
    return session.run(None, inputs)
