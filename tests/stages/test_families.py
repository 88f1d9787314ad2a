"""What a family has beside Llama's parts takes the whole way: through the stages, every shipped recipe and
onnxruntime-genai."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.checkpoint.blobs import Store
from pipeline.runtime.session import OnnxDecoder
from pipeline.stages import calibrate, download, export, learn, quantize, sensitivity
from pipeline.workspace import MODEL_FILE, Workspace
from tests import tiny
from tests.families import CASES
from tests.graph.test_genai import assert_greedy, greedy, prompt

NEW = 16


def log_probabilities(decoder: OnnxDecoder, ids: list[int]) -> np.ndarray:
    """float64 [tokens, vocab]"""
    logits = decoder.run(ids)[0].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama3", "qwen3-biased", "phimoe-wide-heads"])
def test_from_a_checkpoint_to_text(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is what the written logits say, and these are near the full-precision ones: nearest where bits are most."""
    tiny.make_store(tmp_path / "store")
    monkeypatch.setenv("PIPELINE_STORE", str(tmp_path / "store"))
    case = replace(CASES[name], config=CASES[name].config | {"max_position_embeddings": tiny.CONTEXT})
    monkeypatch.chdir(tiny.copy_configs(tmp_path, case))
    tiny.edit(Path("configs/recipes/q3_learned.yaml"), learn={"steps": 2, "tokens": 128})
    for stage in (download, export, calibrate, sensitivity):
        stage.run(tiny.MODEL)
    workspace, ids = Workspace(tiny.MODEL), prompt(40)
    want = log_probabilities(OnnxDecoder(workspace.reference(Store()) / MODEL_FILE), ids)
    lost: dict[str, float] = {}
    mixture = "num_local_experts" in case.config  # no recipe of three bits has a plan for it
    for variant in ("q4_k_m", "q4") if mixture else ("q4_k_m", "q4", "q3", "q3_learned"):
        learn.run(tiny.MODEL, variant)
        quantize.run(tiny.MODEL, variant)
        artifact = workspace.artifact(variant)
        decoder = OnnxDecoder(next(artifact.glob("*.onnx")))
        lost[variant] = float((np.exp(want) * (want - log_probabilities(decoder, ids))).sum(axis=1).mean())
        written = greedy(artifact, ids, NEW)
        assert len(written) > 4
        assert_greedy(written, decoder.run(ids + written[:-1])[0][len(ids) - 1 :])
    assert max(lost.values()) < 3, lost
    assert mixture or max(lost["q4_k_m"], lost["q4"]) < lost["q3"], lost
