"""A Llama decoder in plain torch, in pieces that a cut can look between; its weights are named as in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]
EMBEDDING, FINAL_NORM = "model.embed_tokens.weight", "model.norm.weight"


@dataclass(frozen=True)
class Shape:
    """What the weights' shapes do not say. The table of embeddings is the head too."""

    layers: int
    heads: int
    kv_heads: int
    eps: float
    theta: float

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From a config.json."""
        names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta")
        return cls(*(config[name] for name in names))


def norm_gain(layer: int, part: str) -> str:
    """Name of the gain before a layer's `attention` or `mlp`."""
    return f"model.layers.{layer}.{'input_layernorm' if part == 'attention' else 'post_attention_layernorm'}.weight"


def matrix(layer: int, name: str) -> str:
    """Name of a layer's matrix: q, k, v, o, gate, up or down."""
    return f"model.layers.{layer}.{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj.weight"


def normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm of [..., channels]."""
    return F.rms_norm(x, (x.shape[-1],), gain, eps)


def attended(query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
    """What the heads give to o_proj, [windows, tokens, heads · head_dim], from the products of q, k and v."""
    query, key, value = (
        states.unflatten(-1, (heads, -1)).transpose(1, 2)
        for states, heads in ((query, shape.heads), (key, shape.kv_heads), (value, shape.kv_heads))
    )
    cos, sin = _rotary(query.shape[-2], query.shape[-1], shape.theta, query.dtype)
    found = F.scaled_dot_product_attention(
        _rotated(query, cos, sin), _rotated(key, cos, sin), value, is_causal=True, enable_gqa=True
    )
    return found.transpose(1, 2).flatten(2)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """What the MLP gives to down_proj."""
    return F.silu(gate) * up


def layer_forward(x: Tensor, weights: Weights, layer: int, shape: Shape) -> Tensor:
    """The residual stream, [windows, tokens, channels], after a layer."""

    def product(name: str, states: Tensor) -> Tensor:
        return F.linear(states, weights[matrix(layer, name)])

    z = normed(x, weights[norm_gain(layer, "attention")], shape.eps)
    x = x + product("o", attended(*(product(name, z) for name in "qkv"), shape))
    z = normed(x, weights[norm_gain(layer, "mlp")], shape.eps)
    return x + product("down", gated(product("gate", z), product("up", z)))


def hidden_states(ids: Tensor, weights: Weights, shape: Shape) -> list[Tensor]:
    """The residual stream before the first layer and after each, [windows, tokens, channels]; ids [windows, tokens]."""
    states = [F.embedding(ids, weights[EMBEDDING])]
    for layer in range(shape.layers):
        states.append(layer_forward(states[-1], weights, layer, shape))
    return states


def logits(x: Tensor, weights: Weights, shape: Shape) -> Tensor:
    """[..., vocabulary] from the residual stream after the last layer."""
    return F.linear(normed(x, weights[FINAL_NORM], shape.eps), weights[EMBEDDING])


def _rotary(tokens: int, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.arange(tokens)[:, None] * theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = states.chunk(2, -1)
    return states * cos + torch.cat([-high, low], -1) * sin
