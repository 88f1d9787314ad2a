"""Our ONNX graphs in torch, node by node, with gradients: what is learned is what will run, however a writer wrote it.

Full-precision exports and artifacts take the same way. Weights stay packed as they lie in the files, mapped; a product
unpacks its matrix, and once more when its gradient is due, so what training holds are activations. Left out is what
only a kernel rounds: activations in 8 bits before a product. Operators:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.errors import GraphError
from pipeline.graph.last_token import every_token
from pipeline.graph.slices import reads

# Whose gradients are the same bytes every time, those that take least memory first.
_REPEATABLE = {"cpu": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], "cuda": [SDPBackend.MATH]}
Tensor = torch.Tensor
Values = dict[str, Tensor]
Attributes = Mapping[str, Any]

_TYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.BOOL: torch.bool,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
}


class Interpreter:
    """A decoder graph and its weights as a function of tokens.

    Args:
        model: a full-precision export, or an artifact's graph; of the latter all tokens' logits are computed.
        folder: where its data files lie.
        device: what computes, such as `cpu` or `cuda`. Weights are there from the start.
        precision: of products; everything else is float32.

    Raises GraphError for an operator that is not known here.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path, device: str = "cpu", precision: torch.dtype | None = None):
        self.device, self.precision = torch.device(device), precision or torch.float32
        graph = every_token(model).graph
        self.stored = {item.name: _stored(item, folder).to(self.device) for item in graph.initializer}
        self.external = {item.name: item for item in graph.initializer if item.external_data}
        self._nodes = list(graph.node)
        if unknown := {node.op_type for node in self._nodes} - _OPERATORS.keys() - {"If"}:
            raise GraphError(
                f"graph {graph.name!r}: learning knows no operator {', '.join(sorted(unknown))}. Quantize without "
                f"`learn`, or add it to pipeline/learn/interpreter.py."
            )
        self._done = _last_uses(self._nodes)

    def logits(self, ids: Tensor, learned: Mapping[str, Tensor] | None = None) -> Tensor:
        """float32 [batch, tokens, vocab] of int64 [batch, tokens]; `learned` stands for stored tensors of its names."""
        ids = ids.to(self.device)
        values = self.stored | dict(learned or {}) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for node, done in zip(self._nodes, self._done, strict=True):
            self._run(node, values)
            for name in done:
                values.pop(name, None)
        return values["logits"]

    def _run(self, node: onnx.NodeProto, values: Values) -> None:
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        if node.op_type == "If":
            branch = attributes["then_branch" if values[node.input[0]] else "else_branch"]
            for inner in branch.node:
                self._run(inner, values)
            found = [values[item.name] for item in branch.output]
        else:
            inputs = [values.get(name) for name in node.input]
            result = _OPERATORS[node.op_type](attributes | {"precision": self.precision}, *inputs)
            found = list(result) if isinstance(result, tuple) else [result]
        values |= zip(node.output, found, strict=False)


def _stored(item: onnx.TensorProto, folder: Path) -> Tensor:
    """An initializer; what lies in a file is mapped."""
    if not item.external_data:
        return torch.from_numpy(numpy_helper.to_array(item).copy())
    place = {entry.key: entry.value for entry in item.external_data}
    at, length = int(place["offset"]), int(place["length"])
    data = np.memmap(folder / place["location"], np.uint8, "c", at, (length,))
    return torch.from_numpy(data).view(_TYPES[item.data_type]).reshape(tuple(item.dims))


def _last_uses(nodes: Sequence[onnx.NodeProto]) -> list[list[str]]:
    """Names that no node after each reads."""
    seen = {"logits"}
    found: list[list[str]] = []
    for node in reversed(nodes):
        names = {*reads(node), *filter(None, node.output)} - seen
        seen |= names
        found.append(sorted(names))
    return found[::-1]


# --- products with packed weights -------------------------------------------------------------------------------------


def unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """Values of `bits` bits, lowest first, of uint8 [.., bytes]: uint8 [.., count]."""
    if bits == 8:
        return packed
    slots = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(slots, -1).flatten(-2)[..., :count]


