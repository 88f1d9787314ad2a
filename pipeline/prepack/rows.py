"""Large products in bands of rows, so that none is packed whole: not once, and not each time that a model is loaded.

ONNX Runtime packs a matrix before it can tell that the packed bytes are there already; a mapped model so needs private
memory for its largest one while it loads (MiMo's head: 0.43 GB). Rows of a quantized matrix lie one after the other, so
a band of them is a range of the same file, and the products of all bands side by side are the product, bit for bit.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from math import prod

import onnx
from onnx import TensorProto, helper

from pipeline.graph.nodes import external_tensor

PRODUCT = "MatMulNBits"
EXPERTS = "QMoE"
"""Two products of every expert of a layer, packed together: they are cut into no bands."""
_BY_ROW = {1, 2, 3, 5}  # inputs of MatMulNBits that rows share out: codes, scales, zero points, bias
_MULTIPLE = 128
"""Rows of a band but the last: kernels work on some rows at once, and 4-bit codes of a band begin on a byte."""


def in_bands(model: onnx.ModelProto, limit: int) -> onnx.ModelProto:
    """The same decoder, in which no product reads more than `limit` bytes of codes, or has more than 128 rows."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    bands = _Bands(made.graph)
    nodes = [part for node in model.graph.node for part in bands.of(node, limit)]
    del made.graph.node[:], made.graph.initializer[:]
    made.graph.node.extend(nodes)
    made.graph.initializer.extend(bands.initializers.values())
    return made


class _Bands:
    """Nodes and initializers of bands of rows.

    Attributes:
        initializers: of the graph, and of the bands that were made of it.
    """

    def __init__(self, graph: onnx.GraphProto):
        self.initializers = {item.name: item for item in graph.initializer}
        self._made = set[str]()
        self._computed = {node.output[0]: node for node in graph.node if node.op_type in {"Cast", "Mul"}}

    def of(self, node: onnx.NodeProto, limit: int) -> Iterator[onnx.NodeProto]:
        """A node itself, or what takes its place: products of bands with what they need, and their concatenation."""
        codes = self.initializers.get(node.input[1]) if node.op_type == PRODUCT else None
        if codes is None or prod(codes.dims) <= limit or codes.dims[0] <= _MULTIPLE:
            yield node
            return
        rows = codes.dims[0]
        step = max(1, limit * rows // prod(codes.dims) // _MULTIPLE) * _MULTIPLE
        results = []
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            band = onnx.NodeProto()
            band.CopyFrom(node)
            band.name = band.output[0] = f"{node.output[0]}/{start}-{stop}"
            for number in sorted(_BY_ROW & set(range(len(node.input)))):
                band.input[number] = yield from self._band(node.input[number], start, stop, rows)
            next(item for item in band.attribute if item.name == "N").i = stop - start
            results.append(band.name)
            yield band
        yield helper.make_node("Concat", results, [node.output[0]], name=node.name, axis=-1)

    def _band(self, name: str, start: int, stop: int, rows: int) -> Generator[onnx.NodeProto, None, str]:
        """The nodes that compute rows `start` to `stop` of an input, unless another product has them; their name."""
        band_name = f"{name}/{start}-{stop}"
        if node := self._computed.get(name):
            band = onnx.NodeProto()
            band.CopyFrom(node)
            band.name = band.output[0] = band_name
            for number, item in enumerate(node.input):
                band.input[number] = yield from self._band(item, start, stop, rows)
            if band_name not in self._made:
                self._made.add(band_name)
                yield band
            return band_name
        tensor = self.initializers.get(name)
        if tensor is None or tensor.data_location != TensorProto.EXTERNAL:
            return name  # a scalar of the graph, or nothing
        entries = {item.key: item.value for item in tensor.external_data}
        size, per_row = int(entries["length"]) // rows, tensor.dims[0] // rows
        shape = ((stop - start) * per_row, *tensor.dims[1:])
        place = entries["location"], int(entries.get("offset", 0)) + start * size, (stop - start) * size
        self.initializers[band_name] = external_tensor(band_name, tensor.data_type, shape, *place)
        return band_name
