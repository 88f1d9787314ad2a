"""A decoder graph in slices: embedding, one layer, what precedes the head. Pure surgery; no weight is read or moved.

The hidden states between two layers are one value. In the decoder graph the norm that opens a layer also adds the
block before it to the residual; here that node becomes an Add, whose output is the hidden states, and a norm. A slice
is everything that its outputs need, back to the hidden states that it takes: rotary tables, LongRoPE's choice of them
and attention lengths come along where they are reached. Initializers keep their references, so a slice runs in the
folder where the whole graph does, and holds that layer's weights only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from pipeline.checkpoint.architecture import Architecture
from pipeline.errors import GraphError
from pipeline.graph.nodes import MICROSOFT, GraphWriter, value_info

LOGITS = "logits"


@dataclass(frozen=True)
class Slice:
    """A model and the names of its values.

    Attributes:
        source: the hidden states that it takes, float32 [batch, sequence, hidden]; None for the embedding. It also
            takes what else it reads of the decoder's inputs: input_ids, attention_mask, the layer's (empty) past.
        target: the hidden states that it gives; None if it ends at a product's input.
        taps: input of the matrices → output that holds it, float32 [batch, sequence, columns]; of an expert's [1, its
            own tokens, columns].
        cached: `layers.0.key`, `layers.0.value` → output that holds the layer's, float32 [batch, kv_heads, sequence,
            head_dim], keys after the rotary embedding; empty unless the slices were asked for it.
    """

    model: onnx.ModelProto
    source: str | None
    target: str | None
    taps: Mapping[str, str]
    cached: Mapping[str, str]


class DecoderSlices:
    """The slices of a full-precision decoder graph of `pipeline.graph.decoder`.

    `model` is not changed. `columns` are the channels of each input. With `cache`, layers also give the keys and values
    that they cache. Raises GraphError when a layer's norms or products are not where that module puts them.
    """

    def __init__(self, model: onnx.ModelProto, architecture: Architecture, cache: bool = False):
        self.architecture = architecture
        self._cache = {value.name: value for value in model.graph.output if cache and value.name.startswith("present.")}
        self._model = model
        self._taps = product_inputs(model, architecture)
        self.columns = {matrix.input: matrix.columns for matrix in architecture.matrices}
        norms = [f"model.layers.{layer}.input_layernorm" for layer in range(architecture.layers)] + ["model.norm"]
        nodes = {node.name: node for node in model.graph.node}
        if missing := [name for name in norms if name not in nodes] + sorted(self.columns.keys() - self._taps.keys()):
            raise GraphError(
                f"graph {model.graph.name!r}: {missing[0]!r} and {len(missing) - 1} more are not in it, so it cannot "
                f"be cut into {architecture.layers} layers. Run the export stage again."
            )
        opened = {name: _open_norm(nodes[name]) for name in norms}
        self._hidden = [*(opened[name][-1].input[0] for name in norms), None]  # before each layer and the head
        split = (part for node in model.graph.node for part in opened.get(node.name, [node]))
        self._producers = {output: node for node in split for output in node.output if output}

    def inputs(self, layer: int) -> list[str]:
        """The inputs of the matrices of a layer, in the order of execution; `["head"]` after the last layer."""
        head = self.architecture.head
        matrices = self.architecture.body(layer) if layer < self.architecture.layers else [head]
        return list(dict.fromkeys(matrix.input for matrix in matrices))

    def embedding(self) -> Slice:
        """input_ids → the hidden states before the first layer."""
        return self._slice(None, self._hidden[0], [], {})

    def layer(self, layer: int) -> Slice:
        """The hidden states before `layer` → those after it, and every product's input.

        The number of layers stands for what remains after the last one: up to the head's input, without its product, a
        model's largest.
        """
        return self._slice(self._hidden[layer], self._hidden[layer + 1], self.inputs(layer), self._cached(layer))

    def open_layer(self, layer: int, vectors: bool = False) -> Slice:
        """The hidden states before `layer` → those after it, its matrices being inputs of the model, float32 [rows,
        columns] by their names: what runs may change from one run to the next. With `vectors`, its norms, its biases
        and its router are inputs too, and layers differ in nothing but names."""
        part = self._slice(self._hidden[layer], self._hidden[layer + 1], [], self._cached(layer))
        stored, prefix = self.architecture.expected_tensors(), f"model.layers.{layer}."
        names = stored if vectors else [matrix.name for matrix in self.architecture.body(layer)]
        shapes = {name: stored[name] for name in names if name.startswith(prefix)}
        _open_weights(part.model.graph, shapes)
        return part

    def head(self) -> Slice:
        """The head's input → `LOGITS`, float32 [batch, sequence, vocab]."""
        return self._slice(self._taps[self.architecture.head.input], LOGITS, [], {})

    def _cached(self, layer: int) -> dict[str, str]:
        parts = {f"layers.{layer}.{part}": f"present.{layer}.{part}" for part in ("key", "value")}
        return {name: value for name, value in parts.items() if value in self._cache}

    def _slice(self, source: str | None, target: str | None, names: Iterable[str], cached: Mapping[str, str]) -> Slice:
        taps = {name: self._taps[name] for name in names}
        outputs = {value: self.columns[name] for name, value in taps.items()}
        if target:
            outputs[target] = self.architecture.vocab if target == LOGITS else self.architecture.hidden
        nodes, read = self._reach([*outputs, *cached.values()], source)
        graph = self._model.graph
        taken = [_activations(source, self.architecture.hidden)] if source else []
        taken += [value for value in graph.input if value.name in read]
        # ONNX Runtime takes sizes of one name for equal, and an expert has its own tokens.
        given = [_activations(name, columns, f"{name} tokens") for name, columns in outputs.items()]
        given += [self._cache[name] for name in cached.values()]
        stored = [tensor for tensor in graph.initializer if tensor.name in read]
        cut = helper.make_graph(nodes, f"{graph.name} slice", taken, given, stored)
        opsets, version = self._model.opset_import, self._model.ir_version
        model = helper.make_model(cut, opset_imports=opsets, producer_name="pipeline", ir_version=version)
        return Slice(model, source, target, taps, cached)

    def _reach(self, outputs: Iterable[str], source: str | None) -> tuple[list[onnx.NodeProto], set[str]]:
        """The nodes that compute `outputs` from `source`, in order of execution, and every name that they read."""
        wanted, found, read = list(outputs), set[int](), set[str]()
        while wanted:
            node = self._producers.get(wanted.pop())
            if node is None or id(node) in found:
                continue
            found.add(id(node))
            names = set(reads(node))
            read |= names
            wanted += names - {source}
        order = {id(node): node for node in self._producers.values()}
        return [node for key, node in order.items() if key in found], read


