"""Activation statistics: the tapped graph's sums against the activations themselves, family by family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.graph.decoder import build_decoder, save_decoder
from pipeline.graph.taps import SUFFIX, with_moments
from tests.families import CASES, make_checkpoint, transformers_model


def run(path: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
    return dict(zip((value.name for value in session.get_outputs()), session.run(None, feeds), strict=True))


@pytest.mark.parametrize(("name", "dtype"), [*((name, "F32") for name in CASES), ("phi3", "F16")])
def test_sums_of_squares_of_every_products_input(name: str, dtype: str, tmp_path: Path) -> None:
    """transformers' linear layers, hooked, see the same inputs."""
    import torch

    folder = make_checkpoint(tmp_path, CASES[name], dtype=dtype)
    architecture, checkpoint = read_architecture(folder / "config.json"), Checkpoint(folder)
    model, rope = build_decoder(architecture, checkpoint, 64)
    save_decoder(folder, model, rope, "model.onnx")
    before = model.SerializeToString(deterministic=True)
    tapped = with_moments(model, architecture)
    assert model.SerializeToString(deterministic=True) == before
    (folder / "tapped.onnx").write_bytes(tapped.SerializeToString())
    ids = np.random.default_rng(0).integers(3, 320, (2, 24))
    got = run(folder / "tapped.onnx", ids)

    want: dict[str, np.ndarray] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(_: object, inputs: tuple[torch.Tensor], __: object) -> None:
            want[name + SUFFIX] = inputs[0].square().sum(dim=(0, 1)).numpy()

        return hook

    reference = transformers_model(folder, CASES[name])
    modules = dict(reference.named_modules())
    for matrix in architecture.matrices:
        module = modules["lm_head" if matrix.role == "head" else matrix.name.removesuffix(".weight")]
        module.register_forward_hook(remember(matrix.input))
    with torch.no_grad():
        reference(torch.tensor(ids))
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].dtype == np.float32
        np.testing.assert_allclose(got[key], value, rtol=1e-3, atol=1e-4 * value.max())


def test_neither_logits_nor_caches_are_computed(tmp_path: Path) -> None:
    """The head is the largest product of a small model, and nothing reads it here."""
    architecture = read_architecture(make_checkpoint(tmp_path, CASES["qwen2"]) / "config.json")
    model, _ = build_decoder(architecture, Checkpoint(tmp_path), 64)
    tapped: onnx.ModelProto = with_moments(model, architecture)
    outputs = [value.name for value in tapped.graph.output]
    assert outputs == [
        *(f"layers.{layer}.{part}{SUFFIX}" for layer in range(3) for part in ("attention", "output", "mlp", "down")),
        f"head{SUFFIX}",
    ]
    assert sum(node.op_type == "FusedMatMul" for node in tapped.graph.node) == 7 * 3
