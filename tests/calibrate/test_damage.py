"""What each matrix's damage does: measured in one pass, equal to the whole graph run with that matrix damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.calibrate import damage as module
from pipeline.calibrate.damage import Damage, sensitivities
from pipeline.checkpoint.architecture import Architecture, Matrix
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.engine import Bundles, Engine, Threads
from pipeline.errors import EvaluationError
from pipeline.graph.slices import DecoderSlices
from pipeline.partial import open_partial
from pipeline.runtime import device
from pipeline.runtime.device import Gpu
from pipeline.runtime.session import OnnxDecoder
from tests.activations import make_decoder
from tests.many_cores import Elsewhere, with_cores
from tests.torch_device import choose

IDS = np.random.default_rng(3).integers(3, 320, (3, 40))
LONG = np.random.default_rng(3).integers(3, 320, (2, 80))  # beyond LongRoPE's switch at 64


def rounded(matrix: Matrix, rows: np.ndarray) -> np.ndarray:
    """To three bits of each row's range; rows are independent, as in every format."""
    scale = np.abs(rows).max(axis=1, keepdims=True) / 3
    return (np.round(rows / scale) * scale).astype(np.float32)


def whole(matrix: Matrix, rows: np.ndarray) -> np.ndarray:
    return rows


def measure(
    folder: Path, decoder: tuple[onnx.ModelProto, Architecture], damage: Damage = rounded, ids: np.ndarray = IDS
) -> dict[str, float]:
    """Continues what lies in `folder`/partial."""
    with open_partial(folder / "partial" / "copies", "key") as partial:
        slices, checkpoint = DecoderSlices(*decoder), Checkpoint(folder)
        return sensitivities(slices, folder, checkpoint, ids, damage, partial, "tiny")


def log_probabilities(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Of the next token, float64 [tokens, vocab], by the whole graph in `folder`."""
    decoder = OnnxDecoder(folder / "model.onnx")
    logits = np.concatenate([decoder.run(window.tolist())[0] for window in ids]).astype(np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def directly(folder: Path, architecture: Architecture, ids: np.ndarray, other: Path) -> dict[str, float]:
    """For every matrix, or all experts of a layer, a checkpoint of its own in which only it is damaged, run through the
    whole graph."""
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("partial"))
    tensors = load_file(folder / "model.safetensors")
    clean = log_probabilities(folder, ids)
    found = {}
    body = [matrix for layer in range(architecture.layers) for matrix in architecture.body(layer)]
    together: dict[str, list[Matrix]] = {}
    for matrix in (*architecture.tables, *body):
        together.setdefault(matrix.name if ".experts." not in matrix.name else matrix.choice, []).append(matrix)
    for name, matrices in together.items():
        hurt = {
            matrix.name: rounded(matrix, tensors[matrix.name].astype(np.float32)).astype(tensors[matrix.name].dtype)
            for matrix in matrices
        }
        save_file(tensors | hurt, other / "model.safetensors")
        found[name] = float((np.exp(clean) * (clean - log_probabilities(other, ids))).sum(-1).mean())
    return found


@pytest.mark.parametrize(
    ("name", "ids"),
    [("llama-tied", IDS), ("qwen2", IDS), ("phi3", IDS), ("phi3-longrope", LONG), ("phimoe", IDS)],
    ids=["tied", "untied, biases", "fused", "longrope", "a biased head"],
)
def test_each_matrix_does_what_it_does_to_the_whole_graph(
    name: str, ids: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every matrix of the artifact, each once; whether copies pass together or in batches, the head whole or not."""
    decoder = make_decoder(tmp_path / "model", name)
    want = directly(tmp_path / "model", decoder[1], ids, tmp_path / "other")
    assert min(want.values()) > 1e-4
    got = measure(tmp_path / "model", decoder, ids=ids)
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=2e-3), key
    monkeypatch.setattr(module, "BATCH_TOKENS", 2 * ids.size)
    monkeypatch.setattr(module, "_HEAD_ROWS", 77)
    shutil.rmtree(tmp_path / "model/partial")
    assert measure(tmp_path / "model", decoder, ids=ids) == pytest.approx(got, rel=1e-3)


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied"])
def test_no_damage_is_no_divergence(name: str, tmp_path: Path) -> None:
    found = measure(tmp_path, make_decoder(tmp_path, name), whole)
    assert len(found) == 3 * 7 + (1 if name == "llama-tied" else 2)
    assert max(map(abs, found.values())) < 1e-6


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_is_measured_as_the_same_weights_in_float32(dtype: str, tmp_path: Path) -> None:
    half = measure(tmp_path / "half", make_decoder(tmp_path / "half", "qwen2", dtype))
    decoder = make_decoder(tmp_path / "full", "qwen2")
    tensors = {name: Checkpoint(tmp_path / "half").rows(name) for name in decoder[1].expected_tensors()}
    save_file(tensors, tmp_path / "full" / "model.safetensors")
    assert half == pytest.approx(measure(tmp_path / "full", decoder), rel=1e-3)


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_an_interrupted_run_goes_on_at_its_layer(layer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit; what a kill cut short is not believed; one layer's copies lie on the disk at most."""
    decoder, passed = make_decoder(tmp_path, "llama-untied"), list[int]()
    want = measure(tmp_path, decoder)
    shutil.rmtree(tmp_path / "partial")
    advance, divergences = module.Passing.advance, module.Passing.divergences

    def stopping(self: module.Passing, copies: module.Copies) -> object:
        if copies.layer == layer:
            raise KeyboardInterrupt
        return (advance if copies.layer < 3 else divergences)(self, copies)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.Passing, "advance", stopping)
        patch.setattr(module.Passing, "divergences", stopping)
        measure(tmp_path, decoder)
    left = sorted(file.name for file in (tmp_path / "partial").glob("copies/*"))
    assert left == ([f"copies.{layer}.npy"] if layer else [])
    if left:
        (tmp_path / "partial/copies" / f"copies.{layer + 1}.npy").write_bytes(b"cut short by a kill")

    def counted(self: module.Passing, copies: module.Copies) -> module.Copies:
        passed.append(copies.layer)
        return advance(self, copies)

    monkeypatch.setattr(module.Passing, "advance", counted)
    assert measure(tmp_path, decoder) == want
    assert passed == list(range(layer, 3))
    assert not list(tmp_path.glob("*slice*"))  # nothing of ours stays beside the weights


