"""The nodes of a rotation compute it, and back, in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto

from pipeline.artifact.rotation_nodes import rotate_blocks, rotate_states, rotate_states_back
from pipeline.graph.nodes import GraphWriter, value_info
from pipeline.quantize.rotation import factors, rotate

STATES = [(576, 576), (576, 64), (96, 96), (40, 8), (256, 256), (128, 1)]


def made(x: np.ndarray, graph: GraphWriter, output: str) -> np.ndarray:
    """`output` for "x", float32 [batch, sequence, channels]."""
    shape = ["batch", "sequence", x.shape[-1]]
    graph.inputs = [value_info("x", TensorProto.FLOAT, shape)]
    graph.outputs = [value_info(output, TensorProto.FLOAT, shape)]
    session = ort.InferenceSession(graph.model("nodes").SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run([output], {"x": x})[0]


def random(channels: int) -> np.ndarray:
    return np.random.default_rng(channels).standard_normal((2, 3, channels)).astype(np.float32)


@pytest.mark.parametrize(("channels", "run"), STATES)
def test_states_there_and_back(channels: int, run: int) -> None:
    x, there, back = random(channels), GraphWriter(), GraphWriter()
    turned = made(x, there, rotate_states(there, "x", channels, run, "y"))
    np.testing.assert_allclose(turned, rotate(x.reshape(6, -1).copy(), run).reshape(x.shape), atol=1e-5)
    unsigned = made(turned, back, rotate_states_back(back, "x", channels, run, "y"))
    np.testing.assert_allclose(unsigned * np.tile(factors(run).signs, channels // run), x, atol=1e-5)


@pytest.mark.parametrize("block", [32, 128])
def test_blocks(block: int) -> None:
    x, graph = random(384), GraphWriter()
    found = made(x, graph, rotate_blocks(graph, "x", 384, block, "y"))
    np.testing.assert_allclose(found, rotate(x.reshape(6, -1).copy(), block).reshape(x.shape), atol=1e-5)


def test_layers_share_constants() -> None:
    graph = GraphWriter()
    for layer in range(3):
        rotate_blocks(graph, "x", 384, 128, f"{layer}")
    assert [tensor.dims for tensor in graph.initializers.values()] == [[128, 128], [4], [3]]
