"""A small writer of ONNX graphs: nodes by operator name, initializers as references to bytes in files.

Initializers hold no bytes of their own: they name a file beside the model, an offset and a length, so a graph of a
14 B model is kilobytes. External data format: https://onnx.ai/onnx/repo-docs/ExternalData.html
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

value_info = helper.make_tensor_value_info
"""Type and shape of a graph input or output; strings are symbolic dimensions."""
OPSET = 21
MICROSOFT = "com.microsoft"
STORED = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}
"""The ONNX data type of a safetensors dtype."""


def external_tensor(
    name: str, data_type: int, shape: tuple[int, ...], file: str, offset: int, length: int
) -> onnx.TensorProto:
    """An initializer whose `length` bytes lie at `offset` of `file` beside the model."""
    tensor = TensorProto(name=name, data_type=data_type, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


class GraphWriter:
    """Collects nodes and initializers in order of execution and makes a model of them."""

    def __init__(self) -> None:
        self.nodes: dict[str, onnx.NodeProto] = {}
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def node(
        self, op: str, inputs: list[str], output: str, domain: str = "", more: Sequence[str] = (), **attrs: Any
    ) -> str:
        """Append a node unless it is there; `output` is its name and first output, `more` its further outputs."""
        made = helper.make_node(op, inputs, [output, *more], name=output, domain=domain, **attrs)
        self.nodes.setdefault(output, made)
        return output

    def constant(self, name: str, value: np.ndarray) -> str:
        """A small initializer kept inside the model (indices, scalars)."""
        if name not in self.initializers:
            self.initializers[name] = onnx.numpy_helper.from_array(value, name)
        return name

    def model(self, name: str) -> onnx.ModelProto:
        """The finished model."""
        nodes, stored = list(self.nodes.values()), list(self.initializers.values())
        graph = helper.make_graph(nodes, name, self.inputs, self.outputs, stored)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, producer_name="pipeline", ir_version=10)
