from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.errors import EvaluationError
from pipeline.graph.decoder import build_decoder, save_decoder
from pipeline.runtime import session as runtime
from tests.families import CASES, make_checkpoint

IDS = np.random.default_rng(0).integers(3, 320, 24).tolist()


def export(folder: Path) -> Path:
    make_checkpoint(folder, CASES["llama-tied"])
    architecture = read_architecture(folder / "config.json")
    save_decoder(folder, *build_decoder(architecture, Checkpoint(folder), 64), "model.onnx")
    return folder / "model.onnx"


def test_one_prefix_serves_many_continuations(tmp_path: Path) -> None:
    decoder = runtime.OnnxDecoder(export(tmp_path))
    whole, _ = decoder.run(IDS)
    _, state = decoder.run(IDS[:16])
    decoder.run([5, 6, 7], state)  # another continuation in between must leave no trace
    rest, after = decoder.run(IDS[16:], state)
    np.testing.assert_allclose(rest, whole[16:], rtol=1e-4, atol=1e-5)
    assert (state.length, after.length) == (16, 24)


def test_a_file_that_is_no_model_is_an_evaluation_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(EvaluationError, match=r"model\.onnx: ONNX Runtime .* cannot load it"):
        runtime.OnnxDecoder(tmp_path / "model.onnx")
