"""Level of parity: logits. Our full-precision graph against transformers, family by family, prompt and decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from pipeline.checkpoint.architecture import check_tensors, read_architecture
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.graph.decoder import build_decoder, save_decoder
from tests.families import CASES, make_checkpoint, transformers_model

PROMPT, STEPS, CONTEXT = 40, 32, 96


def export(folder: Path) -> Path:
    architecture = read_architecture(folder / "config.json")
    checkpoint = Checkpoint(folder)
    check_tensors(architecture, checkpoint)
    model, rope = build_decoder(architecture, checkpoint, CONTEXT)
    save_decoder(folder, model, rope, "model.onnx")
    return folder / "model.onnx"


class Cached:
    """Runs an exported graph with its KV cache."""

    def __init__(self, path: Path):
        self.session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        inputs = [value for value in self.session.get_inputs() if value.name.startswith("past")]
        self.past = {value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in inputs}
        self.length = 0

    def run(self, ids: list[int]) -> np.ndarray:
        self.length += len(ids)
        feeds = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, self.length), np.int64)}
        logits, *present = self.session.run(None, feeds | self.past)
        self.past = dict(zip(self.past, present, strict=True))
        return logits[0]


def reference_logits(model: Any, ids: list[int]) -> np.ndarray:
    """Prompt, then one token at a time with transformers' own cache."""
    import torch

    with torch.no_grad():
        out = model(torch.tensor([ids[:PROMPT]]), use_cache=True)
        rows = [out.logits[0]]
        for token in ids[PROMPT:]:
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0])
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = make_checkpoint(tmp_path, case)
    ids = np.random.default_rng(1).integers(3, 320, PROMPT + STEPS).tolist()
    ours = Cached(export(folder))
    got = np.concatenate([ours.run(ids[:PROMPT]), *(ours.run([token]) for token in ids[PROMPT:])])
    want = reference_logits(transformers_model(folder, case), ids)
    assert np.abs(got - want).max() / np.abs(want).max() <= 1e-4


@pytest.mark.parametrize("name", ["llama-untied", "phi3"])
def test_half_precision_checkpoint_computes_in_float32(name: str, tmp_path: Path) -> None:
    """Weights stored in fp16 are widened exactly; nothing is computed in half precision."""
    case = CASES[name]
    ids = np.random.default_rng(2).integers(3, 320, 16).tolist()
    half = make_checkpoint(tmp_path / "half", case, dtype="F16")
    got = Cached(export(half)).run(ids)
    import torch

    with torch.no_grad():
        want = transformers_model(half, case)(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(got - want).max() / np.abs(want).max() <= 1e-4
