"""The decoder graph of an architecture, as onnxruntime-genai runs it on phones.

Inputs input_ids, attention_mask [batch, total] and past_key_values.N.{key,value} [batch, kv_heads, past, head_dim];
outputs logits [batch, sequence, vocab] and present.N.{key,value}. Attention is GroupQueryAttention with the rotary
embedding inside; norms are fused with the residual sum; products are FusedMatMul(transB) so that weights stay in the
[rows, columns] order of the checkpoint and are referenced where they lie. No quantization mathematics here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from pipeline.checkpoint.architecture import Architecture, Matrix
from pipeline.checkpoint.tensors import TensorRef
from pipeline.files import write_bytes
from pipeline.graph.experts import mix_experts, sparse_mixer
from pipeline.graph.limits import check_context
from pipeline.graph.nodes import MICROSOFT, STORED, GraphWriter, external_tensor, value_info
from pipeline.graph.rope import rope_tables

ROPE_FILE = "rope.data"
_ACTIVATION_COPIES = 4.5
"""Floats per token of a layer's run for each of 7·width + intermediate, measured at widths of 1,024 to 5,120."""


def activation_bytes(architecture: Architecture, tokens: int) -> int:
    """Memory of the activations while so many tokens run through a layer, float32; its width is that of the residual,
    or of all heads where that is more."""
    width = max(architecture.hidden, architecture.heads * architecture.head_dim)
    return round(4 * _ACTIVATION_COPIES * (7 * width + architecture.intermediate) * tokens)


def build_decoder(
    architecture: Architecture, checkpoint: Mapping[str, TensorRef], context: int
) -> tuple[onnx.ModelProto, bytes]:
    """The full-precision graph for at most `context` tokens, and the bytes of its rotary tables (`ROPE_FILE`).

    Every weight is a reference into the checkpoint's own files. Raises GraphError as `check_context`.
    """
    check_context(architecture, context)
    decoder = Decoder(architecture, checkpoint, context)
    return decoder.write(), bytes(decoder.rope_data)


def save_decoder(folder: Path, model: onnx.ModelProto, rope_data: bytes, name: str) -> None:
    """Write the graph as folder/name and its rotary tables beside it, atomically."""
    write_bytes(folder / ROPE_FILE, rope_data)
    write_bytes(folder / name, model.SerializeToString(deterministic=True))


