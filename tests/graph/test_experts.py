"""A mixture's nodes: SparseMixer against its definition, token by token, and experts that no token wakes."""

from __future__ import annotations

import math

import numpy as np
import onnxruntime as ort
import pytest
import torch

from pipeline.graph.experts import mix_experts, sparse_mixer
from pipeline.graph.nodes import MICROSOFT, GraphWriter, value_info
from pipeline.parity import phimoe

EXPERTS, HIDDEN, JITTER = 16, 32, 0.01
RNG = np.random.default_rng(0)


def by_definition(logits: list[float], jitter: float) -> list[float]:
    """Two choices without replacement; each one's share of the softmax over what is within 2 · jitter of it."""
    weights, left = [0.0] * len(logits), list(range(len(logits)))
    for _ in range(2):
        best = max(left, key=lambda expert: logits[expert])
        top = logits[best]
        near = [expert for expert in left if top - logits[expert] <= 2 * jitter * max(abs(logits[expert]), top)]
        weights[best] = 1 / math.fsum(math.exp(logits[expert] - top) for expert in near)
        left.remove(best)
    return weights


LOGITS = {
    "apart": RNG.standard_normal((50, EXPERTS)),
    "close together": 1 + RNG.standard_normal((50, EXPERTS)) / 50,
    "negative": -1 - np.abs(RNG.standard_normal((50, EXPERTS))) / 50,
    "equal": np.zeros((3, EXPERTS)),
    "whole numbers": np.round(5 * RNG.standard_normal((50, EXPERTS))),
    "far apart": 1e4 * RNG.standard_normal((50, EXPERTS)),
}


def session(writer: GraphWriter, outputs: dict[str, int]) -> ort.InferenceSession:
    writer.outputs = [value_info(name, 1, [None] * rank) for name, rank in outputs.items()]
    return ort.InferenceSession(writer.model("mixture").SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", LOGITS)
def test_sparse_mixer_as_nodes_as_reference_as_defined_and_as_transformers_has_it(name: str) -> None:
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    logits = LOGITS[name].astype(np.float32)
    want = np.array([by_definition(row, JITTER) for row in logits.tolist()])
    writer = GraphWriter()
    writer.inputs = [value_info("router", 1, ["tokens", EXPERTS])]
    weights = sparse_mixer(writer, "router", EXPERTS, JITTER)
    (got,) = session(writer, {weights: 2}).run(None, {"router": logits})
    theirs = np.zeros_like(logits)
    shares, chosen = sparsemixer(torch.tensor(logits), JITTER, training=False)
    np.put_along_axis(theirs, chosen.numpy(), shares.numpy(), 1)
    for found in (got, phimoe.sparse_mixer(torch.tensor(logits), JITTER).numpy(), theirs):
        np.testing.assert_allclose(found, want, atol=1e-6)
    if name == "close together":
        assert ((want > 0) & (want < 1)).sum() > 50  # several experts are near one another


@pytest.mark.parametrize(("batch", "tokens"), [(2, 37), (1, 1), (3, 1)])
def test_experts_see_their_tokens_only(batch: int, tokens: int) -> None:
    """A token's sum is its own experts', whatever the batch; most experts are woken by none of a few tokens."""
    writer = GraphWriter()
    sizes = ["batch", "sequence", HIDDEN]
    writer.inputs = [value_info("weights", 1, ["tokens", EXPERTS]), value_info("x", 1, sizes)]
    matrices = RNG.standard_normal((EXPERTS, HIDDEN, HIDDEN)).astype(np.float32)

    def run(rows: str, expert: int) -> str:
        matrix = writer.constant(f"matrix.{expert}", matrices[expert])
        return writer.node("FusedMatMul", [rows, matrix], f"product.{expert}", MICROSOFT, transB=1)

    mix_experts(writer, "x", "weights", HIDDEN, EXPERTS, "block", run)
    rows = [f"block.{expert}.rows" for expert in range(EXPERTS)]
    model = session(writer, {"block": 3} | dict.fromkeys(rows, 3))
    x = RNG.standard_normal((batch, tokens, HIDDEN)).astype(np.float32)
    flat = x.reshape(-1, HIDDEN)
    logits = torch.tensor(RNG.standard_normal((batch * tokens, EXPERTS)).astype(np.float32))
    weights = phimoe.sparse_mixer(logits, JITTER).numpy()
    got, *seen = model.run(None, {"weights": weights, "x": x})
    for expert, values in enumerate(seen):
        np.testing.assert_array_equal(values, flat[None, weights[:, expert] > 0])
    want = sum(weights[:, expert, None] * (flat @ matrices[expert].T) for expert in range(EXPERTS))
    np.testing.assert_allclose(got, np.reshape(want, x.shape), rtol=1e-5, atol=1e-5)
    assert any(values.size == 0 for values in seen) or tokens > 30
