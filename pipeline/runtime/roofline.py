"""The roofline of decoding: no model makes tokens faster than memory delivers the bytes that each of them reads.

    tokens/s ≤ memory bandwidth ÷ bytes read per token

A token reads every weight of the body and of the head once, of a layer's experts those that it wakes, one row of the
embedding, and the keys and values of all tokens before it. The bytes are those of the written graph, which are a lower
bound: kernels keep packed weights, which are no smaller. So a rate above the roofline measured something other than
this model.

Source: Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", CACM 52(4), 2009; at one
token at a time decoding does two operations per weight and is bound by memory on every processor here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import onnx

from pipeline.errors import EvaluationError
from pipeline.graph.experts import CHOICES

TOLERANCE = 1.10
"""A rate may be this many times its roofline before it counts as impossible: measured bandwidths of an undisturbed
machine differ by a few per cent from one second to the next."""
_ALIASES = {
    "Cast",
    "Reshape",
    "Identity",
    "Mul",
}  # of stored tensors alone, what they return is computed once, from these
# Inputs of which a token reads one row: the table of Gather; codes, scales and zero points of GatherBlockQuantized; the
# rotary tables of GroupQueryAttention.
_ROW_INPUTS = {"Gather": {0}, "GatherBlockQuantized": {0, 2, 3}, "GroupQueryAttention": {7, 8}}
_EXPERT = re.compile(r"layers\.\d+\.experts(?:\.(\d+)\.\w+)?")  # products of experts: one by one, or all of a layer
_EXPERT_INPUTS = {2, 3, 5, 6, 11, 12}  # of QMoE: codes, scales and zero points


@dataclass(frozen=True)
class Traffic:
    """Bytes that decoding one token must read at least."""

    weight_bytes: (
        int  # every stored tensor, tables only by the rows that one token needs, experts by those that it wakes
    )
    table_bytes: int  # tables of which one row is read (embedding, rotary), not part of the above
    cache_bytes: int  # keys and values of one token of context

    def per_token(self, context: float) -> float:
        """Bytes at `context` tokens of context."""
        return self.weight_bytes + self.cache_bytes * context


def traffic(model: onnx.ModelProto) -> Traffic:
    """What a token reads, from the graph alone. Tensors stored once under two names count once."""
    origin = {tensor.name: {_stored(tensor)} for tensor in model.graph.initializer}
    read, experts = dict[_Stored, Fraction](), _experts(model.graph)
    for node in model.graph.node:
        stored = [name in origin for name in node.input]
        if node.op_type in _ALIASES and stored[0] and (all(stored) or node.op_type == "Reshape"):
            origin[node.output[0]] = set().union(*(origin.get(name, ()) for name in node.input))
            continue
        woken = Fraction(CHOICES, experts) if _EXPERT.fullmatch(node.name) else Fraction(1)
        for index, name in enumerate(node.input):
            if index not in _ROW_INPUTS.get(node.op_type, ()):
                share = woken if node.op_type != "QMoE" or index in _EXPERT_INPUTS else Fraction(1)
                read |= {place: max(share, read.get(place, share)) for place in origin.get(name, ())}
    # The others are read by rows, LongRoPE's tables among them, which no node of the outer graph reads: a branch picks.
    tables = set().union(*origin.values()) - read.keys()
    weight_bytes = sum(int(place.length * share) for place, share in read.items())
    weight_bytes += sum(place.length // place.rows for place in tables)
    # Keys and values of one token: inputs past_key_values.* are [batch, heads, past, head_dim].
    kinds = [value.type.tensor_type for value in model.graph.input if value.name.startswith("past_key_values.")]
    sizes = ((kind.shape.dim[1].dim_value, kind.shape.dim[3].dim_value, kind.elem_type) for kind in kinds)
    cache_bytes = sum(heads * channels * _item_bytes(elem_type) for heads, channels, elem_type in sizes)
    return Traffic(weight_bytes, sum(place.length for place in tables), cache_bytes)


def _experts(graph: onnx.GraphProto) -> int:
    """Experts of a layer; 1 where there are none."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    mixtures = (tensors[node.input[2]].dims[0] for node in graph.node if node.op_type == "QMoE")
    numbers = (found[1] for node in graph.node if (found := _EXPERT.fullmatch(node.name)))
    return max([*mixtures, *(int(number) + 1 for number in numbers if number)], default=1)


class _Stored(NamedTuple):
    """Where a tensor lies; equal for two names of the same bytes."""

    location: str
    offset: int
    length: int
    rows: int


def _item_bytes(data_type: int) -> int:
    return onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize


def _stored(tensor: onnx.TensorProto) -> _Stored:
    place = {item.key: item.value for item in tensor.external_data}
    length = int(place.get("length", math.prod(tensor.dims) * _item_bytes(tensor.data_type)))
    rows = tensor.dims[0] if tensor.dims else 1
    return _Stored(place.get("location", tensor.name), int(place.get("offset", 0)), length, rows)


def require_possible(rate: float, ceiling: float, what: str) -> None:
    """Raise EvaluationError for a rate above its roofline by more than `TOLERANCE`; both in tokens per second."""
    if rate > TOLERANCE * ceiling:
        raise EvaluationError(
            f"{what}: {rate:,.2f} tokens/s is above the roofline of {ceiling:,.2f} (memory bandwidth ÷ bytes read per "
            f"token; up to {TOLERANCE} times it would be measurement error). Something other than this model was "
            f"measured: check that the graph computes every layer. If other programs kept memory busy while its "
            f"bandwidth was measured, validate again on an idle machine."
        )
