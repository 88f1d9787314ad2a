"""Activation statistics: the decoder graph with one small output per product input."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipeline.checkpoint.architecture import Architecture

SUFFIX = ".squares"


def with_moments(model: onnx.ModelProto, architecture: Architecture) -> onnx.ModelProto:
    """A copy of a decoder graph whose outputs are Σ x² over batch and positions of each product's input, [channels].

    Outputs are named by the matrices' inputs plus `SUFFIX`. Logits and caches are not computed: the head's product is
    by far the largest and nothing reads it here.
    """
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    graph = tapped.graph
    inputs = {matrix.name: matrix.input for matrix in architecture.matrices}
    cast_of = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    sources: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "FusedMatMul":
            sources.setdefault(inputs[cast_of.get(node.input[1], node.input[1])], node.input[0])
    head = next(node for node in graph.node if node.output[0] == "logits")
    graph.node.remove(head)
    del graph.output[:]
    graph.initializer.append(numpy_helper.from_array(np.array([0, 1], np.int64), "batch_and_positions"))
    for name, value in sources.items():
        output = name + SUFFIX
        graph.node.append(helper.make_node("ReduceSumSquare", [value, "batch_and_positions"], [output], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, ["channels"]))
    return tapped