class Decoder(GraphWriter):
    """Writes one architecture's nodes; each method is one part of a transformer and returns its output's name."""

    def __init__(self, architecture: Architecture, checkpoint: Mapping[str, TensorRef], context: int):
        super().__init__()
        self.arch = architecture
        self.checkpoint = checkpoint
        self.context = context
        self.rope_data = bytearray()

    def write(self) -> onnx.ModelProto:
        arch = self.arch
        self.inputs += [
            value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
            *self.cache("past_key_values", "past"),
        ]
        self.attention_lengths()
        self.cos, self.sin = self.rope()
        # The first norm has nothing to add; from then on each norm adds the block before it to the residual.
        residual = self.embedding()
        pending = None
        for layer in range(arch.layers):
            prefix = arch.block(layer)
            normed, residual = self.norm(residual, pending, f"{prefix}.input_layernorm")
            pending = self.attention(normed, layer)
            normed, residual = self.norm(residual, pending, f"{prefix}.post_attention_layernorm")
            pending = self.mlp(normed, layer)
        normed, _ = self.norm(residual, pending, arch.final_norm)
        self.linear(normed, arch.head, "logits")
        logits = value_info("logits", TensorProto.FLOAT, ["batch", "sequence", arch.vocab])
        self.outputs += [logits, *self.cache("present", "total")]
        return self.model(arch.family)

    # --- weights ---

    def stored(self, name: str) -> str:
        """The checkpoint's tensor in its own dtype, as a reference."""
        ref = self.checkpoint[name]
        self.initializers[name] = external_tensor(name, STORED[ref.dtype], ref.shape, ref.file, ref.offset, ref.length)
        return name

    def weight(self, name: str) -> str:
        """The checkpoint's tensor as float32."""
        self.stored(name)
        if self.checkpoint[name].dtype == "F32":
            return name
        return self.node("Cast", [name], f"{name}/float32", to=TensorProto.FLOAT)

    def linear(self, x: str, matrix: Matrix, output: str) -> str:
        """x · Wᵀ, plus the bias where the matrix has one."""
        product, biased = output, f"{output}/biased"
        if matrix.bias and matrix.role == "head":  # whose output is the graph's
            product, biased = f"{output}/product", output
        self.node("FusedMatMul", [x, self.weight(matrix.name)], product, MICROSOFT, transB=1)
        return self.node("Add", [product, self.weight(matrix.bias)], biased) if matrix.bias else product

    # --- parts of the transformer ---

    def embedding(self) -> str:
        name = "model.embed_tokens.weight"
        rows = self.node("Gather", [self.stored(name), "input_ids"], "embedding")
        if self.checkpoint[name].dtype == "F32":
            return rows
        return self.node("Cast", [rows], "embedding/float32", to=TensorProto.FLOAT)

    def norm(self, residual: str, pending: str | None, name: str) -> tuple[str, str]:
        """The family's norm of residual + pending: (normed, the sum)."""
        kind = {"rms": "SimplifiedLayerNormalization", "layer": "LayerNormalization"}[self.arch.traits.norm]
        weights, epsilon = [self.weight(part) for part in self.arch.norm(name)], self.arch.epsilon
        if pending is None:
            self.node(kind, [residual, *weights], name, axis=-1, epsilon=epsilon)
            return name, residual
        added, total = [residual, pending, *weights], f"{name}/sum"
        self.node(f"Skip{kind}", added, name, MICROSOFT, ("", "", total), epsilon=epsilon)
        return name, total

    def attention(self, x: str, layer: int) -> str:
        arch, prefix = self.arch, f"layers.{layer}"
        *projections, output = (matrix for matrix in arch.body(layer) if matrix.input.endswith(("attention", "output")))
        qkv = [self.linear(x, matrix, f"{prefix}.{matrix.role}") for matrix in projections]
        if arch.traits.head_norms:
            qkv[:2] = [self.head_norm(qkv[at], f"model.{prefix}.self_attn.{'qk'[at]}_norm") for at in (0, 1)]
        past, present = ([f"{at}.{layer}.{part}" for part in ("key", "value")] for at in ("past_key_values", "present"))
        inputs = [*qkv, *[""] * (3 - len(qkv)), *past, "seqlens_k", "total_sequence_length", self.cos, self.sin]
        heads = {"num_heads": arch.heads, "kv_num_heads": arch.kv_heads, "scale": arch.head_dim**-0.5}
        rotary = {"do_rotary": 1, "rotary_interleaved": 0}
        mixed = self.node("GroupQueryAttention", inputs, f"{prefix}.attention", MICROSOFT, present, **heads, **rotary)
        return self.linear(mixed, output, f"{prefix}.{output.role}")

    def head_norm(self, x: str, name: str) -> str:
        """RMSNorm of each head's channels, float32 [batch, sequence, heads · head_dim] as it was. GroupQueryAttention
        takes these norms as inputs, but not on CPU (ONNX Runtime 1.31)."""
        heads, whole = ([0, 0, -1, self.arch.head_dim], [0, 0, -1])
        split = self.node("Reshape", [x, self.constant("heads", np.array(heads, np.int64))], f"{name}/heads")
        inputs = [split, self.weight(f"{name}.weight")]
        normed = self.node("SimplifiedLayerNormalization", inputs, f"{name}/normed", axis=-1, epsilon=self.arch.epsilon)
        return self.node("Reshape", [normed, self.constant("channels", np.array(whole, np.int64))], name)

    def mlp(self, x: str, layer: int) -> str:
        """The family's kind of MLP."""
        prefix, matrices = f"layers.{layer}", [item for item in self.arch.body(layer) if item.kind in {"mlp", "down"}]
        return self.experts(x, layer, matrices) if self.arch.experts else self.gated(x, matrices, prefix)

    def gated(self, x: str, matrices: list[Matrix], prefix: str) -> str:
        """down(silu(gate(x)) · up(x)), as in Shazeer 2020, "GLU Variants Improve Transformer"."""
        *projections, down = matrices
        parts = [self.linear(x, matrix, f"{prefix}.{matrix.role}") for matrix in projections]
        if self.arch.traits.mlp == "fused":
            halves = (f"{prefix}.gate", f"{prefix}.up")
            self.node("Split", parts, halves[0], more=halves[1:], axis=-1, num_outputs=2)
            parts = list(halves)
        silu = self.node("QuickGelu", [parts[0]], f"{prefix}.silu", MICROSOFT, alpha=1.0)
        product = self.node("Mul", [silu, parts[1]], f"{prefix}.gated")
        return self.linear(product, down, f"{prefix}.{down.role}")

    def experts(self, x: str, layer: int, matrices: list[Matrix]) -> str:
        """A mixture of gated MLPs (`pipeline.graph.experts`). The router's product is a Gemm: nobody quantizes it."""
        arch, prefix = self.arch, f"layers.{layer}"
        flat = self.constant("router.flat", np.array([-1, arch.hidden], np.int64))
        rows = self.node("Reshape", [x, flat], f"{prefix}.router.rows")
        logits = self.node("Gemm", [rows, self.weight(arch.router(layer))], f"{prefix}.router", transB=1)
        weights = sparse_mixer(self, logits, arch.experts, arch.router_jitter)
        own = [[matrix for matrix in matrices if matrix.expert == expert] for expert in range(arch.experts)]

        def run(rows: str, expert: int) -> str:
            return self.gated(rows, own[expert], f"{prefix}.experts.{expert}")

        return mix_experts(self, x, weights, arch.hidden, arch.experts, f"{prefix}.experts", run)

    # --- positions ---

    def attention_lengths(self) -> None:
        """GroupQueryAttention's seqlens_k (tokens so far minus one, per sequence) and total_sequence_length."""
        one, axis = self.constant("one", np.array(1, np.int64)), self.constant("axis_1", np.array([1], np.int64))
        total = self.node("ReduceSum", ["attention_mask", axis], "mask_total", keepdims=0)
        last = self.node("Sub", [total, one], "mask_last")
        self.node("Cast", [last], "seqlens_k", to=TensorProto.INT32)
        shape = self.node("Shape", ["attention_mask"], "mask_shape", start=1, end=2)
        scalar = self.node("Squeeze", [shape], "mask_length")
        self.node("Cast", [scalar], "total_sequence_length", to=TensorProto.INT32)

    def rope(self) -> tuple[str, str]:
        """Names of the cos and sin tables in force: LongRoPE picks by the total length, as transformers does."""
        rope = self.arch.rope
        if rope.long_factor is None:
            return self.tables("", self.context, rope.short_factor)
        short = self.tables("short_", min(self.context, rope.original_max_position), rope.short_factor)
        if self.context <= rope.original_max_position:
            return short
        long = self.tables("long_", self.context, rope.long_factor)
        limit = self.constant("original_max_position", np.array(rope.original_max_position, np.int32))
        is_long = self.node("Greater", ["total_sequence_length", limit], "is_long")
        branches = {"then_branch": _identities("long", long), "else_branch": _identities("short", short)}
        self.node("If", [is_long], "cos_in_force", more=("sin_in_force",), **branches)
        return "cos_in_force", "sin_in_force"

    def tables(self, prefix: str, positions: int, factor: tuple[float, ...] | None) -> tuple[str, str]:
        names = f"{prefix}cos_cache", f"{prefix}sin_cache"
        for name, table in zip(names, rope_tables(self.arch.rope, positions, factor), strict=True):
            data = table.tobytes()
            place = ROPE_FILE, len(self.rope_data), len(data)
            self.initializers[name] = external_tensor(name, TensorProto.FLOAT, table.shape, *place)
            self.rope_data += data
        return names

    def cache(self, prefix: str, tokens: str) -> list[onnx.ValueInfoProto]:
        """Keys and values of every layer, inputs or outputs."""
        shape: list[int | str] = ["batch", self.arch.kv_heads, tokens, self.arch.head_dim]
        names = (f"{prefix}.{layer}.{part}" for layer in range(self.arch.layers) for part in ("key", "value"))
        return [value_info(name, TensorProto.FLOAT, shape) for name in names]


def _identities(name: str, sources: tuple[str, str]) -> onnx.GraphProto:
    """A branch of an If that passes on two values of the outer graph."""
    outputs = [f"{name}_{part}" for part in ("cos", "sin")]
    nodes = [helper.make_node("Identity", [source], [out]) for source, out in zip(sources, outputs, strict=True)]
    infos = [value_info(out, TensorProto.FLOAT, ["positions", "pairs"]) for out in outputs]
    return helper.make_graph(nodes, name, [], infos)
