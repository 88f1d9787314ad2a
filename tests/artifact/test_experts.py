"""Experts as one QMoE of each layer: the weights that it reads, what it computes, bytes that the plan alone decides.

The experts have 128 channels outside and 192 inside: blocks of 64 divide both, blocks of 128 one of them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from pipeline.artifact import work, write
from pipeline.config.recipes import RecipeConfig
from pipeline.errors import PlanError
from pipeline.planning.recipes import make_plan
from pipeline.quantize.search import weighted
from pipeline.runtime.session import OnnxDecoder
from tests.artifact.exported import Exported, changed, contents, export, finished_units
from tests.artifact.test_write import Written, fields
from tests.families import Case, _base, make_checkpoint

EXPERTS = 4
MIXTURE = Case(
    _base(
        "phimoe", intermediate_size=192, num_local_experts=EXPERTS, attention_bias=True, lm_head_bias=True,
        sliding_window=None,
    ),
    "phimoe",
)  # fmt: skip
ROLES = ["expert_gate", "expert_up", "expert_down"]


def recipe(experts: object, **changes: object) -> RecipeConfig:
    """4 bits in the body, and experts in another format."""
    rules = [
        {"roles": ROLES, "format": experts},
        {"roles": ["q_proj", "k_proj", "v_proj", "o_proj"], "format": "w4b32a"},
    ]
    return changed("q4", body=rules, head="w4b32a", embedding="w4b32a", **changes)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(make_checkpoint(tmp_path_factory.mktemp("mixture"), MIXTURE))


def experts_weights(written: Written, node: onnx.NodeProto, first: int, zeros: int) -> np.ndarray:
    """float64 [experts, rows, columns] of the product whose codes are input `first`, by the operator's description."""
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    bits, block = attributes["expert_weight_bits"], attributes["block_size"]
    scales, unit = written.larger.get(node.input[first + 1], (node.input[first + 1], 1))
    scales, *largest = written.shares.get(scales, [scales])
    scale = written.value(written.cast_of[scales]).astype(np.float64) * unit
    for name in largest:
        scale = scale * written.value(written.cast_of[name])
    experts, rows, blocks = scale.shape
    codes = fields(written.value(node.input[first]).reshape(experts * rows, -1), bits)
    codes = codes.reshape(experts, rows, blocks, block)
    zero = np.full((experts, rows, blocks), 1 << (bits - 1))
    if node.input[zeros]:
        packed = written.value(node.input[zeros]).reshape(experts * rows, -1)
        zero = fields(packed, bits)[:, :blocks].reshape(experts, rows, blocks)
    return ((codes - zero[..., None]) * scale[..., None]).reshape(experts, rows, -1)


def stored_experts(written: Written) -> dict[str, np.ndarray]:
    """Every expert's matrix in the file, by its name in the checkpoint."""
    found = {}
    for layer, node in enumerate(written.nodes("QMoE")):
        assert node.output[0] == f"layers.{layer}.experts"
        both, down = experts_weights(written, node, 2, 11), experts_weights(written, node, 5, 12)
        for expert in range(EXPERTS):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            matrices = {"w1": both[expert, 0::2], "w3": both[expert, 1::2], "w2": down[expert]}
            found |= {f"{prefix}.{name}.weight": values for name, values in matrices.items()}
    return found


@pytest.mark.parametrize("chosen", ["w4b64a8", "w4b32a", "w4b128s", "w8b64s8", "w8b32a"])
def test_the_file_holds_what_the_quantizer_computed(chosen: str, exported: Exported, tmp_path: Path) -> None:
    drafted = exported.write(recipe(chosen), tmp_path / "artifact", part_bytes=300_000)
    assert sum(file.stat().st_size for file in (tmp_path / "artifact").iterdir()) == drafted.bytes
    stored = stored_experts(Written(tmp_path / "artifact"))
    planned = {item.matrix.name: item for item in drafted.plan.body if item.matrix.expert is not None}
    assert stored.keys() == planned.keys()
    assert len(stored) == 3 * EXPERTS * exported.architecture.layers
    for name, item in planned.items():
        moments = exported.moments[item.matrix.input]
        want = weighted(exported.checkpoint.rows(name), moments, item.pieces[0].format).dequantize()
        np.testing.assert_allclose(stored[name], want, rtol=1e-6, atol=0)


def test_experts_of_a_layer_get_the_block_that_divides_them_both_ways(exported: Exported) -> None:
    for wide in ("w4b64a8", "w4b128a8", "w4b256a8"):
        plan = make_plan(exported.architecture, recipe(wide))
        assert {item.formats for item in plan.body if item.matrix.expert is not None} == {"w4b64a8"}


