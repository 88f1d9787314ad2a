"""Graphs for phones give the logits of the last token only; validation reads those of every token.

The two are one node apart, and read the same weights.
"""

from __future__ import annotations

import onnx

LAST_TOKEN = "last_token"
"""The node that hands only the last token's hidden states, [batch, 1, hidden], to the head."""


def every_token(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph for phones with logits [batch, sequence, vocab] of every token: itself without `LAST_TOKEN`. A graph
    without that node is returned as it is."""
    last = next((node for node in model.graph.node if node.name == LAST_TOKEN), None)
    if last is None:
        return model
    found = onnx.ModelProto()
    found.CopyFrom(model)
    found.graph.node.remove(last)
    for node in found.graph.node:
        node.input[:] = [last.input[0] if name == last.output[0] else name for name in node.input]
    logits = next(value for value in found.graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "sequence"
    return found
