"""A quantized decoder cut for prepacking, and put together again over what a machine packed. No weight is read.

ONNX Runtime packs each matrix for the processor when it opens a graph; opening a whole model so takes the memory of all
its packed weights at once. A slice is a graph of some products alone, each between an input and an output that nobody
fills: opening it packs these products, as in the whole graph, and saves the packed bytes. What it also saves are the
values that the runtime computes once from stored tensors (scales widened to float32), which then need no memory either.

The merged graph is the whole decoder. Its codes stay where they were; widened values and packed bytes lie in the
slices' files. The runtime finds packed bytes by a key, the operator and a hash of these very bytes, and does not ask
which initializer names them: so one tensor of each slice, its anchor, carries the entries of all its products, and the
codes that a slice saves once more are left behind. The keys make a merged graph good for one kernel class only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from math import prod

import onnx
from onnx import TensorProto, helper

from pipeline.artifact.layout import make_layout
from pipeline.errors import GraphError
from pipeline.graph.nodes import external_tensor, value_info
from pipeline.graph.slices import reads
from pipeline.prepack.rows import EXPERTS, PRODUCT, in_bands

LIMIT = 64 << 20
"""Bytes of codes in one slice, and so in one product."""
_PACKED = "prepacked"  # how the keys of entries with packed bytes begin (onnxruntime, tensor_external_data_info.cc)

_CODES = {PRODUCT: (1,), EXPERTS: (2, 5)}  # inputs that are packed
_WEIGHTS = (1, 14)  # inputs of QMoE that are computed for every token, beside the first

Values = Sequence[onnx.ValueInfoProto]


def cut(model: onnx.ModelProto, limit: int) -> list[onnx.ModelProto]:
    """The slices of a quantized decoder: products in the order of execution, then what else the runtime widens.

    Raises GraphError when the graph has no quantized product: there is nothing to pack.
    """
    graph = _Graph(in_bands(model, limit))
    groups: list[list[onnx.NodeProto]] = []
    room = 0
    for node in graph.products:
        size = graph.stored_bytes(node)
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(node)
        room -= size
    if not groups:
        raise GraphError(f"graph {model.graph.name!r} has no {PRODUCT}: only quantized artifacts are prepacked.")
    slices = [graph.product_slice(number, nodes) for number, nodes in enumerate(groups)]
    if names := graph.looked_up():
        slices.append(graph.lookup_slice(len(slices), names))
    return slices


def stored_files(model: onnx.ModelProto) -> list[str]:
    """The files that hold a graph's weights, sorted."""
    entries = (entry for item in model.graph.initializer for entry in item.external_data)
    return sorted({entry.value for entry in entries if entry.key == "location"})


class Merging:
    """The decoder `model`, put together over its slices of `limit` as ONNX Runtime saved them, one after the other."""

    def __init__(self, model: onnx.ModelProto, limit: int):
        self._graph = _Graph(in_bands(model, limit))
        self._tensors: dict[str, onnx.TensorProto] = {}
        self._keys = set[str]()

    def add(self, saved: onnx.ModelProto, file: str) -> list[tuple[int, int, int]]:
        """Take over a saved slice, whose own file is called `file`. What the merged graph reads of it: (offset in the
        saved data, length, offset in the slice's file).

        Raises GraphError when the slice holds nothing that could carry its entries.
        """
        graph, tensors = self._graph, self._tensors
        found = {item.name: item for item in saved.graph.initializer if item.data_location == TensorProto.EXTERNAL}
        # Equal matrices have one key, under which the runtime wants the bytes once.
        blobs = {blob[0]: blob for item in found.values() for blob in packed_entries(item) if blob[0] not in self._keys}
        packed = list(blobs.values())
        pieces = [piece for _, own in packed for piece in own]
        self._keys |= blobs.keys()
        names = [name for name in found if name in graph.computed.keys() - tensors]
        if packed and not names:
            names = _smallest(found, graph.initializers.keys() - tensors, saved.graph.name)
        ranges = [_place(found[name]) for name in names] + pieces
        places = _layout(length for _, length in ranges)
        for name, place in zip(names, places, strict=False):
            size = _place(found[name])[1]
            tensors[name] = external_tensor(name, found[name].data_type, tuple(found[name].dims), file, place, size)
        moved = iter(places[len(names) :])
        for number, (key, own) in enumerate(packed):
            # The last field is a checksum, which nobody checks.
            value = "|".join([key, *(f"{next(moved)};{length};0" for _, length in own)])
            tensors[names[0]].external_data.add(key=f"{_PACKED}_{number}", value=value)
        return [(*source, target) for source, target in zip(ranges, places, strict=True)]

    def merged(self) -> onnx.ModelProto:
        """The whole graph over all slices."""
        return self._graph.over(self._tensors)