def test_copies_that_were_edited_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(tmp_path, "llama-tied")
    want = measure(tmp_path, decoder)
    copies = tmp_path / "partial/copies/copies.3.npy"
    data = bytearray(copies.read_bytes())
    data[1000] ^= 1
    copies.write_bytes(data)
    assert measure(tmp_path, decoder) == want


@pytest.mark.parametrize(
    ("damaged", "word"),
    [("model.layers.1.mlp.up_proj.weight", "layer 1"), ("model.embed_tokens.weight", "not finite")],
)
def test_weights_that_overflow_are_refused(damaged: str, word: str, tmp_path: Path) -> None:
    """In the checkpoint, and in what a format makes of a matrix."""
    decoder = make_decoder(tmp_path, "llama-tied")

    def infinite(matrix: Matrix, rows: np.ndarray) -> np.ndarray:
        return rows * (np.inf if matrix.name == damaged else 1)

    if word != "not finite":
        tensors = load_file(tmp_path / "model.safetensors")
        save_file(tensors | {damaged: tensors[damaged] * np.float32(1e38)}, tmp_path / "model.safetensors")
    with pytest.raises(EvaluationError, match=f"{word}.*weights are damaged"), np.errstate(all="ignore"):
        measure(tmp_path, decoder, whole if word != "not finite" else infinite)


@pytest.mark.parametrize("name", ["llama-tied", "phimoe"])
def test_no_digit_depends_on_cores_or_workers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of copies on 1, 2 and 3 threads; on workers of 1 and 2 cores, which pickle what they are sent."""
    decoder, found = make_decoder(tmp_path, name), list[dict[str, float]]()
    monkeypatch.setattr(module, "HEAD_COPIES", 3)
    engines: list[tuple[int, Engine]] = [(count, Threads(count)) for count in (1, 2, 3)]
    engines += [(count, Bundles(Elsewhere(), count)) for count in (1, 2)]
    for count, engine in engines:
        monkeypatch.setattr(device, "narrow", lambda engine=engine: engine)
        shutil.rmtree(tmp_path / "partial", ignore_errors=True)
        with with_cores(count):
            found.append(measure(tmp_path, decoder))
    assert all(one == found[0] for one in found[1:])


@pytest.mark.parametrize(("name", "ids"), [("llama-tied", IDS), ("phi3-longrope", LONG)])
def test_a_gpu_measures_the_same(name: str, ids: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(tmp_path, name)
    want = measure(tmp_path, decoder, ids=ids)
    shutil.rmtree(tmp_path / "partial")
    choose(monkeypatch, found := Gpu("cpu", "torch"))
    assert measure(tmp_path, decoder, ids=ids) == pytest.approx(want, rel=1e-3)
    assert not found.fallen
