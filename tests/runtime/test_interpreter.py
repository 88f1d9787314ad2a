"""The interpreter computes what ONNX Runtime does: full-precision exports of every family, artifacts of every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from pipeline.errors import GraphError
from pipeline.graph.last_token import every_token
from pipeline.quantize.formats import FORMATS
from pipeline.runtime.interpreter import Interpreter, unpacked
from pipeline.runtime.session import OnnxDecoder, open_graph
from tests.artifact.exported import Exported, changed, export
from tests.families import CASES, make_checkpoint
from tests.recipes import load_recipe

ROLES = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"]
SPLIT = {"roles": ROLES, "format": {"high": "w6b32a", "low": "w2b64a", "high_fraction": 0.5}}
KINDS = {
    "q4": load_recipe("q4"),
    "q4_k_m": load_recipe("q4_k_m"),
    "q3": load_recipe("q3"),
    "w6 split": changed("q4", embedding="w6b32a", head="w6b32a", body=[SPLIT]),
    "symmetric": changed("q4", embedding="w4b16s", head="w8b64s", body=[{"roles": ROLES, "format": "w2b64s"}]),
}
IDS = np.random.default_rng(3).integers(0, 320, 48)


def interpreted(model: onnx.ModelProto, folder: Path) -> np.ndarray:
    with torch.no_grad():
        return Interpreter(model, folder).logits(torch.from_numpy(IDS[None]))[0].numpy()


def run(model: onnx.ModelProto, folder: Path) -> np.ndarray:
    """ONNX Runtime's logits of every token; activations are not rounded to 8 bits."""
    exact = every_token(model)
    for node in exact.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    return OnnxDecoder(open_graph(exact, folder)).run(IDS)[0]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    folder = tmp_path_factory.mktemp("exports")
    return {name: export(make_checkpoint(folder / name, case, dtype="BF16")) for name, case in CASES.items()}


@pytest.mark.parametrize("family", CASES)
def test_full_precision(family: str, exports: dict[str, Exported]) -> None:
    one = exports[family]
    np.testing.assert_allclose(interpreted(one.model, one.folder), run(one.model, one.folder), atol=2e-4)


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "phi3"])
@pytest.mark.parametrize("kind", KINDS)
def test_artifacts(kind: str, family: str, exports: dict[str, Exported], tmp_path: Path) -> None:
    drafted = exports[family].write(KINDS[kind], tmp_path / "artifact")
    expected = run(drafted.model, tmp_path / "artifact")
    np.testing.assert_allclose(interpreted(drafted.model, tmp_path / "artifact"), expected, atol=2e-4)


def test_an_int8_cache_is_rounded_as_the_kernel_rounds_it(exports: dict[str, Exported], tmp_path: Path) -> None:
    """Up to the kernel's own int8 products: nearer than without rounding."""
    one, rng = exports["llama-untied"], np.random.default_rng(5)
    names = [f"layers.{layer}.{part}" for layer in range(3) for part in ("key", "value")]
    ranges = {name: rng.uniform(2, 6, 32).astype(np.float32) for name in names}
    drafted = one.write(load_recipe("q4_kv8"), tmp_path / "artifact", ranges=ranges)
    expected = run(drafted.model, tmp_path / "artifact")
    gap = np.abs(interpreted(drafted.model, tmp_path / "artifact") - expected).mean()
    plain = one.write(load_recipe("q4"), tmp_path / "plain")
    assert gap < 0.5 * np.abs(interpreted(plain.model, tmp_path / "plain") - expected).mean()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unpacking_is_the_formats_own(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, (5, 37)).astype(np.uint8)
    packed = FORMATS[bits](32, False).pack(values)
    assert (unpacked(torch.from_numpy(packed), bits, 37).numpy() == values).all()


def test_an_unknown_operator_is_refused(exports: dict[str, Exported]) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(exports["qwen2"].model)
    model.graph.node[-1].op_type = "Einsum"
    with pytest.raises(GraphError, match=r"no operator Einsum.*interpreter\.py"):
        Interpreter(model, exports["qwen2"].folder)
