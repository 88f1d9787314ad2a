from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.errors import EvaluationError
from pipeline.graph.decoder import build_decoder, save_decoder
from pipeline.runtime import session as runtime
from pipeline.tasks.divergence_scores import Scores, compare, record_reference
from tests.artifact import exported as artifacts
from tests.families import CASES, make_checkpoint
from tests.many_cores import with_cores
from tests.recipes import load_recipe

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


def test_no_digit_of_divergence_depends_on_the_cores(tmp_path: Path) -> None:
    """A reference in full precision, variants of 2 to 8 bits against it, on 1, 2 and 3 threads; one token alone too."""
    exported, found = artifacts.export(make_checkpoint(tmp_path / "full", CASES["qwen2"])), list[dict[str, bytes]]()
    files = [exported.folder / "model.onnx"]
    for name in ("q4", "q4_k_m", "q3"):
        exported.write(load_recipe(name), tmp_path / name)
        files += (tmp_path / name).glob("*.onnx")
    windows = [np.asarray(IDS), np.asarray(IDS * 2)]
    for cores in (1, 2, 3):
        with with_cores(cores):
            written = dict[str, bytes]()
            for file in files:
                decoder, own = runtime.OnnxDecoder(file), tmp_path / str(cores) / file.parent.name
                own.mkdir(parents=True)
                scores = score(decoder, windows, own.parent / "full", own)
                written |= {f"{own.name} {name}": values.tobytes() for name, values in scores.items()}
                _, state = decoder.run(IDS[:16])
                written[f"{own.name} next"] = decoder.run(IDS[16:17], state)[0].tobytes()
            found.append(written)
    assert len(files) == 4
    assert found[1] == found[0]
    assert found[2] == found[0]


def score(decoder: runtime.OnnxDecoder, windows: list[np.ndarray], full: Path, own: Path) -> Scores:
    def logits(ids: np.ndarray) -> np.ndarray:
        return decoder.run(ids.tolist())[0]

    return record_reference(logits, windows, own) if own == full else compare(logits, windows, full, own, own.name)