class _Graph:
    """A quantized decoder graph by what its values are.

    Attributes:
        initializers: by name.
        computed: values that follow from initializers alone, with the node of each: the runtime computes them once.
        products: the nodes with packed weights, in the order of execution.
    """

    def __init__(self, model: onnx.ModelProto):
        self._model = model
        self.initializers = {item.name: item for item in model.graph.initializer}
        self.computed: dict[str, onnx.NodeProto] = {}
        for node in model.graph.node:
            names = list(reads(node))
            if names and all(name in self.initializers or name in self.computed for name in names):
                self.computed |= dict.fromkeys(node.output, node)
        self._others = [node for node in model.graph.node if node.output[0] not in self.computed]
        self.products = [node for node in self._others if node.op_type in _CODES]

    def stored_bytes(self, node: onnx.NodeProto) -> int:
        """Bytes of a product's codes."""
        return sum(prod(self.initializers[node.input[place]].dims) for place in _CODES[node.op_type])

    def looked_up(self) -> list[str]:
        """Computed values that other nodes than products read; scalars are too small to matter."""
        multiplied = {name for node in self.products for name in node.input}
        names = dict.fromkeys(name for node in self._others if node.op_type not in _CODES for name in reads(node))
        return [name for name in names if name in self.computed and name not in multiplied and self._shape(name)]

    def product_slice(self, number: int, nodes: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
        """These products, each from an input that products of one width share to an output of its own."""
        kept, taken, given = [], {}, []
        for node in nodes:
            columns, rows = self._sides(node)
            kind, x = self._kind(node.input[_CODES[node.op_type][0] + 1]), f"x.{columns}"
            taken[x] = value_info(x, kind, ["rows", columns])
            given.append(value_info(node.output[0], kind, ["rows", rows]))
            alone = onnx.NodeProto()
            alone.CopyFrom(node)
            alone.input[0] = x
            if node.op_type == EXPERTS:
                taken["weights"] = value_info("weights", kind, ["rows", self.initializers[node.input[2]].dims[0]])
                for place in _WEIGHTS:
                    alone.input[place] = "weights"
            kept.append(alone)
        return self._model_of(number, kept, list(taken.values()), given)

    def _sides(self, node: onnx.NodeProto) -> tuple[int, int]:
        """Channels that a product reads and gives."""
        if node.op_type == EXPERTS:
            hidden = self.initializers[node.input[5]].dims[1]
            return hidden, hidden
        sizes = {item.name: item.i for item in node.attribute}
        return sizes["K"], sizes["N"]

    def lookup_slice(self, number: int, names: Sequence[str]) -> onnx.ModelProto:
        """These computed values, each with a row looked up: something must read a value that is to be saved."""
        row = value_info("row", TensorProto.INT64, [1])
        nodes = [helper.make_node("Gather", [name, row.name], [f"{name}/row"], name=f"{name}/row") for name in names]
        given = [value_info(f"{name}/row", self._kind(name), [1, *self._shape(name)[1:]]) for name in names]
        return self._model_of(number, nodes, [row], given)

    def over(self, tensors: Mapping[str, onnx.TensorProto]) -> onnx.ModelProto:
        """The whole graph with `tensors` as initializers, in place of what computed or stored them."""
        nodes = [node for node in self._model.graph.node if node.output[0] not in tensors]
        return self._with(nodes, tensors, self._model.graph.name, self._model.graph.input, self._model.graph.output)

    def _model_of(self, number: int, nodes: Sequence[onnx.NodeProto], taken: Values, given: Values) -> onnx.ModelProto:
        """A slice: `nodes` and what computes their constant inputs."""
        wanted, found = [name for node in nodes for name in node.input], set[str]()
        while wanted:
            name = wanted.pop()
            if name in self.computed and name not in found:
                found.add(name)
                wanted += self.computed[name].input
        before = [node for node in self._model.graph.node if node.output[0] in found]
        return self._with([*before, *nodes], {}, f"{self._model.graph.name} slice {number}", taken, given)

    def _with(
        self, nodes: Sequence[onnx.NodeProto], tensors: Mapping[str, onnx.TensorProto], name: str, taken: Values,
        given: Values,
    ) -> onnx.ModelProto:  # fmt: skip
        read = dict.fromkeys(name for node in nodes for name in reads(node))
        stored = {**self.initializers, **tensors}
        graph = helper.make_graph(nodes, name, taken, given, [stored[name] for name in read if name in stored])
        opsets, version = self._model.opset_import, self._model.ir_version
        return helper.make_model(graph, opset_imports=opsets, producer_name="pipeline", ir_version=version)

    def _kind(self, name: str) -> int:
        """ONNX data type of an initializer or a computed value."""
        if name in self.initializers:
            return self.initializers[name].data_type
        node = self.computed[name]
        if node.op_type == "Cast":
            return int(helper.get_node_attr_value(node, "to"))
        return self._kind(node.input[0])

    def _shape(self, name: str) -> list[int]:
        """Shape of an initializer, or of what is computed from one elementwise."""
        if name in self.initializers:
            return list(self.initializers[name].dims)
        return max((self._shape(item) for item in self.computed[name].input), key=prod)


def packed_entries(tensor: onnx.TensorProto) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Key, and (offset, length) of each piece, of the packed bytes that a saved tensor names; see
    tensor_external_data_info.cc."""
    for entry in tensor.external_data:
        if entry.key.startswith(_PACKED):
            key, *pieces = entry.value.split("|")
            found = (piece.split(";") for piece in pieces)
            yield key, [(int(offset), int(length)) for offset, length, _ in found]


def _smallest(found: Mapping[str, onnx.TensorProto], allowed: AbstractSet[str], what: str) -> list[str]:
    """The smallest stored tensor of a slice that widens none: to be read from there, so that it can be the anchor."""
    names = sorted(found.keys() & allowed, key=lambda name: (_place(found[name])[1], name))
    if not names:
        raise GraphError(f"{what} has packed bytes and no tensor of the model: it was cut from another graph.")
    return names[:1]


def _layout(lengths: Iterable[int]) -> list[int]:
    """Offsets of these ranges in a file of their own, each on 64 bytes or on a page."""
    sizes = [(str(number), length) for number, length in enumerate(lengths)]
    places = make_layout(sizes, 1 << 62).places
    return [places[name].offset for name, _ in sizes]


def _place(tensor: onnx.TensorProto) -> tuple[int, int]:
    entries = {item.key: item.value for item in tensor.external_data}
    return int(entries["offset"]), int(entries["length"])