def _levels(codes: Tensor, zeros: Tensor | None, bits: int, blocks: int, dtype: torch.dtype) -> Tensor:
    """Codes less their zero points, [.., blocks, block], of codes [.., blocks, bytes] or [.., bytes]. Zero points are
    packed as codes are, or float [.., blocks]: those being learned."""
    if codes.shape[-2] != blocks or codes.dim() < 3:
        codes = codes.unflatten(-1, (blocks, -1))
    found = unpacked(codes, bits, codes.shape[-1] * 8 // bits).to(dtype)
    if zeros is None:
        return found.sub_(1 << (bits - 1))
    if zeros.dtype == torch.uint8:
        zeros = unpacked(zeros, bits, blocks)
    return found.sub_(zeros.to(dtype).unsqueeze(-1))


class _Product(torch.autograd.Function):
    """x · Wᵀ, W = (codes − zeros) · scales of a block: what is kept for the gradients is x and the packed matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
        ctx.save_for_backward(x, codes, scales, zeros)
        ctx.bits = bits
        levels = _levels(codes, zeros, bits, scales.shape[1], x.dtype)
        return x @ levels.mul_(scales.to(x.dtype).unsqueeze(-1)).flatten(1).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, scales, zeros = ctx.saved_tensors
        levels = _levels(codes, zeros, ctx.bits, scales.shape[1], x.dtype)
        of_weights = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).view_as(levels)
        of_scales = torch.einsum("nbk,nbk->nb", of_weights, levels).to(scales.dtype)
        of_zeros = None
        if zeros is not None and ctx.needs_input_grad[3]:
            of_zeros = -of_weights.sum(-1, dtype=torch.float32) * scales
        of_x = gradient @ levels.mul_(scales.to(x.dtype).unsqueeze(-1)).flatten(1)
        return of_x, None, of_scales, of_zeros, None


def _packed_product(
    attributes: Attributes, x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None = None
) -> Tensor:
    scales = scales.view(len(codes), -1)
    return _Product.apply(x.to(attributes["precision"]), codes, scales, zeros, attributes["bits"]).float()


def _packed_rows(
    attributes: Attributes, codes: Tensor, ids: Tensor, scales: Tensor, zeros: Tensor | None = None
) -> Tensor:
    found, scale = functional.embedding(ids, codes), functional.embedding(ids, scales)
    zero = None if zeros is None else functional.embedding(ids, zeros)
    blocks = found.unflatten(-1, (scale.shape[-1], -1))
    return (_levels(blocks, zero, attributes["bits"], scale.shape[-1], torch.float32) * scale.unsqueeze(-1)).flatten(-2)


def _product(attributes: Attributes, x: Tensor, matrix: Tensor) -> Tensor:
    wanted = matrix.T if attributes.get("transB") else matrix
    return (x.to(attributes["precision"]) @ wanted.to(attributes["precision"])).float()


# --- the rest of a decoder --------------------------------------------------------------------------------------------


def _norm(attributes: Attributes, x: Tensor, gain: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + attributes["epsilon"]) * gain


def _layer_norm(attributes: Attributes, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(x, gain.shape, gain, bias, attributes["epsilon"])


def _after_sum(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    def computed(attributes: Attributes, x: Tensor, skip: Tensor, *weights: Tensor) -> tuple[Tensor | None, ...]:
        total = x + skip
        return norm(attributes, total, *weights), None, None, total

    return computed


def _attention(
    attributes: Attributes, q: Tensor, k: Tensor | None, v: Tensor | None, *rest: Tensor | None
) -> tuple[Tensor, ...]:
    """Causal, after no past; keys and values rounded to int8 where the graph caches them so. `rest` from past_key on:
    the tables of cosines and sines are the fifth and sixth, int8 scales the tenth and eleventh."""
    heads, kv_heads, (cos, sin) = attributes["num_heads"], attributes["kv_num_heads"], rest[4:6]
    if k is None or v is None:  # one matrix makes all three
        channels = q.shape[-1] // (heads + 2 * kv_heads)
        q, k, v = q.split([heads * channels, kv_heads * channels, kv_heads * channels], -1)
    counts = (heads, kv_heads, kv_heads)
    q, k, v = (part.unflatten(-1, (n, -1)).transpose(1, 2) for part, n in zip((q, k, v), counts, strict=True))
    q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
    if len(rest) > 10:
        k, v = (_rounded(part, scale) for part, scale in zip((k, v), rest[9:11], strict=True))
    with sdpa_kernel(_REPEATABLE[q.device.type]):
        mixed = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=attributes["scale"], enable_gqa=heads != kv_heads
        )
    return mixed.transpose(1, 2).flatten(2), k, v


def _rotated(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Rotary positions, halves side by side, of the first channels of [batch, heads, tokens, channels]."""
    assert cos is not None and sin is not None
    cos, sin = (table[: x.shape[2]] for table in (cos, sin))
    pairs = cos.shape[-1]
    first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def _rounded(x: Tensor, scale: Tensor | None) -> Tensor:
    """int8 under a scale per channel; gradients pass as if nothing were rounded."""
    assert scale is not None
    return x + ((x / scale).round().clamp(-128, 127) * scale - x).detach()


def _taken(attributes: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = attributes.get("axis", 0) % x.dim()
    return x.index_select(axis, indices.flatten()).reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _shaped(_: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    wanted = [x.shape[place] if size == 0 else size for place, size in enumerate(shape.tolist())]
    return x.reshape(wanted)


def _parts(attributes: Attributes, x: Tensor, sizes: Tensor | None = None) -> Sequence[Tensor]:
    if sizes is None:
        return x.chunk(attributes["num_outputs"], attributes["axis"])
    return x.split(sizes.tolist(), attributes["axis"])


def _ascending(_: Attributes, x: Tensor, __: Tensor) -> tuple[Tensor, Tensor]:
    """TopK of all of [values], smallest first; equal ones in their order."""
    values, order = x.sort(stable=True)
    return values, order


_OPERATORS: dict[str, Callable[..., Any]] = {
    "Abs": lambda _, x: x.abs(),
    "Add": lambda _, x, y: x + y,
    "ArgMax": lambda attributes, x: x.argmax(attributes["axis"], bool(attributes["keepdims"])),
    "Cast": lambda attributes, x: x.to(_TYPES[attributes["to"]]),
    "Concat": lambda attributes, *parts: torch.cat(parts, attributes["axis"]),
    "FusedMatMul": _product,
    "Gather": _taken,
    "GatherBlockQuantized": _packed_rows,
    "GatherND": lambda _, x, places: x[tuple(places.T)],
    "Gemm": _product,
    "Greater": lambda _, x, y: x > y,
    "GroupQueryAttention": _attention,
    "Identity": lambda _, x: x,
    "LayerNormalization": _layer_norm,
    "MatMul": _product,
    "MatMulNBits": _packed_product,
    "Max": lambda _, x, y: x.maximum(y),
    "Mul": lambda _, x, y: x * y,
    "NonZero": lambda _, x: x.nonzero().T,
    "OneHot": lambda _, x, count, values: values[functional.one_hot(x, int(count))],
    "QuickGelu": lambda attributes, x: x * torch.sigmoid(attributes["alpha"] * x),
    "ReduceMax": lambda attributes, x, axes: x.amax(axes.tolist(), keepdim=bool(attributes["keepdims"])),
    "ReduceSum": lambda attributes, x, axes: x.sum(axes.tolist(), keepdim=bool(attributes.get("keepdims", 1))),
    "Reshape": _shaped,
    "Shape": lambda attributes, x: torch.tensor(x.shape)[attributes.get("start", 0) : attributes.get("end")],
    "SimplifiedLayerNormalization": _norm,
    "SkipLayerNormalization": _after_sum(_layer_norm),
    "SkipSimplifiedLayerNormalization": _after_sum(_norm),
    "Softmax": lambda attributes, x: x.softmax(attributes["axis"]),
    "Split": _parts,
    "Squeeze": lambda _, x: x.squeeze(),
    "Sub": lambda _, x, y: x - y,
    "TopK": _ascending,
    "Transpose": lambda attributes, x: x.permute(attributes["perm"]),
    "Unsqueeze": lambda _, x, axes: x.unsqueeze(int(axes)),
    "Where": lambda _, condition, x, y: torch.where(condition, x, y),
}
