"""The independent reference of a Phi mixture of experts, in plain torch: Optimum exports none.

transformers 4.57 cannot take its place: it computes head_dim as hidden / heads, and Phi-tiny-MoE's is another. The
weight of an expert is SparseMixer's in inference (arXiv 2310.00811; without replacement as in GRIN, arXiv 2409.12136):
the largest logit m is the first choice, and its weight is its share of the softmax over all logits s with
(m - s) / max(|s|, m) <= 2 * jitter. The second choice is made likewise of what is left. The two do not sum to 1.

Runs in a process of its own, as Optimum's exporter does:

    python -m pipeline.parity.phimoe WEIGHTS LAYERS VOCAB IDS PROMPT LOGITS

computes the first LAYERS layers with the first VOCAB rows of the head. Weights are read by the safetensors library, one
at a time.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from pipeline.parity.optimum_export import reference_config

Cache = list[tuple[Tensor, Tensor]]


def sparse_mixer(logits: Tensor, jitter: float, choices: int = 2) -> Tensor:
    """Weights of the chosen experts, 0 of all others: float32 [tokens, experts] of logits [tokens, experts]."""
    weights, left = torch.zeros_like(logits), logits.clone()
    for _ in range(choices):
        largest, chosen = left.max(-1, keepdim=True)
        far = (largest - logits) / logits.abs().maximum(largest) > 2 * jitter
        shares = left.masked_fill(far, -torch.inf).softmax(-1)
        weights.scatter_(-1, chosen, shares.gather(-1, chosen))
        left.scatter_(-1, chosen, -torch.inf)
    return weights


class Found(NamedTuple):
    """logits, float32 [batch, tokens, vocab]; keys and values of each layer."""

    logits: Tensor
    past_key_values: Cache


class PhiMoE:
    """The model of a folder's safetensors files and a transformers configuration, in float32, called as its models are.

    Attributes:
        seen: what each matrix multiplied last, by the matrix's name.
    """

    def __init__(self, folder: Path, config: Any):
        self.config, self.seen = config, dict[str, Tensor]()
        files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads

    def __call__(self, ids: Tensor, past_key_values: Cache | None = None, logits_to_keep: int = 0, **_: Any) -> Found:
        x, cache = self._weight("model.embed_tokens.weight")[ids], Cache()
        for layer in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            past = past_key_values[layer] if past_key_values else None
            mixed, kept = self._attention(self._norm(x, f"{prefix}input_layernorm"), f"{prefix}self_attn.", past)
            cache.append(kept)
            x = x + mixed
            x = x + self._experts(self._norm(x, f"{prefix}post_attention_layernorm"), f"{prefix}block_sparse_moe.")
        x = self._norm(x, "model.norm")[:, -logits_to_keep:]
        return Found(self._linear(x, "lm_head", self.config.vocab_size), cache)

    def _weight(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name).float()

    def _linear(self, x: Tensor, name: str, rows: int | None = None) -> Tensor:
        self.seen[f"{name}.weight"] = x
        bias = self._weight(f"{name}.bias")[:rows] if f"{name}.bias" in self._files else None
        return functional.linear(x, self._weight(f"{name}.weight")[:rows], bias)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        gain, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        return functional.layer_norm(x, gain.shape, gain, bias, self.config.rms_norm_eps)

    def _attention(self, x: Tensor, prefix: str, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Any]:
        counts = {"q_proj": self.heads, "k_proj": self.kv_heads, "v_proj": self.kv_heads}
        parts = (self._linear(x, prefix + name).unflatten(-1, (heads, -1)) for name, heads in counts.items())
        q, k, v = (part.transpose(1, 2) for part in parts)
        start = past[0].shape[2] if past else 0
        q, k = self._rotated(q, start), self._rotated(k, start)
        if past:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        tokens, total = q.shape[2], k.shape[2]
        visible = torch.ones(tokens, total, dtype=torch.bool).tril(total - tokens)
        repeated = (part.repeat_interleave(self.heads // self.kv_heads, 1) for part in (k, v))
        keys, values = repeated
        scores = (q @ keys.transpose(2, 3) / self.head_dim**0.5).masked_fill(~visible, -torch.inf)
        mixed = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        return self._linear(mixed, f"{prefix}o_proj"), (k, v)

    def _rotated(self, x: Tensor, start: int) -> Tensor:
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        positions = torch.arange(start, start + x.shape[2], dtype=torch.float32)
        angles = torch.outer(positions, 1 / self.config.rope_theta**pairs)
        cos, sin = (torch.cat([table, table], -1) for table in (angles.cos(), angles.sin()))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def _experts(self, x: Tensor, prefix: str) -> Tensor:
        rows = x.flatten(0, 1)
        weights = sparse_mixer(self._linear(rows, f"{prefix}gate"), self.config.router_jitter_noise)
        total = torch.zeros_like(rows)
        for expert in range(self.config.num_local_experts):
            own, at = torch.nonzero(weights[:, expert])[:, 0], f"{prefix}experts.{expert}."
            gate, up = self._linear(rows[own], f"{at}w1"), self._linear(rows[own], f"{at}w3")
            total[own] += weights[own, expert, None] * self._linear(functional.silu(gate) * up, f"{at}w2")
        return total.view_as(x)


def main(weights: Path, layers: int, vocab: int, ids: Path, prompt_tokens: int, logits: Path) -> None:
    """Write the logits of a file of ids: the first `prompt_tokens` at once, then one at a time with the cache."""
    model, rows = PhiMoE(weights, reference_config(weights, layers, vocab)), list[Tensor]()
    past: Cache | None = None
    tokens = torch.from_numpy(np.load(ids))
    with torch.no_grad():
        for step in (tokens[:prompt_tokens], *tokens[prompt_tokens:, None]):
            found, past = model(step[None], past)
            rows.append(found[0])
    np.save(logits, torch.cat(rows).numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]), Path(sys.argv[6]))
