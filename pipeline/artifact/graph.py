"""The quantized graph: the full-precision graph with its products and its embedding replaced, weights to be written.

Pure rewriting: no weight is read. `quantize_graph` says which tensors the artifact stores (`Stored`), and
`QuantizedGraph.place` binds them to byte ranges once the layout is known, so the finished model's size is known too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from pipeline.artifact.layout import Layout
from pipeline.errors import GraphError
from pipeline.graph.nodes import MICROSOFT, GraphWriter, external_tensor, value_info
from pipeline.planning.recipes import Piece, Plan, PlannedMatrix
from pipeline.quantize.formats import TensorFormat, row_bytes

# int8 activations: what the fast kernels of x86-64 and arm64 compute with.
ACCURACY_LEVEL = 4
# Of GroupQueryAttention, whose inputs are positional (ContribOperators.md of ONNX Runtime 1.31).
_KEY_SCALE = 12
_BYTES = {TensorProto.UINT8: 1, TensorProto.FLOAT16: 2, TensorProto.FLOAT: 4, TensorProto.INT32: 4}


@dataclass(frozen=True)
class Stored:
    """A tensor of the artifact's data with its ONNX type and shape."""

    name: str
    data_type: int
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Length in bytes."""
        total = _BYTES[self.data_type]
        for size in self.shape:
            total *= size
        return total


def piece_names(planned: PlannedMatrix) -> list[str]:
    """Prefix of the stored tensors of each piece."""
    stem = planned.matrix.name.removesuffix(".weight")
    return [f"{stem}.high", f"{stem}.low"] if planned.split else [stem]


def plane_names(prefix: str, fmt: TensorFormat) -> list[tuple[str, int]]:
    """Prefix of the codes and zero points of each plane of a piece, and its bits."""
    if len(fmt.planes) == 1:
        return [(prefix, fmt.bits)]
    return [(f"{prefix}.bits{bits}", bits) for bits in fmt.planes]


def channel_names(planned: PlannedMatrix) -> tuple[str, str]:
    """Names of the channel indices that a split input is gathered with."""
    return f"{planned.matrix.input}.high.channels", f"{planned.matrix.input}.low.channels"


def cache_scales(name: str) -> str:
    """Stored name of the int8 scales of a layer's keys or values, `layers.0.key`."""
    return f"{name}.scales"


