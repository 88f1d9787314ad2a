"""The quantized graph: the full-precision graph with its products and its embedding replaced, weights to be written.

Pure rewriting: no weight is read. A `QuantizedGraph` says which tensors the artifact stores, and `place` binds them to
byte ranges once the layout is known, so the finished model's size is known too. How a matrix is multiplied by is its
format's business: here its nodes get their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from pipeline.artifact.layout import Layout
from pipeline.artifact.rotated import HEAD_GAIN
from pipeline.artifact.rotation_nodes import rotate_blocks, rotate_states, rotate_states_back
from pipeline.errors import GraphError
from pipeline.graph.experts import CHOICES
from pipeline.graph.last_token import LAST_TOKEN
from pipeline.graph.nodes import MICROSOFT, GraphWriter, external_tensor, value_info
from pipeline.planning import experts
from pipeline.planning.recipes import Piece, Plan, PlannedMatrix
from pipeline.quantize.formats import Node, Operand, Stored, TensorFormat

# Of GroupQueryAttention, whose inputs are positional (ContribOperators.md of ONNX Runtime 1.31).
_KEY_SCALE = 12
_EXPERTS = re.compile(r"layers\.(\d+)\.experts(\..*)?")
_MIXTURE: dict[str, Any] = {
    "k": CHOICES, "activation_type": "swiglu", "activation_alpha": 1.0, "activation_beta": 0.0, "swiglu_fusion": 1,
    "normalize_routing_weights": 0, "accuracy_level": 4,
}  # fmt: skip
"""Nodes of a full-precision block of experts (`pipeline.graph.experts`), the last of which has no further name."""


class Seat(NamedTuple):
    """Where the rows of a matrix lie in the stored tensors whose names begin with `prefix`: from row `first` on, every
    `step`th."""

    prefix: str
    first: int = 0
    step: int = 1


def seats(planned: PlannedMatrix) -> list[Seat]:
    """Of each piece. Experts of a layer lie one behind the other; of each the rows of gate and up alternate, as QMoE
    reads them."""
    matrix, stem = planned.matrix, planned.matrix.name.removesuffix(".weight")
    if matrix.expert is None:
        return [Seat(f"{stem}.high"), Seat(f"{stem}.low")] if planned.split else [Seat(stem)]
    at = matrix.expert * matrix.rows
    if matrix.role == experts.DOWN:
        return [Seat(_stacked_name(matrix.layer, "fc2"), at)]
    return [Seat(_stacked_name(matrix.layer, "fc1"), 2 * at + (matrix.role == experts.UP), 2)]


def _stacked_name(layer: int, product: str) -> str:
    return f"layers.{layer}.experts.{product}"


def channel_names(planned: PlannedMatrix) -> tuple[str, str]:
    """Names of the channel indices that a split input is gathered with."""
    return f"{planned.matrix.input}.high.channels", f"{planned.matrix.input}.low.channels"


def cache_scales(name: str) -> str:
    """Stored name of the int8 scales of a layer's keys or values, `layers.0.key`."""
    return f"{name}.scales"