@pytest.mark.parametrize(
    "rotation", [{}, {"attention": 32, "output": 32, "mlp": 64, "down": 32}], ids=["plain", "rotated"]
)
def test_it_computes_what_a_full_precision_graph_of_the_stored_weights_does(
    rotation: dict[str, int], exported: Exported, tmp_path: Path
) -> None:
    """Equal to rounding with float activations. Int8 ones, which phones use, cost about a hundredth, and more of the
    few tokens that they send to another expert: random routers decide narrowly."""
    folder, scratch = tmp_path / "artifact", tmp_path / "float"
    drafted = exported.write(recipe("w4b64a8", rotation=rotation), folder)
    assert any(item.rotated for item in drafted.plan.body if item.matrix.role == "expert_gate") == bool(rotation)
    assert not any(item.rotated for item in drafted.plan.body if item.matrix.role == "expert_down")
    written = Written(folder)
    products = {node.output[0]: node for node in written.nodes("MatMulNBits")}
    stored = stored_experts(written) | {
        item.matrix.name: written.weights(products[_product(item.matrix)])
        for item in (*drafted.plan.body, drafted.plan.head)
        if item.matrix.expert is None
    }
    stored["model.embed_tokens.weight"] = written.weights(written.nodes("GatherBlockQuantized")[0])
    for item in drafted.plan.body:
        if item.rotated:
            stored[item.matrix.name] = _turned_back(stored[item.matrix.name], item.rotated)
    scratch.mkdir()
    shutil.copyfile(exported.folder / "config.json", scratch / "config.json")
    names = exported.architecture.expected_tensors()
    save_file(
        {name: stored.get(name, exported.checkpoint.rows(name)).astype(np.float32) for name in names},
        scratch / "model.safetensors",
    )
    export(scratch)
    ids = np.random.default_rng(3).integers(0, exported.architecture.vocab, 60).tolist()
    want, _ = OnnxDecoder(scratch / "model.onnx").run(ids)
    for level, worst, tolerance in ((4, np.median, 0.05), (0, np.max, 1e-5)):
        for node in (*written.nodes("MatMulNBits"), *written.nodes("QMoE")):
            next(item for item in node.attribute if item.name == "accuracy_level").i = level
        onnx.save(written.model, folder / f"level.{level}.onnx")
        got, _ = OnnxDecoder(folder / f"level.{level}.onnx").run(ids)
        assert worst(np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)) < tolerance


def _product(matrix: object) -> str:
    """The node that multiplies by a matrix that is no expert's."""
    return f"layers.{matrix.layer}.{matrix.role}" if matrix.role != "head" else "logits/product"


def _turned_back(weights: np.ndarray, block: int) -> np.ndarray:
    from pipeline.quantize.rotation import rotate

    matrix = rotate(np.eye(block, dtype=np.float32), block).astype(np.float64)
    return (weights.reshape(len(weights), -1, block) @ matrix.T).reshape(weights.shape)


def test_neither_threads_nor_units_change_a_byte(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts' rows lie between those of others, which other threads write."""
    exported.write(recipe("w4b64a8"), tmp_path / "one", threads=1)
    monkeypatch.setattr(write, "units", lambda planned, **rest: work.units(planned, unit_bytes=1 << 13))
    exported.write(recipe("w4b64a8"), tmp_path / "many", threads=5)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_a_run_that_stopped_goes_on_and_finds_a_damaged_row(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished unit of an expert's gate lies between rows of its up: both are read back, and only what is wrong is
    computed again."""
    exported.write(recipe("w4b64a8"), tmp_path / "whole")
    computed, stop = list[str](), 20

    def some(unit: work.Unit, *rest: Any) -> Any:
        if len(computed) == stop:
            raise RuntimeError("stopped")
        computed.append(unit.name)
        return work.quantize_unit(unit, *rest)

    monkeypatch.setattr(write, "quantize_unit", some)
    target = tmp_path / "artifact"
    with pytest.raises(RuntimeError, match="stopped"):
        exported.write(recipe("w4b64a8"), target, threads=1)
    before = finished_units(tmp_path / "partial" / "artifact.journal")
    gate = next(name for name in before if ".experts.1.w1." in name)
    drafted = exported.draft(recipe("w4b64a8"))
    place = drafted.layout.places["layers.0.experts.fc1.codes"]
    row = place.length // (EXPERTS * 2 * 192)  # the second expert's first row is its gate's
    path = tmp_path / "partial" / "artifact" / f"tiny.data.{place.part}"
    with path.open("r+b") as file:
        file.seek(place.offset + 2 * 192 * row)
        file.write(bytes(row))
    computed, stop = [], -1
    exported.write(recipe("w4b64a8"), target, threads=1)
    assert before & set(computed) == {gate}
    assert contents(target) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("w2b64a8", r"format w2b64a8: experts are multiplied in 4 or 8 bits \(QMoE\)"),
        ("w6b64a8", r"format w6b64a8: experts are multiplied in 4 or 8 bits"),
        ({"high": "w4b32a", "low": "w2b32a", "high_fraction": 0.5}, r"experts cannot be split \(QMoE\)"),
    ],
)
def test_formats_that_no_expert_can_have(chosen: object, message: str, exported: Exported) -> None:
    with pytest.raises(PlanError, match=rf"tensor model\.layers\.0\.block_sparse_moe\.experts\.0\.w1.*{message}"):
        make_plan(exported.architecture, recipe(chosen))


def test_experts_of_one_layer_that_differ_are_refused(exported: Exported) -> None:
    rules = [
        {"roles": ["expert_down"], "format": "w8b32a"},
        {"roles": [*ROLES, "q_proj", "k_proj", "v_proj", "o_proj"], "format": "w4b32a"},
    ]
    with pytest.raises(
        PlanError, match=r"0\.w1\.weight \(w4b32a\) and .*0\.w2\.weight \(w8b32a\) are experts of one layer"
    ):
        make_plan(exported.architecture, changed("q4", body=rules))