class _Rewriter(GraphWriter):
    def __init__(self, source: onnx.ModelProto, plan: Plan):
        super().__init__()
        self.source = source
        self.plan = plan
        self.planned = {item.matrix.name: item for item in (*plan.body, plan.head)}
        self.references = {tensor.name: tensor for tensor in source.graph.initializer}
        self.stored: dict[str, Stored] = {}
        self.aliases: dict[str, Stored] = {}  # graph initializer → stored tensor, possibly under another shape
        self.widened: dict[str, str] = {}
        self.done: set[str] = set()  # nodes shared by several products: casts of scales, gathers of split inputs

    def rewrite(self) -> None:
        for node in self.source.graph.node:
            if node.op_type == "Cast" and node.input[0] in self.references:
                self.widened[node.output[0]] = node.input[0]
            elif node.op_type == "Gather" and node.input[1] == "input_ids":
                self.embedding(node)
            elif node.op_type == "Cast" and node.input[0] == "embedding":
                continue  # the quantized embedding is float32 already, under this node's name
            elif node.op_type == "FusedMatMul":
                self.product(node)
            elif node.op_type == "GroupQueryAttention" and self.plan.cache.type == "int8":
                self.attention(node)
            else:
                self.keep(node)
        self.inputs, self.outputs = map(self.typed, (self.source.graph.input, self.source.graph.output))

    def keep(self, node: onnx.NodeProto) -> None:
        for name in node.input:
            origin = self.widened.get(name, name)
            if origin in self.references and not _inline(self.references[origin]):
                self.declare(Stored(name, TensorProto.FLOAT, tuple(self.references[origin].dims)))
            elif origin in self.references:
                self.initializers[name] = self.references[origin]
        for attribute in node.attribute:
            for inner in attribute.g.node:
                self.keep_captured(inner)
        self.nodes.append(node)

    def keep_captured(self, node: onnx.NodeProto) -> None:
        """Initializers that a branch of an If takes from the outer graph."""
        for name in node.input:
            if name in self.references:
                self.declare(Stored(name, TensorProto.FLOAT, tuple(self.references[name].dims)))

    def typed(self, values: Iterable[onnx.ValueInfoProto]) -> list[onnx.ValueInfoProto]:
        """Inputs or outputs, with the cache's in the plan's type."""
        return [
            value_info(value.name, TensorProto.INT8, _shape(value))
            if self.plan.cache.type == "int8" and value.name.startswith(("past_key_values.", "present."))
            else value
            for value in values
        ]

    def attention(self, node: onnx.NodeProto) -> None:
        """Keys and values are cached as int8; new ones are rounded inside, under a scale per channel."""
        quantized = onnx.NodeProto()
        quantized.CopyFrom(node)
        quantized.input.extend([""] * (_KEY_SCALE - len(node.input)))
        shapes = {value.name: _shape(value) for value in self.source.graph.input}
        for past, kind in zip(node.input[3:5], ("k", "v"), strict=True):
            _, heads, _, channels = shapes[past]
            name = cache_scales(past.replace("past_key_values", "layers"))
            quantized.input.append(self.declare(Stored(name, TensorProto.FLOAT, (1, int(heads), 1, int(channels)))))
            quantized.attribute.append(helper.make_attribute(f"{kind}_quant_type", "PER_CHANNEL"))
        quantized.attribute.append(helper.make_attribute("kv_cache_bit_width", 8))
        self.keep(quantized)

    def declare(self, stored: Stored, shape: tuple[int, ...] | None = None, name: str | None = None) -> str:
        """Store a tensor once; make it an initializer, under another name and shape if asked."""
        self.stored.setdefault(stored.name, stored)
        alias = name or stored.name
        self.aliases[alias] = Stored(stored.name, stored.data_type, shape or stored.shape)
        return alias

    def scales(self, prefix: str, shape: tuple[int, ...], unit: int) -> str:
        """float16 on disk, float32 for the kernel, whose scales have the activations' type; `unit` times as large, for
        the plane of codes whose lowest bit counts as much."""
        stored = self.declare(Stored(f"{prefix}.scales", TensorProto.FLOAT16, shape))
        wide = f"{prefix}.scales/float32"
        if wide not in self.done:
            self.done.add(wide)
            self.node("Cast", [stored], wide, to=TensorProto.FLOAT)
        if unit == 1:
            return wide
        if (larger := f"{wide}/{unit}") not in self.done:
            self.done.add(larger)
            self.node("Mul", [wide, self.constant(f"unit.{unit}", np.float32(unit))], larger)
        return larger

    def planes(
        self, planned: PlannedMatrix, piece: Piece, prefix: str, in_blocks: bool
    ) -> Iterator[tuple[int, str, list[str]]]:
        """Of each plane of a piece: its bits, its codes, and its scales with the zero points that it may have."""
        fmt, rows, blocks = piece.format, planned.matrix.rows, piece.columns // piece.format.block
        left = fmt.bits
        for name, bits in plane_names(prefix, fmt):
            left -= bits
            codes = Stored(f"{name}.codes", TensorProto.UINT8, (rows, row_bytes(piece.columns, bits)))
            # A tied head's table is stored as the embedding's; its kernel wants these bytes as [rows, blocks, bytes].
            shape = (rows, blocks, row_bytes(fmt.block, bits))
            stored = self.declare(codes, shape, f"{name}.codes/blocks") if in_blocks else self.declare(codes)
            grid = [self.scales(prefix, (rows, blocks), 1 << left)]
            if not fmt.symmetric:
                zeros = Stored(f"{name}.zeros", TensorProto.UINT8, (rows, row_bytes(blocks, bits)))
                grid.append(self.declare(zeros))
            yield bits, stored, grid

    def added(self, terms: list[str], output: str) -> str:
        """The sum of one or two terms under the name `output`; a single term has it already."""
        return output if len(terms) == 1 else self.node("Add", terms, output)

    def embedding(self, node: onnx.NodeProto) -> None:
        planned = self.plan.embedding
        (piece,), (prefix,) = planned.pieces, piece_names(planned)
        target = "embedding" if node.input[0] not in self._half() else "embedding/float32"
        outputs = _term_names(target, piece.format)
        for output, (bits, codes, grid) in zip(outputs, self.planes(planned, piece, prefix, False), strict=True):
            self.node(
                "GatherBlockQuantized", [codes, "input_ids", *grid], output, MICROSOFT,
                bits=bits, block_size=piece.format.block, gather_axis=0, quantize_axis=1,
            )  # fmt: skip
        self.added(outputs, target)

    def _half(self) -> set[str]:
        return {name for name, tensor in self.references.items() if tensor.data_type != TensorProto.FLOAT}

    def product(self, node: onnx.NodeProto) -> None:
        name = self.widened.get(node.input[1], node.input[1])
        planned, x, output = self.planned[name], node.input[0], node.output[0]
        if not planned.split:
            self.matmul(planned, planned.pieces[0], piece_names(planned)[0], x, output)
            return
        halves = []
        for piece, prefix, channels in zip(planned.pieces, piece_names(planned), channel_names(planned), strict=True):
            part = channels.removesuffix(".channels")
            if part not in self.done:
                self.done.add(part)
                indices = self.declare(Stored(channels, TensorProto.INT32, (piece.columns,)))
                self.node("Gather", [x, indices], part, axis=2)
            halves.append(self.matmul(planned, piece, prefix, part, f"{output}.{prefix.rsplit('.', 1)[1]}"))
        self.node("Add", halves, output)

    def matmul(self, planned: PlannedMatrix, piece: Piece, prefix: str, x: str, output: str) -> str:
        outputs = _term_names(output, piece.format)
        for term, (bits, codes, grid) in zip(outputs, self.planes(planned, piece, prefix, True), strict=True):
            self.node(
                "MatMulNBits", [x, codes, *grid], term, MICROSOFT, K=piece.columns, N=planned.matrix.rows,
                bits=bits, block_size=piece.format.block, accuracy_level=ACCURACY_LEVEL,
            )  # fmt: skip
        return self.added(outputs, output)


