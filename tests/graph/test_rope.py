"""Rotary tables against their definition, and against transformers' own to the last bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.checkpoint.architecture import Rope
from pipeline.graph.rope import rope_tables
from tests.real_configs import REAL_CONFIGS, architecture_of


def test_by_hand() -> None:
    cos, sin = rope_tables(Rope(theta=100.0, dims=4, original_max_position=8), positions=3)
    assert cos.dtype == sin.dtype == np.float32
    # frequencies 100^0 = 1 and 100^(-2/4) = 0.1
    np.testing.assert_allclose(cos, np.cos([[0, 0], [1, 0.1], [2, 0.2]]), atol=1e-7)
    np.testing.assert_allclose(sin, np.sin([[0, 0], [1, 0.1], [2, 0.2]]), atol=1e-7)


def test_longrope_divides_frequencies_and_scales_by_the_attention_factor() -> None:
    rope = Rope(theta=100.0, dims=4, original_max_position=8, attention_factor=1.25)
    cos, sin = rope_tables(rope, positions=3, factor=(2.0, 5.0))
    np.testing.assert_allclose(cos, 1.25 * np.cos([[0, 0], [0.5, 0.02], [1, 0.04]]), atol=1e-6)
    np.testing.assert_allclose(sin, 1.25 * np.sin([[0, 0], [0.5, 0.02], [1, 0.04]]), atol=1e-6)


@pytest.mark.parametrize("theta", [10_000.0, 250_000.0, 640_000.0])
def test_equals_transformers_at_far_positions(theta: float) -> None:
    """Angles are rounded to float32: at position 32,767 a table in float64 would differ in the third digit."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_theta=theta, max_position_embeddings=32_768)
    positions = torch.tensor([[0, 1, 4095, 32_767]])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    ours = rope_tables(Rope(theta, 128, 32_768), positions=32_768)
    for got, want in zip(ours, (cos, sin), strict=True):
        np.testing.assert_allclose(got[positions[0].numpy()], want[0, :, :64].numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ["llama-3-2-1b", "llama-3-1-8b"])
def test_llama3_equals_transformers_at_far_positions(name: str, tmp_path: Path) -> None:
    """High frequencies are kept to the bit; the interpolated ones, at most 2π · 4 / 8192, differ in the last bit."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = architecture_of(name, tmp_path).rope
    assert rope.short_factor is not None and rope.long_factor is None
    assert {min(rope.short_factor), max(rope.short_factor)} == {1.0, REAL_CONFIGS[name]["rope_scaling"]["factor"]}
    positions = [0, 1, 8191, 131_071]
    cos, sin = LlamaRotaryEmbedding(LlamaConfig(**REAL_CONFIGS[name]))(torch.zeros(1), torch.tensor([positions]))
    for got, want in zip(rope_tables(rope, 131_072, rope.short_factor), (cos, sin), strict=True):
        np.testing.assert_allclose(got[positions], want[0, :, : rope.dims // 2].numpy(), atol=1e-4)
