"""Which kernel runs a product: one small MatMulNBits per format, whose error tells int8 activations from float ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipeline.quantize.formats import FORMATS, TensorFormat

INT8 = (1e-3, 2e-2)
"""Relative error of a product whose activations were rounded to int8; less means that a float kernel ran."""
COLUMNS, OUTPUTS = 1024, 512
_ROWS = (1, 16)  # decoding and reading a prompt have kernels of their own


@dataclass(frozen=True)
class Product:
    """How a product is written: with activations and scales in float16 (`half`) or, as artifacts are, in float32 with
    scales cast from float16; `level` is its accuracy_level."""

    half: bool = False
    level: int = 4
    columns: int = COLUMNS
    outputs: int = OUTPUTS


@dataclass(frozen=True)
class Probe:
    """A graph from x [1, rows, columns] to y = x·Wᵀ, and the product in float64 [rows, outputs]."""

    name: str
    path: Path
    x: np.ndarray
    exact: np.ndarray


def products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The quantized products of a graph."""
    return [node for node in model.graph.node if node.op_type == "MatMulNBits"]


def formats(model: onnx.ModelProto) -> list[TensorFormat]:
    """The format of every quantized product, each once."""
    found = {}
    for node in products(model):
        values = {item.name: item.i for item in node.attribute}
        fmt = FORMATS[values["bits"]](values["block_size"], symmetric=len(node.input) < 4)
        found[str(fmt)] = fmt
    return [found[name] for name in sorted(found)]


def make_probes(wanted: Sequence[TensorFormat], folder: Path) -> list[Probe]:
    """Write a probe for each format with one row and with many."""
    return [make_probe(fmt, rows, folder) for fmt in wanted for rows in _ROWS]


def make_probe(fmt: TensorFormat, rows: int, folder: Path, product: Product = Product()) -> Probe:
    """Normal activations times random codes."""
    rng = np.random.default_rng(rows)
    outputs, columns = shape = product.outputs, product.columns
    blocks = columns // fmt.block
    codes = rng.integers(0, fmt.top + 1, shape, np.uint8)
    zeros = np.full((outputs, blocks), fmt.middle, np.uint8)
    if not fmt.symmetric:
        zeros = rng.integers(0, fmt.top + 1, (outputs, blocks), np.uint8)
    scales = rng.uniform(0.5, 1.5, (outputs, blocks)).astype(np.float16)
    x = rng.standard_normal((1, rows, columns)).astype(np.float16 if product.half else np.float32)
    centred = codes.reshape(outputs, blocks, fmt.block).astype(np.float64) - zeros[..., None]
    weights = (centred * scales[..., None]).reshape(shape)
    inputs = {"codes": fmt.pack(codes).reshape(outputs, blocks, -1), "scales": scales}
    if not fmt.symmetric:
        inputs["zeros"] = fmt.pack(zeros)
    path = folder / f"probe-{fmt}-{rows}-{columns}.onnx"
    onnx.save(_graph(fmt, rows, inputs, product), path)
    return Probe(f"{fmt}, {rows} row{'s' * (rows > 1)}", path, x, x[0].astype(np.float64) @ weights.T)


def _graph(fmt: TensorFormat, rows: int, inputs: Mapping[str, np.ndarray], product: Product) -> onnx.ModelProto:
    scales = "scales" if product.half else "widened"
    node = helper.make_node(
        "MatMulNBits", ["x", *(scales if name == "scales" else name for name in inputs)], ["y"], domain="com.microsoft",
        K=product.columns, N=product.outputs, bits=fmt.bits, block_size=fmt.block, accuracy_level=product.level,
    )  # fmt: skip
    widen = helper.make_node("Cast", ["scales"], ["widened"], to=TensorProto.FLOAT)
    nodes = [node] if product.half else [widen, node]
    kind = TensorProto.FLOAT16 if product.half else TensorProto.FLOAT
    sides = [
        helper.make_tensor_value_info(name, kind, (1, rows, width))
        for name, width in (("x", product.columns), ("y", product.outputs))
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in inputs.items()]
    graph = helper.make_graph(nodes, "probe", sides[:1], sides[1:], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def errors(found: Mapping[str, np.ndarray], probes: Sequence[Probe]) -> dict[str, float]:
    """Relative error of each probe's product, ‖y − exact‖ / ‖exact‖, by its name; `found` is keyed by path."""
    return {
        probe.name: float(np.linalg.norm(found[str(probe.path)][0] - probe.exact) / np.linalg.norm(probe.exact))
        for probe in probes
    }


def not_int8(found: Mapping[str, float]) -> list[str]:
    """Names of the probes that ran with float activations, or computed something else altogether."""
    return [name for name, error in found.items() if not INT8[0] < error < INT8[1]]