def _term_names(output: str, fmt: TensorFormat) -> list[str]:
    """What the planes of a format contribute to `output`."""
    return [output] if len(fmt.planes) == 1 else [f"{output}.bits{bits}" for bits in fmt.planes]


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def _inline(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location != TensorProto.EXTERNAL


@dataclass(frozen=True)
class QuantizedGraph:
    """A rewritten graph whose stored tensors are not placed yet."""

    stored: tuple[Stored, ...]
    _rewriter: _Rewriter

    def place(self, layout: Layout, part_name: Callable[[int], str]) -> onnx.ModelProto:
        """The finished model: every stored tensor bound to its bytes in the part files."""
        writer = self._rewriter
        initializers = dict(writer.initializers)
        for name, tensor in writer.aliases.items():
            place = layout.places[tensor.name]
            initializers[name] = external_tensor(
                name, tensor.data_type, tensor.shape, part_name(place.part), place.offset, place.length
            )
        finished = GraphWriter()
        finished.nodes, finished.inputs, finished.outputs = writer.nodes, writer.inputs, writer.outputs
        finished.initializers = initializers
        return finished.model(writer.source.graph.name)


def quantize_graph(source: onnx.ModelProto, plan: Plan) -> QuantizedGraph:
    """Replace products and embedding of a graph made by `build_decoder` according to `plan`.

    Raises GraphError when the plan and the graph do not belong to the same model.
    """
    rewriter = _Rewriter(source, plan)
    _check_same_model(rewriter)
    rewriter.rewrite()
    return QuantizedGraph(tuple(rewriter.stored.values()), rewriter)


def _check_same_model(rewriter: _Rewriter) -> None:
    widened = {node.output[0]: node.input[0] for node in rewriter.source.graph.node if node.op_type == "Cast"}
    products = [node.input[1] for node in rewriter.source.graph.node if node.op_type == "FusedMatMul"]
    names = [widened.get(name, name) for name in products]
    found = {name: list(rewriter.references[name].dims) for name in names}
    planned = {name: [item.matrix.rows, item.matrix.columns] for name, item in rewriter.planned.items()}
    if found != planned:
        name = next(name for name in (found | planned) if found.get(name) != planned.get(name))
        raise GraphError(
            f"the graph multiplies by {len(found)} matrices, the plan has {len(planned)}; the first difference is "
            f"{name!r}: {found.get(name, 'absent')} in the graph, {planned.get(name, 'absent')} in the plan. Run "
            f"export and quantize for the same model."
        )
