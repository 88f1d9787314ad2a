"""Experts that few tokens woke: what they lack comes from their layer's others, and no more than that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.calibrate.rare import experts_inputs, needed, top_up
from pipeline.checkpoint.architecture import Architecture
from pipeline.quantize.factor import expected_damping
from pipeline.stages.calibrate import rare_experts
from tests.planning.test_experts import TINY
from tests.real_configs import architecture_of

CHANNELS = 8
ENOUGH = needed(CHANNELS)


def sums(*counts: int) -> tuple[dict[str, np.ndarray], dict[str, int], list[np.ndarray]]:
    """Σ x·xᵀ and tokens of experts that so many tokens woke, and their x."""
    rng = np.random.default_rng(0)
    seen = [rng.normal(0, 1 + index, (count, CHANNELS)).astype(np.float32) for index, count in enumerate(counts)]
    names = [f"layers.0.experts.{index}.mlp" for index in range(len(counts))]
    return {n: x.T @ x for n, x in zip(names, seen, strict=True)}, dict(zip(names, counts, strict=True)), seen


def test_the_needed_tokens_are_those_of_a_damping_of_1() -> None:
    assert expected_damping(CHANNELS, ENOUGH) == 1


def test_what_an_expert_lacks_is_the_layers_mean() -> None:
    products, tokens, seen = sums(ENOUGH, ENOUGH - 20, 0, ENOUGH + 5)
    before = {name: total.copy() for name, total in products.items()}
    every = np.concatenate(seen)
    mean = every.T @ every / len(every)
    names = list(products)
    assert top_up(products, tokens, names) == names[1:3]
    assert tokens == dict(zip(names, [ENOUGH, ENOUGH, ENOUGH, ENOUGH + 5], strict=True))
    for name in (names[0], names[3]):
        np.testing.assert_array_equal(products[name], before[name])
    np.testing.assert_allclose(products[names[1]], before[names[1]] + 20 * mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(products[names[2]] / ENOUGH, mean, rtol=1e-4, atol=1e-4)
    assert all((total == total.T).all() for total in products.values())


def test_inputs_that_are_alike(tmp_path: Path) -> None:
    assert experts_inputs(architecture_of("mimo-8b", tmp_path).body(0)) == []


def test_rare_experts_are_named() -> None:
    """4,096 channels need 16,384 tokens, 448 need 1,792."""
    model = replace(TINY, layers=2, experts=4)
    seen = {
        "layers.0.experts.tokens": np.array([20_000, 5_000, 10, 2_000]),
        "layers.1.experts.tokens": np.full(4, 17_000),
    }
    first, last = rare_experts(seen, model)
    assert first == (
        "  input mlp of experts: 3 of 8 saw fewer than 16,384 tokens and got the rest from their layer's others; "
        "least: 10 (layers.0.experts 2)"
    )
    assert last.startswith("  input down of experts: 1 of 8 saw fewer than 1,792 tokens")
    assert rare_experts({}, architecture_without_experts()) == []


def architecture_without_experts() -> Architecture:
    return replace(TINY, family="llama", experts=0, biases=())
