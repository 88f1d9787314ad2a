"""Level of parity: two exporters. Our full-precision graph against Optimum's own export of the same checkpoint.

A documented limit of the reference: Optimum traces the model, and tracing freezes LongRoPE's choice between short and
long factors at what its short dummy input needs. Beyond `original_max_position_embeddings` tokens its export computes
something else than transformers; the last test shows it, and that ours does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.checkpoint.architecture import Architecture, read_architecture
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.graph.decoder import build_decoder, save_decoder
from pipeline.parity import optimum_export
from pipeline.parity.compare import cached_logits, compare, judge, optimums
from tests.families import CASES, make_checkpoint, transformers_model

STEPS = 32
CONTEXT = 96
LIMIT = 1e-4
LONGROPE = [name for name, case in CASES.items() if "long_factor" in case.config.get("rope_scaling", ())]


@dataclass(frozen=True)
class Exports:
    """One checkpoint, exported twice."""

    folder: Path
    architecture: Architecture

    @property
    def ours(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def optimums(self) -> Path:
        return self.folder / "optimum" / "model.onnx"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exports]:
    """A family's checkpoint, exported once for all tests."""

    @cache
    def export(name: str) -> Exports:
        folder = make_checkpoint(tmp_path_factory.mktemp(name), CASES[name])
        architecture = read_architecture(folder / "config.json")
        save_decoder(folder, *build_decoder(architecture, Checkpoint(folder), CONTEXT), "model.onnx")
        optimum_export.main(folder, architecture.layers, architecture.vocab, folder / "optimum")
        return Exports(folder, architecture)

    return export


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.optimum])
def test_prompt_and_cached_decode_equal_optimum(name: str, exports: Callable[[str], Exports]) -> None:
    pair = exports(name)
    # LongRoPE: all 64 tokens before the switch. Otherwise a prompt of 40.
    prompt = pair.architecture.rope.original_max_position - STEPS if name in LONGROPE else 40
    found = compare(pair.ours, optimums(pair.optimums, pair.architecture), pair.architecture, prompt, STEPS, seed=1)
    assert found["max_relative_error"] <= LIMIT
    assert (found["decode_steps"], found["mismatches"]) == (STEPS, 0)


def reference_logits(model: Any, ids: np.ndarray, prompt: int) -> np.ndarray:
    """transformers' logits, prompt first, then one token at a time with its own cache."""
    import torch

    with torch.no_grad():
        out = model(torch.from_numpy(ids[None, :prompt]), use_cache=True)
        rows = [out.logits[0]]
        for token in ids[prompt:]:
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0])
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("name", LONGROPE)
def test_beyond_the_switch_optimum_is_wrong_and_ours_right(name: str, exports: Callable[[str], Exports]) -> None:
    pair = exports(name)
    switch = pair.architecture.rope.original_max_position
    ids = np.random.default_rng(1).integers(0, pair.architecture.vocab, switch + 8)
    ours = cached_logits(pair.ours, pair.architecture, ids, switch - 8)
    optimums = cached_logits(pair.optimums, pair.architecture, ids, switch - 8)
    want = reference_logits(transformers_model(pair.folder, CASES[name]), ids, switch - 8)
    assert judge(ours, want)["max_relative_error"] <= LIMIT
    assert judge(optimums[:switch], want[:switch])["max_relative_error"] <= LIMIT
    assert judge(optimums[switch:], want[switch:])["max_relative_error"] > 0.1
