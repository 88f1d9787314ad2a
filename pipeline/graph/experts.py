"""A mixture of experts as nodes: which experts a token wakes, and the sum of what they say.

Every expert reads its own tokens only, so the input of its products, float32 [1, tokens of the expert, columns], shows
what it is used for, and may be empty. Rows are gathered once, in the order of experts and then of tokens, split among
the experts, and put back by sorting: a token's rows come to lie side by side, and their sum has a fixed order.

Names of layer N, with T = batch · sequence tokens and E experts, on which a rewriter that replaces the block relies:

    model.layers.N.post_attention_layernorm   its input, [batch, sequence, hidden]
    layers.N.router                           the router's logits, [T, E], always in full precision
    layers.N.router.weights                   of the experts in a token's sum, 0 for all but those chosen, [T, E]
    layers.N.experts                          its output, [batch, sequence, hidden]

Nodes between the weights and the output are named `layers.N.experts…`, those before them `layers.N.router…`; casts of
stored weights have the names of these. Products of expert E: `layers.N.experts.E.{expert_gate,expert_up,expert_down}`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from pipeline.graph.nodes import GraphWriter

CHOICES = 2
"""Experts of a token; SparseMixer is defined for two."""


def sparse_mixer(writer: GraphWriter, logits: str, experts: int, jitter: float) -> str:
    """Weights of the experts, [tokens, experts] as the logits: two choices without replacement.

    The first is the largest logit m; its weight is its share of the softmax over the logits s that are no farther from
    it than 2 · jitter · max(|s|, m). The second is made likewise of what is left. The two do not sum to 1. SparseMixer
    in inference: Liu et al. 2023, arXiv 2310.00811, as GRIN uses it, arXiv 2409.12136.
    """
    sizes = writer.node("Abs", [logits], f"{logits}.sizes")
    never = writer.constant("never", np.array(-np.inf, np.float32))
    reach = writer.constant("router.reach", np.array(2 * jitter, np.float32))
    off_on = writer.constant("off_on", np.array([0, 1], np.float32))
    count, last = writer.constant("experts", np.array(experts)), writer.constant("last_axis", np.array([-1]))
    left, weights = logits, []
    for choice in ("first", "second"):
        name = f"{logits}.{choice}"
        largest = writer.node("ReduceMax", [left, last], f"{name}.largest", keepdims=1)
        distance = writer.node("Sub", [largest, logits], f"{name}.distance")
        scale = writer.node("Max", [sizes, largest], f"{name}.scale")
        limit = writer.node("Mul", [scale, reach], f"{name}.limit")
        far = writer.node("Greater", [distance, limit], f"{name}.far")
        near = writer.node("Where", [far, never, left], f"{name}.near")
        shares = writer.node("Softmax", [near], f"{name}.shares", axis=-1)
        chosen = writer.node("ArgMax", [left], f"{name}.expert", axis=-1, keepdims=0)
        mask = writer.node("OneHot", [chosen, count, off_on], f"{name}.mask", axis=-1)
        weights.append(writer.node("Mul", [shares, mask], f"{name}.weight"))
        taken = writer.node("Cast", [mask], f"{name}.taken", to=TensorProto.BOOL)
        left = writer.node("Where", [taken, never, left], f"{name}.left") if choice == "first" else left
    return writer.node("Add", weights, f"{logits}.weights")


def mix_experts(
    writer: GraphWriter, x: str, weights: str, hidden: int, experts: int, name: str, run: Callable[[str, int], str]
) -> str:
    """Σ weight · expert(x) over the chosen experts of each token, [batch, sequence, hidden] as x.

    `run` writes an expert's nodes: rows [1, tokens, hidden] and its number → rows of the same shape.
    """

    def whole(label: str, *values: int) -> str:
        return writer.constant(f"experts.{label}", np.array(values, np.int64))

    by_expert = writer.node("Transpose", [weights], f"{name}.weights", perm=[1, 0])
    places = writer.node("NonZero", [by_expert], f"{name}.places")  # of each choice: [expert, token], experts in order
    woken = writer.node("Cast", [by_expert], f"{name}.woken", to=TensorProto.BOOL)
    ones = writer.node("Cast", [woken], f"{name}.ones", to=TensorProto.INT64)
    counts = writer.node("ReduceSum", [ones, whole("tokens", 1)], f"{name}.counts", keepdims=0)
    token = writer.constant("experts.token", np.array(1, np.int64))
    tokens = writer.node("Gather", [places, token], f"{name}.tokens", axis=0)

    flat = writer.node("Reshape", [x, whole("flat", 1, -1, hidden)], f"{name}.flat")
    rows = writer.node("Gather", [flat, tokens], f"{name}.rows", axis=1)
    first, *others = (f"{name}.{expert}.rows" for expert in range(experts))
    writer.node("Split", [rows, counts], first, more=others, axis=1)
    said = [run(part, expert) for expert, part in enumerate([first, *others])]

    joined = writer.node("Concat", said, f"{name}.joined", axis=1)
    pairs = writer.node("Transpose", [places], f"{name}.pairs", perm=[1, 0])
    shares = writer.node("GatherND", [by_expert, pairs], f"{name}.shares")
    column = writer.node("Unsqueeze", [shares, whole("column", 1)], f"{name}.column")
    scaled = writer.node("Mul", [joined, column], f"{name}.scaled")
    slots = writer.node("Shape", [tokens], f"{name}.slots")
    writer.node("TopK", [tokens, slots], f"{name}.sorted", more=(order := f"{name}.order",), largest=0, sorted=1)
    sorted_rows = writer.node("Gather", [scaled, order], f"{name}.by_token", axis=1)
    grouped = writer.node("Reshape", [sorted_rows, whole("grouped", -1, CHOICES, hidden)], f"{name}.grouped")
    total = writer.node("ReduceSum", [grouped, whole("choices", 1)], f"{name}.total", keepdims=0)
    return writer.node("Reshape", [total, writer.node("Shape", [x], f"{name}.shape")], name)