def product(columns: int) -> onnx.ModelProto:
    """`x`, float32 [tokens, columns], and a matrix `w`, [rows, columns] → `LOGITS`, [tokens, rows]."""
    writer, taken = GraphWriter(), {"x": "tokens", "w": "rows"}
    writer.inputs += [value_info(name, TensorProto.FLOAT, [size, columns]) for name, size in taken.items()]
    writer.outputs.append(value_info(LOGITS, TensorProto.FLOAT, ["tokens", "rows"]))
    writer.node("FusedMatMul", [*taken], LOGITS, MICROSOFT, transB=1)
    return writer.model("product")


def product_inputs(model: onnx.ModelProto, architecture: Architecture) -> dict[str, str]:
    """Input of the matrices (`layers.0.attention`, …, `head`) → the value of a full-precision graph that holds it.

    In the order of execution. Matrices that share an input share the value.
    """
    inputs = {matrix.name: matrix.input for matrix in architecture.matrices}
    stored = _cast_from(model.graph)
    values: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "FusedMatMul":
            values.setdefault(inputs[stored.get(node.input[1], node.input[1])], node.input[0])
    return values


def _cast_from(graph: onnx.GraphProto) -> dict[str, str]:
    return {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}


def _activations(name: str, channels: int, tokens: str = "sequence") -> onnx.ValueInfoProto:
    return value_info(name, TensorProto.FLOAT, ["batch", tokens, channels])


def _open_weights(graph: onnx.GraphProto, shapes: Mapping[str, Sequence[int]]) -> None:
    """Make weights of a graph its inputs, float32 in these shapes by name, in place of references to the checkpoint."""
    stored = {wide: name for wide, name in _cast_from(graph).items() if name in shapes}
    kept = [node for node in graph.node if node.output[0] not in stored]
    for node in kept:
        node.input[:] = [stored.get(name, name) for name in node.input]
    others = [tensor for tensor in graph.initializer if tensor.name not in shapes]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(others)
    graph.input.extend(value_info(name, TensorProto.FLOAT, list(shape)) for name, shape in shapes.items())


def _open_norm(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """A norm as (the sum, if it computes one, and) a norm of the hidden states, which are its first input."""
    kind = node.op_type.removeprefix("Skip")
    if kind == node.op_type:
        return [node]
    residual, block, *weights = node.input
    normed, total = node.output[0], node.output[-1]
    epsilon = helper.get_node_attr_value(node, "epsilon")
    added = helper.make_node("Add", [residual, block], [total], name=total)
    settings = {"name": node.name, "axis": -1, "epsilon": epsilon}
    return [added, helper.make_node(kind, [total, *weights], [normed], **settings)]


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, those of the outer graph that its branches read included."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            inner = {output for part in attribute.g.node for output in part.output}
            yield from (name for part in attribute.g.node for name in reads(part) if name not in inner)
