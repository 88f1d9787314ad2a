"""Where the products of a decoder graph read: the activations that calibration measures."""

from __future__ import annotations

import onnx

from pipeline.checkpoint.architecture import Architecture


def product_inputs(model: onnx.ModelProto, architecture: Architecture) -> dict[str, str]:
    """Input of the matrices (`layers.0.attention`, …, `head`) → the value of a full-precision graph that holds it.

    In the order of execution. Matrices that share an input share the value.
    """
    inputs = {matrix.name: matrix.input for matrix in architecture.matrices}
    cast_of = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    values: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "FusedMatMul":
            values.setdefault(inputs[cast_of.get(node.input[1], node.input[1])], node.input[0])
    return values