class QuantizedGraph(GraphWriter):
    """A graph made by `build_decoder`, rewritten according to a plan; its stored tensors are not placed yet.

    Raises GraphError when the plan and the graph do not belong to the same model.

    Attributes:
        stored: the tensors of the artifact's data by name, in the order of execution.
    """

    def __init__(self, source: onnx.ModelProto, plan: Plan):
        super().__init__()
        self.stored: dict[str, Stored] = {}
        self._source, self._plan = source, plan
        self._planned = {item.matrix.name: item for item in (*plan.body, plan.head)}
        self._references = {tensor.name: tensor for tensor in source.graph.initializer}
        casts = (node for node in source.graph.node if node.op_type == "Cast" and node.input[0] in self._references)
        self._widened = {node.output[0]: node.input[0] for node in casts}
        self._aliases: dict[str, Stored] = {}  # graph initializer → stored tensor, possibly under another shape
        self._check_same_model()
        for node in source.graph.node:
            self._rewrite(node)
        self.inputs = [self._typed(value) for value in source.graph.input]
        self.outputs = [self._typed(value) for value in source.graph.output]

    def place(self, layout: Layout, parts: Sequence[str]) -> onnx.ModelProto:
        """The finished model: every stored tensor bound to its bytes in the files of these names."""
        for name, tensor in self._aliases.items():
            place, kind = layout.places[tensor.name], helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
            at = parts[place.part], place.offset, place.length
            self.initializers[name] = external_tensor(name, kind, tensor.shape, *at)
        return self.model(self._source.graph.name)

    def _check_same_model(self) -> None:
        products = [node.input[1] for node in self._source.graph.node if node.op_type == "FusedMatMul"]
        names = [self._widened.get(name, name) for name in products]
        found = {name: list(self._references[name].dims) for name in names}
        planned = {name: [item.matrix.rows, item.matrix.columns] for name, item in self._planned.items()}
        if found != planned:
            name = next(name for name in (found | planned) if found.get(name) != planned.get(name))
            raise GraphError(
                f"the graph multiplies by {len(found)} matrices, the plan has {len(planned)}; the first difference is "
                f"{name!r}: {found.get(name, 'absent')} in the graph, {planned.get(name, 'absent')} in the plan. Run "
                f"export and quantize for the same model."
            )

    def _rewrite(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Cast" and (node.output[0] in self._widened or node.input[0] == "embedding"):
            return  # the quantized embedding is float32 already, under this node's name
        if block := _EXPERTS.fullmatch(node.name):
            if not block[2]:
                self._mixture(int(block[1]), node.name)
        elif node.op_type == "Gather" and node.input[1] == "input_ids":
            self._embedding(node)
        elif node.op_type == "FusedMatMul":
            self._product(node)
        else:
            if node.op_type == "GroupQueryAttention" and self._plan.cache.type == "int8":
                node = self._attention(node)
            self._keep_inputs(node)
            self.nodes[node.name] = node

    def _keep_inputs(self, node: onnx.NodeProto) -> None:
        """Its initializers, and those that the branches of an If take from the outer graph."""
        for name in node.input:
            tensor = self._references.get(self._widened.get(name, name))
            if tensor is not None and tensor.data_location == TensorProto.EXTERNAL:
                self._declare(Stored(name, "float32", tuple(tensor.dims)))
            elif tensor is not None:
                self.initializers[name] = tensor
        for attribute in node.attribute:
            for inner in attribute.g.node:
                self._keep_inputs(inner)

    def _typed(self, value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
        """An input or output; the cache's in the plan's type, logits of one token."""
        if value.name == "logits":
            return value_info("logits", TensorProto.FLOAT, ["batch", 1, self._plan.head.matrix.rows])
        cached = self._plan.cache.type == "int8" and value.name.startswith(("past_key_values.", "present."))
        return value_info(value.name, TensorProto.INT8, _shape(value)) if cached else value

    def _attention(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """Keys and values are cached as int8; new ones are rounded inside, under a scale per channel."""
        quantized = onnx.NodeProto()
        quantized.CopyFrom(node)
        quantized.input.extend([""] * (_KEY_SCALE - len(node.input)))
        shapes = {value.name: _shape(value) for value in self._source.graph.input}
        for past, kind in zip(node.input[3:5], ("k", "v"), strict=True):
            _, heads, _, channels = shapes[past]
            name = cache_scales(past.replace("past_key_values", "layers"))
            quantized.input.append(self._declare(Stored(name, "float32", (1, int(heads), 1, int(channels)))))
            quantized.attribute.append(helper.make_attribute(f"{kind}_quant_type", "PER_CHANNEL"))
        quantized.attribute.append(helper.make_attribute("kv_cache_bit_width", 8))
        return quantized

    def _embedding(self, node: onnx.NodeProto) -> None:
        planned = self._plan.embedding
        (piece,), ((prefix, *_),) = planned.pieces, seats(planned)
        half = self._references[node.input[0]].data_type != TensorProto.FLOAT
        target = "embedding/float32" if half else "embedding"
        looked_up = f"{target}/table" if self._turns_table else target
        self._compute(piece.format.lookup(), planned, piece, prefix, "input_ids", looked_up)
        if self._turns_table:
            columns = planned.matrix.columns
            rotate_states(self, looked_up, columns, self._plan.rotation.run(columns), target)

    def _product(self, node: onnx.NodeProto) -> None:
        planned = self._planned[self._widened.get(node.input[1], node.input[1])]
        x, output, halves = node.input[0], node.output[0], []
        if planned is self._plan.head:
            x = self._head_input(self._last_token(x))
        for piece, (prefix, *_), channels in zip(planned.pieces, seats(planned), channel_names(planned), strict=False):
            source, result = x, output
            if planned.split:
                indices = self._declare(Stored(channels, "int32", (piece.columns,)))
                source = self.node("Gather", [x, indices], channels.removesuffix(".channels"), axis=2)
            if planned.rotated:
                source = rotate_blocks(self, source, piece.columns, planned.rotated, f"{source}/rotated")
            if planned.split:
                result = f"{output}.{prefix.rsplit('.', 1)[1]}"
            nodes = piece.format.product(planned.matrix.rows, piece.columns)
            halves.append(self._compute(nodes, planned, piece, prefix, source, result))
        if planned.split:
            self.node("Add", halves, output)

    def _mixture(self, layer: int, output: str) -> None:
        """A layer's experts as one QMoE. It takes the router's weights twice: the chosen ones alone are not 0, so their
        largest are the experts that the router chose, also where two logits are equal."""
        own = [item for item in self._plan.body if item.matrix.layer == layer and item.matrix.expert is not None]
        gate, _, down = own[:3]
        (piece,), count, weights = gate.pieces, len(own) // 3, f"layers.{layer}.router.weights"
        x = f"model.layers.{layer}.post_attention_layernorm"
        if gate.rotated:
            x = rotate_blocks(self, x, gate.matrix.columns, gate.rotated, f"{output}/rotated")
        sides = {"fc1": (2 * gate.matrix.rows, gate.matrix.columns), "fc2": (down.matrix.rows, down.matrix.columns)}
        first, second = (
            self._stacked(_stacked_name(layer, name), piece.format, count, *sizes) for name, sizes in sides.items()
        )
        zeros = [first.get(".zeros", ""), second.get(".zeros", "")]
        stored = [first[".codes"], first[".scales"], "", second[".codes"], second[".scales"], "", "", "", "", *zeros]
        sizes = {"expert_weight_bits": piece.format.bits, "block_size": piece.format.block}
        self.node("QMoE", [x, weights, *stored, "", weights], output, MICROSOFT, **(_MIXTURE | sizes))

    def _stacked(self, prefix: str, fmt: TensorFormat, count: int, rows: int, columns: int) -> dict[str, str]:
        """What a product of `count` experts reads, by the endings of the stored tensors, [experts, rows, values]."""
        tensors = {item.name: item._replace(shape=(count, *item.shape)) for item in fmt.tensors(rows, columns)}
        (node,) = fmt.product(rows, columns)
        return {item.tensor: self._operand(prefix, tensors, item._replace(shape=None)) for item in node.inputs if item}

    def _last_token(self, x: str) -> str:
        """A phone samples from the last token's logits: the others would be most of the memory of reading a prompt."""
        return self.node("Gather", [x, self.constant("last", np.array([-1], np.int64))], LAST_TOKEN, axis=1)

    @property
    def _turns_table(self) -> bool:
        """One table serves two inputs, of which the head's has a gain: rotated states are turned to and from it."""
        return self._plan.tied and bool(self._plan.rotation.residual)

    def _head_input(self, x: str) -> str:
        if not self._turns_table:
            return x
        channels = self._plan.head.matrix.columns
        back = rotate_states_back(self, x, channels, self._plan.rotation.run(channels), "head/back")
        return self.node("Mul", [back, self._declare(Stored(HEAD_GAIN, "float32", (channels,)))], "head/input")

    def _compute(
        self, nodes: Sequence[Node], planned: PlannedMatrix, piece: Piece, prefix: str, x: str, output: str
    ) -> str:
        """The sum of a format's nodes over `x`, under the name `output`."""
        tensors = {tensor.name: tensor for tensor in piece.format.tensors(planned.matrix.rows, piece.columns)}
        results = [output] if len(nodes) == 1 else [f"{output}{node.ending}" for node in nodes]
        for node, result in zip(nodes, results, strict=True):
            inputs = [x if item is None else self._operand(prefix, tensors, item) for item in node.inputs]
            self.node(node.op, inputs, result, MICROSOFT, **node.attributes)
        return output if len(nodes) == 1 else self.node("Add", results, output)

    def _operand(self, prefix: str, tensors: Mapping[str, Stored], item: Operand) -> str:
        """Scales are float16 or shares on disk and float32 for the kernel, whose scales have the activations' type."""
        stored = tensors[item.tensor]._replace(name=prefix + item.tensor)
        if item.shape:
            return self._declare(stored, item.shape, f"{stored.name}/blocks")
        name = self._declare(stored)
        if stored.dtype == "float16" or item.rows:
            name = self.node("Cast", [name], f"{name}/float32", to=TensorProto.FLOAT)
        if item.rows:
            largest = self._operand(prefix, tensors, Operand(item.rows))
            name = self.node("Mul", [name, largest], f"{stored.name}/rows")
        if item.unit == 1:
            return name
        unit = self.constant(f"unit.{item.unit}", np.array(item.unit, np.float32))
        return self.node("Mul", [name, unit], f"{name}/{item.unit}")

    def _declare(self, stored: Stored, shape: tuple[int, ...] | None = None, name: str | None = None) -> str:
        """Store a tensor once; make it an initializer, under another name and shape if asked."""
        self.stored.setdefault(stored.name, stored)
        alias = name or stored.name
        self._aliases[alias] = stored._replace(shape=shape or stored.shape)
        return alias


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
